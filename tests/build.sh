#!/usr/bin/env bash
# The release binaries themselves, and that building it is repeatable, offline and picky: needs
# out/agent, made by ./build.sh. Takes some minutes: the Dockerfile builds all libraries anew.
cd "$(dirname "$0")/.." || exit 1
. ./build.sh
set +e
need binutils buildah ca-certificates mmdebstrap

tmp=$(mktemp -d) failed=0
trap 'rm -rf "$tmp"' EXIT
trap 'exit 143' TERM

# check NAME COMMAND...: what a failing command says is why.
check() {
    local name=$1 why
    shift
    if why=$("$@" 2>&1); then
        echo "ok $name"
    else
        printf 'FAIL %s: %s\n' "$name" "$(tail -n 3 <<<"${why:-$*}" | tr '\n' ' ')"
        failed=1
    fi
}

sha() { sha256sum <"$1"; }

# is_static FILE MACHINE
is_static() {
    readelf -h "$1" | grep -q "Machine: .*$2" || { echo "not $2"; return 1; }
    readelf -h "$1" | grep -q 'EXEC' || { echo "not a plain executable"; return 1; }
    ! readelf -lW "$1" | grep -E 'INTERP|DYNAMIC'
}

is_stripped() { ! readelf -SW "$1" | grep -E 'symtab|debug'; }

fits() {
    local bytes
    bytes=$(stat -c %s "$1") && ((bytes <= 640 << 10)) || { echo "$bytes bytes"; return 1; }
}

# The stack and the data of the agent are never code.
has_no_writable_code() { ! readelf -lW "$1" | grep -E 'RWE|GNU_STACK.*E '; }

names_no_folder() { ! grep -aoE "$BUILD_ROOT|/usr/(lib|include|[a-z0-9_]*-linux-gnu)/[a-z]*" "$1"; }

# copy_tree FOLDER: what a clone has, and the downloads.
copy_tree() {
    mkdir -p "$1" && cp -r agent.c agent.h build.sh shims vendor "$1" && rm -rf "$1/vendor/src"
}

# In a folder with a space in its name, with no network at all.
fetches_offline() {
    copy_tree "$tmp/another folder/agent" && cd "$tmp/another folder/agent" || return 1
    unshare --net bash -c '. ./build.sh; mkdir -p out; fetch_all; ls vendor/src/*/*' >/dev/null
}

# fetches LOCK_LINE: fetch_library in a folder whose lock holds that line alone.
fetches() {
    local folder=$tmp/fetch
    mkdir -p "$folder/vendor/cache" "$folder/vendor/src" "$folder/out"
    cp build.sh "$folder"
    echo "$1" >"$folder/vendor/lock"
    (cd "$folder" && bash -c '. ./build.sh; fetch_library "$1"' - "${1%% *}")
}

says() {
    local text=$1 out
    shift
    out=$("$@" 2>&1) && { echo "succeeds: $out"; return 1; }
    [[ $out == *"$text"* ]] || { echo "says: $out"; return 1; }
}

fetch_checks() {
    mkdir -p "$tmp/x-1" && echo 'int x;' >"$tmp/x-1/x.c" && tar -czf "$tmp/x.tgz" -C "$tmp" x-1
    local good bad
    good=$(sha256sum <"$tmp/x.tgz") good=${good%% *} bad=${good//[0-7]/8}
    check 'fetch: other bytes than the pinned ones are refused' \
        says 'refused: not the pinned SHA-256' fetches "x 1 $bad upstream file://$tmp/x.tgz x-1"
    check 'fetch: nothing refused is unpacked' test ! -e "$tmp/fetch/vendor/src/x"
    check 'fetch: pinned bytes are unpacked' \
        fetches "x 1 $good upstream file://$tmp/x.tgz x-1"
    check 'fetch: the source is where the build looks' cmp "$tmp/x-1/x.c" "$tmp/fetch/vendor/src/x/x.c"
    rm -f "$tmp/fetch/vendor/src/x.from"
    echo more >>"$tmp/fetch/vendor/cache/x-1-${good:0:12}"
    check 'fetch: a changed archive in the cache is refused' \
        says 'is not what vendor/lock pins' fetches "x 1 $good upstream file://$tmp/x.tgz x-1"
}

names_missing_packages() {
    chmod 755 "$tmp" && cp build.sh "$tmp/need.sh"
    says 'no-such-package' setpriv --reuid 65534 --clear-groups \
        bash -c '. "$1"; need bash no-such-package' - "$tmp/need.sh"
}

# ---- The Dockerfile, by buildah -----------------------------------------------------

# No daemon, no overlay, no namespaces: works wherever root does.
image_tool() {
    buildah --storage-driver vfs --root "$PWD/out/buildah/images" --runroot "$PWD/out/buildah/run" "$@"
}

# A Debian 12 from the mirror that this machine uses stands in for the official image.
base_image() {
    local base
    image_tool inspect --type image debian:12 >/dev/null 2>&1 && return
    mkdir -p out/buildah
    apt-get indextargets --format 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(SITE) $(RELEASE) $(COMPONENT)' \
        'Created-By: Packages' 'Origin: Debian' | grep bookworm | sort -u >"$tmp/sources.list"
    mmdebstrap --quiet --variant=apt bookworm "$tmp/base.tar" "$tmp/sources.list" || return 1
    base=$(image_tool from scratch) && image_tool add "$base" "$tmp/base.tar" / >/dev/null &&
        image_tool commit --quiet --rm "$base" debian:12
}

dockerfile_builds_the_same() {
    base_image || { echo "no base image"; return 1; }
    image_tool bud --pull-never --isolation chroot --tag agent-build . >"$tmp/bud.log" 2>&1 ||
        { tail -n 3 "$tmp/bud.log"; return 1; }
    local result root
    result=$(image_tool from --pull-never agent-build) && root=$(image_tool mount "$result") || return 1
    cp "$root/agent" "$tmp/docker-agent"
    image_tool rm "$result" >/dev/null
    image_tool rmi agent-build >/dev/null
    [[ $(sha "$tmp/docker-agent") == "$(sha out/agent)" ]] || { echo "differs"; return 1; }
}

# release NAME FILE MACHINE
release() {
    check "$1: static $3" is_static "$2" "$3"
    check "$1: stripped" is_stripped "$2"
    check "$1: no memory both writable and executable" has_no_writable_code "$2"
    check "$1: no path of this machine inside" names_no_folder "$2"
    check "$1: at most 640 KiB" fits "$2"
}

release out/agent out/agent X86-64
check 'shortcoming 14: build.sh arm64' ./build.sh arm64
release 'shortcoming 14: out/agent-arm64' out/agent-arm64 AArch64
check 'build.sh size' ./build.sh size
check 'out/agent-all: at most 640 KiB with every library whole' fits out/agent-all
check 'build.sh: a word it does not know' says './build.sh debug' ./build.sh nonsense
check 'build.sh: names the missing packages to who may not install them' names_missing_packages
fetch_checks
check 'what was fetched once is found again without a network' fetches_offline
check 'a build in another folder, by the Dockerfile, has the same bytes' dockerfile_builds_the_same
exit $failed

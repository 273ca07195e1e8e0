#!/usr/bin/env bash
# That building is repeatable, offline and picky. Takes some minutes: the Dockerfile builds all
# libraries anew.
TEST_SECONDS=${TEST_SECONDS:-900}
. "$(dirname "$0")/lib.sh"

cd "$GUEST_ROOT"
need binutils buildah ca-certificates mmdebstrap

sha() { sha256sum <"$1"; }

# copy_tree FOLDER: what a clone has, and the downloads.
copy_tree() {
    mkdir -p "$1" && cp -r agent.c agent.h build.sh shims vendor "$1" && rm -rf "$1/vendor/src"
}

# In a folder with a space in its name, with no network at all.
fetches_offline() {
    copy_tree "$T/another folder/agent"
    unshare --net bash -c 'cd "$1"; . ./build.sh; mkdir -p out; fetch_all; ls vendor/src/*/*' - \
        "$T/another folder/agent" >/dev/null
}

# fetches LOCK_LINE: fetch_library in a folder whose lock holds that line alone.
fetches() {
    local folder=$T/fetch
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
    mkdir -p "$T/x-1" && echo 'int x;' >"$T/x-1/x.c" && tar -czf "$T/x.tgz" -C "$T" x-1
    local good bad
    good=$(sha256sum <"$T/x.tgz") good=${good%% *} bad=${good//[0-7]/8}
    check 'fetch: other bytes than the pinned ones are refused' \
        says 'refused: not the pinned SHA-256' fetches "x 1 $bad upstream file://$T/x.tgz x-1"
    check 'fetch: nothing refused is unpacked' test ! -e "$T/fetch/vendor/src/x"
    check 'fetch: pinned bytes are unpacked' \
        fetches "x 1 $good upstream file://$T/x.tgz x-1"
    check 'fetch: the source is where the build looks' cmp "$T/x-1/x.c" "$T/fetch/vendor/src/x/x.c"
    rm -f "$T/fetch/vendor/src/x.from"
    echo more >>"$T/fetch/vendor/cache/x-1-${good:0:12}"
    check 'fetch: a changed archive in the cache is refused' \
        says 'is not what vendor/lock pins' fetches "x 1 $good upstream file://$T/x.tgz x-1"
}

names_missing_packages() {
    chmod 755 "$T" && cp build.sh "$T/need.sh"
    says 'no-such-package' setpriv --reuid 65534 --clear-groups \
        bash -c '. "$1"; need bash no-such-package' - "$T/need.sh"
}

# ---- The Dockerfile, by buildah -----------------------------------------------------

# No daemon, no overlay, no namespaces: works wherever root does.
image_tool() {
    buildah --storage-driver vfs --root "$PWD/out/buildah/images" --runroot "$PWD/out/buildah/run" "$@"
}

# A Debian 12 from the mirror that this machine uses stands in for the official image; with the
# compiler, which is there in one go with it much sooner.
base_image() {
    local base
    image_tool inspect --type image debian:12 >/dev/null 2>&1 && return
    mkdir -p out/buildah
    apt-get indextargets --format 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(SITE) $(RELEASE) $(COMPONENT)' \
        'Created-By: Packages' 'Origin: Debian' | grep bookworm | sort -u >"$T/sources.list"
    mmdebstrap --quiet --variant=apt --include=gcc,libc6-dev,make,linux-libc-dev,bzip2,curl,xz-utils \
        --dpkgopt=force-unsafe-io bookworm "$T/base.tar" "$T/sources.list" || return 1
    base=$(image_tool from scratch) && image_tool add "$base" "$T/base.tar" / >/dev/null &&
        image_tool commit --quiet --rm "$base" debian:12
}

dockerfile_builds_the_same() {
    base_image || { echo "no base image"; return 1; }
    image_tool bud --pull-never --isolation chroot --tag agent-build . >"$T/bud.log" 2>&1 ||
        { tail -n 3 "$T/bud.log"; return 1; }
    local result root
    result=$(image_tool from --pull-never agent-build) && root=$(image_tool mount "$result") || return 1
    cp "$root/agent" "$T/docker-agent"
    image_tool rm "$result" >/dev/null
    image_tool rmi agent-build >/dev/null
    [[ $(sha "$T/docker-agent") == "$(sha out/agent)" ]] || { echo "differs"; return 1; }
}

check_release out/agent out/agent X86-64 640
check 'build.sh size' ./build.sh size
check_at_most 'out/agent-all: bytes, with every library whole' $((640 << 10)) "$(stat -c %s out/agent-all)"
check 'build.sh: a word it does not know' says './build.sh debug' ./build.sh nonsense
check 'build.sh: names the missing packages to who may not install them' names_missing_packages
fetch_checks
check 'what was fetched once is found again without a network' fetches_offline
check 'a build in another folder, by the Dockerfile, has the same bytes' dockerfile_builds_the_same

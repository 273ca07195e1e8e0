#!/usr/bin/env bash
# How programs are launched, watched and restarted. Numbers in names are those of the list of
# bad inputs (group G).
. "$(dirname "$0")/lib.sh"

# program NAME: standard input becomes main.py of a folder of that name. Prints the folder.
program() {
    mkdir -p "$T/programs/$1"
    cat >"$T/programs/$1/main.py"
    echo "$T/programs/$1"
}

# What every program of one line here ends with.
ANSWERS='
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(answer()).encode()})
'

value() { "$PYTHON" -c 'import json, sys; print(eval(sys.argv[1], {"it": json.load(sys.stdin)}))' "$1"; }

# in_background FILE COMMAND…; finished: all of these have ended.
JOBS=()
in_background() {
    local to=$1
    shift
    "$@" >"$to" 2>&1 &
    JOBS+=($!)
}
finished() {
    local pid
    for pid in "${JOBS[@]}"; do wait "$pid" || true; done
    JOBS=()
}

# Processes of this machine: children of the agent; their ids in the guest.
workers() { cat "/proc/$PID1/task/$PID1/children"; }
guest_pid() { awk '/^NSpid:/ { print $NF }' "/proc/$1/status"; }
lines_with() { grep -cE -e "$1" "$CONSOLE" || true; }

# ---- 62, 63: configurations that fail --------------------------------------------------------

# fails NAME REGEX DIR ENTRYPOINT [OPTION…]: the host is told why, and so is the console.
fails() {
    local name=$1 regex=$2
    shift 2
    refused "$name" 1 "$regex" configure "$@"
    guest_ok "$name: well afterwards"
}

fails_source() {
    local name=$1 regex=$2 entry=${3:-main:app}
    fails "$name" "$regex" "$(program source)" "$entry"
}

bad_entrypoints() {
    local hello=$APPS/hello entry
    while read -r entry; do
        fails "62 entrypoint '$entry'" 'entrypoint' "$hello" "$entry"
    done <<'END'
main
main:
:app
a:b:c
:
main.py
/etc/passwd:app
../main:app
main:app()
main:1
main app:app
END
    fails "62 entrypoint ''" 'entrypoint' "$hello" ''
    fails '62 missing file' 'there is no module missing in /opt' "$hello" missing:app
    fails '62 a file name for a module' 'there is no module main.py' "$hello" main.py:app
    fails '62 missing file in a package' 'there is no module main\.missing|cannot be imported' "$hello" main.missing:app
    fails '62 missing attribute' 'module main has no attribute missing' "$hello" main:missing
    fails '62 missing attribute of an attribute' 'has no attribute missing' "$hello" main:app.missing
    mkdir -p "$T/programs/folder/main.py" "$T/programs/folder/main"
    : >"$T/programs/folder/main/data"
    fails '62 a directory' 'has no attribute app' "$T/programs/folder" main:app
    mkdir -p "$T/programs/empty"
    fails '62 an empty folder' 'there is no module main' "$T/programs/empty" main:app
    fails '62 an attribute that cannot be called' 'cannot be called' "$APPS/kinds" main:not_callable
    fails '62 a function that takes nothing' 'takes neither' "$APPS/kinds" main:takes_nothing
}

bad_sources() {
    local broken=$APPS/broken
    fails '62 syntax error' 'SyntaxError' "$broken" syntax:app
    fails '62 syntax error: the line is shown' 'def app\(scope, receive, send:' "$broken" syntax:app
    fails '62 import raises' 'ValueError: at import' "$broken" raises:app
    fails '62 import raises: traceback' 'line 2, in deep' "$broken" raises:app
    fails '62 import misses a module' 'no_such_module_at_all' "$broken" misses:app
    fails '62 import of a package fails' 'missing_name' "$broken" package.bad:app
    fails '62 import exits' 'exit\(3\) while it was imported' "$broken" exits:app
    fails '62 import is interrupted' 'KeyboardInterrupt' "$broken" interrupts:app
    fails_source '62 import calls os._exit' 'exited with exit code 5' <<<'import os; print("last words", flush=True); os._exit(5)'
    fails_source '62 import calls os._exit: its output is told' 'last words' <<<'import os; print("last words", flush=True); os._exit(5)'
    fails_source '62 import kills itself' 'killed by signal 9' <<<'import os; os.kill(os.getpid(), 9)'
    fails_source '62 import crashes' 'killed by signal 11' <<<'import ctypes; ctypes.string_at(0)'
    fails_source '62 import stops itself' 'stopped by signal 19' <<<'import os, signal; os.kill(os.getpid(), signal.SIGSTOP)'
    fails_source '62 import forks, the parent exits' 'exited with exit code 6' <<<'import os, time
if os.fork(): os._exit(6)
time.sleep(60)'
    fails_source '62 import forks, both exit with our descriptors elsewhere' 'exited with exit code 6' <<<'import os, time
if os.fork(): os._exit(6)
os.setsid()
if os.fork(): os._exit(0)
time.sleep(60)'
    fails_source '62 import closes everything' 'closed its channel|cannot be imported|exited' <<<'import os, time
os.closerange(0, 1000)
time.sleep(60)'
    printf 'x = "\0"\n' | fails_source '62 NUL in a source' 'null byte'
    printf '\177ELF\2\1\1\0' | fails_source '62 not Python at all' 'null byte|SyntaxError'
    printf 'x = "\377"\n' | fails_source '62 a source that is no UTF-8' "SyntaxError.*utf-8|codec can't decode"
    head -c 100000 /dev/zero | tr '\0' '(' | fails_source '62 a source nested too deep' 'SyntaxError|MemoryError|RecursionError|too many nested'
}

slow_sources() {
    local start took
    start=$(ms)
    fails_source '62 import blocks' 'did not start within 3000 ms' <<<'import time; print("before", flush=True); time.sleep(60)'
    took=$(($(ms) - start))
    check_at_most '62 import blocks: told in time, ms' 15000 "$took"
    fails_source '62 import computes' 'did not start within 3000 ms' <<<'while True: pass'
    fails_source '62 import computes: its output is told' 'still busy' <<<'print("still busy", flush=True)
while True: pass'
    start=$(pid1_kib VmHWM)
    fails_source '62 import prints without end' 'did not start within 3000 ms' <<<'while True: print("x" * 1000)'
    is_sanitized || check_at_most '62 import prints without end: KiB more at the peak' 1024 $(($(pid1_kib VmHWM) - start))
}

# With all the time that a start has: how long it takes is the machine's business.
much_output() {
    ns_start
    baseline
    fails_source '62 import prints 100 MiB, then raises' 'enough' <<<'for n in range(100): print("y" * (1 << 20))
raise ValueError("enough")'
    check_at_most '62 an error reply fits the host, bytes' 32768 "$(wc -c <"$T/check.out")"
}

bad_lifespans() {
    local start took
    start=$(ms)
    fails '63 lifespan never answers' 'lifespan startup not answered within 1.5 s' "$APPS/lifespan" main:hang
    took=$(($(ms) - start))
    check_at_most '63 lifespan never answers: told in time, ms' 15000 "$took"
    fails '63 lifespan never answers: where it waits' 'in hang' "$APPS/lifespan" main:hang
    fails '63 lifespan cannot be cancelled' 'not answered within 1.5 s' "$APPS/lifespan" main:stubborn
    fails '63 lifespan says failed' 'lifespan startup failed: no database' "$APPS/lifespan" main:fail
    fails '63 lifespan raises' 'RuntimeError: no database' "$APPS/lifespan" main:startup_raises
    fails '63 lifespan exits' 'exit\(6\)' "$APPS/lifespan" main:startup_exits
}

# There are several python3 on the way, perhaps.
hide_python() {
    shell 'for d in /usr/local/bin /usr/bin; do test ! -e $d/python3 || mv $d/python3 $d/hidden; done'
}
show_python() {
    shell 'rm -rf /usr/bin/python3; for d in /usr/local/bin /usr/bin; do test ! -e $d/hidden || mv $d/hidden $d/python3; done'
}

bad_interpreters() {
    local hello=("$APPS/hello" main:app --env PYTHONHASHSEED=0)    # not the interpreter that is warm
    hide_python
    fails '62 no interpreter' 'there is no python3 in /usr/local/sbin:' "${hello[@]}"
    shell 'printf garbage >/usr/bin/python3; chmod 755 /usr/bin/python3'
    fails '62 an interpreter that is no program' 'exec /usr/bin/python3: Exec format error' "${hello[@]}"
    shell 'printf "#!/bin/sh\r\nexit 0\r\n" >/usr/bin/python3'
    fails '62 an interpreter with CR in its first line' 'exec /usr/bin/python3: No such file' "${hello[@]}"
    shell 'printf "#!/bin/sh\necho I am not Python\nexit 4\n" >/usr/bin/python3'
    fails '62 an interpreter that exits' 'exited with exit code 4' "${hello[@]}"
    fails '62 an interpreter that exits: its output is told' 'I am not Python' "${hello[@]}"
    shell 'printf "#!/bin/sh\nsleep 60\n" >/usr/bin/python3'
    fails '62 an interpreter that says nothing' 'did not start within' "${hello[@]}"
    shell 'printf "#!/bin/sh\nhead -c 1000000 /dev/zero >&3\nsleep 60\n" >/usr/bin/python3'
    fails '62 an interpreter that writes garbage to its channel' 'was killed: it sent' "${hello[@]}"
    shell 'rm /usr/bin/python3; mkdir /usr/bin/python3'
    fails '62 a directory for an interpreter' 'python3' "${hello[@]}"
    show_python
}

run_failures() {
    GOOD=(shell 'echo well')
    ns_start --limit start_ms=3000 --limit lifespan_ms=1500
    baseline
    bad_entrypoints
    bad_sources
    slow_sources
    bad_lifespans
    bad_interpreters
    # A folder that a failed configuration unpacked must not serve the next one's imports.
    fails '62 what a failed program left behind is gone' 'there is no module syntax' "$APPS/hello" syntax:app
    check '62 after all these, a good one starts' configure "$APPS/hello" main:app
    check_eq '62 after all these, it answers' hello "$(request /)"
    much_output
}

# ---- 63, 64: programs that start, and what becomes of them --------------------------------------

unusual_starts() {
    local entry
    GOOD=(http /)
    for entry in unsupported returns unaware unaware_of_body; do
        ns_start
        check "63 lifespan $entry: it starts" configure "$APPS/lifespan" "main:$entry"
        check_eq "63 lifespan $entry: it answers" 200 "$(http / -o /dev/null -w '%{http_code}')"
    done
    ns_start
    check '62 import forks: it starts' configure "$APPS/broken" forks:app
    check_eq '62 import forks: the parent answers' parent "$(http /)"
    ns_start
    check '62 a source with CR LF and a first line for the kernel' configure \
        "$(printf '#!/usr/bin/python3\r\nanswer = lambda: "crlf"\r\n%s' "${ANSWERS//$'\n'/$'\r\n'}" | program crlf)" main:app
    check_eq '62 a source with CR LF: it answers' crlf "$(http /)"
}

# crash NAME STATUS REGEX PATH: a request that ends the worker is told how, and so is one on the
# supervisor's wire; the request after it is answered by another process.
crash() {
    local name=$1 status=$2 regex=$3 path=$4 before answer
    before=$(http /pid | value 'it["pid"]')
    answer=$(http "$path" -w '\n%{http_code}')
    check_match "$name: told on the HTTP front" "$regex" "$answer"
    check_eq "$name: status" "$status" "${answer##*$'\n'}"
    check_eq "$name: another process answers" True "$(http /pid | value "it['pid'] != $before")"
    refused "$name: told on the supervisor's wire" 1 "$regex" request "$path"
    check_eq "$name: answers again" True "$(http /pid | value "it['pid'] != $before")"
    assert_console_has "$name: on the console" "$regex"
    guest_ok "$name: well afterwards"
}

crashes() {
    crash '64 os._exit(3)' 502 'exited with exit code 3' /exit/3
    crash '64 SIGKILL' 502 'killed by signal 9 \(Killed\)' /kill9
    crash '64 SIGSTOP' 502 'stopped by signal 19' /stop
    crash '64 exit 0' 502 'exited with exit code 0' /exit/0
}

busy_is_not_dead() {
    local before start
    before=$(http /pid)
    in_background "$T/block" http /block/3
    sleep 0.3
    start=$(ms)
    check_eq '64 a busy event loop: the request waits and is answered' "$before" "$(http /pid)"
    check '64 a busy event loop: it did wait' test $(($(ms) - start)) -gt 1500
    finished
    check_eq '64 a busy event loop: its own answer' '{"blocked": 3.0}' "$(cat "$T/block")"
    guest_ok '64 a busy event loop: well afterwards'
}

begun() { http /counts | value 'it["begun"]'; }

crash_in_flight() {
    local n before polls=0
    before=$(begun)
    for n in {1..10}; do
        in_background "$T/flight.$n" http "/sleep/3$n" -w '\n%{http_code}\n'
    done
    ten_have_begun() {                  # each look is a request that has begun, too
        polls=$((polls + 1))
        [ $(($(begun) - before - polls)) -ge 10 ]
    }
    wait_for 10 ten_have_begun || true
    in_background "$T/flight.0" http /exit/9 -w '\n%{http_code}'
    sleep 0.05
    for n in {11..20}; do
        in_background "$T/flight.$n" http /pid -w '\n%{http_code}\n'
    done
    finished
    check_eq 'a crash with 10 requests in flight: each is told' 10 \
        "$(cat "$T"/flight.{1..10} | grep -c 'the program main:app exited with exit code 9')"
    check_eq 'a crash with 10 requests in flight: with its status' 10 "$(cat "$T"/flight.{1..10} | grep -cx 502)"
    check_eq 'requests during a restart wait for it' 10 "$(cat "$T"/flight.{11..20} | grep -cx 200)"
    guest_ok 'a crash with 10 requests in flight: well afterwards'
}

# Processes that a program leaves behind keep our ends of its channel and its output.
forks_hold_on() {
    local how child before start
    for how in fork setsid double; do
        child=$(http "/$how" | value 'it["child"]')
        check "a child by $how holds on: it is there" shell "test -e /proc/$child && echo there | grep there"
        before=$(http /pid)
        start=$(ms)
        check_match "a child by $how holds on: a crash is told" 'exited with exit code 7' "$(http /exit/7)"
        check_match "a child by $how holds on: another process answers" '^\{"pid"' "$(http /pid)"
        check_at_most "a child by $how holds on: nobody waits for it, ms" 3000 $(($(ms) - start))
        check "a child by $how holds on: it ends with its program" wait_for 3 eval \
            "[ \"\$(shell 'test -e /proc/$child && echo there || echo gone')\" = gone ]"
        guest_ok "a child by $how holds on: well afterwards"
    done
}

leaks() {
    local before
    before=$(ls "/proc/$PID1/fd" | wc -l)
    check_match '64 leaks descriptors: the request fails or is answered' 'opened|Too many' "$(http /leak)"
    check_match '64 leaks descriptors: the next is answered or told' 'pid|Too many' "$(http /pid)"
    check_eq '64 leaks descriptors: none of them is ours' "$before" "$(ls "/proc/$PID1/fd" | wc -l)"
    http /unleak >/dev/null
    guest_ok '64 leaks descriptors: well afterwards'
}

outputs() {
    local longest
    http /binary >/dev/null
    assert_console_has '64 binary on stdout: the line is there' 'binary \?*'
    check_eq '64 binary on stdout: no control byte on the console' '' \
        "$(grep -a 'binary ' "$CONSOLE" | tr -d '\n\t' | LC_ALL=C grep -oP '[\x00-\x1f\x7f]' || true)"
    http /longline >/dev/null
    assert_console_has '64 a long line: what comes after it is there' 'after the long line'
    longest=$(LC_ALL=C awk '{ if (length > most) most = length } END { print most }' "$CONSOLE")
    check_at_most '64 a long line: capped, bytes' $((1024 + 64)) "$longest"
    check_eq '64 a line without an end is shown by the time it has one' 1 \
        "$(http /parts >/dev/null; wait_for 3 guest_console_has 'in three parts' && lines_with 'in three parts$')"
    guest_ok '64 outputs: well afterwards'
}

# A program that died starts again after 100 ms; one that does not start is tried again after
# 200, 400, 800 and at most 1000 ms.
back_off() {
    http /breakstart >/dev/null             # it will not start from here on
    sleep 1.2                               # served for longer than that, it is no loop
    check_match 'back-off: a crash is told' 'exit code 8' "$(http /exit/8)"
    wait_for 15 guest_console_has 'next try in 1000 ms' || true
    check_eq 'back-off: doubles, and no further than its limit' '200 400 800 1000 ' \
        "$(sed -nE 's/.*does not start: .*next try in ([0-9]+) ms/\1/p' "$CONSOLE" | tr '\n' ' ')"
    check_match 'back-off: whoever waits is told why' 'broken on purpose' "$(http /)"
    shell 'rm /tmp/broken'
    check_match 'back-off: it recovers' '^\{"pid"' "$(until http /pid | grep '^{'; do sleep 0.1; done)"
    guest_ok 'back-off: well afterwards'
}

# Crashes one after the other: each waits longer than the one before.
crash_loop() {
    local n
    sleep 1.2                               # the crashes before are forgotten
    for n in 1 2 3 4; do
        http /exit/1 >/dev/null
        http /pid >/dev/null
    done
    check_eq 'a crash loop: each restart waits longer' '100 200 400 800 ' \
        "$(sed -nE 's/.*: starts again in ([0-9]+) ms/\1/p' "$CONSOLE" | tail -n 4 | tr '\n' ' ')"
    guest_ok 'a crash loop: well afterwards'
}

# apps/echo with more ways to go wrong. Prints the folder.
wild_program() {
    program wild <<'END'
import importlib.util, os, sys, threading, time
if os.path.exists("/tmp/broken"):
    raise RuntimeError("broken on purpose")
spec = importlib.util.spec_from_file_location("echo", "/opt/echo.py")
echo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(echo)
app = echo.app
leaked = []

def route(function):
    async def handler(scope, receive, send, *args):
        await echo.answer(send, await function(*args))
    echo.routes[function.__name__] = handler

def stay(pid_to=None):
    if pid_to is not None:
        os.write(pid_to, b"%d" % os.getpid())
    time.sleep(60)
    os._exit(0)

@route
async def setsid():
    child = os.fork()
    if child == 0:
        os.setsid()
        stay()
    return {"child": child}

@route
async def double():
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0:
            stay(theirs)
        os._exit(0)
    os.waitpid(child, 0)
    return {"child": int(os.read(ours, 20))}

@route
async def leak():
    try:
        while True:
            leaked.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return {"opened": len(leaked)}

@route
async def unleak():
    while leaked:
        os.close(leaked.pop())
    return {}

@route
async def binary():
    sys.stdout.buffer.write(b"binary " + bytes(set(range(256)) - {10}) + b"\x1b[2J\xff\xfe\n")
    sys.stdout.flush()
    return {}

@route
async def longline():
    print("l" * (1 << 20))
    print("after the long line", flush=True)
    return {}

@route
async def parts():
    for part in ("in", " three", " parts\n"):
        os.write(1, part.encode())
        time.sleep(0.05)
    return {}

@route
async def floodthread(mib):
    def flood():
        line = b"f" * 1023 + b"\n"
        for _ in range(int(mib)):
            os.write(1, line * 1024)
    import asyncio
    await asyncio.get_running_loop().run_in_executor(None, flood)
    return {"printed": int(mib)}

@route
async def breakstart():
    open("/tmp/broken", "w").close()
    return {}
END
    cp "$APPS/echo/main.py" "$T/programs/wild/echo.py"
}

worker_life() {
    GOOD=(http /bytes/6)
    ns_start --limit backoff_ms=100 --limit backoff_max_ms=1000
    configure "$(wild_program)" main:app
    http /flood/1 >/dev/null
    baseline
    crashes
    busy_is_not_dead
    crash_in_flight
    forks_hold_on
    leaks
    outputs
    crash_loop
    back_off
}

# ---- A console that is slow -----------------------------------------------------------------------

# The console as a pipe whose reader rests while $T/hold is there.
slow_console_start() {
    mkfifo "$T/pipe"
    eval "usual_$(declare -f spawn)"
    spawn() {
        local log=$1
        shift
        [ "$log" != "$CONSOLE" ] || log=$T/pipe
        usual_spawn "$log" "$@"
    }
    (slow_reader <"$T/pipe" >"$T/shown") &
    ns_start "$@"
    eval "$(declare -f usual_spawn | sed '1s/usual_//')"
    ln -sf "$T/shown" "$CONSOLE"
}

slow_reader() {
    exec "$PYTHON" -uc 'import os, sys, time
while True:
    while os.path.exists(sys.argv[1]): time.sleep(0.01)
    data = os.read(0, 65536)
    if not data: break
    os.write(1, data)' "$T/hold"
}

# Lines of a flood that the console shows, and those that it says were dropped.
flood_lines() {
    awk '/ffffffff/ { n++ } match($0, /[0-9]+ lines dropped/) { n += substr($0, RSTART) + 0 } END { print n + 0 }' "$CONSOLE"
}
flood_is_told() { [ "$(flood_lines)" = $((101 * 1024)) ]; }

slow_console() {
    local start times=() n
    GOOD=(http /bytes/6)
    slow_console_start
    configure "$(wild_program)" main:app
    http /flood/1 >/dev/null
    baseline
    : >"$T/hold"
    in_background "$T/flood" http /floodthread/100
    for n in {1..20}; do
        start=$(ms)
        check_eq "a flood of stdout: request $n is answered" 200 "$(http /bytes/1 -o /dev/null -w '%{http_code}')"
        times+=($(($(ms) - start)))
    done
    finished
    check_at_most 'a flood of stdout: the slowest answer, ms' 3000 "$(printf '%s\n' "${times[@]}" | sort -n | tail -n 1)"
    check_eq 'a flood of stdout: all was taken, though the console took nothing' '{"printed": 100}' "$(cat "$T/flood")"
    rm "$T/hold"
    http /print/afterwards >/dev/null
    assert_console_has 'a console that takes again shows what comes' 'main:app.*afterwards'
    assert_console_has 'lines that the console did not take are counted' 'console too slow, [0-9]+ lines dropped'
    wait_for 5 flood_is_told || true        # the last of the two lines
    check_eq 'lines dropped and lines shown are all lines' $((101 * 1024)) "$(flood_lines)"
    guest_ok 'a slow console: well afterwards'
}

# ---- What a program finds ---------------------------------------------------------------------------

environment() {
    local before pid
    GOOD=(http /)
    ns_start
    wait_for 5 eval '[ -n "$(workers)" ]'
    before=$(workers)
    mkdir -p "$T/data/folder"
    echo 'input data' >"$T/data/folder/file"
    configure "$(program finds <<END
import json, locale, os, sys, tempfile
answer = lambda: json.dumps({
    "env": dict(os.environ), "path": sys.path, "cwd": os.getcwd(), "pid": os.getpid(),
    "exec_env": open("/proc/self/environ").read().split("\0"), "optimize": sys.flags.optimize,
    "argv": sys.argv, "data": open("/data/folder/file").read(), "umask": os.umask(0o22),
    "stdin": os.readlink("/proc/self/fd/0"), "fds": sorted(map(int, os.listdir("/proc/self/fd"))),
    "limits": open("/proc/self/oom_score_adj").read(), "name": __name__,
    "signals": open("/proc/self/status").read().split("SigBlk:")[1].split()[0]})
$ANSWERS
END
)" main:app --env GREETING='grüß dich' --env EMPTY= --env 'MANY=a=b=c' --env ALEPH_API_HOST=http://elsewhere \
        --hash cafecafecafecafecafecafecafecafecafecafecafecafecafecafecafecafe --input "$T/data"
    http / >"$T/finds"
    found() { value "$1" <"$T/finds"; }
    pid=$(found 'it["pid"]')
    check_eq 'the interpreter was there before the configuration' "$pid" "$(guest_pid ${before%% *})"
    check_eq 'a variable' 'grüß dich' "$(found 'it["env"]["GREETING"]')"
    check_eq 'an empty variable' '' "$(found 'it["env"]["EMPTY"]')"
    check_eq 'a variable with equal signs' a=b=c "$(found 'it["env"]["MANY"]')"
    check_eq 'a variable of the configuration comes before ours' http://elsewhere "$(found 'it["env"]["ALEPH_API_HOST"]')"
    check_eq 'ALEPH_ADDRESS_TO_USE' zl7mv7wk73fp5sx6zl7mv7wk73fp5sx6zl7mv7wk73fp5sx6zl7a \
        "$(found 'it["env"]["ALEPH_ADDRESS_TO_USE"]')"
    check_eq 'the hostname' zl7mv7wk73fp5sx6zl7mv7wk73fp5sx6zl7mv7wk73fp5sx6zl7a "$(shell hostname)"
    check_eq 'the other ALEPH variables' \
        '2.0.0 http://localhost /tmp/socat-socket /tmp/socat-socket' \
        "$(found '" ".join(it["env"][k] for k in ("ALEPH_INIT_VERSION", "ALEPH_REMOTE_CRYPTO_HOST", "ALEPH_API_UNIX_SOCKET", "ALEPH_REMOTE_CRYPTO_UNIX_SOCKET"))')"
    check_eq 'PYTHONPATH' /opt/aleph/libs "$(found 'it["env"]["PYTHONPATH"]')"
    check_eq 'HOME, LANG and PATH' "/root C.UTF-8 /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
        "$(found '" ".join(it["env"][k] for k in ("HOME", "LANG", "PATH"))')"
    check_eq 'sys.path begins with code, packages, libraries' '/opt /opt/packages /opt/aleph/libs' \
        "$(found '" ".join(it["path"][:3])')"
    check_eq 'sys.path holds nothing of ours' True "$(found 'not any("/run/agent" in p for p in it["path"])')"
    check_eq 'the working folder' /opt "$(found 'it["cwd"]')"
    check_eq 'input data lies in /data' 'input data' "$(found 'it["data"]')"
    check_eq 'no optimisation without its byte code' 0 "$(found 'it["optimize"]')"
    check_eq 'standard input is nothing' /dev/null "$(found 'it["stdin"]')"
    check_eq 'no signal is blocked' 0000000000000000 "$(found 'it["signals"]')"
    check_eq 'the module has its own name' main "$(found 'it["name"]')"
    check_eq 'lines of other variables: none' True "$(found 'not any(k.startswith(("NS_", "TEST_", "SUDO")) for k in it["env"])')"
}

# Variables that the interpreter reads when it starts.
early_variables() {
    local before pid
    ns_start
    wait_for 5 eval '[ -n "$(workers)" ]'
    before=$(workers)
    configure "$(program early <<END
import json, os, sys
answer = lambda: json.dumps({"pid": os.getpid(), "exec_env": open("/proc/self/environ").read().split("\0"),
    "dont_write": sys.flags.dont_write_bytecode, "dev": sys.flags.dev_mode, "path": sys.path,
    "utf8": sys.flags.utf8_mode, "hash": hash("fixed")})
$ANSWERS
END
)" main:app --env PYTHONDONTWRITEBYTECODE=1 --env PYTHONHASHSEED=42 --env PYTHONDEVMODE=1 \
        --env PYTHONPATH=/opt/mine --env PATH=/usr/bin:/opt/bin --env LANG=de_DE.UTF-8 --env PLAIN=1
    http / >"$T/finds"
    check 'early variables: another interpreter than the warm one' \
        test "$(found 'it["pid"]')" != "$(guest_pid ${before%% *} 2>/dev/null || echo gone)"
    check 'early variables: the warm one is gone' wait_for 3 eval "[ ! -e /proc/${before%% *} ]"
    for pair in PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=42 PYTHONDEVMODE=1 PYTHONPATH=/opt/mine \
        PATH=/usr/bin:/opt/bin LANG=de_DE.UTF-8 PLAIN=1; do
        check_eq "early variables: $pair is there at exec, once" 1 "$(found "it['exec_env'].count('$pair')")"
        check_eq "early variables: no other ${pair%%=*}" 1 \
            "$(found "sum(e.startswith('${pair%%=*}=') for e in it['exec_env'])")"
    done
    check_eq 'early variables: the interpreter took them' '1 True' "$(found '"%d %s" % (it["dont_write"], it["dev"])')"
    check_eq 'early variables: the hash seed counts' "$(PYTHONHASHSEED=42 "$PYTHON" -c 'print(hash("fixed"))')" "$(found 'it["hash"]')"
    check_eq 'early variables: PYTHONPATH comes after the packages' '/opt /opt/packages /opt/mine' "$(found '" ".join(it["path"][:3])')"
}

optimisation() {
    NS_PREPARE='mkdir -p opt/aleph/libs/__pycache__; : >opt/aleph/libs/__pycache__/shipped.cpython-311.opt-2.pyc'
    ns_start
    NS_PREPARE=''
    configure "$(program optimised <<END
import sys
def answer():
    "documentation"
    assert False, "not under -OO"
    return "%d %s" % (sys.flags.optimize, answer.__doc__)
$ANSWERS
END
)" main:app
    check_eq 'byte code of level 2 in the runtime: -OO' '2 None' "$(http /)"
}

plain_code() {
    ns_start
    configure "$APPS/plain/main.py" main:app
    check_eq 'plain code: functions see top-level names' '{"greeting": "from plain code", "name": "/x", "module": "main"}' "$(http /x)"
    check_match 'plain code: an error names its line' 'line of plain code' "$(http /raise)"
    refused 'plain code: the traceback shows its source' 1 'raise ValueError\("line of plain code"\)' request /raise
    ns_start
    configure "$APPS/plain/main.py" app
    check_eq 'plain code: the attribute alone will do' '{"greeting": "from plain code", "name": "/", "module": "main"}' "$(http /)"
}

other_kinds() {
    ns_start
    configure "$APPS/kinds" main:wsgi
    check_eq 'WSGI: a request' "$(printf '3 %s' "$(printf abc | sha256sum | cut -d ' ' -f 1)")" "$(http /body -d abc)"
    check_eq 'WSGI: on the supervisor'"'"'s wire' 'written returned' "$(request /write)"
    check_match 'WSGI: an event' 'aleph.message some text' "$(event --text 'some text')"
    check_match 'WSGI: an error' 'ValueError: raised on purpose' "$(http /raise)"
    check_eq 'WSGI: many at once' 16 "$(for n in {1..16}; do http /sleep/0.5 & done | grep -o slept | wc -l; wait)"
    ns_start
    configure "$APPS/events" main:app
    check_match 'ASGI: an event' 'first' "$(event --text first)"
}

# The lifespan begins once, and ends when the machine halts.
lifespan() {
    ns_start
    configure "$(program lives <<'END'
import os
count = 0

async def app(scope, receive, send):
    global count
    if scope["type"] == "lifespan":
        count += 1
        await receive()
        print("lifespan begins", count, flush=True)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        with open(os.environ["SHUTDOWN_FILE"], "w") as file:
            file.write("shut down\n")
        print("lifespan ends", flush=True)
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d" % count})
END
)" main:app --env SHUTDOWN_FILE="$GUEST/shutdown"
    for _ in 1 2 3; do check_eq 'lifespan: once' 1 "$(http /)"; done
    check 'lifespan: not ended yet' test ! -e "$GUEST/shutdown"
    check 'lifespan: halt' halt
    check_eq 'lifespan: the shutdown has run' 'shut down' "$(cat "$GUEST/shutdown")"
    check_eq 'lifespan: it began once' 1 "$(lines_with 'main:app.*lifespan begins 1')"
    check_eq 'lifespan: it ended once' 1 "$(lines_with 'main:app.*lifespan ends')"
}

run_failures
unusual_starts
worker_life
slow_console
environment
early_variables
optimisation
plain_code
other_kinds
lifespan

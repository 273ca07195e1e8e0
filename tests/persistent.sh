#!/usr/bin/env bash
# A machine that no supervisor configures: /etc/agent.json in its image, or agent.config=PATH.
. "$(dirname "$0")/lib.sh"

EXAMPLES=$GUEST_ROOT/examples

# A guest whose image has more files in it: start_with 'FILE PATH'… [-- KERNEL ARGUMENT…]
start_with() {
    local put=()
    new_guest
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        put+=("$1")
        shift
    done
    [ $# = 0 ] || shift
    cp --sparse=always "$GUEST_IMAGE" "$T/image"
    printf 'mkdir opt/code\n' >"$T/debugfs"
    printf 'write %s\n' "${put[@]}" >>"$T/debugfs"
    debugfs -w -f "$T/debugfs" "$T/image" >"$T/debugfs.log" 2>&1
    GUEST_IMAGE=$T/image
    run_guest "$@"
}

serves() { http / -f >"$T/first" 2>&1; }
processor_ms() { shell 'cat /proc/1/stat' | awk '{ print ($14 + $15) * 10 }'; }

# ---- the example ---------------------------------------------------------------------------

start_with "$EXAMPLES/agent.json etc/agent.json" "$EXAMPLES/hello-python/main.py opt/code/main.py" \
    -- agent.log=debug agent.limit.http_body_bytes=20
check 'example: vsock 80 answers, nobody has configured it' wait_for 60 serves
check_eq 'example: by its program' 'Hello from Python. You asked for /x' "$(http /x)"
before=$(processor_ms)
sleep 5
check_at_most 'example: ms of 5000 that nobody listening costs' 500 $(($(processor_ms) - before))
check_at_most 'example: and lines of log, at the level of debug' 3 "$(grep -ac 'ready' "$CONSOLE")"
check_eq 'example: the command line wins over the file' 413 \
    "$(http / -o "$T/body" -w '%{http_code}' --data-binary 123456789012345678901)"
hear_ready "$SOCK"
await_ready 20
check_match 'example: whoever listens later hears ready' version "$(cat "$GUEST/ready")"
refused 'example: a configuration is refused' 1 'this machine is configured already' configure "$APPS/hello" main:app
check 'example: it can be halted' halt

# ---- a machine in all -----------------------------------------------------------------------

cat >"$T/machine.json" <<'END'
{
  "entrypoint": "run.sh a", "args": ["b c"], "variables": {"A": "1"},
  "volumes": [{"mount": "/var/kept", "device": "vdb", "read_only": false}],
  "hostname": "machine", "ip": "10.0.2.15/24", "dns_servers": ["10.0.2.3"],
  "listen": ["vsock:80", "tcp:10.0.2.15:8081", "unix:/run/late.sock"]
}
END
truncate -s 16M "$T/kept"
mke2fs -q -t ext4 "$T/kept"
start_with "$T/machine.json etc/machine.json" "$APPS/process/run.sh opt/code/run.sh" "$APPS/process/server.py opt/code/server.py" \
    "$APPS/process/main.py opt/code/main.py" -- agent.config=/etc/machine.json -- $GUEST_NIC \
    -drive "file=$T/kept,format=raw,if=virtio"
ASK='import http.client, socket, sys
c = http.client.HTTPConnection("x")
c.sock = socket.socket(socket.AF_INET if len(sys.argv) > 2 else socket.AF_UNIX)
c.sock.connect((sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 2 else sys.argv[1])
c.request("GET", "/facts")
print(c.getresponse().read().decode())'
# In the guest: the body that an address answers with: ask PATH, ask HOST PORT.
ask() { shell "echo $(base64 -w 0 <<<"$ASK") | base64 -d | python3 - $* 2>&1"; }
fact() { http /facts | "$PYTHON" -c "import json, sys; F = json.load(sys.stdin); print($1)"; }
check 'machine: an executable' wait_for 60 serves
check_eq 'machine: its arguments' "['a', 'b c']" "$(fact 'F["args"]')"
check_eq 'machine: its port and variable' '8080 1' "$(fact 'F["env"]["PORT"] + " " + F["env"]["A"]')"
check_eq 'machine: the hostname' machine "$(shell 'cat /proc/sys/kernel/hostname')"
check_eq 'machine: name servers' 'nameserver 10.0.2.3' "$(shell 'cat /etc/resolv.conf')"
check_match 'machine: a volume' '^/dev/vdb /var/kept ext4 rw' "$(shell 'cat /proc/mounts')"
check_match 'machine: a path of a folder that boot mounts' '"b c"' "$(ask /run/late.sock)"
check_match 'machine: an address that setup gives' '"b c"' "$(ask 10.0.2.15 8081)"

# ---- a process in a machine: an instance -------------------------------------------------------

# Its program's port is one of its own: 8080 is the machine's.
shell 'setsid -f /usr/sbin/init run --listen vsock:81 --wire vsock:54 --env A=2 /opt/code server.py >/tmp/run.log 2>&1; sleep 1'
spawn "$GUEST/forward81.log" "$AGENT" forward --raw "unix:$GUEST/81.sock" "hybrid:$SOCK:81"
HTTP=$GUEST/81.sock
check 'instance: a process serves vsock' wait_for 60 serves
serves || shell 'cat /tmp/run.log'
check_eq 'instance: its own program, on a port of its own' '2 True' "$(fact 'F["env"]["A"], F["env"]["PORT"] != "8080"' | tr -d "(),'")"
HTTP=$GUEST/http.sock
check_eq 'instance: beside the machine that it is in' 1 "$(fact 'F["env"]["A"]')"
check 'instance: halt on its wire' timeout 60 "$AGENT" call "hybrid:$SOCK:54" halt
check_eq 'instance: ends it and not the machine' 1 "$(fact 'F["env"]["A"]')"
HTTP=$GUEST/81.sock
check 'instance: it is gone' not serves

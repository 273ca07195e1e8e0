#!/usr/bin/env bash
# The configuration file: what is refused names the line or the field, what is accepted does
# what it says. By `agent run`, which needs no guest; the reader is the one of a machine.
. "$(dirname "$0")/lib.sh"

FILE=$T/agent.json

# wrong NAME REGEX JSON: as the whole of a file, it is refused for that reason.
wrong() {
    printf '%s' "$3" >"$FILE"
    refused "$1" 2 "^agent run: $FILE: $2" timeout 20 "$AGENT" run --config "$FILE" --listen "unix:$T/s"
}

# field NAME REGEX JSON: the same of one field beside a good entrypoint.
field() { wrong "$1" "$2" "{\"entrypoint\": \"main:app\", $3}"; }

# numbers FROM TO: "[FROM, …, TO]" as text.
numbers() { seq -s, "$1" "$2" | sed 's/.*/[&]/'; }

# ---- the file ------------------------------------------------------------------------------

check_file() {
    refused 'file: missing' 2 "^agent run: $T/none: No such file" "$AGENT" run --config "$T/none"
    refused 'file: a folder' 2 "^agent run: $T: no regular file" "$AGENT" run --config "$T"
    mkfifo "$T/fifo"
    refused 'file: a FIFO does not stop it' 2 'no regular file' timeout 10 "$AGENT" run --config "$T/fifo"
    head -c $((1024 * 1024 + 1)) /dev/zero | tr '\0' ' ' >"$FILE"
    refused 'file: 1 MiB and a byte' 2 'more than 1 MiB' "$AGENT" run --config "$FILE"
    { echo '{"entrypoint": "main:app",'; head -c $((1024 * 1024 - 60)) /dev/zero | tr '\0' ' '; echo '"x": 1}'; } >"$FILE"
    refused 'file: just below is read' 2 'x: no such field' "$AGENT" run --config "$FILE"
    wrong 'file: empty' 'line 1: ' ''
    wrong 'file: cut short' 'line 3: ' $'{\n"entrypoint": "main:app",\n'
    wrong 'file: no JSON' 'line 1: ' 'entrypoint = main:app'
    wrong 'file: a comma too many' 'line 3: trailing comma' $'{\n\n"entrypoint": "main:app",\n}'
    wrong 'file: a comment' 'line 2: ' $'{ "entrypoint": "main:app"\n// here\n}'
    wrong 'file: single quotes' 'line 1: ' "{'entrypoint': 'main:app'}"
    wrong 'file: two values' 'line 2: ' $'{}\n{}'
    wrong 'file: NaN' 'line 1: ' '{"port": NaN}'
    wrong 'file: no UTF-8' 'line 1: ' $'{"entrypoint": "\xff"}'
    wrong 'file: half a surrogate' 'line 1: ' '{"entrypoint": "\ud800"}'
    wrong 'file: a control byte in a string' 'line 1: unexpected control' $'{"entrypoint": "a\n"}'
    wrong 'file: a list' 'expected a map' '[]'
    wrong 'file: a string' 'expected a map' '"main:app"'
    wrong 'file: nested 100,000 deep' '(x|x\[0\].*): nested too deep' \
        "{\"x\": $(printf '[%.0s' {1..100000})$(printf ']%.0s' {1..100000})}"
    wrong 'file: 1,025 fields' 'too many fields' "{$(seq 1 1025 | sed 's/.*/"a&": 1/' | paste -sd,)}"
}

# ---- fields --------------------------------------------------------------------------------

check_fields() {
    local name
    wrong 'unknown: named' 'entrypiont: no such field' '{"entrypiont": "main:app"}'
    wrong 'unknown: control bytes are not printed raw' 'a\?b: no such field' '{"a\nb": 1}'
    for name in interface encoding input_data vm_hash worker; do
        field "unknown: $name is no field of a file" "$name: no such field" "\"$name\": \"x\""
    done
    wrong 'twice: named' 'entrypoint: stands twice' '{"entrypoint": "a:b", "entrypoint": "a:b"}'
    field 'twice: also as null' 'code: stands twice' '"code": null, "code": "/x"'
    field 'twice: a variable' 'variables\.A: stands twice' '"variables": {"A": "1", "B": "2", "A": "3"}'
    field 'twice: in a volume' 'volumes\[1\]\.mount: stands twice' \
        '"volumes": [{"mount": "/a", "device": "vdb"}, {"mount": "/b", "mount": "/c"}]'
    field 'twice: a limit' 'limits\.conns: stands twice' '"limits": {"conns": 20, "conns": 20}'

    for name in entrypoint code hostname ip route ipv6 ipv6_gateway log wire; do
        wrong "type: $name is a number" "$name: expected a string" "{\"$name\": 1}"
        wrong "type: $name is a list" "$name: expected a string" "{\"$name\": [\"a\"]}"
        wrong "type: $name is a bool" "$name: expected a string" "{\"$name\": true}"
        wrong "type: $name holds a NUL" "$name: holds a NUL" "{\"$name\": \"a\\u0000b\"}"
    done
    for name in args dns_servers authorized_keys listen; do
        field "type: $name is a string" "$name: expected a list" "\"$name\": \"a\""
        field "type: $name is a map" "$name: expected a list" "\"$name\": {}"
        field "type: $name holds a number" "$name\\[1\\]: expected a string" "\"$name\": [\"a\", 1]"
        field "type: $name holds null" "$name\\[0\\]: expected a string" "\"$name\": [null]"
        field "limit: 65 in $name" "$name: 65 entries, at most 64" "\"$name\": $(numbers 1 65)"
    done
    for name in variables limits; do
        field "type: $name is a list" "$name: expected a map" "\"$name\": []"
        field "type: $name is a string" "$name: expected a map" "\"$name\": \"A=1\""
    done
    field 'type: a variable is a number' 'variables: A: expected a string' '"variables": {"A": 1}'
    field 'variables: an empty name' 'variables: the name "" is empty' '"variables": {"": "x"}'
    field 'variables: a name with =' 'variables: the name "A=B"' '"variables": {"A=B": "x"}'
    field 'variables: 1,025' 'variables: too many fields' \
        "\"variables\": {$(seq 1 1025 | sed 's/.*/"a&": "1"/' | paste -sd,)}"

    field 'volumes: a map' 'volumes: expected a list' '"volumes": {}'
    field 'volumes: of strings' 'volumes\[0\]: expected a map' '"volumes": ["vdb"]'
    field 'volumes: mount is a number' 'volumes\[1\]\.mount: expected a string' \
        '"volumes": [{"mount": "/a", "device": "vdb"}, {"mount": 1}]'
    field 'volumes: read_only is a string' 'volumes\[0\]\.read_only: expected a bool' \
        '"volumes": [{"mount": "/a", "device": "vdb", "read_only": "yes"}]'
    field 'volumes: an unknown field' 'volumes\[0\]\.readonly: no such field' \
        '"volumes": [{"mount": "/a", "device": "vdb", "readonly": true}]'
    field 'volumes: no device' 'volumes\[0\]: needs mount and device' '"volumes": [{"mount": "/a"}]'
    field 'volumes: a bad device' 'volumes: "../sda" is no device name' '"volumes": [{"mount": "/a", "device": "../sda"}]'

    wrong 'entrypoint: missing' 'entrypoint: missing' '{"variables": {"A": "1"}}'
    wrong 'entrypoint: empty' 'entrypoint: 0 bytes' '{"entrypoint": ""}'
    field 'args: for a module' 'args: only for an executable' '"args": ["a"]'
    wrong 'args: for Node' 'args: only for an executable' '{"entrypoint": "a.js", "args": ["a"]}'
    field 'port: for a module' 'port: module:attribute listens on none' '"port": 8080'
    for name in 0 65536 -1 80.5 '"80"' true '[80]'; do
        wrong "port: $name" 'port: expected a number from 1 to 65535' "{\"entrypoint\": \"run.sh\", \"port\": $name}"
    done
    field 'code: relative' 'code: "app" is no absolute path' '"code": "app"'
    for name in '' - a- -a 'a b' a..b .a a. "$(printf 'a%.0s' {1..64})" 'é'; do
        field "hostname: \"${name:0:8}\"" 'hostname: ' "\"hostname\": \"$name\""
    done
    field 'ip: none' 'ip: "10.0.0" is no IPv4' '"ip": "10.0.0"'
    field 'ip: mask' 'ip: "10.0.0.1/33" is no IPv4' '"ip": "10.0.0.1/33"'
    field 'ipv6: none' 'ipv6: ' '"ipv6": "10.0.0.1"'
    field 'dns_servers: none' 'dns_servers\[1\]: "x" is no address' '"dns_servers": ["1.1.1.1", "x"]'

    for name in 80 tcp:80 tcp:example.org:80 tcp:127.0.0.1:65536 vsock:x unix: fd:-1 hybrid:/a:80 "unix:$(printf 'a%.0s' {1..120})"; do
        field "listen: ${name:0:24}" 'listen\[0\]: ".*" is not' "\"listen\": [\"$name\"]"
    done
    field 'listen: 17 addresses' 'listen: 17 addresses, at most 16' "\"listen\": [$(seq 1 17 | sed 's/.*/"fd:&"/' | paste -sd,)]"
    field 'wire: by TCP' 'wire: "tcp:127.0.0.1:52": whoever' '"wire": "tcp:127.0.0.1:52"'
    field 'wire: no address' 'wire: "52" is not' '"wire": "52"'
    field 'log: no level' 'log: "loud" is not info or debug' '"log": "loud"'

    field 'limits: unknown' 'limits\.conn: no limit is named conn$' '"limits": {"conn": 100}'
    field 'limits: too small' 'limits\.conns: limit conns takes a number from 16 to 1048576' '"limits": {"conns": 15}'
    field 'limits: too large' 'limits\.conns: limit conns takes' '"limits": {"conns": 1048577}'
    for name in -1 1.5 1e2 '"100"' true null '[]' 18446744073709551616; do
        field "limits: $name" 'limits\.conns: expected a whole number' "\"limits\": {\"conns\": $name}"
    done
    field 'limits: more than 63 bits' 'limits\.http_body_bytes: limit' '"limits": {"http_body_bytes": 18446744073709551615}'
}

# What belongs to a machine is refused where there is none, whatever its value.
check_machine() {
    local pair
    for pair in '"hostname": "x"' '"ip": "10.0.0.2"' '"route": "10.0.0.1"' '"ipv6": "fd00::2/64"' '"ipv6_gateway": "fd00::1"' \
        '"dns_servers": []' '"authorized_keys": []' '"volumes": []'; do
        field "machine: $pair" '[a-z0-9_]+: only for a machine of its own' "$pair"
    done
    echo '{"log": "info"}' >"$FILE"
    refused 'machine: no program' 2 'there is no program' "$AGENT" run --config "$FILE"
}

check_file
check_fields
check_machine

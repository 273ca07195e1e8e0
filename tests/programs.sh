#!/usr/bin/env bash
# Real frameworks, as Debian packages them, in real guests: what their users do every day, over
# the supervisor's wire and over HTTP.
. "$(dirname "$0")/lib.sh"

# Over both fronts: both NAME EXPECTED PATH
both() {
    check_eq "$1, port 52" "$2" "$(request "$3")"
    check_eq "$1, port 80" "$2" "$(http "$3")"
}

both_matter() {
    check_match "$1, port 52" "$2" "$(request "$3")"
    check_match "$1, port 80" "$2" "$(http "$3")"
}

numbers() { seq -f %05g -s '' 0 999; }

# What every framework's app of tests/apps answers.
common() {
    head -c 3000000 /dev/zero >"$T/body"
    both_matter "$1: path and query parameters" '"item": ?7.*"q": ?"a b&c"' '/item/7?q=a+b%26c'
    check_match "$1: a 3 MB body, port 52" '"body_bytes": ?3000000' "$(request -X POST -d "@$T/body" /body)"
    check_match "$1: a 3 MB body, port 80" '"body_bytes": ?3000000' "$(http /body --data-binary "@$T/body")"
}

boot
check 'fastapi: configured' configure "$APPS/fastapi" main:app
common fastapi
both 'fastapi: StreamingResponse' "$(numbers)" /stream
awk 'BEGIN { for (i = 0; i < 20000; i++) printf "0123456789" }' >"$T/file"
request /file >"$T/file.52" && http /file >"$T/file.80"
check 'fastapi: FileResponse of 200,000 bytes, port 52' cmp "$T/file" "$T/file.52"
check 'fastapi: FileResponse of 200,000 bytes, port 80' cmp "$T/file" "$T/file.80"
start=$(ms)
both_matter 'fastapi: a background task is accepted' '"accepted"' /background/3
check_at_most 'fastapi: two background tasks of 3 s delay no reply, ms' 2900 $(($(ms) - start))
check 'fastapi: the background tasks run' wait_for 15 eval 'request / | grep -q "\"background\":2"'
both_matter 'fastapi: one lifespan' '"lifespans":1' /
check_match 'fastapi: an unknown path is 404' '^HTTP/1.1 404 ' "$(http /nowhere -i)"
check_match 'fastapi: a wrong type is 422' '^HTTP/1.1 422 ' "$(http /item/x -i)"
GOOD=(request '/item/1')
baseline
guest_ok 'fastapi: well afterwards'
check 'fastapi: halts' halt

boot
check 'django asgi: configured' configure "$APPS/django" main:asgi
common 'django asgi'
both 'django asgi: a stream' "$(numbers)" /stream

boot
check 'django wsgi: configured' configure "$APPS/django" main:wsgi
common 'django wsgi'
both 'django wsgi: a stream' "$(numbers)" /stream

boot
check 'flask: configured' configure "$APPS/flask" main:app
common flask
both 'flask: a stream' "$(numbers)" /stream
check_match 'flask: an event is a POST' 'event aleph.message: \{' "$(event '{"a": 1}')"

boot
check 'quart: configured' configure "$APPS/quart" main:app
common quart
both_matter 'quart: one lifespan' '"lifespans": ?1' /

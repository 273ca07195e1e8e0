#!/usr/bin/env bash
# What the first page of Starlette's, Django's and Express's documentation has its reader write, served by
# `agent run` as a reader would type it. Full matrix: it fetches Express.
. "$(dirname "$0")/lib.sh"

need iproute2 nodejs python3-django python3-starlette python3-venv >&2
EXPRESS=$(npm_packages express@5.3.0)
export TMPDIR=$T PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ADDRESS=http://127.0.0.1:8080/

# run DIR ARGUMENT…: `agent run ARGUMENT…` in DIR, as a terminal starts it, up to its first answer. It has a
# network of its own, so that the usual port is free.
run() {
    local dir=$1
    shift
    NAME=$*
    spawn "$T/log" env --chdir="$dir" --default-signal=INT unshare --net \
        bash -c 'ip link set lo up; exec "$@"' - "$AGENT" run "$@"
    RUN_PID=$SPAWNED
    wait_for 30 answers_or_ended || true
    check "$NAME: says where it serves" wait_for 5 grep -q "serving $ADDRESS" "$T/log"
}

get() { nsenter --net="/proc/$RUN_PID/ns/net" curl -sS --max-time 30 "$@"; }
answers_or_ended() { get -o "$T/first" "$ADDRESS" 2>/dev/null || is_gone "$RUN_PID"; }
control_c() { kill -INT -- "-$RUN_PID"; }

# Ends it by ctrl-C, unless that was done before.
finish() {
    local status=0
    [ -n "${1-}" ] || control_c
    wait "$RUN_PID" || status=$?
    check_eq "$NAME: ctrl-C ends it with 0" 0 "$status"
    check_eq "$NAME: and nothing broke" '' "$(grep -E "$BAD_CONSOLE|Traceback|Error" "$T/log" || true)"
}

# ---- Starlette -------------------------------------------------------------------------------

mkdir "$T/starlette"
cat >"$T/starlette/main.py" <<'END'
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route


async def homepage(request):
    return JSONResponse({'hello': 'world'})


app = Starlette(debug=True, routes=[
    Route('/', homepage),
])
END
run "$T/starlette" . main:app
check_eq 'starlette: the page' '200 application/json {"hello":"world"}' "$(get -w '%{http_code} %{content_type} ' -o "$T/page" $ADDRESS; cat "$T/page")"
check_eq 'starlette: no other' 404 "$(get -o "$T/page" -w '%{http_code}' "${ADDRESS}other")"
finish
check_match 'starlette: it ends by itself' 'exited with exit code 0' "$(cat "$T/log")"

# As its reader installs it: in an environment of its own, which the shell has activated.
$PYTHON -m venv --without-pip --system-site-packages "$T/venv"
echo 'here = True' >"$(echo "$T"/venv/lib/python3*/site-packages)/only_in_venv.py"
sed -i '1i import only_in_venv' "$T/starlette/main.py"
PATH=$T/venv/bin:$PATH run "$T/starlette" . main:app
check_eq 'starlette: in a virtual environment' '{"hello":"world"}' "$(get $ADDRESS)"
finish

# ---- Django ----------------------------------------------------------------------------------

mkdir "$T/django"
(cd "$T/django" && django-admin startproject mysite && cd mysite && $PYTHON manage.py startapp polls)
check_site() {
    run "$T/django" mysite "mysite.$1:application"
    check_match "django, $1: the page" 'The install worked successfully! Congratulations!' "$(get $ADDRESS)"
    finish
}
check_site asgi
check_site wsgi

cat >"$T/django/mysite/polls/views.py" <<'END'
from django.http import HttpResponse


def index(request):
    return HttpResponse("Hello, world. You're at the polls index.")
END
cat >"$T/django/mysite/polls/urls.py" <<'END'
from django.urls import path

from . import views

urlpatterns = [
    path("", views.index, name="index"),
]
END
cat >"$T/django/mysite/mysite/urls.py" <<'END'
from django.contrib import admin
from django.urls import include, path

urlpatterns = [
    path("polls/", include("polls.urls")),
    path("admin/", admin.site.urls),
]
END
check_polls() {
    run "$T/django" mysite "mysite.$1:application"
    check_eq "django, $1: the polls" "Hello, world. You're at the polls index." "$(get "${ADDRESS}polls/")"
    check_eq "django, $1: a redirect leads back here" "302 ${ADDRESS}admin/login/?next=/admin/" \
        "$(get -o "$T/page" -w '%{http_code} %{redirect_url}' "${ADDRESS}admin/")"
    check_match "django, $1: and on to the form" '<form action="/admin/login/' "$(get -L "${ADDRESS}admin/")"
    finish
}
check_polls asgi
check_polls wsgi

# ---- Express ---------------------------------------------------------------------------------

check_express() {
    run "$T/express" . "$1"
    check_eq "express, $1: the page" 'Hello World!' "$(get $ADDRESS)"
    check_eq "express, $1: no other" 404 "$(get -o "$T/page" -w '%{http_code}' "${ADDRESS}other")"
    check_match "express, $1: it says what it says" 'Example app listening on port 3000' "$(cat "$T/log")"
    get "${ADDRESS}slow" >"$T/slow" &
    check "express, $1: a request is in flight" wait_for 10 grep -q 'slow: begun' "$T/log"
    control_c
    wait $! || true
    check_eq "express, $1: and ends before the program" 'slowly' "$(cat "$T/slow")"
    finish now
}

mkdir "$T/express"
cp -r "$EXPRESS/node_modules" "$T/express/"
cat >"$T/express/app.js" <<'END'
const express = require('express')
const app = express()
const port = 3000

app.get('/', (req, res) => {
  res.send('Hello World!')
})

app.listen(port, () => {
  console.log(`Example app listening on port ${port}`)
})
END
sed "1c import express from 'express'" "$T/express/app.js" >"$T/express/app.mjs"
for file in app.js app.mjs; do
    cat >>"$T/express/$file" <<'END'
// Not of that page: something to be in the middle of.
app.get('/slow', (req, res) => {
  console.log('slow: begun')
  setTimeout(() => res.send('slowly'), 700)
})
END
    check_express "$file"
done

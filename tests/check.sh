#!/usr/bin/env bash
# `./build.sh check` with agents that were broken on purpose: each row fails for its own breakage, and
# all pass with the one that is whole. Full matrix: an agent is built and booted for each.
TEST_SECONDS=${TEST_SECONDS:-1200}
. "$(dirname "$0")/lib.sh"

BROKEN=$T/broken
mkdir "$BROKEN"
cp -r "$GUEST_ROOT"/{agent.c,agent.h,build.sh,shims,vendor} "$BROKEN"
mkdir -p "$BROKEN/out"
cp -r "$GUEST_ROOT/out/lib" "$BROKEN/out/"

# image_with FILE: the tests' root with that file as its init. Prints the image.
image_with() { (AGENT=$1 guest_image "$TEST_IMAGE" >&2 && echo "$GUEST_IMAGE"); }

# table NAME IMAGE: what check says of it, by the agent of the host, which is whole.
table() { CHECK_READY_S=30 "$GUEST_ROOT/runtimes/check.sh" "$2" >"$T/$1.table" 2>&1 || true; }
says() { grep -E "^$2 +$3 " "$T/$1.table" || { cat "$T/$1.table"; return 1; }; }

ROWS='ready configuration executable volumes asgi event wsgi node halt'

table whole "$(image_with "$AGENT")"
for row in $ROWS; do
    check "check: whole: $row passes" says whole "$row" ok
done

# breaks ROW FILE SED: with that change, the row fails; the rows after ROW are those that still pass.
breaks() {
    local row=$1 file=$2 change=$3
    shift 3
    cp "$GUEST_ROOT"/agent.c "$BROKEN/"
    cp "$GUEST_ROOT"/shims/* "$BROKEN/shims/"
    sed -i "$change" "$BROKEN/$file"
    if cmp -s "$BROKEN/$file" "$GUEST_ROOT/$file" || ! "$BROKEN/build.sh" >"$T/build.log" 2>&1; then
        fail "check: breaking $row" "nothing was changed, or it does not build: $(tail -n 3 "$T/build.log")"
        return
    fi
    table "$row" "$(image_with "$BROKEN/out/agent")"
    check "check: broken: $row fails" says "$row" "$row" FAIL
    for other; do
        check "check: $row is broken: $other passes" says "$row" "$other" ok
    done
}

breaks ready agent.c 's/VMADDR_CID_HOST, PORT_ALEPH)/VMADDR_CID_HOST, PORT_ALEPH + 2)/'
breaks configuration agent.c 's/mp_write_bool(&out, ok);/mp_write_bool(\&out, true);/' ready halt
breaks executable agent.c 's/"HOST", "127.0.0.1"/"HOST", "127.0.0.2"/' ready asgi event wsgi
breaks volumes agent.c 's/(v->read_only ? MS_RDONLY : 0)/MS_RDONLY/' ready executable asgi halt
breaks asgi agent.c '/marshal_bytes(out, request_part(r, r->query));/s/r->query/r->raw_path/' ready executable event node
breaks event agent.c 's/marshal_text(out, request_part(r, r->event));/marshal_text(out, SPAN("other"));/' ready asgi wsgi
breaks wsgi shims/worker.py 's/"QUERY_STRING": .*/"QUERY_STRING": "",/' ready asgi event
breaks node shims/node.cjs "s/^const fs = .*/process.exit(3);/" ready executable asgi
breaks halt agent.c 's/^    reboot(off ? /    (void)(off ? /' ready executable asgi

/* fuzz_conf.c - the supervisor's configuration: length, map, keys. Fed in pieces and whole, the
 * outcome is the same; what is accepted keeps what conf promises, what is not says why. The
 * same of a file's JSON, which begins with a brace where the other has the size of the pieces.
 *
 * What follows an accepted configuration (hostname, network, files) is not run here. */
#define main agent_main
#include "../agent.c"
#undef main
#include "fuzz.h"

static void seed_json(unsigned which, struct buf *out)
{
    static const char *const fields[] = {
        "\"code\": \"/srv\"", "\"variables\": {\"A\": \"1\", \"B\": \"\\u00e9\"}", "\"hostname\": \"h-1.x\"",
        "\"ip\": \"10.0.0.2/24\", \"route\": \"10.0.0.1\"", "\"dns_servers\": [\"9.9.9.9\", \"::1\"]",
        "\"volumes\": [{\"mount\": \"/v\", \"device\": \"vdb\", \"read_only\": false}]",
        "\"listen\": [\"vsock:80\", \"tcp:127.0.0.1:1\", \"unix:/s\", \"fd:3\"], \"wire\": \"unix:/w\"",
        "\"log\": \"debug\", \"limits\": {\"conns\": 20, \"http_body_bytes\": 9223372036854775807}",
        "\"entrypoint\": \"run.sh x\", \"args\": [\"a\", \"b c\"], \"port\": 81",
        "\"authorized_keys\": [\"ssh-ed25519 AAAA\"]", "\"ipv6\": null",
    };

    buf_add_text(out, which & 1 << 8 ? "{" : "{\n \"entrypoint\": \"main:app\",");
    for (size_t i = 0; i < COUNT(fields); i++)
        if (which >> i & 1)
            buf_add_format(out, "\n %s,", fields[i]);
    buf_add_text(out, "\n \"ipv6_gateway\": null\n}");
}

static void fuzz_seed(unsigned which, struct buf *out)
{
    if (which & 4) {
        seed_json(which >> 3, out);
        return;
    }
    static const char *const texts[][2] = {
        { "interface", "asgi" }, { "vm_hash", "cafecafe" }, { "encoding", "plain" }, { "entrypoint", "main:app" },
        { "ip", "10.0.0.2/24" }, { "route", "10.0.0.1" }, { "ipv6", "fe80::2/64" }, { "ipv6_gateway", "fe80::1" },
    };
    struct buf map = { 0 };

    mp_write_map(&map, COUNT(texts) + 6 + (which & 1));
    for (size_t i = 0; i < COUNT(texts); i++) {
        mp_write_key(&map, texts[i][0]);
        mp_write_key(&map, texts[i][1]);
    }
    if (which & 1) {
        mp_write_key(&map, "unknown");
        mp_write_nil(&map);
    }
    mp_write_key(&map, "input_data");
    mp_write_nil(&map);
    mp_write_key(&map, "code");
    mp_write_bin(&map, SPAN("app = 1"));
    mp_write_key(&map, "dns_servers");
    mp_write_array(&map, 2);
    mp_write_key(&map, "9.9.9.9");
    mp_write_key(&map, "::1");
    mp_write_key(&map, "authorized_keys");
    mp_write_array(&map, 1);
    mp_write_key(&map, "ssh-ed25519 AAAA");
    mp_write_key(&map, "variables");
    mp_write_map(&map, 2);
    mp_write_key(&map, "A");
    mp_write_key(&map, "1");
    mp_write_key(&map, "LD_PRELOAD");
    mp_write_key(&map, "x");
    mp_write_key(&map, "volumes");
    mp_write_array(&map, which & 2 ? 1 : 0);
    if (which & 2) {
        mp_write_map(&map, 3);
        mp_write_key(&map, "mount");
        mp_write_key(&map, "/data");
        mp_write_key(&map, "device");
        mp_write_key(&map, "vdb");
        mp_write_key(&map, "read_only");
        mp_write_bool(&map, true);
    }
    buf_add_byte(out, (unsigned char)which);
    buf_add_format(out, "%zu\n", map.len);
    buf_add_span(out, buf_span(&map));
    buf_fini(&map);
}

/* A connection that leads nowhere: answers gather in its output. */
static void aleph_begin(struct aleph *a, struct aleph_server *s, struct conns *conns)
{
    *a = (struct aleph){ .server = s, .state = ALEPH_CONF };
    a->conn = (struct conn){ .all = conns, .proto = &aleph_proto, .state = CONN_OPEN, .in_max = CONN_READ_BYTES,
                             .watch = { .fd = -1, .on_event = conn_on_event, .on_deadline = conn_on_deadline } };
}

static void aleph_end(struct aleph *a, struct loop *l)
{
    loop_never(l, &a->conn.watch);
    loop_forget_soon(l, &a->conn.watch);
    buf_fini(&a->conn.in);
    buf_fini(&a->conn.out);
}

/* What a configuration promises to those who use it. */
static void check_conf(struct conf *c)
{
    struct conf copy;
    struct buf marshalled = { 0 };

    demand(c->entrypoint && (c->source == CONF_FILE || c->encoding == ENCODING_SQUASHFS || (c->encoding != ENCODING_NONE && c->code.p)),
           "accepted without what a program needs");
    demand(strlen(c->hostname) <= HOSTNAME_MAX && !strpbrk(c->hostname, "/ \n"), "a hostname that is none");
    demand(c->code.n <= c->raw.len, "code that is longer than the message");
    for (size_t i = 0; i < c->variables_len; i++)
        demand(c->variables[i].name[0] && !strchr(c->variables[i].name, '=') && c->variables[i].value, "a variable");
    for (size_t i = 0; i < c->dns_servers_len; i++)
        demand(!strpbrk(c->dns_servers[i], " \n/"), "a name server");
    demand(!c->ip || !strpbrk(c->ip, " \n"), "an address");
    demand(conf_copy_program(&copy, c) == 0, "a copy");
    program_marshal(&copy, &marshalled);
    struct program program = { .conf = copy, .env = program_env_guest };
    char **env = program_env(&program, PORT_PROGRAM);
    for (size_t n = 0; env && env[n]; n++)
        demand(strchr(env[n], '=') != NULL, "an environment");
    env_free(env);
    buf_fini(&marshalled);
    conf_fini(&copy);
}

/* Feeds the frame in pieces of that many bytes as aleph_on_conf does, and tells the outcome:
 * the answer to the host, or what conf_read_msgpack says. */
static void outcome(struct span frame, size_t piece, struct buf *told)
{
    struct loop l = { .epoll_fd = -1 };
    struct conns conns = { .loop = &l };
    struct aleph_server s = { .loop = &l, .conns = &conns };
    struct aleph a;
    const char *wrong = "";
    enum scan scan = SCAN_MORE;

    l.soon_last = &l.soon_first;
    aleph_begin(&a, &s, &conns);
    while (frame.n > 0 && a.conn.state == CONN_OPEN && scan == SCAN_MORE) {
        size_t n = frame.n < piece ? frame.n : piece;
        buf_add(&a.conn.in, frame.p, n);
        frame = (struct span){ frame.p + n, frame.n - n };
        if (a.conf_bytes == 0 && !aleph_conf_length(&a))
            continue;
        scan = mp_scan(&a.scan, buf_at(&a.conn.in), a.conn.in.len, a.conf_bytes, &wrong);
        demand(a.scan.pos <= a.conn.in.len && a.scan.depth <= 64, "a scan past its input");
    }
    if (a.conn.state != CONN_OPEN) {
        demand(is_one_map(buf_span(&a.conn.out)), "the answer is no map");
        buf_add_span(told, buf_span(&a.conn.out));
    } else if (scan == SCAN_DONE && a.scan.pos == a.conf_bytes) {
        struct conf c = { .raw = a.conn.in };
        a.conn.in = (struct buf){ 0 };
        c.raw.len = a.conf_bytes;               /* what is behind it was refused before */
        int rc = conf_read_msgpack(&c, told);
        demand(rc == 0 || told->len > 0, "refused without a reason");
        if (rc == 0)
            check_conf(&c);
        conf_fini(&c);
    } else {
        buf_add_format(told, "%s at %zu: %s", scan == SCAN_BAD ? "bad" : scan == SCAN_DONE ? "early" : "more", a.scan.pos, wrong);
    }
    aleph_end(&a, &l);
    free(l.heap);
}

/* Nothing of a file counts before it is right as a whole. */
static void file_outcome(struct span text)
{
    struct limits before = limits;
    struct conf c = { 0 };
    struct buf why = { 0 };
    int rc = conf_read_json(&c, text, &why);

    if (rc == 0)
        rc = conf_check(&c, &why);
    demand(rc == 0 || why.len > 0, "refused without a reason");
    demand(memcmp(&before, &limits, sizeof limits) == 0, "a limit was set by reading");
    if (rc == 0 && c.entrypoint)
        check_conf(&c);
    else if (rc == 0)
        demand(!c.variables && !c.volumes && !c.ip && !c.folder, "a program that is none");
    for (size_t i = 0; rc == 0 && i < c.settings.limits_len; i++)
        demand(!limit_set(&before, c.settings.limits[i]), "a limit that cannot be set");
    for (size_t i = 0; rc == 0 && i < c.settings.listen_len; i++)
        demand(address_can_listen(c.settings.listen[i], &(bool){ false }), "an address that is none");
    conf_fini(&c);
    buf_fini(&why);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz f = { data, size };

    if (size > 0 && data[0] == '{') {
        file_outcome(fuzz_piece(&f, size));
        return 0;
    }
    size_t piece = 1 + fuzz_byte(&f);
    struct span frame = fuzz_piece(&f, f.n);
    struct buf whole = { 0 }, pieces = { 0 };

    outcome(frame, SIZE_MAX, &whole);
    outcome(frame, piece, &pieces);
    demand_same(&whole, &pieces);
    return 0;
}

/* fuzz_upstream.c - whatever a program answers on its connection, in whatever pieces: the front
 * gets a head that is well formed, no byte before it or past its end, and one end or failure;
 * the pieces do not matter. A connection that has seen anything odd is not used again.
 *
 * No other connection can be made: whoever tries is refused. */
#define _GNU_SOURCE
#include <errno.h>

static int refuse_socket(int family, int type, int protocol)
{
    (void)family;
    (void)type;
    (void)protocol;
    errno = ECONNREFUSED;
    return -1;
}

#define SYS_READ    read
#define SYS_WRITE   write
#define SYS_SOCKET  refuse_socket
#define SYS_ACCEPT  accept4
#define main agent_main
#include "../agent.c"
#undef main
#include "fuzz.h"

static void fuzz_seed(unsigned which, struct buf *out)
{
    static const char *const answers[] = {
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: 1\r\nX-A: 2\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nTrailer: x\r\n\r\n",
        "HTTP/1.0 200 OK\r\n\r\nup to the end",
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x05hello",
        "HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\nETag: \"x\"\r\n\r\n",
        "HTTP/1.1 200 OK\r\nConnection: close, X-Gone\r\nX-Gone: 1\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\t\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    };

    buf_add_byte(out, (unsigned char)(which >> 3));
    buf_add_byte(out, (unsigned char)(which >> 6));
    buf_add_text(out, answers[which % COUNT(answers)]);
}

/* What the front was told, in order. */
struct client {
    struct exchange ex;
    struct buf      told;
    bool            head, ended;
};

static struct client *client_of(struct exchange *ex) { return CONTAINER(ex, struct client, ex); }

static void client_on_room(struct exchange *ex) { demand(!client_of(ex)->ended, "room after the end"); }

static void client_on_head(struct exchange *ex, const struct response_head *h)
{
    struct client *c = client_of(ex);
    struct span rest = h->fields, name, value;
    unsigned fields = 0;

    demand(!c->head && !c->ended, "a second head");
    demand((h->status >= 200 && h->status <= 999) || (h->status == 101 && ex->may_upgrade), "a status");
    for (; field_next(&rest, &name, &value); fields++)
        demand(field_name_ok(name) && field_value_ok(value), "a field");
    demand(rest.n == 0 && fields == h->fields_count && fields <= limits.head_fields, "the fields");
    c->head = true;
    buf_add_format(&c->told, "%d ", h->status);
    buf_add_span(&c->told, h->fields);
}

static void client_on_data(struct exchange *ex, struct span data)
{
    struct client *c = client_of(ex);

    demand(c->head && !c->ended && data.n > 0 && data.n <= UPSTREAM_CREDIT, "data out of turn");
    buf_add_span(&c->told, data);
    exchange_consumed(ex, data.n);
}

static void client_on_end(struct exchange *ex)
{
    demand(client_of(ex)->head && !client_of(ex)->ended, "an end out of turn");
    client_of(ex)->ended = true;
    buf_add_text(&client_of(ex)->told, "|end");
}

static void client_on_fail(struct exchange *ex, enum failure kind, struct span text, struct span traceback)
{
    (void)text;
    (void)traceback;
    demand(!client_of(ex)->ended, "a failure after the end");
    client_of(ex)->ended = true;
    buf_add_format(&client_of(ex)->told, "|failed %d", kind);
}

static const struct front client_front = {
    .on_room = client_on_room, .on_head = client_on_head, .on_data = client_on_data,
    .on_end = client_on_end, .on_fail = client_on_fail,
};

static void owner_on_refused(struct runner *r, struct exchange *ex)
{
    (void)r;
    exchange_fail(ex, FAILURE_CRASHED, SPAN("refused"), SPAN(""));
}

static const struct runner_owner owner = { .on_refused = owner_on_refused };

static void client_start(struct client *c, struct loop *loop, struct upstream *up, unsigned how)
{
    struct request *r = &c->ex.request;

    *c = (struct client){ .ex = { .front = &client_front } };
    r->http_version = "1.1";
    r->has_body = how & 1;
    r->method = request_part_begin(r);
    buf_add_text(&r->text, how & 1 ? "POST" : how & 2 ? "HEAD" : "GET");
    request_part_end(r, &r->method);
    r->raw_path = request_part_begin(r);
    buf_add_text(&r->text, "/");
    request_part_end(r, &r->raw_path);
    if (how & 4 && !r->has_body) {
        r->upgrade = request_part_begin(r);
        buf_add_text(&r->text, "websocket");
        request_part_end(r, &r->upgrade);
    }
    exchange_start(&c->ex, loop, &nobody_backend);
    upstream_request(&up->runner, &c->ex);
    if (r->has_body && !c->ended)
        exchange_body(&c->ex, SPAN("body"), true);
}

static void turn_on_event(struct watch *w, uint32_t events)
{
    (void)w;
    (void)events;
}

/* Every limit of time passes. */
static void pass_time(struct loop *l)
{
    while (l->heap_len > 0) {
        struct watch *w = l->heap[1];
        loop_never(l, w);
        w->on_deadline(w);
        loop_rest(l);
    }
}

static void outcome(struct span bytes, size_t piece, unsigned how, struct buf *told)
{
    struct loop loop;
    struct upstream *up = calloc(1, sizeof *up);
    struct up *u = calloc(1, sizeof *u);
    struct client client;
    struct watch turn = { .fd = -1, .on_event = turn_on_event };
    char sink[4096];
    int ends[2];

    loop_init(&loop);
    demand(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0, "a socket pair");
    *up = (struct upstream){ .runner = { .kind = &upstream_kind, .owner = &owner, .loop = &loop, .state = RUNNER_READY,
                                         .child = { .name = "fuzz" }, .output = { .watch = { .fd = -1 } } },
        .conns = { .loop = &loop }, .reports = { .fd = 0 }, .probe = { .fd = -1, .on_deadline = upstream_probe },
        .lost_timer = { .fd = -1, .on_deadline = lost_on_deadline } };
    demand(conn_open(&u->conn, &up->conns, &up_proto, ends[1], CONN_OPEN) == 0, "a connection");
    u->of = up;
    u->connected = u->parked = true;
    up_reset(u);
    up_link(&up->idle, u);
    up->idle_len = 1;
    conn_after(&u->conn, limits.upstream_idle_ms);
    client_start(&client, &loop, up, how);
    loop_rest(&loop);
    while (bytes.n > 0) {
        size_t n = bytes.n < piece ? bytes.n : piece;
        ssize_t sent = send(ends[0], bytes.p, n, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN)
            break;
        bytes = sent > 0 ? (struct span){ bytes.p + sent, bytes.n - (size_t)sent } : bytes;
        loop_rest(&loop);
        demand(read(ends[0], sink, sizeof sink) != 0 || client.ended, "it hung up within the exchange");
    }
    shutdown(ends[0], SHUT_WR);
    loop_rest(&loop);
    pass_time(&loop);
    demand(client.ended && !client.ex.backend, "no end");
    demand(!up->busy && !up->lost && up->idle_len == 0 && !up->idle && up->conns.count == 0, "something is left");
    buf_add_span(told, buf_span(&client.told));
    buf_fini(&client.told);
    request_fini(&client.ex.request);
    up->reports.fd = -1;
    upstream_free(&up->runner);
    loop_soon(&loop, &turn);        /* a turn more, at whose end it is buried */
    loop_rest(&loop);
    close(ends[0]);
    free(loop.heap);
    close(loop.epoll_fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz f = { data, size };
    size_t piece = 1 + fuzz_byte(&f);
    unsigned how = fuzz_byte(&f);
    struct span bytes = fuzz_piece(&f, f.n);
    struct buf whole = { 0 }, pieces = { 0 };

    outcome(bytes, SIZE_MAX, how, &whole);
    outcome(bytes, piece, how, &pieces);
    demand_same(&whole, &pieces);
    return 0;
}

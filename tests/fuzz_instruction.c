/* fuzz_instruction.c - whatever comes on a connection of the supervisor's wire, in whatever
 * pieces: requests, events, commands, halt and none of these. Each gets one well-formed answer
 * or reaches the program as a request that keeps what the front promises; the pieces do not
 * matter. The program answers, fails, or sees its host go.
 *
 * No process can be started: a command must fail with an error of its own. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/types.h>
#include <unistd.h>

static pid_t fuzz_fork(void)
{
    errno = EAGAIN;
    return -1;
}

#define fork fuzz_fork
#define main agent_main
#include "../agent.c"
#undef main
#include "fuzz.h"

static void fuzz_seed(unsigned which, struct buf *out)
{
    buf_add_byte(out, (unsigned char)(which >> 4));
    buf_add_byte(out, (unsigned char)(which >> 12));
    switch (which % 8) {
    case 0: buf_add_text(out, "halt\n"); break;
    case 1: buf_add_text(out, "!echo hello\n"); break;
    case 2: buf_add_text(out, "12\n\x81\xa1""a\xa7""1234567"); break;
    case 3: seed_scope(out, "aleph.message"); break;
    default: seed_scope(out, "http"); break;
    }
}

struct bench {
    struct loop         loop;
    struct conns        conns;
    struct children     children;
    struct program      program;
    struct setup        setup;
    struct aleph_server aleph;
    unsigned            halts;
    int                 fd;             /* the host's end */
};

static void bench_on_halt(struct aleph_server *s)
{
    ((struct bench *)s->owner)->halts++;
}

static void bench_init(struct bench *b)
{
    int ends[2];

    *b = (struct bench){ 0 };
    loop_init(&b->loop);
    b->conns.loop = &b->loop;
    program_init(&b->program, &b->loop, &b->children);
    b->program.state = PROGRAM_STARTING;
    b->setup.state = SETUP_DONE;
    b->aleph = (struct aleph_server){ .loop = &b->loop, .conns = &b->conns, .children = &b->children,
        .program = &b->program, .setup = &b->setup, .on_halt = bench_on_halt, .owner = b };
    b->aleph.listener.arg = &b->aleph;
    demand(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0, "a socket pair");
    b->fd = ends[0];
    aleph_on_accept(&b->aleph.listener, ends[1]);
}

/* Closes the host's end, lets every limit of time pass, and demands that nothing is left. */
static void bench_fini(struct bench *b)
{
    close(b->fd);
    loop_rest(&b->loop);
    while (b->loop.heap_len > 0) {
        struct watch *w = b->loop.heap[1];
        loop_never(&b->loop, w);
        w->on_deadline(w);
        loop_rest(&b->loop);
    }
    demand(b->conns.count == 0 && b->program.queued == 0 && b->aleph.commands == 0 && !b->aleph.halting, "something is left");
    free(b->loop.heap);
    close(b->loop.epoll_fd);
}

static void bench_read(struct bench *b, struct buf *answer)
{
    ssize_t n;

    for (char *to; (to = buf_room(answer, 4096)) && (n = read(b->fd, to, 4096)) > 0;)
        buf_added(answer, (size_t)n);
}

/* Bytes that may stand in a request line: visible ASCII, none that would end the part. */
static void check_target(struct span s, const char *never)
{
    for (size_t i = 0; i < s.n; i++)
        demand(s.p[i] > ' ' && s.p[i] < 0x7f && !strchr(never, s.p[i]), "a byte in the target");
}

static void check_request(const struct exchange *ex, size_t body)
{
    const struct request *r = &ex->request;
    struct span rest = request_part(r, r->fields), name, value;
    uint32_t fields = 0, lengths = 0;
    struct buf marshalled = { 0 };
    int64_t length;

    if (!r->is_event) {
        check_target(request_part(r, r->raw_path), "?#");
        check_target(request_part(r, r->query), "#");
        demand(request_part(r, r->raw_path).p[0] == '/', "a path without a slash");
        demand(field_name_ok(request_part(r, r->method)), "a method");
    }
    while (field_next(&rest, &name, &value)) {
        fields++;
        demand(field_name_ok(name) && field_value_ok(value) && !field_is_hop_by_hop(name), "a field");
        if (span_eq_nocase(name, "content-length")) {
            lengths++;
            demand(number_read(value, 0, INT64_MAX, &length) && (size_t)length == body, "a length that is not the body's");
        }
    }
    demand(rest.n == 0 && fields == r->fields_count && lengths <= 1, "the fields");
    marshal_scope(&marshalled, r);
    demand(!marshalled.failed, "a scope");
    buf_fini(&marshalled);
}

/* The program's part: an answer, a failure, or nothing until the host has gone. */
static void answer(struct bench *b, unsigned how)
{
    static const char fields[] = "x\0caf\xe9\0connection\0close\0";
    struct exchange *ex = b->program.first;
    struct response_head h = { .status = 200, .fields = { fields, sizeof fields - 1 }, .fields_count = 2 };
    bool event = ex->request.is_event;

    if (how % 4 == 3)
        return;
    program_dequeue(&b->program, ex);
    if (how % 4 == 0) {
        exchange_fail(ex, FAILURE_EXCEPTION, SPAN("\xff failed"), SPAN(""));
        return;
    }
    ex->backend = NULL;             /* nobody to be told what was consumed */
    if (!event)
        exchange_head(ex, &h);
    exchange_data(ex, how % 4 == 1 ? SPAN("\x81\xa1""a\xc0") : SPAN("\x81\xa1"));
    exchange_end(ex);
}

/* Feeds it and tells what came of it; the answer is checked. */
static void outcome(struct span bytes, size_t piece, unsigned how, struct buf *told)
{
    struct bench b;
    char first = bytes.n > 0 ? bytes.p[0] : 0;

    bench_init(&b);
    while (bytes.n > 0) {
        size_t n = bytes.n < piece ? bytes.n : piece;
        ssize_t sent = send(b.fd, bytes.p, n, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN)
            break;
        bytes = sent > 0 ? (struct span){ bytes.p + sent, bytes.n - (size_t)sent } : bytes;
        loop_rest(&b.loop);
    }
    shutdown(b.fd, SHUT_WR);
    loop_rest(&b.loop);
    if (b.program.first) {
        struct aleph *a = CONTAINER(b.program.first, struct aleph, ex);
        check_request(&a->ex, a->body_left);
        buf_add_span(told, buf_span(&a->ex.request.text));
        answer(&b, how);
        loop_rest(&b.loop);
    }
    size_t at = told->len;
    bench_read(&b, told);
    struct span reply = { buf_span(told).p + at, told->len - at };
    demand(reply.n == 0 || is_one_map(reply), "the answer is no map");
    if (first == 'h')
        told->len = at;             /* it is quoted in the answer as far as it had come */
    buf_add_format(told, "|%u", b.halts);
    bench_fini(&b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz f = { data, size };
    size_t piece = 1 + fuzz_byte(&f);
    unsigned how = fuzz_byte(&f);
    struct span bytes = fuzz_piece(&f, f.n);
    struct buf whole = { 0 }, pieces = { 0 };

    /* halt takes effect with its fourth byte, so what follows it counts only if it was there */
    if (bytes.n >= 4 && memcmp(bytes.p, "halt", 4) == 0)
        piece = SIZE_MAX;
    outcome(bytes, SIZE_MAX, how, &whole);
    outcome(bytes, piece, how, &pieces);
    demand_same(&whole, &pieces);
    return 0;
}

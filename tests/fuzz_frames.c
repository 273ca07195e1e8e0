/* fuzz_frames.c - what a worker may write to its channel, any order, any pieces, while fronts
 * send bodies, read answers and go away. Each exchange ends exactly once, a head comes before
 * data, no more data than there was credit for; what we write is whole frames; an answer on
 * the supervisor's wire is one map. */
#define main agent_main
#include "../agent.c"
#undef main
#include "fuzz.h"

#define SLOTS   8

/* An exchange behind a front that only counts. */
struct slot {
    struct exchange ex;
    bool            used, event, ended, cancelled, head;
    size_t          credit;         /* response bytes that may still come */
    size_t          unread;         /* came, and were not reported as consumed */
    bool            body_done;
};

struct bench {
    struct loop     loop;
    struct children children;
    struct worker  *worker;
    struct slot     slots[SLOTS];
    unsigned        told;           /* of the worker's own life */
};

static struct bench *bench;

static struct slot *slot_of(struct exchange *ex)
{
    struct slot *s = CONTAINER(ex, struct slot, ex);
    demand(s->used && !s->ended && !s->cancelled, "an exchange is called after its end");
    return s;
}

static void slot_on_room(struct exchange *ex)
{
    demand(!slot_of(ex)->body_done, "room for a body that is complete");
}

static void slot_on_head(struct exchange *ex, const struct response_head *h)
{
    struct slot *s = slot_of(ex);
    struct span rest = h->fields, name, value;
    unsigned n = 0;

    demand(!s->head && !s->event, "a second head");
    s->head = true;
    demand(h->status >= 200 && h->status <= 999, "a status");
    for (; field_next(&rest, &name, &value); n++)
        demand(field_name_ok(name) && field_value_ok(value), "a field");
    demand(n == h->fields_count && rest.n == 0, "the fields");
}

static void slot_on_data(struct exchange *ex, struct span data)
{
    struct slot *s = slot_of(ex);

    demand(s->head || s->event, "data before the head");
    demand(data.n > 0 && data.n <= s->credit, "more data than credit");
    s->credit -= data.n;
    s->unread += data.n;
}

static void slot_on_end(struct exchange *ex)
{
    struct slot *s = slot_of(ex);
    demand(s->head || s->event, "an end before the head");
    s->ended = true;
}

static void slot_on_fail(struct exchange *ex, enum failure kind, struct span text, struct span traceback)
{
    struct slot *s = slot_of(ex);
    demand(kind <= FAILURE_NO_MEMORY && (text.n == 0 || text.p) && (traceback.n == 0 || traceback.p), "a failure");
    s->ended = true;
}

static const struct front slot_front = {
    .on_room = slot_on_room, .on_head = slot_on_head, .on_data = slot_on_data,
    .on_end = slot_on_end, .on_fail = slot_on_fail,
};

static void life_on_warm(struct runner *w)
{
    demand(bench->told++ == 0 && w->state == RUNNER_WARM, "warm, once");
    w->state = RUNNER_STARTING;
}

static void life_on_ready(struct runner *w)
{
    demand(bench->told++ == 1 && w->state == RUNNER_READY, "ready, once, after warm");
}

static void life_on_start_failed(struct runner *w, struct span text, struct span traceback)
{
    (void)text;
    (void)traceback;
    demand(bench->told++ == 1 && w->state == RUNNER_STOPPING, "failed, once, after warm");
}

static void life_on_gone(struct runner *w, int status)
{
    (void)w;
    (void)status;
    demand(false, "nobody died");
}

static const struct runner_owner life = {
    .on_warm = life_on_warm, .on_ready = life_on_ready, .on_start_failed = life_on_start_failed, .on_gone = life_on_gone,
};

static void slot_start(struct bench *b, struct slot *s, unsigned flags)
{
    struct request *r = &s->ex.request;

    if (s->used && !s->ended && !s->cancelled)
        return;
    *s = (struct slot){ .used = true, .event = flags & 1, .credit = WORKER_CREDIT };
    s->ex.front = &slot_front;
    r->http_version = "1.1";
    r->is_event = s->event;
    r->has_body = !s->event && flags & 2;
    s->body_done = !r->has_body;
    r->method = request_part_begin(r);
    buf_add_text(&r->text, "GET");
    request_part_end(r, &r->method);
    r->raw_path = request_part_begin(r);
    buf_add_text(&r->text, "/");
    request_part_end(r, &r->raw_path);
    exchange_start(&s->ex, &b->loop, &worker_backend);
    demand(worker_request(b->worker, &s->ex, (char[sizeof ((struct stream *)0)->accept]){ 0 }) == 0, "a request");
}

static void slot_send(struct slot *s, unsigned size, bool last)
{
    static const char body[WORKER_CREDIT];
    size_t room = exchange_room(&s->ex), n = size * 300 < room ? size * 300 : room;

    if (s->used && !s->ended && !s->cancelled && !s->body_done && room > 0) {
        s->body_done = last;
        exchange_body(&s->ex, (struct span){ body, n }, last);
    }
}

/* Takes what we would write, which must be whole frames of ours. */
static void take_frames(struct worker *w)
{
    while (w->out.len > 0) {
        const char *p = buf_at(&w->out);
        demand(w->out.len >= FRAME_HEADER_BYTES && w->out.len - FRAME_HEADER_BYTES >= frame_u32(p), "a frame of ours is cut");
        unsigned type = (unsigned char)p[8], flags = (unsigned char)p[9];
        demand(type >= FRAME_CONFIGURE && type <= FRAME_WINDOW && flags <= FRAME_END && !p[10] && !p[11], "a frame of ours");
        demand(frame_u32(p + 4) > 0, "a stream of ours");
        buf_drop(&w->out, FRAME_HEADER_BYTES + frame_u32(p));
    }
}

static void receive(struct worker *w, struct span bytes, size_t piece)
{
    while (bytes.n > 0 && w->runner.state != RUNNER_BROKEN) {
        size_t n = bytes.n < piece ? bytes.n : piece;
        buf_add(&w->in, bytes.p, n);
        bytes = (struct span){ bytes.p + n, bytes.n - n };
        worker_parse(w);
        demand(w->runner.state == RUNNER_BROKEN || w->in.len < FRAME_HEADER_BYTES + WORKER_FRAME_MAX, "input piles up");
    }
}

/* A frame whose head is right; the payload is the fuzzer's, or long. */
static void receive_frame(struct worker *w, struct fuzz *f)
{
    struct buf frame = { 0 };
    unsigned id = fuzz_byte(f), type = fuzz_byte(f), size = fuzz_byte(f), flags = fuzz_byte(f);
    struct span payload = fuzz_piece(f, size & 0x7f);
    size_t more = size & 0x80 ? 500 * (size_t)(size & 0x7f) : 0;
    static const char long_payload[127 * 500];
    char head[FRAME_HEADER_BYTES];

    frame_head(head, (uint32_t)(payload.n + more), id, type % 14, flags & FRAME_END);
    buf_add(&frame, head, sizeof head);
    buf_add_span(&frame, payload);
    buf_add(&frame, long_payload, more);
    receive(w, buf_span(&frame), 1 + (flags >> 1) * 100);
    buf_fini(&frame);
}

static void step(struct bench *b, struct fuzz *f)
{
    unsigned op = fuzz_byte(f), arg = fuzz_byte(f);
    struct slot *s = &b->slots[arg % SLOTS];
    bool live = s->used && !s->ended && !s->cancelled;

    switch (op % 8) {
    case 0:
        if (b->worker->runner.state != RUNNER_BROKEN)
            slot_start(b, s, arg >> 3);
        break;
    case 1:
        slot_send(s, arg >> 3, op & 8);
        break;
    case 2:
        if (live) {
            s->cancelled = true;
            exchange_cancel(&s->ex);
        }
        break;
    case 3:
        if (live) {
            size_t n = s->unread;
            s->unread = 0;
            s->credit += n;
            exchange_consumed(&s->ex, n);
        }
        break;
    case 4:
        take_frames(b->worker);
        if (b->worker->choked)
            worker_unchoke(b->worker);
        break;
    case 5:
        receive(b->worker, fuzz_piece(f, arg), 1 + (op >> 3));
        break;
    default:
        receive_frame(b->worker, f);
    }
}

static char bodies[WORKER_SHARED_BYTES];

/* The same worker's frames for an instruction of the supervisor's wire: one map comes of it. */
static void answer_instruction(struct fuzz f, bool event)
{
    struct loop l;
    struct conns conns = { .loop = &l };
    struct children children = { 0 };
    struct program p;
    struct setup setup = { .state = SETUP_DONE };
    struct aleph_server server = { .loop = &l, .conns = &conns, .children = &children, .program = &p, .setup = &setup };
    struct worker *w = calloc(1, sizeof *w);
    struct buf bytes = { 0 };
    int ends[2];

    loop_init(&l);
    program_init(&p, &l, &children);
    *w = (struct worker){ .runner = { .kind = &worker_kind, .loop = &l, .children = &children, .owner = &life,
                                      .state = RUNNER_READY, .child = { .name = "fuzz" } }, .next_id = 1,
                          .channel = { .fd = -1, .on_event = worker_on_event }, .slots = bodies };
    w->runner.output.watch.fd = -1;
    p.places->runner = &w->runner;
    p.places->state = PLACE_SERVING;
    p.state = PROGRAM_SERVING;
    server.listener.arg = &server;
    demand(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0, "a socket pair");
    aleph_on_accept(&server.listener, ends[1]);
    seed_scope(&bytes, event ? "aleph.message" : "http");
    demand(send(ends[0], buf_at(&bytes), bytes.len, 0) == (ssize_t)bytes.len, "send");
    loop_rest(&l);
    buf_fini(&bytes);
    demand(p.queued == 0 && stream_find(w, 1) && *stream_find(w, 1), "it reached the worker");
    while (f.n > 0 && w->runner.state != RUNNER_BROKEN)
        receive_frame(w, &f);
    worker_fail_all(&w->runner, FAILURE_CRASHED, SPAN("crashed"), SPAN(""));
    for (ssize_t n = 1; n > 0;) {
        loop_rest(&l);
        char *to = buf_room(&bytes, 4096);
        if ((n = to ? read(ends[0], to, 4096) : -1) > 0)
            buf_added(&bytes, (size_t)n);
    }
    demand(conns.count == 0, "the connection ends");
    demand(is_one_map(buf_span(&bytes)), "the reply is one map");
    buf_fini(&bytes);
    close(ends[0]);
    loop_forget_soon(&l, &w->channel);
    buf_fini(&w->in);
    buf_fini(&w->out);
    free(w);
    free(l.heap);
    close(l.epoll_fd);
}

/* A body that uses its credit up, nearly, and goes past it. */
static void seed_flood(struct buf *out, size_t head)
{
    static const char step[] = { 6, 0, 2, FRAME_RESPONSE_BODY, '\xff', 0 }, payload[0x7f];

    for (int i = 0; i < 2; i++) {
        buf_add(out, step + sizeof step - head, head);
        buf_add(out, payload, sizeof payload);
    }
}

static void fuzz_seed(unsigned which, struct buf *out)
{
    static const struct { unsigned char type, flags; const char *payload; size_t n; } frames[] = {
        { FRAME_RESPONSE_HEAD, 0, "\xc8\0\1\0a\0b\0", 8 }, { FRAME_RESPONSE_BODY, 0, "body", 4 },
        { FRAME_WINDOW, 0, "\1\0\0\0", 4 }, { FRAME_RESPONSE_BODY, FRAME_END, "\x81\xa1""a\xc0", 4 },
        { FRAME_FAILURE, 0, "text\0trace", 10 }, { FRAME_HELLO, 0, "", 0 },
        { FRAME_RESPONSE_SLOT, 0, "\2\0\0\0\x9\0\0\0", 8 },
    };

    buf_add_byte(out, (unsigned char)which);
    if (which & 4)
        buf_add(out, "\6\0\0\7\0\0\6\0\0\x8\0\0", 12);
    for (unsigned i = 0; i < 3; i++)
        buf_add(out, (const char[]){ 0, (char)(i | (which & 3) << 3) }, 2);
    for (unsigned i = which % 3; i < COUNT(frames); i++) {
        const char head[] = { (char)((which & 12) ? 6 : 14), 0, 1 + (char)(i % 2), (char)frames[i].type, (char)frames[i].n, (char)frames[i].flags };
        buf_add(out, which & 0x80 ? head + 2 : head, which & 0x80 ? 4 : 6);
        buf_add(out, frames[i].payload, frames[i].n);
        if (which & 16 && i == 1)
            seed_flood(out, which & 0x80 ? 4 : 6);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz f = { data, size };
    unsigned mode = fuzz_byte(&f);
    struct bench b = { .loop = { .epoll_fd = -1 } };

    if (mode & 0x80) {
        answer_instruction(f, mode & 1);
        return 0;
    }
    bench = &b;
    b.loop.soon_last = &b.loop.soon_first;
    struct worker *w = b.worker = calloc(1, sizeof *w);
    *w = (struct worker){ .runner = { .kind = &worker_kind, .loop = &b.loop, .children = &b.children, .owner = &life,
                                      .state = mode & 4 ? RUNNER_BOOTING : RUNNER_READY, .child = { .name = "fuzz" } },
                          .next_id = mode & 0x40 ? UINT32_MAX : 1,
                          .channel = { .fd = -1, .on_event = worker_on_event }, .slots = bodies };
    w->runner.output.watch.fd = -1;
    while (f.n > 0)
        step(&b, &f);
    take_frames(w);
    worker_fail_all(&w->runner, FAILURE_CRASHED, SPAN("crashed"), SPAN(""));
    for (size_t i = 0; i < SLOTS; i++)
        demand(!b.slots[i].used || b.slots[i].ended || b.slots[i].cancelled, "an exchange that never ends");
    demand(b.loop.heap_len == 0, "a deadline is left");
    loop_forget_soon(&b.loop, &w->channel);
    buf_fini(&w->in);
    buf_fini(&w->out);
    free(w);
    free(b.loop.heap);
    return 0;
}

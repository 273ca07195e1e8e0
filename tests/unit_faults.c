/* ---- group K: for tests/unit.c. Whole exchanges, from a client to a program that the test plays,
 * while the n-th allocation or system call of the agent fails, is interrupted or cut short, for
 * every n until a run does not reach it. The linker brings every call here (build.sh, --wrap), also
 * those of the libraries. ---- */

enum fault_kind {
    FAULT_NONE,
    FAULT_MEMORY,       /* an allocation finds none */
    FAULT_HARD,         /* a system call fails as fault.error says */
    FAULT_SOFT,         /* one that may be tried again: EINTR, EAGAIN */
    FAULT_SHORT,        /* one byte in a call, or 13 in all */
};

static struct {
    enum fault_kind kind;
    int  error;
    long at;            /* the n-th call, from 1 */
    bool ever;          /* and all after it */
    long seen;          /* calls so far */
    bool armed;         /* the agent runs, not the test */
} fault_plan;

static bool fault_due(enum fault_kind kind)
{
    if (!fault_plan.armed || fault_plan.kind != kind)
        return false;
    fault_plan.seen++;
    return fault_plan.ever ? fault_plan.seen >= fault_plan.at : fault_plan.seen == fault_plan.at;
}

static bool fault_fails(int fd, bool soft)
{
    bool due = (!soft || fault_plan.error != EMFILE) && fault_due(FAULT_HARD);

    due = due || (soft && fault_due(FAULT_SOFT));
    if (due && fault_plan.error == ECONNRESET)
        shutdown(fd, SHUT_RDWR);
    if (due) {
        watched_again(fd);
        errno = fault_plan.error;
    }
    return due;
}

/* How many bytes of n a call may carry. */
static size_t fault_cut(int fd, size_t n)
{
    size_t most = fault_plan.ever ? 13 : 1;

    if (n <= most || !fault_due(FAULT_SHORT))
        return n;
    watched_again(fd);
    return most;
}

#define WRAP(type, name, args)  type __real_##name args; type __wrap_##name args; type __wrap_##name args

static void *no_memory(void)
{
    errno = ENOMEM;
    return NULL;
}

WRAP(void *, malloc, (size_t n)) { return fault_due(FAULT_MEMORY) ? no_memory() : __real_malloc(n); }
WRAP(void *, calloc, (size_t n, size_t size)) { return fault_due(FAULT_MEMORY) ? no_memory() : __real_calloc(n, size); }
WRAP(void *, realloc, (void *p, size_t n)) { return fault_due(FAULT_MEMORY) ? no_memory() : __real_realloc(p, n); }
WRAP(ssize_t, read, (int fd, void *p, size_t n)) { return fault_fails(fd, true) ? -1 : __real_read(fd, p, fault_cut(fd, n)); }
WRAP(ssize_t, write, (int fd, const void *p, size_t n)) { return fault_fails(fd, true) ? -1 : __real_write(fd, p, fault_cut(fd, n)); }
WRAP(ssize_t, recv, (int fd, void *p, size_t n, int flags)) { return fault_fails(fd, true) ? -1 : __real_recv(fd, p, fault_cut(fd, n), flags); }
WRAP(ssize_t, send, (int fd, const void *p, size_t n, int flags)) { return fault_fails(fd, true) ? -1 : __real_send(fd, p, fault_cut(fd, n), flags); }
WRAP(int, socket, (int family, int type, int protocol)) { return fault_fails(-1, false) ? -1 : __real_socket(family, type, protocol); }
WRAP(int, connect, (int fd, const struct sockaddr *to, socklen_t n)) { return fault_fails(fd, false) ? -1 : __real_connect(fd, to, n); }
WRAP(int, epoll_ctl, (int fd, int op, int to, struct epoll_event *e)) { return op != EPOLL_CTL_DEL && fault_fails(fd, false) ? -1 : watched_ctl(fd, op, to, e); }

WRAP(ssize_t, sendmsg, (int fd, const struct msghdr *m, int flags))
{
    struct iovec first = m->msg_iov[m->msg_iov[0].iov_len == 0];
    struct msghdr part = { .msg_iov = &first, .msg_iovlen = 1 };

    if (fault_fails(fd, true))
        return -1;
    size_t n = fault_cut(fd, first.iov_len);
    if (n == first.iov_len)
        return __real_sendmsg(fd, m, flags);
    first.iov_len = n;
    return __real_sendmsg(fd, &part, flags);
}

static bool entropy_absent;
static unsigned entropy_asked, entropy_waited;

WRAP(ssize_t, getrandom, (void *p, size_t n, unsigned flags))
{
    entropy_asked++;
    entropy_waited += !(flags & GRND_NONBLOCK);
    if (!entropy_absent)
        return __real_getrandom(p, n, flags);
    errno = EAGAIN;
    return -1;
}

static time_t wall_ahead_s;         /* of the wall clock alone */

WRAP(time_t, time, (time_t *to))
{
    time_t now = __real_time(NULL) + wall_ahead_s;

    if (to)
        *to = now;
    return now;
}

/* ---- a program that the test plays ---- */

#define SCENE_PEERS     8
#define SCENE_REPLY     9000        /* bytes of its answer that are sent past every buffer */

struct scene_peer { int fd; char in[48 << 10]; size_t n; };

struct scene {
    struct bench       bench;
    bool               is_worker;
    struct runner     *runner;
    int                listener;
    char               path[64];
    struct scene_peer  peers[SCENE_PEERS];      /* the worker's channel, or connections to the program */
    struct buf         out;                     /* of the worker */
    bool               open[64], websocket[64]; /* its streams */
    struct pumps       pumps;
    struct listener    forward;
};

static char scene_body[SCENE_REPLY];

static void scene_frame(struct scene *s, unsigned id, enum frame_type type, unsigned flags, const char *p, size_t n)
{
    char head[FRAME_HEADER_BYTES];

    frame_head(head, (uint32_t)n, id, type, flags);
    buf_add(&s->out, head, sizeof head);
    buf_add(&s->out, p, n);
}

/* What the worker does about a frame. */
static void scene_on_frame(struct scene *s, unsigned id, unsigned type, unsigned flags, const char *p, size_t n)
{
    bool *open = &s->open[id % COUNT(s->open)], *websocket = &s->websocket[id % COUNT(s->open)];

    if (type == FRAME_REQUEST) {
        *open = true;
        *websocket = memmem(p, n, "sec-websocket-key", 17) != NULL;
        if (*websocket)
            scene_frame(s, id, FRAME_RESPONSE_HEAD, 0, "\x65\0\0\0", 4);
    }
    if (!*open)
        return;
    if (type == FRAME_DISCONNECT) {
        scene_frame(s, id, *websocket ? FRAME_CLOSE : FRAME_FAILURE, 0, "\xe8\x03", 2);
        *open = false;
    } else if (type == FRAME_TEXT || type == FRAME_BINARY) {
        scene_frame(s, id, type, flags, p, n);
    } else if ((type == FRAME_REQUEST || type == FRAME_REQUEST_BODY) && flags & FRAME_END && !*websocket) {
        scene_frame(s, id, FRAME_RESPONSE_HEAD, 0, "\xc8\0\1\0type\0text", 14);
        scene_frame(s, id, FRAME_RESPONSE_BODY, 0, scene_body, sizeof scene_body);
        scene_frame(s, id, FRAME_RESPONSE_BODY, FRAME_END, "END!", 4);
        *open = false;
    }
}

static size_t scene_take_frame(struct scene *s, const struct scene_peer *p, size_t at)
{
    uint32_t length = p->n - at < FRAME_HEADER_BYTES ? 0 : frame_u32(p->in + at);

    if (p->n - at < FRAME_HEADER_BYTES + length)
        return 0;
    const char *f = p->in + at;
    check(f[8] >= FRAME_CONFIGURE && f[8] <= FRAME_CLOSE && !f[10] && !f[11] && !(f[9] & ~FRAME_END), "a whole frame");
    scene_on_frame(s, frame_u32(f + 4), (unsigned char)f[8], (unsigned char)f[9], f + FRAME_HEADER_BYTES, length);
    return FRAME_HEADER_BYTES + length;
}

/* As a small server does: a request ends with END!, or has no body. */
static void scene_serve(struct scene_peer *p)
{
    char head[160];
    bool has_body = memmem(p->in, p->n, "POST", 4) != NULL;

    if (p->n < 4 || memcmp(p->in + p->n - 4, has_body ? "END!" : "\r\n\r\n", 4) != 0)
        return;
    int n = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\ntype: text\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n", SCENE_REPLY);
    send(p->fd, head, (size_t)n, MSG_NOSIGNAL);
    send(p->fd, scene_body, sizeof scene_body, MSG_NOSIGNAL);
    send(p->fd, "\r\n4\r\nEND!\r\n0\r\n\r\n", 16, MSG_NOSIGNAL);
    if (memmem(p->in, p->n, "Connection: close", 17))
        shutdown(p->fd, SHUT_WR);
    p->n = 0;
}

/* Whatever the program can do now. False: nothing. */
static bool scene_play(struct scene *s)
{
    bool did = false;

    for (struct scene_peer *p = s->peers; p < s->peers + SCENE_PEERS; p++) {
        if (p->fd < 0 && s->listener >= 0 && (p->fd = accept4(s->listener, NULL, NULL, SOCK_NONBLOCK)) >= 0)
            did = true;
        ssize_t n = p->fd < 0 ? -1 : read(p->fd, p->in + p->n, sizeof p->in - p->n);
        if (n == 0) {
            close(p->fd);
            p->fd = -1;
            p->n = 0;
        }
        did |= n >= 0;
        if (n <= 0)
            continue;
        p->n += (size_t)n;
        size_t used = 0, step;
        while (s->is_worker && (step = scene_take_frame(s, p, used)) > 0)
            used += step;
        memmove(p->in, p->in + used, p->n -= used);
        if (!s->is_worker)
            scene_serve(p);
    }
    ssize_t sent = s->out.len == 0 ? -1 : send(s->peers->fd, buf_at(&s->out), s->out.len, MSG_NOSIGNAL);
    buf_drop(&s->out, sent > 0 ? (size_t)sent : 0);
    return did || sent > 0;
}

static void scene_probe(struct watch *t)
{
    struct upstream *up = CONTAINER(t, struct upstream, probe);

    up->runner.state = RUNNER_READY;
    up->runner.owner->on_ready(&up->runner);
}

static void scene_start_program(struct scene *s)
{
    struct place *at = s->bench.program.places;
    struct loop *loop = &s->bench.loop;
    struct runner base = { .owner = &program_owner, .place = at, .loop = loop, .children = &s->bench.children,
        .state = RUNNER_READY, .was_ready = true, .name = "program", .child = { .name = "program", .pid = INT_MAX /* nobody's */ }, .output = { .watch = { .fd = -1 } } };
    int ends[2];

    if (s->is_worker) {
        struct worker *w = calloc(1, sizeof *w);
        *w = (struct worker){ .runner = base, .next_id = 1, .out.keep = 2 * WORKER_OUT_HIGH };
        w->runner.kind = &worker_kind;
        check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0, "a channel");
        w->channel = (struct watch){ .fd = ends[0], .on_event = worker_on_event, .on_deadline = worker_on_deadline };
        check(loop_want(loop, &w->channel, EPOLLIN) == 0, "watched");
        fd_close(&s->peers->fd);
        *s->peers = (struct scene_peer){ .fd = ends[1] };
        memset(s->open, 0, sizeof s->open);
        buf_fini(&s->out);
        s->runner = &w->runner;
    } else {
        struct upstream *up = calloc(1, sizeof *up);
        upstream_init(up, loop);
        base.kind = up->runner.kind;
        up->runner = base;
        up->elsewhere = false;
        up->probe.on_deadline = scene_probe;
        up->address = s->pumps.target;
        s->runner = &up->runner;
    }
    at->runner = s->runner;
    at->state = PLACE_SERVING;
    s->bench.program.state = PROGRAM_SERVING;
}

static void scene_end_program(struct scene *s)
{
    s->bench.program.places->runner = NULL;
    s->runner->kind->fail_all(s->runner, FAILURE_CRASHED, SPAN("the program was killed"), SPAN(""));
    s->runner->kind->free(s->runner);
}

static void scene_init(struct scene *s, bool is_worker)
{
    static char text[80];
    struct sockaddr_un un = { .sun_family = AF_UNIX };

    bench_init(&s->bench);
    s->out = (struct buf){ 0 };
    s->is_worker = is_worker;
    s->bench.program.conf.entrypoint = (char *)(uintptr_t)"program";
    s->bench.program.conf.launch = is_worker ? LAUNCH_WORKER : LAUNCH_EXEC;
    for (size_t i = 0; i < SCENE_PEERS; i++)
        s->peers[i] = (struct scene_peer){ .fd = -1 };
    s->listener = -1;
    snprintf(s->path, sizeof s->path, "/tmp/unit-%d.program", (int)getpid());
    snprintf(text, sizeof text, "unix:%s", s->path);
    s->pumps = (struct pumps){ .conns = &s->bench.conns, .on_failed = forward_on_failed };
    check(address_parse(&s->pumps.target, text), "an address");
    s->forward = (struct listener){ .arg = &s->pumps };
    snprintf(un.sun_path, sizeof un.sun_path, "%s", s->path);
    unlink(s->path);
    if (!is_worker) {
        s->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
        check(bind(s->listener, (void *)&un, sizeof un) == 0 && listen(s->listener, 20) == 0, "a program's socket");
    }
    scene_start_program(s);
}

static void scene_turn(struct scene *s)
{
    fault_plan.armed = true;
    loop_turn(&s->bench.loop);
    if (s->runner->state == RUNNER_BROKEN) {        /* as program_on_gone does */
        scene_end_program(s);
        fault_plan.armed = false;
        scene_start_program(s);
        fault_plan.armed = true;
        program_dispatch(&s->bench.program);
    }
    fault_plan.armed = false;
}

static void scene_fini(struct scene *s)
{
    for (int i = 0; i < 3; i++) {
        clock_ahead_ms += limits.response_head_ms;
        bench_run(&s->bench);
        loop_turn(&s->bench.loop);
    }
    scene_end_program(s);
    loop_turn(&s->bench.loop);
    for (size_t i = 0; i < SCENE_PEERS; i++)
        fd_close(&s->peers[i].fd);
    fd_close(&s->listener);
    buf_fini(&s->out);
    unlink(s->path);
    bench_fini(&s->bench);
}

/* ---- a client ---- */

struct script_step { const char *after; struct span text; };   /* sent once the answer holds `after` */

struct script {
    const char        *name;
    bool               is_worker;
    void             (*accept)(struct listener *, int fd);
    struct script_step steps[4];
};

static char scene_answer[128 << 10];
static size_t scene_answer_len;

static struct listener *script_listener(struct scene *s, const struct script *script)
{
    return script->accept == http_on_accept ? &s->bench.http.listener
         : script->accept == aleph_on_accept ? &s->bench.aleph.listener : &s->forward;
}

/* One exchange, as far as it comes: scene_answer. How often time had to pass; -1: it never ends. */
static int scene_run(struct scene *s, const struct script *script)
{
    static const int64_t waits_ms[] = { 0, 300, 1500, 6000, 61000, 61000, 301000, 301000 };
    const struct script_step *step = script->steps;
    int ends[2], rc = -1;

    check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0, "a socket pair");
    scene_answer_len = 0;
    scene_answer[0] = '\0';
    fault_plan.armed = true;
    script->accept(script_listener(s, script), ends[1]);
    fault_plan.armed = false;
    for (size_t wait = 0; wait < COUNT(waits_ms) && rc < 0; wait++) {
        clock_ahead_ms += waits_ms[wait];
        for (int quiet = 0; quiet < 3 && rc < 0;) {
            bool did = loop_is_busy(&s->bench.loop);
            scene_turn(s);
            did |= scene_play(s);
            if (step->text.n > 0 && memmem(scene_answer, scene_answer_len, step->after, strlen(step->after))) {
                did = true;
                send(ends[0], step->text.p, step->text.n, MSG_NOSIGNAL);
                step++;
            }
            ssize_t n = read(ends[0], scene_answer + scene_answer_len, sizeof scene_answer - 1 - scene_answer_len);
            scene_answer_len += n > 0 ? (size_t)n : 0;
            scene_answer[scene_answer_len] = '\0';
            if (n == 0 || (n < 0 && errno != EAGAIN))
                rc = (int)wait;
            quiet = did || n > 0 ? 0 : quiet + 1;
        }
    }
    close(ends[0]);
    return rc;
}

/* ---- what an answer says, whatever pieces it came in ---- */

static const char *head_value(const char *head, const char *end, const char *name)
{
    const char *at = memmem(head, (size_t)(end - head), name, strlen(name));
    return at ? at + strlen(name) : NULL;
}

/* A WebSocket's frames: the bytes of messages, then those of control frames. */
static void plain_frames(const char *p, size_t n, struct buf *out)
{
    struct buf control = { 0 };

    while (n >= 2) {
        size_t size = (unsigned char)p[1] & 0x7f, head = 2;
        if (size == 126 && n >= 4) {
            size = (size_t)((unsigned char)p[2] << 8 | (unsigned char)p[3]);
            head = 4;
        }
        if (n < head + size)
            break;
        if (p[0] & 8)
            buf_add_format(&control, "<%x:%zu>", p[0] & 15, size);
        else
            buf_add(out, p + head, size);
        p += head + size;
        n -= head + size;
    }
    buf_add_span(out, buf_span(&control));
    buf_fini(&control);
}

/* Responses without their dates and chunks; each that is whole ends with <end>. */
static void plain_http(const char *p, size_t n, struct buf *out)
{
    const char *all = p + n, *end;

    while (p < all && (end = memmem(p, (size_t)(all - p), "\r\n\r\n", 4))) {
        const char *date = head_value(p, end + 2, "\r\ndate: "), *length = head_value(p, end + 2, "content-length: ");
        const char *body = end + 4;
        bool chunked = head_value(p, end + 2, "transfer-encoding: chunked"), whole = false;
        buf_add(out, p, date ? (size_t)(date - p) : (size_t)(body - p));
        if (date)
            buf_add(out, strchr(date, '\r'), (size_t)(body - strchr(date, '\r')));
        if (strncmp(p, "HTTP/1.1 101", 12) == 0) {
            plain_frames(body, (size_t)(all - body), out);
            return;
        }
        while (chunked && !whole && (end = memmem(body, (size_t)(all - body), "\r\n", 2))) {
            size_t size = strtoul(body, NULL, 16), here = (size_t)(all - end) < size + 4 ? (size_t)(all - end - 2) : size;
            buf_add(out, end + 2, here);
            if (here < size || (size_t)(all - end) < size + 4)
                return;
            whole = size == 0;
            body = end + 2 + size + 2;
        }
        if (!chunked) {
            size_t size = length ? strtoul(length, NULL, 10) : 0, here = (size_t)(all - body) < size ? (size_t)(all - body) : size;
            buf_add(out, body, here);
            whole = here == size;
            body += here;
        }
        if (!whole)
            return;
        buf_add_text(out, "<end>");
        p = body;
    }
}

static void scene_plain(const struct script *script, struct buf *out)
{
    if (script->accept == aleph_on_accept)
        buf_add(out, scene_answer, scene_answer_len);
    else
        plain_http(scene_answer, scene_answer_len, out);
}

static bool starts_with(struct span s, struct span start)
{
    return s.n >= start.n && memcmp(s.p, start.p, start.n) == 0;
}

/* Whether an answer is right, as far as it goes, or says in good order that there is none. */
static bool is_clean(const struct script *script, struct span right, struct span answer)
{
    if (starts_with(right, answer))
        return true;
    if (script->accept == aleph_on_accept) {
        struct mp_in in = { answer.p, answer.n };
        return mp_peek(&in) == MP_MAP && mp_skip(&in) && in.n == 0 && memmem(answer.p, answer.n, "\xa5" "error", 6);
    }
    for (const char *end; (end = memmem(answer.p, answer.n, "<end>", 5));) {
        struct span one = { answer.p, (size_t)(end + 5 - answer.p) };
        if (!starts_with(right, one))
            return starts_with(answer, SPAN("HTTP/1.1 50")) && one.n == answer.n;
        answer = (struct span){ answer.p + one.n, answer.n - one.n };
        right = (struct span){ right.p + one.n, right.n - one.n };
    }
    if (starts_with(answer, SPAN("HTTP/1.1 101"))) {        /* control frames stand behind the messages */
        const char *control = memmem(answer.p, answer.n, "<", 1);
        answer.n = control ? (size_t)(control - answer.p) : answer.n;
    }
    return starts_with(right, answer);
}

static char script_http[1 << 14], script_aleph[1 << 14], script_raw[1 << 14], script_messages[1 << 14];

static struct script scripts[] = {
    { .name = "http, worker", .is_worker = true, .accept = http_on_accept },
    { .name = "http, upstream", .accept = http_on_accept },
    { .name = "aleph, worker", .is_worker = true, .accept = aleph_on_accept },
    { .name = "aleph, upstream", .accept = aleph_on_accept },
    { .name = "websocket", .is_worker = true, .accept = http_on_accept },
    { .name = "forward", .accept = forward_on_accept },
};

#define SCRIPT_CLOSE "\x88\x82\0\0\0\0\x03\xe8"

static void scripts_init(void)
{
    static const char shake[] = "GET /w HTTP/1.1\r\n" HOST "Connection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    struct buf b = { 0 };

    memset(scene_body, 'r', sizeof scene_body);
    /* Two requests in one go: the first with a body past every buffer, the second the last. */
    buf_add_format(&b, "POST /a%%20b?q HTTP/1.1\r\n" HOST "X-A: 1\r\nContent-Length: %d\r\n\r\n", SCENE_REPLY + 4);
    buf_add(&b, scene_body, sizeof scene_body);
    buf_add_text(&b, "END!GET / HTTP/1.1\r\n" HOST "Connection: close\r\n\r\n");
    memcpy(script_http, buf_at(&b), b.len);
    scripts[0].steps[0] = scripts[1].steps[0] = (struct script_step){ "", { script_http, b.len } };
    buf_fini(&b);
    buf_add_format(&b, "POST / HTTP/1.1\r\n" HOST "Connection: close\r\nContent-Length: %d\r\n\r\n", SCENE_REPLY + 4);
    buf_add(&b, scene_body, sizeof scene_body);
    buf_add_text(&b, "END!");
    memcpy(script_raw, buf_at(&b), b.len);
    scripts[5].steps[0] = (struct script_step){ "", { script_raw, b.len } };
    buf_fini(&b);
    mp_write_map(&b, 1);
    mp_write_key(&b, "scope");
    mp_write_map(&b, 6);
    static const char *const pairs[] = { "type", "http", "method", "POST", "path", "/a b", "query_string", "q" };
    EACH(i, pairs)
        mp_write_key(&b, pairs[i]);
    mp_write_key(&b, "headers");
    mp_write_array(&b, 0);
    mp_write_key(&b, "body");
    struct buf body = { 0 };
    buf_add(&body, scene_body, sizeof scene_body);
    buf_add_text(&body, "END!");
    mp_write_bin(&b, buf_span(&body));
    buf_fini(&body);
    memcpy(script_aleph, buf_at(&b), b.len);
    scripts[2].steps[0] = scripts[3].steps[0] = (struct script_step){ "", { script_aleph, b.len } };
    buf_fini(&b);
    /* A short text, a ping, a long message in two fragments. */
    buf_add(&b, "\x81\x85\0\0\0\0hello", 11);
    buf_add(&b, "\x89\x84\0\0\0\0ping", 10);
    buf_add(&b, "\x02\xfe\x1f\x40\0\0\0\0", 8);
    buf_add(&b, scene_body, 0x1f40);
    buf_add(&b, "\x80\x84\0\0\0\0END!", 10);
    memcpy(script_messages, buf_at(&b), b.len);
    scripts[4].steps[0] = (struct script_step){ "", { shake, sizeof shake - 1 } };
    scripts[4].steps[1] = (struct script_step){ "\r\n\r\n", { script_messages, b.len } };
    scripts[4].steps[2] = (struct script_step){ "!", { SCRIPT_CLOSE, sizeof SCRIPT_CLOSE - 1 } };
    buf_fini(&b);
}

/* forward_on_failed speaks to the terminal. */
static int stderr_quiet(void)
{
    int quiet = open("/dev/null", O_WRONLY | O_CLOEXEC), before = dup(2);

    dup2(quiet, 2);
    close(quiet);
    return before;
}

static void stderr_back(int before)
{
    dup2(before, 2);
    close(before);
}

static void faults_run(enum fault_kind kind, int error, bool ever)
{
    scripts_init();
    EACH(i, scripts) {
        const struct script *script = &scripts[i];
        struct buf right = { 0 };
        for (long n = 0;; n++) {            /* 0: a run without any, for the answer */
            static struct scene s;
            struct buf answer = { 0 }, next = { 0 };
            int err = script->accept == forward_on_accept ? stderr_quiet() : -1;
            scene_init(&s, script->is_worker);
            fault_plan.kind = n > 0 ? kind : FAULT_NONE;
            fault_plan.error = error;
            fault_plan.at = n;
            fault_plan.ever = ever;
            fault_plan.seen = 0;
            int waits = scene_run(&s, script);
            fault_plan.kind = FAULT_NONE;
            scene_plain(script, &answer);
            if (n == 0)
                buf_add_span(&right, buf_span(&answer));
            check(waits >= 0, "%s, %s %ld: it never ends", script->name, strerror(error), n);
            if (n == 0 || kind == FAULT_SOFT || kind == FAULT_SHORT)
                check(right.len > 100 && waits == 0 && answer.len == right.len && starts_with(buf_span(&answer), buf_span(&right)),
                      "%s, %s %ld: the same answer at once (waits: %d): %.300s", script->name, kind == FAULT_SHORT ? "short" : strerror(error), n, waits, buf_text(&answer));
            check(is_clean(script, buf_span(&right), buf_span(&answer)), "%s, %s %ld: an answer or an error: %.300s",
                  script->name, strerror(error), n, buf_text(&answer));
            bool reached = fault_plan.seen >= n;
            clock_ahead_ms += 2 * RUNNER_REAP_MS;       /* a worker that hung up is given a moment */
            scene_turn(&s);
            waits = scene_run(&s, script);
            scene_plain(script, &next);
            check(waits >= 0 && next.len == right.len && starts_with(buf_span(&next), buf_span(&right)),
                  "%s, %s %ld: the next exchange works (waits: %d): %.300s", script->name, strerror(error), n, waits, buf_text(&next));
            buf_fini(&answer);
            buf_fini(&next);
            scene_fini(&s);
            if (err >= 0)
                stderr_back(err);
            if (n > 0 && (!reached || (kind == FAULT_SHORT && ever) || test_failed > 20)) {
                check(n > (error == EMFILE ? 0 : 3) || reached, "%s: only %ld calls", script->name, n);
                break;
            }
        }
        buf_fini(&right);
    }
}

static void test_faults_memory(void) { faults_run(FAULT_MEMORY, ENOMEM, false); }
static void test_faults_memory_ever(void) { faults_run(FAULT_MEMORY, ENOMEM, true); }
static void test_faults_interrupted(void) { faults_run(FAULT_SOFT, EINTR, false); }
static void test_faults_again(void) { faults_run(FAULT_SOFT, EAGAIN, false); }
static void test_faults_short(void) { faults_run(FAULT_SHORT, 0, false); }
static void test_faults_short_ever(void) { faults_run(FAULT_SHORT, 0, true); }
static void test_faults_calls(void)
{
    static const int errors[] = { ENOMEM, EMFILE, ECONNRESET };

    EACH(i, errors)
        faults_run(FAULT_HARD, errors[i], false);
}

/* Deadlines come although there is no room to note them, in any number; those that were taken back
 * do not. */
static void test_faults_deadlines(void)
{
    static struct probe probes[300];
    struct loop l;

    loop_init(&l);
    for (size_t i = 0; i < COUNT(probes); i++) {
        probe_init(&probes[i], &l, -1);
        fault_plan.kind = FAULT_MEMORY;
        fault_plan.at = 1;
        fault_plan.ever = fault_plan.armed = i % 100 != 50;     /* now and then there is some */
        loop_after(&l, &probes[i].watch, 1000 + (int64_t)i);
        loop_after(&l, &probes[i].watch, i % 2 ? 2000 : 500);
        fault_plan.armed = false;
    }
    check(l.unplaced != NULL && l.heap_len > 0, "some have no place");
    for (size_t i = 0; i < COUNT(probes); i += 3)
        loop_never(&l, &probes[i].watch);
    check_number("they are not slept over", HEAP_RETRY_MS, loop_timeout(&l));
    int64_t saved = clock_ahead_ms;
    for (int round = 0; round < 3; round++) {
        clock_ahead_ms += 700;      /* in the last one there is memory again */
        fault_plan.armed = round < 2;
        loop_turn(&l);
        fault_plan.armed = false;
        for (size_t i = 0; i < COUNT(probes); i++)
            check_number("calls of a deadline", i % 3 != 0 && (i % 2 == 0 || round == 2), probes[i].deadlines);
    }
    check(!l.unplaced && l.heap_len == 0, "none is left");
    clock_ahead_ms = saved;
    fault_plan.kind = FAULT_NONE;
    loop_fini(&l);
}

/* ---- 78: clocks ---- */

/* Plays until nothing happens any more, and adds what came to scene_answer. False: the agent hung up. */
static bool scene_settle(struct scene *s, int fd, bool answers)
{
    bool open = true;

    for (int quiet = 0; quiet < 3; quiet++) {
        scene_turn(s);
        if (answers && scene_play(s))
            quiet = 0;
        ssize_t n = read(fd, scene_answer + scene_answer_len, sizeof scene_answer - 1 - scene_answer_len);
        open = open && n != 0;
        quiet = n > 0 ? 0 : quiet;
        scene_answer_len += n > 0 ? (size_t)n : 0;
        scene_answer[scene_answer_len] = '\0';
    }
    return open;
}

/* The answer is whole, and dated by the wall clock as it is now. */
static void check_dated(const char *what)
{
    const char *date = strstr(scene_answer, "\r\ndate: ");
    struct tm tm = { 0 };
    time_t now = time(NULL);

    check(strstr(scene_answer, "END!\r\n0\r\n\r\n") != NULL, "%s: the whole answer", what);
    check(date && strptime(date + 8, "%a, %d %b %Y %H:%M:%S GMT", &tm), "%s: a date", what);
    check(llabs(timegm(&tm) - now) <= 2, "%s: dated %.31s", what, date ? date + 8 : "");
    scene_answer_len = 0;
}

static void test_clocks(void)
{
    static const struct { const char *name; int64_t wall_s; bool ahead; int64_t boot_ms; } jumps[] = {
        { "1970", 0, false, 0 }, { "2038", INT32_MAX, false, 0 }, { "after 2038", (int64_t)INT32_MAX + 86400, false, 0 },
        { "a day ahead", 86400, true, 0 }, { "a day back", -86400, true, 0 }, { "an hour asleep", 3600, true, 3600000 },
    };
    static const char ask[] = "GET / HTTP/1.1\r\n" HOST "\r\n";

    scripts_init();
    EACH(i, jumps)
        for (int is_worker = 0; is_worker < 2; is_worker++) {
            static struct scene s;
            char byte, line[256] = "", expected[64];
            int log[2];
            scene_init(&s, is_worker);
            check(pipe2(log, O_NONBLOCK) == 0, "a pipe");
            access_log.fd = log[1];
            int served = bench_connect(&s.bench, http_on_accept, &s.bench.http.listener);
            int silent = bench_connect(&s.bench, http_on_accept, &s.bench.http.listener);
            int within = bench_connect(&s.bench, http_on_accept, &s.bench.http.listener);
            int wire = bench_connect(&s.bench, aleph_on_accept, &s.bench.aleph.listener);
            bench_send(&s.bench, within, SPAN("GET / HT"), 8);
            bench_send(&s.bench, wire, SPAN("\x81\xa5sco"), 5);
            scene_answer_len = 0;
            bench_send(&s.bench, served, SPAN(ask), sizeof ask);
            scene_settle(&s, served, true);
            check_dated("before");
            bench_send(&s.bench, served, SPAN(ask), sizeof ask);    /* now the program takes its time */
            time_t now = time(NULL);
            wall_ahead_s = jumps[i].ahead ? jumps[i].wall_s : jumps[i].wall_s - now;
            clock_boot_ms = jumps[i].boot_ms;
            for (int turn = 0; turn < 20; turn++) {
                clock_ahead_ms += 1000;
                check(scene_settle(&s, served, false) && scene_answer_len == 0, "%s: the exchange goes on", jumps[i].name);
            }
            const int others[] = { silent, within, wire };
            EACH(k, others)
                check(read(others[k], &byte, 1) < 0 && errno == EAGAIN, "%s: connection %zu stays", jumps[i].name, k);
            check(read(log[0], line, sizeof line) > 0, "the first request is logged");
            scene_settle(&s, served, true);
            check_dated(jumps[i].name);
            bench_send(&s.bench, served, SPAN(ask), sizeof ask);
            scene_settle(&s, served, true);
            check_dated("and the next");
            log_flush();
            memset(line, 0, sizeof line);
            check(read(log[0], line, sizeof line - 1) > 0 && strchr(line, '\n'), "%s: logged", jumps[i].name);
            time_t wall = time(NULL);
            strftime(expected, sizeof expected, "[%d/%b/%Y:%H:", gmtime(&wall));
            check(strstr(strchr(line, '\n'), expected) || wall % 3600 < 3, "%s: by the wall clock %s: %s", jumps[i].name, expected, line);
            clock_ahead_ms += limits.head_ms - 19000;       /* limits hold all the same */
            loop_turn(&s.bench.loop);
            bench_run(&s.bench);
            EACH(k, others)
                check(read(others[k], line, sizeof line) >= 0, "%s: connection %zu is told at its time", jumps[i].name, k);
            access_log.fd = -1;
            wall_ahead_s = 0;
            clock_boot_ms = 0;
            close(served);
            EACH(k, others)
                close(others[k]);
            close(log[0]);
            close(log[1]);
            scene_fini(&s);
        }
}

/* ---- TLS: 76 and 80 ---- */

static const char tls_test_certificate[] =
    "-----BEGIN CERTIFICATE-----\n"
    "MIIBczCCARmgAwIBAgIUdNTuPWF6dnhJktBvoK6DznmZrbQwCgYIKoZIzj0EAwIw\n"
    "DzENMAsGA1UEAwwEdW5pdDAeFw0yNjExMjQwMTMzMjBaFw0zNjExMjEwMTMzMjBa\n"
    "MA8xDTALBgNVBAMMBHVuaXQwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASV1C0v\n"
    "Pqa6Onuxhbfv/5YbMFGgN1xxDdGPMdptsWI+Eq5uQEWtNAtZbKVpRyBJypS9Zr5c\n"
    "WESLOrxdpRMOt+7vo1MwUTAdBgNVHQ4EFgQUUWfN4V7FHk8yEiJW3gYPrY0Po9Iw\n"
    "HwYDVR0jBBgwFoAUUWfN4V7FHk8yEiJW3gYPrY0Po9IwDwYDVR0TAQH/BAUwAwEB\n"
    "/zAKBggqhkjOPQQDAgNIADBFAiEAuQKZhtAhjtI/zZlkChHQVAhop7M8kgzDkKwN\n"
    "3K5enxYCIF/X/O1NPWVyW1nhOZFogMD7IcgaIvXP1UVfbk27H18c\n"
    "-----END CERTIFICATE-----\n";

static const char tls_test_key[] =
    "-----BEGIN PRIVATE KEY-----\n"
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgVW/XlFNSymsnMHoa\n"
    "zasIjzSq1pqDfsNflTOdWRn8vaKhRANCAASV1C0vPqa6Onuxhbfv/5YbMFGgN1xx\n"
    "DdGPMdptsWI+Eq5uQEWtNAtZbKVpRyBJypS9Zr5cWESLOrxdpRMOt+7v\n"
    "-----END PRIVATE KEY-----\n";

/* A ClientHello of TLS 1.2: ECDHE with P-256 and ECDSA. */
static const char tls_test_hello[] =
    "\x16\x03\x01\x00\x4e\x01\x00\x00\x4a\x03\x03\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c"
    "\x0d\x0e\x0f\x10\x11\x12\x13\x14\x15\x16\x17\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f\x00\x00\x02\xc0\x2b"
    "\x01\x00\x00\x1f\x00\x0a\x00\x04\x00\x02\x00\x17\x00\x0b\x00\x02\x01\x00\x00\x0d\x00\x04\x00\x02"
    "\x04\x03\x00\x17\x00\x00\xff\x01\x00\x01\x00";

struct tls_scene {
    struct scene     scene;
    struct tls_files files;
    char             paths[2][64];
    struct tls_keys *keys;
};

static void tls_scene_init(struct tls_scene *t)
{
    const char *const texts[] = { tls_test_certificate, tls_test_key };

    scene_init(&t->scene, true);
    EACH(i, texts) {
        snprintf(t->paths[i], sizeof t->paths[i], "/tmp/unit-%d.pem%zu", (int)getpid(), i);
        check(file_write(t->paths[i], texts[i], strlen(texts[i]), 0600) == 0, "a file");
    }
    t->files = (struct tls_files){ .certificate = t->paths[0], .key = t->paths[1] };
    t->scene.bench.http.keys = &t->keys;
    t->scene.bench.http.listener.address.tls = true;
}

/* Connects and says hello. What came back: 0x16 begins a handshake's message, 0x15 an alert;
 * -1: the end and nothing. */
static int tls_scene_hello(struct tls_scene *t)
{
    struct scene *s = &t->scene;
    int ends[2], first = -1;

    check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0, "a socket pair");
    fault_plan.armed = true;
    http_on_accept(&s->bench.http.listener, ends[1]);
    fault_plan.armed = false;
    send(ends[0], tls_test_hello, sizeof tls_test_hello - 1, MSG_NOSIGNAL);
    scene_answer_len = 0;
    scene_settle(s, ends[0], true);
    if (scene_answer_len > 0)
        first = (unsigned char)scene_answer[0];
    close(ends[0]);
    return first;
}

static void tls_scene_fini(struct tls_scene *t)
{
    tls_keys_drop(t->keys);
    t->keys = NULL;
    unlink(t->paths[0]);
    unlink(t->paths[1]);
    scene_fini(&t->scene);
    mbedtls_psa_crypto_free();
}

/* The kernel has no random bytes yet: nothing waits for them, no handshake goes on without, the
 * rest is served. */
static void test_entropy(void)
{
    static struct tls_scene t;
    struct buf why = { 0 };

    tls_scene_init(&t);
    entropy_absent = true;
    entropy_asked = entropy_waited = 0;
    check(!tls_keys_load(&t.files, &why), "keys cannot be used yet");
    check_buf("and why", "tls: the kernel has no random bytes yet", &why);
    entropy_absent = false;
    t.keys = tls_keys_load(&t.files, &why);
    check(t.keys != NULL, "later they can: %s", buf_text(&why));
    check_number("a handshake", 0x16, tls_scene_hello(&t));
    entropy_absent = true;
    int first = tls_scene_hello(&t);
    check(first == 0x15 || first == -1, "without entropy there is none: 0x%x", (unsigned)first);
    t.scene.bench.http.listener.address.tls = false;
    scripts_init();
    EACH(i, scripts) {
        if (!scripts[i].is_worker)
            continue;
        check_number(scripts[i].name, 0, scene_run(&t.scene, &scripts[i]));
        check(scene_answer_len > 100, "%s: answered", scripts[i].name);
    }
    t.scene.bench.http.listener.address.tls = true;
    entropy_absent = false;
    check_number("with entropy again", 0x16, tls_scene_hello(&t));
    check(entropy_asked > 3, "asked %u times", entropy_asked);
    check_number("never so that it could wait", 0, entropy_waited);
    buf_fini(&why);
    tls_scene_fini(&t);
}

/* Every allocation of loading keys, then of a handshake's start; a handshake has too many for all. */
static void test_tls_memory(void)
{
    static struct tls_scene t;
    struct buf why = { 0 };

    tls_scene_init(&t);
    for (int ever = 0; ever < 2; ever++) {
        fault_plan.ever = ever;
        for (long n = 1;; n++) {
            fault_plan.kind = FAULT_MEMORY;
            fault_plan.at = n;
            fault_plan.seen = 0;
            fault_plan.armed = true;
            t.keys = tls_keys_load(&t.files, &why);
            fault_plan.armed = false;
            fault_plan.kind = FAULT_NONE;
            bool reached = fault_plan.seen >= n;
            check(t.keys || (reached && (why.len > 0 || why.failed)), "%ld: a reason", n);
            buf_fini(&why);
            if (!reached)
                break;
            tls_keys_drop(t.keys);
        }
        check(t.keys != NULL, "and then they are loaded");
        for (long n = 1;; n += n < 60 ? 1 : 29) {
            fault_plan.kind = FAULT_MEMORY;
            fault_plan.at = n;
            fault_plan.seen = 0;
            int first = tls_scene_hello(&t);
            fault_plan.kind = FAULT_NONE;
            bool reached = fault_plan.seen >= n;
            check(first == 0x16 || (reached && (first == 0x15 || first == -1)), "%ld: 0x%x", n, (unsigned)first);
            if (!reached)
                break;
        }
        check_number("the next handshake", 0x16, tls_scene_hello(&t));
        tls_keys_drop(t.keys);
        t.keys = NULL;
    }
    tls_scene_fini(&t);
}

/* ---- 76: configurations and archives ---- */

static void fault_begin(enum fault_kind kind, int error, long at, bool ever)
{
    fault_plan.kind = kind;
    fault_plan.error = error;
    fault_plan.at = at;
    fault_plan.ever = ever;
    fault_plan.seen = 0;
    fault_plan.armed = true;
}

/* Whether what ran since fault_begin has come to the call that was to fail. */
static bool fault_end(void)
{
    fault_plan.armed = false;
    fault_plan.kind = FAULT_NONE;
    return fault_plan.seen >= fault_plan.at;
}

/* From its bytes to what a program is started with. */
static int conf_use(bool json, struct buf *why)
{
    static const char map[] = "\x88\xaa""entrypoint\xa3""m:a\xa8""encoding\xa5""plain\xa4""code\xc4\x03""a=1"
        "\xa9""variables\x82\xa1""A\xa1""1\xa4""HOME\xa2/x" "\xa7""volumes\x91\x82\xa5""mount\xa2/v\xa6""device\xa3""vdb"
        "\xab""dns_servers\x91\xa7""1.1.1.1" "\xaf""authorized_keys\x91\xa1k" "\xa7""unknown\xc0";
    struct conf c = { 0 }, copy = { 0 };

    buf_add(&c.raw, map, json ? 0 : sizeof map - 1);        /* as it has been received */
    fault_plan.armed = true;
    int rc = json ? conf_of_json(&c, "{\"entrypoint\":\"m:a\",\"code\":\"/srv\",\"hostname\":\"h\",\"variables\":{\"A\":\"\\u00e9\"},"
                                 "\"listen\":[\"vsock:81\"],\"limits\":{\"conns\":99}}", why)
                  : conf_read_msgpack(&c, why);

    if (rc == 0 && conf_copy_program(&copy, &c) < 0)
        rc = conf_wrong(why, "no memory");
    conf_fini(&c);
    if (rc == 0) {
        struct program owner = { .conf = copy, .env = program_env_guest };
        char **env = program_env(&owner, PORT_PROGRAM);
        if (!env)
            rc = conf_wrong(why, "no memory");
        env_free(env);
    }
    conf_fini(&copy);
    fault_plan.armed = false;
    return rc;
}

static void test_conf_memory(void)
{
    for (int how = 0; how < 4; how++) {
        bool reached = true;
        for (long n = 1; reached; n++) {
            struct buf why = { 0 };
            log_forget();
            fault_begin(FAULT_MEMORY, ENOMEM, n, how & 1);
            fault_plan.armed = false;
            int rc = conf_use(how & 2, &why);
            reached = fault_end();
            check(rc == 0 ? !why.len : reached && (strstr(buf_text(&why), "memory") || why.failed), "%d, %ld: %d %s", how, n, rc, buf_text(&why));
            check(rc == 0 || reached, "%d: it works in the end", how);
            buf_fini(&why);
            if (!reached)
                check(n > 10, "%d: %ld allocations", how, n);
        }
    }
}

/* An archive comes out whole, or an error says why and nothing of it is left. */
static void test_zip_faults(void)
{
    static const struct { enum fault_kind kind; int error; bool ever; } faults[] = {
        { FAULT_MEMORY, ENOMEM, false }, { FAULT_MEMORY, ENOMEM, true }, { FAULT_SOFT, EINTR, false },
        { FAULT_SHORT, 0, false }, { FAULT_SHORT, 0, true }, { FAULT_HARD, ENOSPC, false }, { FAULT_HARD, EIO, false },
    };
    char root[] = "/tmp/unit-zip.XXXXXX", in[64], out[64];
    struct buf archive = { 0 };

    check(mkdtemp(root) != NULL, "a folder");
    snprintf(in, sizeof in, "%s/in", root);
    snprintf(out, sizeof out, "%s/out", root);
    zip_test_tree(in, &archive);
    EACH(i, faults) {
        bool must = faults[i].kind == FAULT_SOFT || faults[i].kind == FAULT_SHORT, reached = true;
        for (long n = 1; reached && test_failed < 20; n++) {
            struct buf why = { 0 }, again = { 0 };
            fault_begin(faults[i].kind, faults[i].error, n, faults[i].ever);
            int rc = zip_extract(buf_span(&archive), out, &why);
            reached = fault_end();
            size_t things = zip_test_things_in(out);
            check(rc == 0 ? things == 5 : reached && !must && things == 0 && (why.len > 0 || why.failed),
                  "extract %zu, %ld: %d, %zu things, %s", i, n, rc, things, buf_text(&why));
            zip_remove(buf_span(&archive), out);
            buf_fini(&why);
            if (faults[i].kind == FAULT_MEMORY)
                continue;           /* minizip does not look whether it has any: only children pack */
            fault_begin(faults[i].kind, faults[i].error, n, faults[i].ever);
            rc = zip_pack(in, &again, &why);
            reached |= fault_end();
            check(rc == 0 ? again.len == archive.len : !must && (why.len > 0 || why.failed), "pack %zu, %ld: %d %s", i, n, rc, buf_text(&why));
            buf_fini(&again);
            buf_fini(&why);
        }
    }
    buf_fini(&archive);
    nftw(root, zip_test_remove, 16, FTW_DEPTH | FTW_PHYS);
}

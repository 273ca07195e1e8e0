/* fuzz.h - what the fuzz targets of the wire share. The includer has agent.c before it and
 * defines fuzz_seed(). Nothing here may start a process, open AF_VSOCK or write a file. */

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);

/* A good input of some kind, into out; the fuzzer bends it. */
static void fuzz_seed(unsigned which, struct buf *out);

static void demand(bool ok, const char *what)
{
    if (ok)
        return;
    fprintf(stderr, "fuzz: %s\n", what);
    abort();
}

/* Takes small numbers and pieces from the front of the input. */
struct fuzz { const uint8_t *p; size_t n; };

static unsigned fuzz_byte(struct fuzz *f)
{
    if (f->n == 0)
        return 0;
    f->n--;
    return *f->p++;
}

static struct span fuzz_piece(struct fuzz *f, size_t n)
{
    struct span s = { (const char *)f->p, n < f->n ? n : f->n };
    f->p += s.n;
    f->n -= s.n;
    return s;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed)
{
    if (size < 4 || seed % 64 == 0) {
        struct buf good = { 0 };
        fuzz_seed(seed / 64, &good);
        size = good.len < most ? good.len : most;
        memcpy(data, buf_at(&good), size);
        buf_fini(&good);
        if (seed % 128 == 0)
            return size;
    }
    return LLVMFuzzerMutate(data, size, most);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    agent_log.fd = -1;
    signal(SIGPIPE, SIG_IGN);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Turns of the loop until there is nothing to do at once: it never sleeps. */
static inline void loop_rest(struct loop *l)
{
    struct pollfd any = { .fd = l->epoll_fd, .events = POLLIN };    /* epoll tells of some events only once */

    for (int i = 0; l->soon_first || poll(&any, 1, 0) > 0; i++) {
        demand(i < 1000, "the loop does not come to rest");
        loop_turn(l);
    }
}

/* Whether the bytes are exactly one map, nothing behind it. */
static bool is_one_map(struct span s)
{
    struct mp_in in = { s.p, s.n };
    return s.n > 0 && mp_peek(&in) == MP_MAP && mp_skip(&in) && in.n == 0;
}

/* What came of the input at once, and in pieces; frees both. */
static inline void demand_same(struct buf *whole, struct buf *pieces)
{
    demand(whole->len == pieces->len && memcmp(buf_span(whole).p, buf_span(pieces).p, whole->len) == 0,
           "the outcome depends on the pieces");
    buf_fini(whole);
    buf_fini(pieces);
}

/* An instruction that asks for a path. */
static inline void seed_scope(struct buf *out, const char *type)
{
    mp_write_map(out, 1);
    mp_write_key(out, "scope");
    mp_write_map(out, 6);
    mp_write_key(out, "type");
    mp_write_key(out, type);
    mp_write_key(out, "method");
    mp_write_key(out, "POST");
    mp_write_key(out, "path");
    mp_write_key(out, "/a b?#%\r\n");
    mp_write_key(out, "query_string");
    mp_write_key(out, "x=y %41&z");
    mp_write_key(out, "headers");
    mp_write_array(out, 3);
    for (int i = 0; i < 3; i++) {
        mp_write_array(out, 2);
        mp_write_bin(out, i == 0 ? SPAN("Host") : i == 1 ? SPAN("Connection") : SPAN("Content-Length"));
        mp_write_bin(out, i == 0 ? SPAN("h") : i == 1 ? SPAN("close, host") : SPAN("99"));
    }
    mp_write_key(out, "body");
    mp_write_bin(out, SPAN("the body"));
}

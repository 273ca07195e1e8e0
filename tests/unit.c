/* unit.c - agent.c's dense logic against tables of input and expected outcome.
 *
 * agent.c is included whole, with its main renamed, and with system calls and the clock that
 * the tests steer. Each test prints `ok NAME` or a line `FAIL NAME: why` for each check that
 * failed; the exit status is that of the worst. `unit NAME...` runs only those. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static ssize_t unit_read(int fd, void *p, size_t n);
static ssize_t unit_write(int fd, const void *p, size_t n);
static int unit_socket(int family, int type, int protocol);
static int unit_accept(int fd, struct sockaddr *peer, socklen_t *size, int flags);
static int unit_clock(clockid_t id, struct timespec *ts);
static int unit_poll(struct pollfd *fds, nfds_t n, int timeout_ms);

#define SYS_READ        unit_read
#define SYS_WRITE       unit_write
#define SYS_SOCKET      unit_socket
#define SYS_ACCEPT      unit_accept
#define clock_gettime   unit_clock
#define poll            unit_poll
#define main            agent_main
#include "../agent.c"
#undef main
#undef clock_gettime
#undef poll

/* ---- the frame of the tests ---- */

static const char *test_name;
static unsigned test_checks, test_failed, all_failed;

PRINTF(2, 3) static void check(bool ok, const char *format, ...)
{
    va_list ap;

    test_checks++;
    if (ok)
        return;
    test_failed++;
    printf("FAIL %s: ", test_name);
    va_start(ap, format);
    vprintf(format, ap);
    va_end(ap);
    putchar('\n');
}

static void check_text(const char *what, const char *expected, const char *actual)
{
    check(strcmp(expected, actual) == 0, "%s: expected \"%s\", got \"%s\"", what, expected, actual);
}

static void check_number(const char *what, int64_t expected, int64_t actual)
{
    check(expected == actual, "%s: expected %" PRId64 ", got %" PRId64, what, expected, actual);
}

/* A buf's bytes against a text; the buf is emptied. */
static void check_buf(const char *what, const char *expected, struct buf *actual)
{
    check_text(what, expected, buf_text(actual));
    buf_fini(actual);
}

#define MP(literal)     (literal), sizeof literal - 1   /* bytes that may hold a NUL, and how many */
#define EACH(i, table)  for (size_t i = 0; i < COUNT(table); i++)

/* ---- system calls with faults ---- */

static int     fault_errno;         /* the next fault_times calls of the macros fail with it */
static int     fault_times;
static size_t  fault_short;         /* at most so many bytes in one call; 0: as many as asked */
static int     asked_families[16];  /* of socket() */
static size_t  asked_len;
static int     accepts;
static bool    accepts_vsock;       /* peers look like the host's end of vsock */
static int64_t clock_ahead_ms;      /* how far the tests' clocks are before the real ones */
static int64_t clock_boot_ms;       /* and how much further that which goes on while the machine sleeps */

static bool fault(void)
{
    if (fault_times == 0)
        return false;
    fault_times--;
    errno = fault_errno;
    return true;
}

/* What epoll was asked of each descriptor. Of what a read leaves only because a test has it fail or
 * cut short it would not tell again (EPOLLET): no kernel reads so, and epoll is asked anew. */
static struct { int epoll_fd; struct epoll_event event; } watched[1024];

int __real_epoll_ctl(int epoll_fd, int op, int fd, struct epoll_event *e);

static int watched_ctl(int epoll_fd, int op, int fd, struct epoll_event *e)
{
    int rc = __real_epoll_ctl(epoll_fd, op, fd, e);

    if (rc == 0 && (size_t)fd < COUNT(watched)) {
        watched[fd].epoll_fd = epoll_fd;
        watched[fd].event = op == EPOLL_CTL_DEL ? (struct epoll_event){ 0 } : *e;
    }
    return rc;
}

static void watched_again(int fd)
{
    int before = errno;

    if ((size_t)fd < COUNT(watched) && watched[fd].event.events & EPOLLET)
        __real_epoll_ctl(watched[fd].epoll_fd, EPOLL_CTL_MOD, fd, &watched[fd].event);
    errno = before;
}

static ssize_t unit_read(int fd, void *p, size_t n)
{
    bool fails = fault(), cut = fault_short && n > fault_short;
    ssize_t got = fails ? -1 : read(fd, p, cut ? fault_short : n);

    if (fails || cut)
        watched_again(fd);
    return got;
}

static ssize_t unit_write(int fd, const void *p, size_t n)
{
    return fault() ? -1 : write(fd, p, fault_short && n > fault_short ? fault_short : n);
}

/* AF_VSOCK is noted and never opened: something that is no test may answer there. */
static int unit_socket(int family, int type, int protocol)
{
    if (asked_len < COUNT(asked_families))
        asked_families[asked_len++] = family;
    if (family == AF_VSOCK) {
        errno = EAFNOSUPPORT;
        return -1;
    }
    return fault() ? -1 : socket(family, type, protocol);
}

static int unit_accept(int fd, struct sockaddr *peer, socklen_t *size, int flags)
{
    accepts++;
    int near = fault() ? -1 : accept4(fd, peer, size, flags);
    if (near >= 0 && accepts_vsock)
        *(struct sockaddr_vm *)(void *)peer = (struct sockaddr_vm){ .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST };
    return near;
}

static int unit_clock(clockid_t id, struct timespec *ts)
{
    int rc = clock_gettime(id, ts);
    int64_t ms = clock_ahead_ms + (id == CLOCK_BOOTTIME ? clock_boot_ms : 0);

    ts->tv_sec += ms / 1000;
    ts->tv_nsec += ms % 1000 * 1000000;
    if (ts->tv_nsec >= 1000000000) {
        ts->tv_sec++;
        ts->tv_nsec -= 1000000000;
    }
    return rc;
}

/* The tests move the clock themselves: a turn of the loop never sleeps. */
static int unit_poll(struct pollfd *fds, nfds_t n, int timeout_ms)
{
    (void)timeout_ms;
    return poll(fds, n, 0);
}

/* ---- what was logged ---- */

static char unit_log[256 << 10];

static void log_forget(void)
{
    agent_log.fd = -1;
    agent_log.ring_head = 0;
    agent_log.last[0] = '\0';
    agent_log.repeats = 0;
}

/* The lines since log_forget, without their time. */
static const char *log_lines(void)
{
    size_t n = 0, len = (size_t)agent_log.ring_head;
    const char *p = agent_log.ring;

    check(len < (size_t)limits.log_ring_bytes, "the log of this test is too long to look at");
    for (const char *end; p && len > 0 && (end = memchr(p, '\n', len)); len -= (size_t)(end - p) + 1, p = end + 1) {
        const char *text = memmem(p, (size_t)(end - p), "]: ", 3);
        n += (size_t)snprintf(unit_log + n, sizeof unit_log - n, "%.*s|", text ? (int)(end - text - 3) : 0, text + 3);
    }
    unit_log[n] = '\0';
    return unit_log;
}

/* ==== buf ======================================================================== */

static void test_buf(void)
{
    struct buf b = { 0 };
    char big[1000];

    memset(big, 'b', sizeof big);
    check(buf_span(&b).n == 0 && buf_span(&b).p, "an empty buf has a span that may be read");
    buf_add_text(&b, "hello");
    buf_drop(&b, 2);
    check_text("drop takes from the front", "llo", buf_text(&b));
    for (int i = 0; i < 100; i++) {     /* the front moves: room is made without growing for ever */
        buf_add(&b, big, sizeof big);
        buf_drop(&b, sizeof big);
    }
    check(b.len == 3 && b.cap <= 4096, "bytes that pass through leave a small buf: %zu of %zu", b.len, b.cap);
    check_text("and the last bytes are right", "bbb", buf_text(&b));
    buf_keep_tail(&b, 2);
    check_text("the tail", "bb", buf_text(&b));
    buf_keep_tail(&b, 5);
    check_text("a longer tail is all", "bb", buf_text(&b));
    for (int i = 0; i < 100; i++)
        buf_add(&b, big, sizeof big);
    check(b.cap > BUF_KEEP_BYTES, "a large buf");
    buf_drop(&b, b.len);
    check(b.cap == 0, "gives its memory back when it is empty");
    check(buf_room(&b, SIZE_MAX / 2 + 2) == NULL && b.failed, "a size that cannot be had");
    check(buf_add_text(&b, "x") < 0 && b.len == 0, "after a failure nothing is added");
    check_text("and its text is empty", "", buf_text(&b));
    buf_fini(&b);
    check(buf_add_format(&b, "%2000d", 5) == 0 && b.len == 1023, "a format is cut at its buffer, not beyond");
    buf_fini(&b);
}

static void test_span(void)
{
    check(span_eq(SPAN("abc"), "abc") && !span_eq(SPAN("abc"), "ab") && !span_eq(SPAN("ab"), "abc"), "span_eq");
    check(!span_eq(SPAN("a\0c"), "a"), "a NUL inside does not end a span");
    check(span_eq_nocase(SPAN("HoSt"), "host") && !span_eq_nocase(SPAN("host "), "host"), "span_eq_nocase");
    check(span_of(NULL).n == 0, "no text is an empty span");
    char *copy = span_dup((struct span){ NULL, 0 });
    check_text("a copy of nothing", "", copy);
    free(copy);
}

/* ==== log ======================================================================== */

static void test_log(void)
{
    log_forget();
    log_info("one");
    for (int i = 0; i < 1000; i++)
        log_info("same");
    log_info("two");
    check_text("repetitions are folded", "one|same|last line came 999 times more|two|", log_lines());
    log_forget();
    log_line("x", MP("a\x1b[31m\r\0\x7f\tb\xc3\xa9"));
    check_text("control bytes do not reach a terminal", "a?[31m???\tb\xc3\xa9|", log_lines());
    char *many = calloc(1, (size_t)limits.log_ring_bytes);
    memset(many, 'm', 4000);
    for (int i = 0; i < 40; i++)
        log_line("x", many, 4000);
    check(agent_log.ring_head > (uint64_t)limits.log_ring_bytes, "the ring went round");
    log_line("x", many, 100000);
    free(many);
    log_forget();
}

/* A console that takes nothing: lines are counted, none is waited for, and it is told after. */
static void test_log_slow_console(void)
{
    int ends[2];
    char bytes[1 << 17];

    check(pipe2(ends, O_NONBLOCK) == 0, "a pipe");
    log_forget();
    agent_log.fd = ends[1];
    for (int i = 0; i < 2000; i++) {
        char text[100];
        snprintf(text, sizeof text, "line %d .....................................................", i);
        log_line("x", text, strlen(text));
    }
    check(agent_log.dropped > 0 && agent_log.dropped < 2000, "lines are dropped: %u", agent_log.dropped);
    unsigned dropped = agent_log.dropped;
    ssize_t n = read(ends[0], bytes, sizeof bytes);
    for (int i = 0; i < 4 && n > 0; i++) {
        log_flush();
        n = read(ends[0], bytes, sizeof bytes - 1);
        if (n > 0)
            bytes[n] = '\0';
        if (n > 0 && strstr(bytes, "lines dropped"))
            break;
    }
    snprintf(unit_log, sizeof unit_log, "console too slow, %u lines dropped", dropped);
    check(n > 0 && strstr(bytes, unit_log), "the console is told how many");
    agent_log.pending_len = 0;
    close(ends[0]);
    close(ends[1]);
    log_forget();
}

/* ==== text ======================================================================= */

static void test_utf8(void)
{
    static const struct { const char *text; bool ok; const char *clean; } table[] = {
        { "", true, "" }, { "plain", true, "plain" }, { "\x7f", true, "\x7f" },
        { "\xc2\x80", true, "\xc2\x80" }, { "\xdf\xbf", true, "\xdf\xbf" },
        { "\xe0\xa0\x80", true, "\xe0\xa0\x80" }, { "\xed\x9f\xbf", true, "\xed\x9f\xbf" },
        { "\xee\x80\x80", true, "\xee\x80\x80" }, { "\xef\xbf\xbf", true, "\xef\xbf\xbf" },
        { "\xf0\x90\x80\x80", true, "\xf0\x90\x80\x80" }, { "\xf4\x8f\xbf\xbf", true, "\xf4\x8f\xbf\xbf" },
        { "\x80", false, "\xef\xbf\xbd" }, { "a\xff z", false, "a\xef\xbf\xbd z" },
        { "\xc0\xaf", false, "\xef\xbf\xbd\xef\xbf\xbd" }, { "\xc1\xbf", false, "\xef\xbf\xbd\xef\xbf\xbd" },
        { "\xc3", false, "\xef\xbf\xbd" }, { "\xc3(", false, "\xef\xbf\xbd(" },
        { "\xe0\x9f\xbf", false, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd" },      /* overlong */
        { "\xed\xa0\x80", false, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd" },      /* a surrogate */
        { "\xe2\x82", false, "\xef\xbf\xbd\xef\xbf\xbd" },
        { "\xf0\x8f\xbf\xbf", false, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd" },
        { "\xf4\x90\x80\x80", false, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd" },
        { "\xf5\x80\x80\x80", false, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd" },
        { "\xf0\x9f\x98", false, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd" },
    };

    EACH(i, table) {
        struct buf out = { 0 };
        check(utf8_ok(span_of(table[i].text)) == table[i].ok, "row %zu is%s UTF-8", i, table[i].ok ? "" : " not");
        utf8_add(&out, span_of(table[i].text));
        check(utf8_ok(buf_span(&out)), "row %zu made clean is clean", i);
        check_buf("made clean", table[i].clean, &out);
    }
    struct buf out = { 0 };
    utf8_add_latin1(&out, SPAN("caf\xe9 \x80\xff"));
    check_buf("ISO 8859-1", "caf\xc3\xa9 \xc2\x80\xc3\xbf", &out);
    utf8_add_latin1(&out, SPAN("caf\xc3\xa9"));
    check_buf("UTF-8 stays", "caf\xc3\xa9", &out);
    for (size_t most = 0; most < 12; most++) {
        struct span cut = utf8_cut(SPAN("a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80"), most);
        check(cut.n <= most && utf8_ok(cut) && cut.n + 4 > (most < 10 ? most : 10), "cut at %zu: %zu bytes", most, cut.n);
    }
    check_number("not cut", 3, (int64_t)utf8_cut(SPAN("abc"), 3).n);
}

static void test_percent(void)
{
    static const struct { const char *in, *path, *query, *decoded; } table[] = {
        { "/plain-._~", "/plain-._~", "/plain-._~", "/plain-._~" },
        { "!$&'()*+,;=:@/", "!$&'()*+,;=:@/", "!$&'()*+,;=:@/", "!$&'()*+,;=:@/" },
        { " ", "%20", "+", " " }, { "?", "%3F", "?", "?" }, { "#", "%23", "%23", "#" },
        { "\r\n", "%0D%0A", "%0D%0A", "\r\n" }, { "\x7f\x01", "%7F%01", "%7F%01", "\x7f\x01" },
        { "\xc3\xa9", "%C3%A9", "%C3%A9", "\xc3\xa9" }, { "%41", "%2541", "%41", "A" },
        { "%", "%25", "%25", "%" }, { "%4", "%254", "%254", "%4" }, { "%zz", "%25zz", "%25zz", "%zz" },
        { "%%41", "%25%2541", "%25%41", "%A" }, { "%2e%2E", "%252e%252E", "%2e%2E", ".." },
        { "\"<>\\^`{|}[]", "%22%3C%3E%5C%5E%60%7B%7C%7D%5B%5D", "%22%3C%3E%5C%5E%60%7B%7C%7D%5B%5D", "\"<>\\^`{|}[]" },
    };
    struct buf out = { 0 };

    EACH(i, table) {
        percent_encode_path(&out, span_of(table[i].in));
        check_buf("path", table[i].path, &out);
        percent_encode_query(&out, span_of(table[i].in));
        check_buf("query", table[i].query, &out);
        percent_decode(&out, span_of(table[i].in));
        check_buf("decoded", table[i].decoded, &out);
    }
    percent_encode_path(&out, SPAN("a\0b"));
    check_buf("a NUL", "a%00b", &out);
    for (int c = 0; c < 256; c++) {             /* what is encoded is what was there */
        char byte = (char)c;
        struct buf again = { 0 };
        percent_encode_path(&out, (struct span){ &byte, 1 });
        percent_decode(&again, buf_span(&out));
        check(again.len == 1 && buf_at(&again)[0] == byte, "byte %d comes back", c);
        for (size_t k = 0; k < out.len; k++)
            check((unsigned char)buf_at(&out)[k] > ' ' && (unsigned char)buf_at(&out)[k] < 0x7f, "byte %d is encoded", c);
        buf_fini(&again);
        buf_fini(&out);
    }
}

static void test_base32(void)
{
    static const struct { const char *hex, *base32; } table[] = {
        { "", "" }, { "66", "my" }, { "666f", "mzxq" }, { "666f6f", "mzxw6" }, { "666f6f62", "mzxw6yq" },
        { "666f6f6261", "mzxw6ytb" }, { "666F6F626172", "mzxw6ytboi" }, { "00", "aa" }, { "ff", "74" },
        { "ffffffffff", "77777777" },
        { "cafecafecafecafecafecafecafecafecafecafecafecafecafecafecafecafe",
          "zl7mv7wk73fp5sx6zl7mv7wk73fp5sx6zl7mv7wk73fp5sx6zl7a" },
        { "6", NULL }, { "6g", NULL }, { "../..", NULL }, { "66 6", NULL }, { "\xff\xff", NULL },
    };
    char out[HOSTNAME_MAX + 1];

    EACH(i, table) {
        int rc = base32_of_hex(out, sizeof out, span_of(table[i].hex));
        check(rc == (table[i].base32 ? 0 : -1), "\"%s\" gives %d", table[i].hex, rc);
        if (table[i].base32)
            check_text(table[i].hex, table[i].base32, out);
    }
    for (size_t digits = 0; digits <= 100; digits += 2) {       /* never past the end: the sanitizer looks */
        char hex[100], *room = malloc(HOSTNAME_MAX + 1);
        memset(hex, 'f', sizeof hex);
        int rc = base32_of_hex(room, HOSTNAME_MAX + 1, (struct span){ hex, digits });
        check(rc < 0 || strlen(room) <= HOSTNAME_MAX, "%zu digits fit or are refused", digits);
        check(rc == 0 || digits > 64, "64 digits fit");
        free(room);
    }
}

static void test_number(void)
{
    static const struct { const char *text; int64_t least, most; bool ok; int64_t value; } table[] = {
        { "0", 0, 10, true, 0 }, { "10", 0, 10, true, 10 }, { "11", 0, 10, false, 0 }, { "1", 2, 10, false, 0 },
        { "007", 0, 10, true, 7 }, { "9223372036854775807", 0, INT64_MAX, true, INT64_MAX },
        { "9223372036854775808", 0, INT64_MAX, false, 0 }, { "9999999999999999999", 0, INT64_MAX, false, 0 },
        { "18446744073709551617", 0, INT64_MAX, false, 0 }, { "00000000000000000001", 0, 10, false, 0 },
        { "", 0, 10, false, 0 }, { "-1", -5, 10, false, 0 }, { "+1", 0, 10, false, 0 }, { " 1", 0, 10, false, 0 },
        { "1 ", 0, 10, false, 0 }, { "1e1", 0, 10, false, 0 }, { "0x1", 0, 10, false, 0 }, { "1,0", 0, 10, false, 0 },
        { "\xd9\xa1", 0, 10, false, 0 },
    };

    EACH(i, table) {
        int64_t value = 0;
        bool ok = number_read(span_of(table[i].text), table[i].least, table[i].most, &value);
        check(ok == table[i].ok && (!ok || value == table[i].value), "\"%s\": %d, %" PRId64, table[i].text, ok, value);
    }
}

static void test_limits(void)
{
    static const struct { const char *text, *wrong; } table[] = {
        { "conns=16", NULL }, { "conns=1048576", NULL },
        { "conns=15", "limit conns takes a number from 16 to 1048576" },
        { "conns=1048577", "limit conns takes" }, { "conns=", "limit conns takes" }, { "conns", "limit conns takes" },
        { "conns=16 ", "limit conns takes" }, { "conns=-16", "limit conns takes" }, { "conns=1k", "limit conns takes" },
        { "conn=16", "no limit is named conn" }, { "connss=16", "no limit is named connss" }, { "=16", "no limit is named " },
        { "", "no limit is named " }, { "http_body_bytes=9223372036854775807", NULL },
        { "http_body_bytes=9223372036854775808", "limit http_body_bytes takes" },
    };
    struct limits saved = limits;

    EACH(i, table) {
        const char *wrong = limit_set(&limits, table[i].text);
        check(!wrong == !table[i].wrong && (!wrong || strncmp(wrong, table[i].wrong, strlen(table[i].wrong)) == 0),
              "\"%s\": %s", table[i].text, wrong ? wrong : "taken");
    }
    check_number("the last that was right", 1048576, limits.conns);
    limits = saved;
    EACH(i, limit_table) {                      /* each default lies in its own range, and each can be set */
        const struct limit *row = &limit_table[i];
        char text[128];
        int64_t *value = (int64_t *)(void *)((char *)&limits + row->offset);
        check(*value >= row->least && *value <= row->most, "the default of %s", row->name);
        snprintf(text, sizeof text, "%s=%" PRId64, row->name, row->least);
        check(!limit_set(&limits, text) && *value == row->least, "%s is set", row->name);
    }
    limits = saved;
}

/* ==== mp ========================================================================= */

static const struct mp_row { const char *p; size_t n; enum mp_type type; size_t head; uint64_t value, bytes; bool negative; } mp_heads[] = {
    { MP("\x00"), MP_INT, 1, 0, 0, false }, { MP("\x7f"), MP_INT, 1, 127, 0, false },
    { MP("\xff"), MP_INT, 1, (uint64_t)-1, 0, true }, { MP("\xe0"), MP_INT, 1, (uint64_t)-32, 0, true },
    { MP("\x80"), MP_MAP, 1, 0, 0, false }, { MP("\x8f"), MP_MAP, 1, 15, 0, false },
    { MP("\x90"), MP_ARRAY, 1, 0, 0, false }, { MP("\x9f"), MP_ARRAY, 1, 15, 0, false },
    { MP("\xa0"), MP_STR, 1, 0, 0, false }, { MP("\xbf"), MP_STR, 1, 31, 31, false },
    { MP("\xc0"), MP_NIL, 1, 0, 0, false }, { MP("\xc1"), MP_BAD, 1, 0, 0, false },
    { MP("\xc2"), MP_BOOL, 1, 0, 0, false }, { MP("\xc3"), MP_BOOL, 1, 1, 0, false },
    { MP("\xc4\x05"), MP_BIN, 2, 5, 5, false }, { MP("\xc5\x01\x02"), MP_BIN, 3, 258, 258, false },
    { MP("\xc6\xff\xff\xff\xff"), MP_BIN, 5, 0xffffffff, 0xffffffff, false },
    { MP("\xc7\x00"), MP_EXT, 2, 0, 1, false }, { MP("\xc7\xff"), MP_EXT, 2, 255, 256, false },
    { MP("\xc8\x01\x00"), MP_EXT, 3, 256, 257, false },
    { MP("\xc9\xff\xff\xff\xff"), MP_EXT, 5, 0xffffffff, 0x100000000, false },
    { MP("\xca\x00\x00\x00\x01"), MP_FLOAT, 5, 1, 0, false },
    { MP("\xcb\x00\x00\x00\x00\x00\x00\x00\x02"), MP_FLOAT, 9, 2, 0, false },
    { MP("\xcc\xff"), MP_INT, 2, 255, 0, false }, { MP("\xcd\xff\xff"), MP_INT, 3, 65535, 0, false },
    { MP("\xce\xff\xff\xff\xff"), MP_INT, 5, 0xffffffff, 0, false },
    { MP("\xcf\xff\xff\xff\xff\xff\xff\xff\xff"), MP_INT, 9, UINT64_MAX, 0, false },
    { MP("\xd0\x80"), MP_INT, 2, (uint64_t)-128, 0, true }, { MP("\xd0\x7f"), MP_INT, 2, 127, 0, false },
    { MP("\xd1\x80\x00"), MP_INT, 3, (uint64_t)-32768, 0, true },
    { MP("\xd2\x80\x00\x00\x00"), MP_INT, 5, (uint64_t)INT32_MIN, 0, true },
    { MP("\xd3\x80\x00\x00\x00\x00\x00\x00\x00"), MP_INT, 9, (uint64_t)INT64_MIN, 0, true },
    { MP("\xd3\x00\x00\x00\x00\x00\x00\x00\x01"), MP_INT, 9, 1, 0, false },
    { MP("\xd4"), MP_EXT, 1, 0, 2, false }, { MP("\xd8"), MP_EXT, 1, 0, 17, false },
    { MP("\xd9\x20"), MP_STR, 2, 32, 32, false }, { MP("\xda\x01\x00"), MP_STR, 3, 256, 256, false },
    { MP("\xdb\x00\x01\x00\x00"), MP_STR, 5, 65536, 65536, false },
    { MP("\xdc\x00\x10"), MP_ARRAY, 3, 16, 0, false }, { MP("\xdd\xff\xff\xff\xff"), MP_ARRAY, 5, 0xffffffff, 0, false },
    { MP("\xde\x00\x10"), MP_MAP, 3, 16, 0, false }, { MP("\xdf\xff\xff\xff\xff"), MP_MAP, 5, 0xffffffff, 0, false },
};

static void test_mp_heads(void)
{
    EACH(i, mp_heads) {
        const struct mp_row *row = &mp_heads[i];
        struct mp_head h;
        char *copy = malloc(row->n);            /* its own size: the sanitizer sees a byte too many */
        memcpy(copy, row->p, row->n);
        check(mp_head_read(copy, row->n, &h), "head 0x%02x", (unsigned char)row->p[0]);
        check(h.type == row->type && h.head == row->head && h.bytes == row->bytes && h.negative == row->negative
              && (h.type == MP_EXT || h.value == row->value), "head 0x%02x: type %d, %zu, %" PRIu64 ", %" PRIu64,
              (unsigned char)row->p[0], (int)h.type, h.head, h.value, h.bytes);
        for (size_t n = 0; n < row->n; n++) {
            char *part = malloc(n + 1);
            memcpy(part, row->p, n);
            part = realloc(part, n ? n : 1);
            check(!mp_head_read(part, n, &h), "the first %zu bytes of head 0x%02x", n, (unsigned char)row->p[0]);
            free(part);
        }
        free(copy);
    }
}

static void test_mp_scan(void)
{
    static const struct { const char *p; size_t n; uint64_t most; enum scan end; const char *why; } table[] = {
        { MP("\xc0"), 100, SCAN_DONE, "" }, { MP("\xa3""abc"), 4, SCAN_DONE, "" },
        { MP("\x82\xa1""a\x93\x01\x02\x03\xa1""b\x81\xa1""c\xc4\x02xy"), 100, SCAN_DONE, "" },
        { MP("\xd6\x01""1234"), 100, SCAN_DONE, "" }, { MP("\xc7\x00\x01"), 100, SCAN_DONE, "" },
        { MP("\x90"), 100, SCAN_DONE, "" }, { MP("\x92\x90\x80"), 100, SCAN_DONE, "" },
        { MP("\xa3""ab"), 100, SCAN_MORE, "" }, { MP("\x81\xa1""a"), 100, SCAN_MORE, "" },
        { MP("\xda\x00"), 100, SCAN_MORE, "" },
        { MP("\xc1"), 100, SCAN_BAD, "0xc1" }, { MP("\x91\xc1"), 100, SCAN_BAD, "0xc1" },
        { MP("\xa3""abc"), 3, SCAN_BAD, "larger" }, { MP("\xc6\xff\xff\xff\xff"), 100, SCAN_BAD, "larger" },
        { MP("\xdd\x00\x00\x00\x60"), 100, SCAN_BAD, "larger" }, { MP("\xdd\xff\xff\xff\xff"), 100, SCAN_BAD, "larger" },
        { MP("\xdf\xff\xff\xff\xff"), 100, SCAN_BAD, "larger" }, { MP("\xc9\xff\xff\xff\xff"), 100, SCAN_BAD, "larger" },
        { MP("\x92\xdd\x00\x00\x00\x50\xdd\x00\x00\x00\x50"), 90, SCAN_BAD, "larger" },
        { MP("\x92\xdd\x00\x00\x00\x50\xdd\x00\x00\x00\x50"), 91, SCAN_MORE, "" },
        { MP("\xdf\x7f\xff\xff\xff"), UINT32_MAX, SCAN_BAD, "larger" },
    };

    EACH(i, table) {
        for (size_t split = 0; split <= table[i].n; split++) {      /* the same answer, however it comes */
            struct mp_scan s;
            const char *why = "";
            mp_scan_init(&s);
            enum scan end = mp_scan(&s, table[i].p, split, table[i].most, &why);
            if (end == SCAN_MORE)
                end = mp_scan(&s, table[i].p, table[i].n, table[i].most, &why);
            check(end == table[i].end && strstr(why, table[i].why), "row %zu split at %zu: %d %s", i, split, (int)end, why);
            check(end != SCAN_DONE || s.pos == table[i].n, "row %zu ends at %zu of %zu", i, s.pos, table[i].n);
        }
    }
    for (int depth = 60; depth < 70; depth++) {
        char deep[128];
        struct mp_scan s;
        const char *why = "";
        memset(deep, 0x91, sizeof deep);
        deep[depth] = (char)0xc0;
        mp_scan_init(&s);
        enum scan end = mp_scan(&s, deep, sizeof deep, 1000, &why);
        check(end == (depth <= 64 ? SCAN_DONE : SCAN_BAD), "%d deep: %d %s", depth, (int)end, why);
    }
}

static void test_mp_write(void)
{
    static const uint64_t numbers[] = { 0, 127, 128, 255, 65535, 65536, UINT32_MAX, (uint64_t)UINT32_MAX + 1, UINT64_MAX };
    static const size_t sizes[] = { 0, 1, 31, 32, 255, 256, 65535, 65536, 70000 };
    char *text = malloc(70000);

    memset(text, 't', 70000);
    EACH(i, numbers) {
        struct buf b = { 0 };
        struct mp_head h;
        mp_write_uint(&b, numbers[i]);
        struct mp_in in = { buf_at(&b), b.len };
        check(mp_read(&in, MP_INT, &h) && h.value == numbers[i] && !h.negative && in.n == 0, "%" PRIu64, numbers[i]);
        buf_fini(&b);
    }
    EACH(i, sizes) {
        struct buf b = { 0 };
        struct span s;
        uint64_t count;
        mp_write_str(&b, (struct span){ text, sizes[i] });
        mp_write_bin(&b, (struct span){ text, sizes[i] });
        mp_write_map(&b, (uint32_t)sizes[i]);
        mp_write_array(&b, (uint32_t)sizes[i]);
        struct mp_in in = { buf_at(&b), b.len };
        check(mp_read_bytes(&in, MP_STR, &s) && s.n == sizes[i], "a string of %zu", sizes[i]);
        check(!mp_read_bytes(&in, MP_STR, &s) && mp_read_bytes(&in, MP_BIN, &s) && s.n == sizes[i], "bytes of %zu", sizes[i]);
        check(mp_read_count(&in, MP_MAP, &count) && count == sizes[i], "a map of %zu", sizes[i]);
        check(mp_read_count(&in, MP_ARRAY, &count) && count == sizes[i] && in.n == 0, "a list of %zu", sizes[i]);
        buf_fini(&b);
    }
    free(text);
    struct buf b = { 0 };
    struct span s;
    mp_write_text(&b, SPAN("\xff\xc3\xa9\xe2\x82\xac"), 6);
    struct mp_in in = { buf_at(&b), b.len };
    check(mp_read_bytes(&in, MP_STR, &s) && s.n == 5 && utf8_ok(s), "text is made clean, then cut: %zu", s.n);
    buf_fini(&b);
}

static void test_mp_read(void)
{
    struct mp_in in = { MP("\x93\xc3\xa2xy\xc0") };
    struct span s;
    uint64_t count;
    bool yes;

    check(!mp_read_nil(&in) && !mp_read_bool(&in, &yes) && !mp_read_count(&in, MP_MAP, &count) && in.n == 6,
          "a wrong type takes nothing");
    check(mp_read_count(&in, MP_ARRAY, &count) && count == 3 && mp_read_bool(&in, &yes) && yes
          && mp_peek(&in) == MP_STR && mp_skip(&in) && mp_read_nil(&in) && in.n == 0, "a list taken apart");
    check(!mp_read_nil(&in) && mp_peek(&in) == MP_BAD && !mp_skip(&in), "nothing is left");
    in = (struct mp_in){ MP("\xa5""abc") };
    check(!mp_read_bytes(&in, MP_STR, &s) && !mp_skip(&in) && in.n == 4, "a string cut short");
    in = (struct mp_in){ MP("\xc6\xff\xff\xff\xff""abc") };
    check(!mp_read_bytes(&in, MP_BIN, &s) && !mp_skip(&in), "bytes that claim 4 GiB");
    in = (struct mp_in){ MP("\xc1") };
    check(!mp_skip(&in), "the byte that is no msgpack");
}

/* ==== conf ======================================================================= */

#define CONF_MIN "\xaa""entrypoint\xa3""m:a\xa8""encoding\xa3""zip\xa4""code\xc4\x01Z"

static int conf_of(struct conf *c, const char *p, size_t n, struct buf *why)
{
    *c = (struct conf){ 0 };
    buf_add(&c->raw, p, n);
    return conf_read_msgpack(c, why);
}

static void test_conf(void)
{
    static const struct { const char *p; size_t n; const char *wrong; } table[] = {
        { MP("\x83" CONF_MIN), NULL },
        { MP("\x80"), "entrypoint: missing" }, { MP("\x90"), "expected a map" }, { MP("\xc0"), "expected a map" },
        { MP("\x83" CONF_MIN "\xc0"), "1 bytes after the map" },
        { MP("\x81\xc0\xc0"), "a key is not a string" }, { MP("\x81\x05\xc0"), "a key is not a string" },
        { MP("\x81\xc4\x04""code\xc0"), "a key is not a string" },
        { MP("\x82\xa4""code\xc4\x01Z\xa4""code\xc4\x01Z"), "code: stands twice" },
        { MP("\x82\xa4""code\xc0\xa4""code\xc4\x01Z"), "code: stands twice" },
        { MP("\x84" CONF_MIN "\xa7""unknown\x91\xd6\xff""time"), NULL },
        { MP("\x81\xaa""entrypoint\x01"), "entrypoint: expected a string" },
        { MP("\x81\xaa""entrypoint\xc4\x01x"), "entrypoint: expected a string" },
        { MP("\x81\xaa""entrypoint\xa2\xff\xfe"), "entrypoint: not UTF-8" },
        { MP("\x81\xaa""entrypoint\xa2""a\x00"), "entrypoint: holds a NUL byte" },
        { MP("\x84" CONF_MIN "\xa9""variables\x81\xa1""A\xa1""b"), NULL },
        { MP("\x84" CONF_MIN "\xa9""variables\xc0"), NULL },
        { MP("\x84" CONF_MIN "\xa9""variables\x90"), "variables: expected a map" },
        { MP("\x84" CONF_MIN "\xa9""variables\x81\xa0\xa1""b"), "variables: the name \"\" is empty" },
        { MP("\x84" CONF_MIN "\xa9""variables\x81\xa3""A=B\xa1""b"), "\"A=B\" is empty or holds '='" },
        { MP("\x84" CONF_MIN "\xa9""variables\x81\xa1""A\xc0"), "variables: A: expected a string" },
        { MP("\x84" CONF_MIN "\xa9""variables\x81\x01\xa1""b"), "variables: a name: expected a string" },
        { MP("\x84" CONF_MIN "\xab""dns_servers\x91\xa7""1.1.1.1"), NULL },
        { MP("\x84" CONF_MIN "\xab""dns_servers\x91\xa3""::1"), NULL },
        { MP("\x84" CONF_MIN "\xab""dns_servers\x91\xa3""1.1"), "dns_servers[0]: \"1.1\" is no address" },
        { MP("\x84" CONF_MIN "\xab""dns_servers\xdc\x00\x41"), "dns_servers: 65 entries" },
        { MP("\x84" CONF_MIN "\xa7""volumes\x90"), NULL },
        { MP("\x84" CONF_MIN "\xa7""volumes\x80"), "volumes: expected a list" },
        { MP("\x84" CONF_MIN "\xa7""volumes\x91\x80"), "volumes[0]: needs mount and device" },
        { MP("\x84" CONF_MIN "\xa7""volumes\x91\xc0"), "volumes[0]: expected a map" },
        { MP("\x84" CONF_MIN "\xa7""volumes\x91\x81\xa5""mount\x01"), "volumes[0].mount: expected a string" },
        { MP("\x84" CONF_MIN "\xa7""volumes\x91\x81\xa9""read_only\xc0"), "volumes[0].read_only: expected a bool" },
        { MP("\x84" CONF_MIN "\xa9""interface\xa4""asgi"), NULL },
        { MP("\x84" CONF_MIN "\xa9""interface\xa4""wsgi"), "interface: \"wsgi\"" },
        { MP("\x84" CONF_MIN "\xa7""vm_hash\xa4""cafe"), NULL }, { MP("\x84" CONF_MIN "\xa7""vm_hash\xa0"), NULL },
        { MP("\x84" CONF_MIN "\xa7""vm_hash\xa3""caf"), "vm_hash: expected an even number" },
        { MP("\x84" CONF_MIN "\xa7""vm_hash\xa4""../."), "vm_hash: expected an even number" },
        { MP("\x83\xaa""entrypoint\xa1""m\xa8""encoding\xa3""zip\xa4""code\xc4\x01Z"), "entrypoint: \"m\" is not module:attribute" },
        { MP("\x83\xaa""entrypoint\xa1""m\xa8""encoding\xa5""plain\xa4""code\xc4\x01Z"), NULL },
        { MP("\x83\xaa""entrypoint\xa3""a:b\xa8""encoding\xa5""plain\xa4""code\xc4\x01\xff"), "code: not UTF-8 text" },
        { MP("\x83\xaa""entrypoint\xa3""a:b\xa8""encoding\xa5""plain\xa4""code\xc4\x01\x00"), "code: not UTF-8 text" },
        { MP("\x83\xaa""entrypoint\xa0\xa8""encoding\xa3""zip\xa4""code\xc4\x01Z"), "entrypoint: 0 bytes" },
        { MP("\x82\xaa""entrypoint\xa3""m:a\xa8""encoding\xa3""zip"), "code: missing" },
        { MP("\x82\xaa""entrypoint\xa3""m:a\xa4""code\xc4\x01Z"), "encoding: missing" },
        { MP("\x83\xaa""entrypoint\xa3""m:a\xa8""encoding\xa3""tar\xa4""code\xc4\x01Z"), "encoding: \"tar\" is not" },
        { MP("\x82\xaa""entrypoint\xa3""m:a"), "a key is not a string" },   /* cut short: the scan never lets it come here */
    };

    EACH(i, table) {
        struct conf c;
        struct buf why = { 0 };
        log_forget();
        int rc = conf_of(&c, table[i].p, table[i].n, &why);
        check(table[i].wrong ? rc < 0 && strstr(buf_text(&why), table[i].wrong) : rc == 0,
              "row %zu: expected %s, got %d %s", i, table[i].wrong ? table[i].wrong : "success", rc, buf_text(&why));
        conf_fini(&c);
        buf_fini(&why);
    }
    struct conf c;
    struct buf why = { 0 };
    log_forget();
    conf_of(&c, MP("\x84" CONF_MIN "\xa7""unknown\xc0"), &why);
    check(strstr(log_lines(), "unknown key \"unknown\" ignored") != NULL, "an unknown key is logged: %s", log_lines());
    conf_fini(&c);
    buf_fini(&why);
}

static int conf_of_json(struct conf *c, const char *text, struct buf *why)
{
    *c = (struct conf){ 0 };
    return conf_read_json(c, span_of(text), why) < 0 ? -1 : conf_check(c, why);
}

/* What is wrong in a file is tests/config.sh's; here is what may stand there, and where. */
static void test_conf_json(void)
{
    static const struct { const char *text, *wrong; } table[] = {
        { "{}", NULL }, { " {\n}\n", NULL }, { "{\"log\":\"info\"}", NULL }, { "{\"limits\":{}}", NULL },
        { "{\"entrypoint\":\"m:a\"}", NULL }, { "{\"entrypoint\":null}", "entrypoint: missing" },
        { "{\"entrypoint\":\"m:a\",\"variables\":{}}", NULL }, { "{\"variables\":{}}", "entrypoint: missing" },
        { "{\"limits\":{\"conns\":16,\"queue\":1}}", NULL }, { "{\"limits\":{\"conns\":16,\"\":1}}", "limits.: no limit" },
        { "{\"limits\":{\"http_body_bytes\":9223372036854775807}}", NULL },
        { "{\"limits\":{\"http_body_bytes\":9223372036854775808}}", "limits.http_body_bytes: limit" },
        { "{\"listen\":[]}", NULL }, { "{\"listen\":[\"vsock:80\",\"tcp:[::]:80\",\"unix:/a\",\"fd:3\"]}", NULL },
        { "{\"listen\":[\"hybrid:/a:80\"]}", "listen[0]: " }, { "{\"wire\":\"vsock:52\"}", NULL }, { "{\"wire\":\"\"}", "wire: " },
        { "{\"entrypoint\":\"m:a\",\"hostname\":\"a-1.b\"}", NULL }, { "{\"entrypoint\":\"m:a\",\"hostname\":\"a.-b\"}", "hostname: " },
        { "{\"entrypoint\":\"m:a\",\"volumes\":[{\"mount\":\"/v\",\"device\":\"vdb\",\"read_only\":false}]}", NULL },
        { "{\"a\":{\"b\":[0,{\"c\":1,\"c\":2}]}}", "a.b[1].c: stands twice" }, { "{\"a\":[[[[[[]]]]]]}", "a: no such field" },
        { "[]", "expected a map" }, { "", "line 1: " }, { "{\n\n\"a\" 1}", "line 3: " }, { "\xef\xbb\xbf{}", "line 1: " },
    };

    EACH(i, table) {
        struct conf c;
        struct buf why = { 0 };
        int rc = conf_of_json(&c, table[i].text, &why);
        check(table[i].wrong ? rc < 0 && strncmp(buf_text(&why), table[i].wrong, strlen(table[i].wrong)) == 0 : rc == 0,
              "row %zu: expected %s, got %d %s", i, table[i].wrong ? table[i].wrong : "success", rc, buf_text(&why));
        conf_fini(&c);
        buf_fini(&why);
    }
    struct conf c;
    struct buf why = { 0 };
    struct limits saved = limits;
    check(conf_of_json(&c, "{\"entrypoint\":\"m:a\",\"code\":\"/srv\",\"hostname\":\"h\",\"variables\":{\"A\":\"\\u00e9\"},"
                       "\"listen\":[\"vsock:81\"],\"log\":\"debug\",\"limits\":{\"conns\":99}}", &why) == 0, "%s", buf_text(&why));
    check_text("the folder", "/srv", conf_code_folder(&c));
    check_text("the hostname", "h", c.hostname);
    check_text("a variable", "\xc3\xa9", c.variables[0].value);
    check_text("an address", "vsock:81", c.settings.listen[0]);
    check(strcmp(conf_first(&c, CONF_MACHINE, true), "hostname") == 0, "what is for a machine");
    check_number("reading sets no limit", saved.conns, limits.conns);
    settings_apply(&c.settings);
    check_number("but settings_apply", 99, limits.conns);
    check_number("and the level", LOG_DEBUG, agent_log.level);
    agent_log.level = LOG_INFO;
    limits = saved;
    conf_fini(&c);
    limits.mp_depth = 4;
    check(conf_of_json(&c, "{\"a\":[[[[]]]]}", &why) < 0 && strstr(buf_text(&why), "a[0][0][0]: nested too deep"), "%s", buf_text(&why));
    limits = saved;
    conf_fini(&c);
    buf_fini(&why);
}

static void test_conf_network(void)
{
    static const struct { const char *text; int family; bool prefix, ok; } table[] = {
        { "10.0.0.1", AF_INET, true, true }, { "10.0.0.1/24", AF_INET, true, true }, { "10.0.0.1/0", AF_INET, true, true },
        { "10.0.0.1/32", AF_INET, true, true }, { "10.0.0.1/33", AF_INET, true, false }, { "10.0.0.1/", AF_INET, true, false },
        { "10.0.0.1/24", AF_INET, false, false }, { "10.0.0.1/ 4", AF_INET, true, false }, { "10.0.0.256", AF_INET, true, false },
        { "10.0.1", AF_INET, true, false }, { "", AF_INET, true, false }, { "/24", AF_INET, true, false },
        { "::1", AF_INET, true, false }, { "10.0.0.1\n", AF_INET, true, false },
        { "::1", AF_INET6, true, true }, { "2001:db8::1/128", AF_INET6, true, true }, { "2001:db8::1/129", AF_INET6, true, false },
        { "fe80::1%eth0", AF_INET6, true, false }, { "::ffff:10.0.0.1", AF_INET6, true, true },
        { "1:2:3:4:5:6:7:8:9", AF_INET6, true, false }, { "10.0.0.1", AF_INET6, true, false },
        { "1111111111111111111111111111111111111111111111111111111", AF_INET6, true, false },
    };

    EACH(i, table)
        check(conf_address_ok(table[i].text, table[i].family, table[i].prefix) == table[i].ok, "\"%s\"", table[i].text);
}

/* A configuration with these volumes, checked. */
static int conf_of_volumes(struct conf *c, const char *encoding, const char *const (*volumes)[2], size_t len, struct buf *why)
{
    *c = (struct conf){ .entrypoint = strdup("m:a"), .encoding_name = strdup(encoding), .code = SPAN("Z") };
    c->volumes = calloc(len + 1, sizeof *c->volumes);
    for (; c->volumes_len < len; c->volumes_len++)
        c->volumes[c->volumes_len] = (struct conf_volume){ .device = strdup(volumes[c->volumes_len][0]),
                                                           .mount = strdup(volumes[c->volumes_len][1]) };
    return conf_check(c, why);
}

static void test_conf_volumes(void)
{
    static char long_path[VOLUME_MOUNT_MAX + 2];
    memset(long_path, 'a', VOLUME_MOUNT_MAX + 1);
    long_path[0] = '/';
    const struct { const char *device, *mount, *wrong, *shortest; } table[] = {
        { "vdb", "/data", NULL, "/data" }, { "vdb", "//data/./x///", NULL, "/data/x" }, { "0", "/...", NULL, "/..." },
        { "vdb", "/usr/lib/x", NULL, "/usr/lib/x" }, { "vdb", "/runs", NULL, "/runs" }, { "vdb", "/opt", NULL, "/opt" },
        { "vdb", "/devices/x", NULL, "/devices/x" }, { "vdb", "/etc/x", NULL, "/etc/x" }, { "vdb", "/.x/y.", NULL, "/.x/y." },
        { "../sda", "/data", "is no device name", NULL }, { "Vdb", "/data", "is no device name", NULL },
        { "vd b", "/data", "is no device name", NULL }, { "", "/data", "is no device name", NULL },
        { "vdb/", "/data", "is no device name", NULL }, { "/dev/vdb", "/data", "is no device name", NULL },
        { "0123456789abcdef0123456789abcdef", "/data", "is no device name", NULL },
        { "vdb", "data", "no absolute path", NULL }, { "vdb", "", "no absolute path", NULL },
        { "vdb", "/data/..", "no absolute path", NULL }, { "vdb", "/../x", "no absolute path", NULL },
        { "vdb", "/", "place of the system", NULL }, { "vdb", "///./", "place of the system", NULL },
        { "vdb", "/proc", "place of the system", NULL }, { "vdb", "/proc/1", "place of the system", NULL },
        { "vdb", "//sbin/", "place of the system", NULL }, { "vdb", "/usr/./bin", "place of the system", NULL },
        { "vdb", "/run/agent/x", "place of the system", NULL }, { "vdb", PATH_OLD_ROOT "/x", "place of the system", NULL },
        { "vdb", long_path, "mount has 1024 bytes, at most 1023", NULL },
    };

    EACH(i, table) {
        struct conf c;
        struct buf why = { 0 };
        int rc = conf_of_volumes(&c, "zip", &(const char *const [2]){ table[i].device, table[i].mount }, 1, &why);
        check(table[i].wrong ? rc < 0 && strstr(buf_text(&why), table[i].wrong)
                             : rc == 0 && strcmp(c.volumes[0].mount, table[i].shortest) == 0,
              "%s on %s: %s", table[i].device, table[i].mount, buf_text(&why));
        conf_fini(&c);
        buf_fini(&why);
    }
    static const char *const nested[][2] = { { "vdd", "/a/b/c" }, { "vde", "/z" }, { "vdc", "/a/b" }, { "vdf", "/a" } };
    struct conf c;
    struct buf why = { 0 };
    check(conf_of_volumes(&c, "squashfs", nested, COUNT(nested), &why) == 0 && c.volumes_len == 5, "%s", buf_text(&why));
    for (size_t i = 0; i + 1 < c.volumes_len; i++)
        check(path_depth(c.volumes[i].mount) <= path_depth(c.volumes[i + 1].mount), "the outer comes first");
    check(strcmp(c.volumes[3].mount, PATH_CODE) == 0 && strcmp(c.volumes[3].device, CODE_DEVICE) == 0
          && c.volumes[3].read_only, "code on a disk is a volume");
    check(strcmp(conf_code_folder(&c), PATH_CODE) == 0, "and there is the program");
    conf_fini(&c);
    static const struct { const char *encoding, *volumes[2][2], *wrong; } both[] = {
        { "zip", { { "vdc", "/a" }, { "vdc", "/b" } }, "vdc stands twice" },
        { "zip", { { "vdc", "/a" }, { "vdd", "/./a/" } }, "vdc and vdd are both for /a" },
        { "squashfs", { { "vdc", "/a" }, { CODE_DEVICE, "/b" } }, "is the code's" },
        { "squashfs", { { "vdc", "/a" }, { "vdd", PATH_CODE } }, "are both for" },
    };
    EACH(i, both) {
        check(conf_of_volumes(&c, both[i].encoding, both[i].volumes, 2, &why) < 0 && strstr(buf_text(&why), both[i].wrong),
              "%s: %s", both[i].wrong, buf_text(&why));
        conf_fini(&c);
        buf_fini(&why);
    }
}

static void test_volumes(void)
{
    static char disk[VOL_HEAD_BYTES];

    EACH(i, vol_types) {
        const struct vol_type *t = &vol_types[i];
        memset(disk, 0, sizeof disk);
        memcpy(disk + t->at, t->magic.p, t->magic.n);
        check(vol_probe((struct span){ disk, sizeof disk }) == t, "%s is found", t->name);
        check(vol_probe((struct span){ disk, t->at + t->magic.n }) == t, "%s at the end of a disk", t->name);
        check(!vol_probe((struct span){ disk, t->at + t->magic.n - 1 }), "%s is cut short", t->name);
    }
    check(!vol_probe(SPAN("")), "nothing");
    static const struct { const char *from, *to; } paths[] = {
        { "/a", "/a" }, { "/a\\040b", "/a b" }, { "/\\134", "/\\" }, { "/a\\012\\011", "/a\n\t" }, { "/\\04", "/\\04" }, { "\\", "\\" },
    };
    EACH(i, paths) {
        char path[32];
        snprintf(path, sizeof path, "%s", paths[i].from);
        vol_unescape(path);
        check(strcmp(path, paths[i].to) == 0, "\"%s\" became \"%s\"", paths[i].from, path);
    }
    static const struct conf_volume list[] = { { .device = (char *)(uintptr_t)"vdb" } };
    check(vol_is_meant(list, 1, "/dev/vdb", "/data") && !vol_is_meant(list, 1, "/dev/vdc", "/data"), "these volumes");
    check(vol_is_meant(NULL, 0, "tmpfs", "/data") && vol_is_meant(NULL, 0, "/dev/vdz", "/usr/lib/x"), "whatever is mounted");
    check(!vol_is_meant(NULL, 0, "overlay", "/") && !vol_is_meant(list, 1, "/dev/vdb", PATH_OLD_ROOT)
          && !vol_is_meant(NULL, 0, "tmpfs", "/run"), "but what the system stands on");
}

static void test_conf_copy(void)
{
    struct conf c, copy;
    struct buf why = { 0 };
    static const char map[] = "\x84\xaa""entrypoint\xa3""m:a\xa8""encoding\xa5""plain\xa4""code\xc4\x03""a=1"
                              "\xa9""variables\x83\xa1""A\xa1""1\xa4""HOME\xa2/x\xa1""A\xa1""2";

    check(conf_of(&c, map, sizeof map - 1, &why) == 0 && conf_copy_program(&copy, &c) == 0, "%s", buf_text(&why));
    conf_fini(&c);
    check(span_eq(copy.code, "a=1") && strcmp(copy.entrypoint, "m:a") == 0 && copy.variables_len == 3, "a copy stands alone");
    struct program owner = { .conf = copy, .env = program_env_guest };
    char **env = program_env(&owner, PORT_PROGRAM);
    unsigned a = 0, home = 0, path = 0, len = 0;
    for (; env[len]; len++) {
        a += strcmp(env[len], "A=2") == 0;
        home += strcmp(env[len], "HOME=/x") == 0;
        path += strncmp(env[len], "PATH=", 5) == 0;
        check(strcmp(env[len], "A=1") != 0 && strcmp(env[len], "HOME=/root") != 0, "%s was replaced", env[len]);
    }
    check(a == 1 && home == 1 && path == 1, "each variable once, the later one: %u %u %u", a, home, path);
    check(!program_needs_cold(&copy), "nothing that the interpreter reads when it starts");
    env_free(env);
    free(copy.variables[0].name);
    copy.variables[0].name = strdup("PYTHONHASHSEED");
    check(program_needs_cold(&copy), "PYTHONHASHSEED needs a fresh interpreter");
    conf_fini(&copy);
    buf_fini(&why);
}

/* ==== loop ======================================================================= */

struct probe {
    struct watch watch;             /* first member */
    struct loop *loop;
    unsigned     events, deadlines, buried;
    int64_t      fired_ms;          /* the deadline it had */
    struct probe *buries;           /* on its event it gives this one up */
    bool         again;             /* on its event it asks for another turn */
};

static struct probe *probe_order[1024];
static size_t probe_count;

static void probe_bury(struct watch *w)
{
    ((struct probe *)(void *)w)->buried++;
}

static void probe_on_event(struct watch *w, uint32_t events)
{
    struct probe *p = CONTAINER(w, struct probe, watch);
    (void)events;
    p->events++;
    check(p->buried == 0 && !w->buried, "what was given up is not called");
    probe_order[probe_count++ % COUNT(probe_order)] = p;
    if (p->again && p->events < 10)
        loop_soon(p->loop, w);
    if (p->buries)
        loop_bury(p->loop, &p->buries->watch, probe_bury);
}

static void probe_on_deadline(struct watch *w)
{
    struct probe *p = CONTAINER(w, struct probe, watch);
    p->deadlines++;
    p->fired_ms = w->deadline_ms;
    probe_order[probe_count++ % COUNT(probe_order)] = p;
    if (p->buries)
        loop_bury(p->loop, &p->buries->watch, probe_bury);
}

static void probe_init(struct probe *p, struct loop *l, int fd)
{
    *p = (struct probe){ .loop = l, .watch = { .fd = fd, .on_event = probe_on_event, .on_deadline = probe_on_deadline } };
}

static void loop_fini(struct loop *l)
{
    free(l->heap);
    close(l->epoll_fd);
}

static void heap_check(const struct loop *l)
{
    for (size_t i = 1; i <= l->heap_len; i++) {
        check(l->heap[i]->heap_at == i, "each watch knows its place");
        check(i == 1 || l->heap[i / 2]->heap_ms <= l->heap[i]->heap_ms, "the nearest is on top");
    }
}

static void test_loop_deadlines(void)
{
    static struct probe probes[1000];
    struct loop l;
    unsigned random = 1, fired = 0;
    bool removed[1000] = { false };

    loop_init(&l);
    probe_count = 0;
    for (size_t i = 0; i < 1000; i++) {
        probe_init(&probes[i], &l, -1);
        random = random * 1103515245 + 12345;
        loop_after(&l, &probes[i].watch, 1 + (int64_t)(random >> 16) % 5000);
    }
    heap_check(&l);
    for (size_t i = 0; i < 1000; i += 3) {
        removed[i] = i % 2 == 0;
        if (removed[i])
            loop_never(&l, &probes[i].watch);
        else
            loop_after(&l, &probes[i].watch, 10000);     /* later than all others */
    }
    heap_check(&l);
    check(loop_timeout(&l) <= 5000, "the loop sleeps until the nearest");
    int64_t saved = clock_ahead_ms;
    clock_ahead_ms += 6000;
    loop_turn(&l);
    for (size_t i = 0; i < 1000; i++) {
        fired += probes[i].deadlines;
        check(probes[i].deadlines == (i % 3 == 0 ? 0 : 1), "deadline %zu fires once, if it is due", i);
    }
    for (size_t i = 1; i < probe_count; i++)
        check(probe_order[i - 1]->fired_ms <= probe_order[i]->fired_ms, "in order");
    check_number("those that were due", (int64_t)probe_count, fired);
    clock_ahead_ms += 5000;
    loop_turn(&l);
    for (size_t i = 0; i < 1000; i += 3)
        check(probes[i].deadlines == !removed[i], "one that was put off, %zu", i);
    check(l.heap_len == 0 && l.heap_cap <= 1024, "the heap is empty and small: %zu", l.heap_cap);
    clock_ahead_ms = saved;
    loop_fini(&l);
}

static void test_loop_timeout(void)
{
    struct loop l;
    struct probe p;

    loop_init(&l);
    probe_init(&p, &l, -1);
    check_number("nothing to wait for", 60000, loop_timeout(&l));
    loop_after(&l, &p.watch, -5);
    check_number("a deadline that has passed", 0, loop_timeout(&l));
    loop_after(&l, &p.watch, 1000000);
    loop_turn(&l);
    check(p.deadlines == 0, "one that was put off is not yet due");
    check_number("one far away", 60000, loop_timeout(&l));
    loop_soon(&l, &p.watch);
    check_number("work is queued", 0, loop_timeout(&l));
    loop_never(&l, &p.watch);
    loop_turn(&l);
    check(p.events == 1 && p.deadlines == 0, "the work is done, the deadline is gone");
    loop_never(&l, &p.watch);
    loop_fini(&l);
}

static void test_loop_soon(void)
{
    struct loop l;
    struct probe a, b, c;

    loop_init(&l);
    probe_init(&a, &l, -1);
    probe_init(&b, &l, -1);
    probe_init(&c, &l, -1);
    probe_count = 0;
    loop_soon(&l, &a.watch);
    loop_soon(&l, &b.watch);
    loop_soon(&l, &a.watch);
    loop_soon(&l, &c.watch);
    loop_turn(&l);
    check(probe_count == 3 && probe_order[0] == &a && probe_order[1] == &b && probe_order[2] == &c, "each once, in order");
    a.again = true;
    for (int i = 0; i < 3; i++) {
        loop_soon(&l, &a.watch);
        unsigned before = a.events;
        loop_turn(&l);
        check_number("one that asks again waits for the next turn", before + 1, a.events);
    }
    a.again = false;
    loop_turn(&l);
    b.events = c.events = 0;
    a.buries = &c;                  /* a runs first and gives c up, which is queued behind it */
    loop_soon(&l, &a.watch);
    loop_soon(&l, &c.watch);
    loop_soon(&l, &b.watch);
    loop_after(&l, &c.watch, -1);
    c.deadlines = 0;
    loop_never(&l, &c.watch);
    loop_turn(&l);
    check(c.events == 0 && c.buried == 1 && b.events == 1, "what is given up in a turn is not called in it");
    loop_soon(&l, &c.watch);
    loop_turn(&l);
    check(c.events == 0 && c.buried == 1, "nor after it, and is freed once");
    b.buries = &b;
    b.again = true;                 /* queued for the next turn, and given up in this one */
    loop_soon(&l, &b.watch);
    loop_turn(&l);
    check(b.buried == 1, "a handler gives itself up");
    check(!l.soon_first && l.soon_last == &l.soon_first, "the queue is empty");
    loop_fini(&l);
}

/* Two descriptors are ready in one turn, each gives the other up: the second is not called. */
static void test_loop_bury(void)
{
    struct loop l;
    struct probe a, b;
    int one[2], two[2];

    check(pipe(one) == 0 && pipe(two) == 0, "pipes");
    loop_init(&l);
    probe_init(&a, &l, one[0]);
    probe_init(&b, &l, two[0]);
    a.buries = &b;
    b.buries = &a;
    loop_want(&l, &a.watch, EPOLLIN);
    loop_want(&l, &b.watch, EPOLLIN);
    loop_after(&l, &a.watch, -1);
    loop_after(&l, &b.watch, -1);
    check(write(one[1], "x", 1) == 1 && write(two[1], "x", 1) == 1, "both are ready");
    loop_turn(&l);
    check(a.events + b.events == 1 && a.buried + b.buried == 1, "one is called, the other buried");
    struct probe *alive = a.buried ? &b : &a, *dead = a.buried ? &a : &b;
    check(dead->watch.fd == -1 && dead->deadlines == 0 && dead->watch.heap_at == 0, "its descriptor and deadline are gone");
    check(alive->deadlines == 1, "the other's deadline fires");
    loop_want(&l, &alive->watch, 0);
    close(alive->watch.fd);
    close(one[1]);
    close(two[1]);
    loop_fini(&l);
}

/* ==== boot ======================================================================= */

static void test_modules(void)
{
    static const struct { const char *path, *name; } table[] = {
        { "kernel/net/vsock.ko", "vsock" }, { "kernel/a-b-c.ko.xz", "a_b_c" }, { "x.ko", "x" }, { "x", "x" },
        { "a.b/c-d", "c_d" }, { "", "" }, { "/", "" }, { "a/", "" },
    };
    static const char dep[] =
        "kernel/vmw_vsock_virtio_transport.ko: kernel/common.ko kernel/vsock.ko kernel/virtio.ko\n"
        "no colon here\n"
        "kernel/vsock.ko:\n"
        "kernel/packed-one.ko.zst: kernel/vsock.ko\n"
        "kernel/last.ko: kernel/vsock.ko";
    char name[64], small[4];

    EACH(i, table) {
        module_name(name, sizeof name, span_of(table[i].path));
        check_text(table[i].path, table[i].name, name);
    }
    module_name(small, sizeof small, SPAN("kernel/longer.ko"));
    check_text("a name that is cut", "lon", small);
    static const struct { const char *name, *tried; } loads[] = {
        { "vmw_vsock_virtio_transport", "virtio vsock common vmw_vsock_virtio_transport " }, { "vsock", "vsock " },
        { "packed_one", "vsock packed-one " }, { "last", "vsock last " }, { "no colon here", "" }, { "none", "" },
        { "kernel", "" }, { "", "" },
    };
    EACH(i, loads) {                /* none of the files is there: each try is a line in the log */
        char tried[256] = "";
        log_forget();
        int rc = module_load(SPAN(dep), "/nowhere", loads[i].name);
        check(rc < 0, "%s cannot be loaded", loads[i].name);
        for (const char *at = log_lines(); (at = strstr(at, "/nowhere/kernel/")); at++) {
            at += strlen("/nowhere/kernel/");
            snprintf(tried + strlen(tried), sizeof tried - strlen(tried), "%.*s ", (int)strcspn(at, "."), at);
        }
        check_text(loads[i].name, loads[i].tried, tried);
    }
    log_forget();
}

static void test_root_options(void)
{
    static const struct { const char *words; const char *root, *types, *flags; bool writable; } table[] = {
        { "console=ttyS0 quiet", "", "", "", false }, { "root=/dev/vdb ro", "/dev/vdb", "", "", false },
        { "rw root=/dev/vda rootfstype=ext4,xfs rootflags=a=b,c", "/dev/vda", "ext4,xfs", "a=b,c", true },
        { "rw ro", "", "", "", false }, { "ro rw", "", "", "", true }, { "rwx rot Root=x xroot=y", "", "", "", false },
        { "root=/dev/vda root=/dev/vdb", "/dev/vdb", "", "", false },
    };

    EACH(i, table) {
        char words[128], *word, *rest;
        struct boot b = { 0 };
        snprintf(words, sizeof words, "%s", table[i].words);
        for (word = strtok_r(words, " ", &rest); word; word = strtok_r(NULL, " ", &rest))
            boot_root_option(&b, word);
        check_text(table[i].words, table[i].root, b.root);
        check_text(table[i].words, table[i].types, b.root_types);
        check_text(table[i].words, table[i].flags, b.root_flags);
        check(b.root_writable == table[i].writable, "%s: writable", table[i].words);
    }
    char longest[ROOT_WORD_MAX + 64] = "root=";
    struct boot b = { 0 };
    memset(longest + 5, 'x', sizeof longest - 6);
    log_forget();
    boot_root_option(&b, longest);
    check(strlen(b.root) == ROOT_WORD_MAX - 1, "a word that is too long is cut");
    check(strstr(log_lines(), "cut at") != NULL, "and the log says so");
    log_forget();
}

/* An initramfs is given back: all but one folder, whatever depth that has; links are not followed. */
static void test_root_discard(void)
{
    char top[] = "/tmp/unit.XXXXXX", command[256];
    struct stat root, keep;

    if (!mkdtemp(top)) {
        check(false, "mkdtemp: %s", strerror(errno));
        return;
    }
    snprintf(command, sizeof command, "cd %s && mkdir -p in/lib/modules/6.1 in/a/b/c in/.d out && touch in/init in/a/b/c/f "
             "in/.d/.f in/lib/x in/lib/modules/6.1/m out/f && ln -s ../out in/link && ln -s nowhere in/dangling", top);
    check(system(command) == 0, "the tree is made");
    snprintf(command, sizeof command, "%s/in/lib/modules", top);
    check(stat(command, &keep) == 0, "what is kept is there");
    snprintf(command, sizeof command, "%s/in", top);
    int fd = open(command, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    fstat(fd, &root);
    root_discard_take(fd, &root, &keep);
    snprintf(command, sizeof command, "cd %s && test \"$(find in out | sort | xargs)\" = "
             "'in in/lib in/lib/modules in/lib/modules/6.1 in/lib/modules/6.1/m out out/f'", top);
    check(system(command) == 0, "all else is gone, and nothing outside");
    snprintf(command, sizeof command, "rm -rf %s", top);
    check(system(command) == 0, "cleaned");
}

/* ==== net ======================================================================== */

static void test_hosts(void)
{
#define HOSTS_4     "127.0.0.1\tlocalhost\n"
#define HOSTS_6     "::1\tlocalhost ip6-localhost ip6-loopback\n"
    static const struct { const char *before, *hostname, *added; } table[] = {
        { "", "", HOSTS_4 HOSTS_6 }, { "", "me", HOSTS_4 HOSTS_6 "127.0.1.1\tme\n" },
        { HOSTS_4 HOSTS_6, "", "" }, { HOSTS_4 HOSTS_6, "me", "127.0.1.1\tme\n" },
        { "127.0.0.1 localhost", "", "\n" HOSTS_6 }, { "  127.0.0.2  other LocalHost # x\r\n", "", HOSTS_6 },
        { "#127.0.0.1 localhost\n::1 ip6-localhost\n", "", HOSTS_4 HOSTS_6 },
        { "127.0.0.1 # localhost\n\n\n::1 localhost", "", "\n" HOSTS_4 },
        { HOSTS_4 HOSTS_6 "10.0.0.1 me.example me\n", "me", "" }, { HOSTS_4 HOSTS_6 "fd00::1 me\n", "me", "" },
        { HOSTS_4 HOSTS_6 "10.0.0.1 me.example\n", "me", "127.0.1.1\tme\n" },
        { HOSTS_4 HOSTS_6 "me\n", "me", "127.0.1.1\tme\n" }, { "localhost\nlocalhost\tlocalhost\n", "", HOSTS_6 },
    };

    EACH(i, table) {
        struct buf text = { 0 };
        buf_add_text(&text, table[i].before);
        hosts_complete(&text, table[i].hostname);
        check(strncmp(buf_text(&text), table[i].before, strlen(table[i].before)) == 0, "what was there stays");
        check_text(table[i].before, table[i].added, buf_text(&text) + strlen(table[i].before));
        buf_fini(&text);
    }
}

/* ==== child ====================================================================== */

static void test_describe(void)
{
    static const struct { int status; const char *text; } table[] = {
        { 0, "exited with exit code 0" }, { 3 << 8, "exited with exit code 3" }, { 127 << 8, "exited with exit code 127" },
        { 9, "was killed by signal 9 (Killed)" }, { 11, "was killed by signal 11 (Segmentation fault)" },
        { 11 | 0x80, "was killed by signal 11 (Segmentation fault)" }, { 15, "was killed by signal 15 (Terminated)" },
    };
    char out[128], small[8];

    EACH(i, table) {
        child_describe(out, sizeof out, table[i].status);
        check_text("a status", table[i].text, out);
    }
    child_describe(small, sizeof small, 9);
    check_text("cut", "was kil", small);
}

static void test_output_lines(void)
{
    struct limits saved = limits;
    static const char text[] = "one\ntwo\n\nexactly ten\nten chars.\neleven char\nthis one is much longer than ten\nlast";
    static const char expected[] = "one|two||exactly te|ten chars.|eleven cha|this one i|last|";

    limits.log_line_bytes = 10;
    for (size_t piece = 1; piece < sizeof text; piece++) {
        struct output o = { .name = "x", .watch = { .fd = -1 } };
        log_forget();
        for (size_t at = 0; at < sizeof text - 1; at += piece)
            output_take(&o, text + at, sizeof text - 1 - at < piece ? sizeof text - 1 - at : piece);
        output_close(&o);
        check_text("lines in pieces", expected, log_lines());
        struct span tail = output_tail(&o);
        check(tail.n >= sizeof text - 1 && memcmp(tail.p, text, sizeof text - 1) == 0, "the tail has all of it, uncut");
        output_fini(&o);
    }
    limits = saved;
    log_forget();
}

/* 256 MiB in all, with and without newlines: what is kept is bounded. */
static void test_output_flood(void)
{
    struct output o = { .name = "x", .watch = { .fd = -1 } };
    char *piece = malloc(1 << 20);
    size_t most = 0;

    log_forget();
    for (int i = 0; i < 256; i++) {
        memset(piece, i % 2 ? 'y' : '\0', 1 << 20);
        if (i % 4 == 1)
            for (size_t k = 0; k < 1 << 20; k += 4096)
                piece[k] = '\n';
        for (size_t at = 0; at < 1 << 20; at += 16384)
            output_take(&o, piece + at, 16384);
        most = o.line.cap + o.tail.cap > most ? o.line.cap + o.tail.cap : most;
    }
    check(most <= 256 << 10, "a flood keeps %zu bytes", most);
    check(output_tail(&o).n == (size_t)limits.error_bytes, "and its tail");
    free(piece);
    output_fini(&o);
    log_forget();
}

/* ==== conn ======================================================================= */

static void test_address(void)
{
    static const struct { const char *text; bool ok; enum address_kind kind; int family; unsigned port; } table[] = {
        { "unix:/tmp/x", true, ADDRESS_UNIX, AF_UNIX, 0 }, { "unix:x:y", true, ADDRESS_UNIX, AF_UNIX, 0 },
        { "vsock:52", true, ADDRESS_VSOCK, AF_VSOCK, 52 }, { "vsock:4294967295", true, ADDRESS_VSOCK, AF_VSOCK, UINT32_MAX },
        { "tcp:127.0.0.1:80", true, ADDRESS_TCP, AF_INET, 0 }, { "tcp:localhost:0", true, ADDRESS_TCP, AF_INET, 0 },
        { "tcp:[::1]:65535", true, ADDRESS_TCP, AF_INET6, 0 }, { "tcp:::1:80", true, ADDRESS_TCP, AF_INET6, 0 },
        { "fd:3", true, ADDRESS_FD, 0, 0 }, { "hybrid:/v.sock:52", true, ADDRESS_HYBRID, AF_UNIX, 52 },
        { "hybrid:a:b:1", true, ADDRESS_HYBRID, AF_UNIX, 1 },
        { "", false, 0, 0, 0 }, { "unix:", false, 0, 0, 0 }, { "unix", false, 0, 0, 0 }, { ":x", false, 0, 0, 0 },
        { "vsock:", false, 0, 0, 0 }, { "vsock:4294967296", false, 0, 0, 0 }, { "vsock:-1", false, 0, 0, 0 },
        { "vsock:2:52", false, 0, 0, 0 }, { "tcp:80", false, 0, 0, 0 }, { "tcp:1.2.3.4:65536", false, 0, 0, 0 },
        { "tcp:1.2.3:80", false, 0, 0, 0 }, { "tcp:example.org:80", false, 0, 0, 0 }, { "tcp::80", false, 0, 0, 0 },
        { "tcp:[::1:80", false, 0, 0, 0 }, { "tcp:127.0.0.1:", false, 0, 0, 0 }, { "fd:x", false, 0, 0, 0 },
        { "fd:-1", false, 0, 0, 0 }, { "fd:4294967296", false, 0, 0, 0 }, { "hybrid:52", false, 0, 0, 0 },
        { "hybrid::52", false, 0, 0, 0 }, { "hybrid:/v.sock", false, 0, 0, 0 }, { "udp:1.2.3.4:5", false, 0, 0, 0 },
        { "UNIX:/x", false, 0, 0, 0 },
        { "unix:/x,trust=none", true, ADDRESS_UNIX, AF_UNIX, 0 }, { "vsock:80,trust=all", true, ADDRESS_VSOCK, AF_VSOCK, 80 },
        { "tcp:[::]:80,trust=10.0.0.0/8,::1/128,1.2.3.4", true, ADDRESS_TCP, AF_INET6, 0 },
        { "tcp:1.2.3.4:5,trust=0.0.0.0/0", true, ADDRESS_TCP, AF_INET, 0 }, { "tcp:1.2.3.4:5,trust=", false, 0, 0, 0 },
        { "tcp:1.2.3.4:5,trust=all,1.2.3.4", false, 0, 0, 0 }, { "tcp:1.2.3.4:5,trust=1.2.3.4/33", false, 0, 0, 0 },
        { "tcp:1.2.3.4:5,trust=::/129", false, 0, 0, 0 }, { "tcp:1.2.3.4:5,trust=1.2.3.4,,::1", false, 0, 0, 0 },
        { "tcp:1.2.3.4:5,trust=1.2.3.4/", false, 0, 0, 0 }, { "tcp:1.2.3.4:5,trust=host", false, 0, 0, 0 },
        { "tcp:11111111111111111111111111111111111111111111111111111111111111:80", false, 0, 0, 0 },
    };
    struct address a;
    char path[200];

    EACH(i, table) {
        bool ok = address_parse(&a, table[i].text);
        check(ok == table[i].ok, "\"%s\" is%s an address", table[i].text, table[i].ok ? "" : " not");
        if (ok && table[i].ok)
            check(a.kind == table[i].kind && a.sa.ss_family == table[i].family && a.port == table[i].port, "\"%s\"", table[i].text);
    }
    memset(path, 'p', sizeof path);
    memcpy(path, "unix:", 5);
    path[5 + 107] = '\0';
    check(address_parse(&a, path), "a path of 107 bytes");
    path[5 + 107] = 'p';
    path[5 + 108] = '\0';
    check(!address_parse(&a, path), "a path of 108 bytes");
}

static void test_trust(void)
{
    static const struct { const char *list, *address; bool has; } table[] = {
        { "all", "1.2.3.4", true }, { "all", "-", true }, { "none", "1.2.3.4", false }, { "none", "-", false },
        { "10.0.0.0/8", "10.255.0.1", true }, { "10.0.0.0/8", "11.0.0.1", false }, { "10.0.0.0/8", "-", false },
        { "0.0.0.0/0", "1.2.3.4", true }, { "0.0.0.0/0", "::1", false }, { "::/0", "1.2.3.4", true },
        { "1.2.3.4", "1.2.3.4", true }, { "1.2.3.4", "1.2.3.5", false }, { "1.2.3.4/31", "1.2.3.5", true },
        { "1.2.3.4/31", "1.2.3.6", false }, { "fe80::/10", "febf::1", true }, { "fe80::/10", "fec0::1", false },
        { "9.9.9.9,::1", "::1", true }, { "9.9.9.9,::1", "::2", false }, { "1.2.3.0/24", "::ffff:1.2.3.9", true },
    };
    static const struct { const char *list, *trust, *client; } clients[] = {
        { "1.1.1.1", "", "1.1.1.1" }, { "1.1.1.1, 2.2.2.2", "", "1.1.1.1" }, { "1.1.1.1, 2.2.2.2", "all", "1.1.1.1" },
        { "1.1.1.1, 2.2.2.2", "9.9.9.9", "2.2.2.2" }, { "1.1.1.1,2.2.2.2 ,9.9.9.9", "9.9.9.9", "2.2.2.2" },
        { "9.9.9.9", "9.9.9.9", "9.9.9.9" }, { "x, 2.2.2.2", "2.2.2.2", "2.2.2.2" }, { "1.1.1.1, x", "all", "" },
        { "1.1.1.1:80", "all", "1.1.1.1" }, { "[::1]:80", "all", "::1" }, { "::1", "all", "::1" }, { "[::1]", "all", "::1" },
        { "", "all", "" }, { ",", "all", "" }, { "unknown", "all", "" }, { "1.1.1.1,", "all", "" },
    };

    EACH(i, table)
        check(trust_has(span_of(table[i].list), span_of(table[i].address)) == table[i].has, "%s in %s", table[i].address, table[i].list);
    EACH(i, clients) {
        struct span found = forwarded_client(span_of(clients[i].list), span_of(clients[i].trust));
        check(span_eq(found, clients[i].client), "\"%s\", trusting %s: %.*s", clients[i].list, clients[i].trust, (int)found.n, found.p ? found.p : "");
    }
}

/* Every row: nothing here may ask for input that nobody takes, nor for nothing at all while open. */
static void test_interest(void)
{
    enum { E = 1, P = 2, F = 4, O = 8, H = 16, T = 32, B = 64 };    /* end of stream read, paused, input full,
                     * output waits, the peer is known to send no more; by TLS; which the socket keeps waiting */
    enum { OPEN = EPOLLHUP, IN = EPOLLIN, OUT = EPOLLOUT, END = EPOLLRDHUP };
    static const struct { enum conn_state state; unsigned flags, events; } table[] = {
        { CONN_CONNECTING, 0, OUT }, { CONN_CONNECTING, O, OUT }, { CONN_CONNECTING, P | O | H, OUT },
        { CONN_OPEN, 0, OPEN | END | IN }, { CONN_OPEN, E, OPEN | END }, { CONN_OPEN, P, OPEN | END },
        { CONN_OPEN, F, OPEN | END }, { CONN_OPEN, E | P, OPEN | END }, { CONN_OPEN, E | F, OPEN | END },
        { CONN_OPEN, P | F, OPEN | END }, { CONN_OPEN, E | P | F, OPEN | END },
        { CONN_OPEN, O, OPEN | END | IN | OUT }, { CONN_OPEN, O | E, OPEN | END | OUT },
        { CONN_OPEN, O | P, OPEN | END | OUT }, { CONN_OPEN, O | F, OPEN | END | OUT },
        { CONN_OPEN, O | E | P | F, OPEN | END | OUT },
        { CONN_OPEN, H, OPEN | IN }, { CONN_OPEN, H | E, OPEN }, { CONN_OPEN, H | P, OPEN }, { CONN_OPEN, H | F, OPEN },
        { CONN_OPEN, H | O, OPEN | IN | OUT }, { CONN_OPEN, H | O | P, OPEN | OUT }, { CONN_OPEN, H | O | E, OPEN | OUT },
        { CONN_DRAINING, 0, OPEN }, { CONN_DRAINING, O, OPEN | OUT }, { CONN_DRAINING, E | O, OPEN | OUT },
        { CONN_DRAINING, P | F | H, OPEN }, { CONN_LINGERING, 0, IN }, { CONN_LINGERING, P | F | H, IN },
        { CONN_DEAD, 0, 0 }, { CONN_DEAD, O, 0 },
        { CONN_HANDSHAKE, T, IN }, { CONN_HANDSHAKE, T | B, OUT }, { CONN_HANDSHAKE, T | P | F, IN },
        { CONN_OPEN, T, OPEN | END | IN }, { CONN_OPEN, T | O, OPEN | END | IN | OUT },
        { CONN_OPEN, T | B | O | E, OPEN | END | OUT }, { CONN_DRAINING, T, OPEN }, { CONN_DRAINING, T | B, OPEN | OUT },
        { CONN_LINGERING, T | B, IN }, { CONN_DEAD, T | B, 0 },
    };

    EACH(i, table) {
        unsigned f = table[i].flags;
        struct tls tls = { .blocked = f & B };
        struct conn c = { .state = table[i].state, .eof = f & E, .paused = f & P, .half = f & H, .in_max = 100,
                          .tls = f & T ? &tls : NULL };
        c.in.len = f & F ? 100 : 99;
        c.out.len = f & O ? 1 : 0;
        uint32_t events = table[i].events | (c.state == CONN_OPEN && !c.tls ? (uint32_t)EPOLLET : 0);
        check(conn_interest(&c) == events, "row %zu: expected 0x%x, got 0x%x", i, events, conn_interest(&c));
    }
}

/* ==== fixture: fronts on socket pairs, a program that never answers ============== */

struct bench {
    struct loop         loop;
    struct conns        conns;
    struct children     children;
    struct program      program;
    struct setup        setup;
    struct http_server  http;
    struct aleph_server aleph;
    unsigned            halts;
};

static void bench_on_halt(struct aleph_server *s)
{
    ((struct bench *)s->owner)->halts++;
}

/* Requests queue up in the program, where a test can look at them. */
static void bench_init(struct bench *b)
{
    *b = (struct bench){ 0 };
    loop_init(&b->loop);
    b->conns.loop = &b->loop;
    program_init(&b->program, &b->loop, &b->children);
    b->program.state = PROGRAM_STARTING;
    b->http = (struct http_server){ .loop = &b->loop, .conns = &b->conns, .program = &b->program };
    b->http.listener.arg = &b->http;
    b->setup.state = SETUP_DONE;
    b->aleph = (struct aleph_server){ .loop = &b->loop, .conns = &b->conns, .children = &b->children,
        .program = &b->program, .setup = &b->setup, .on_halt = bench_on_halt, .owner = b };
    b->aleph.listener.arg = &b->aleph;
    log_forget();
}

/* Whether a turn would find something to do; epoll tells of some events only once. */
static bool loop_is_busy(const struct loop *l)
{
    struct pollfd any = { .fd = l->epoll_fd, .events = POLLIN };

    return l->soon_first || poll(&any, 1, 0) > 0;
}

/* Until there is nothing to do at once. */
static void bench_run(struct bench *b)
{
    for (int i = 0; i < 1000; i++) {
        if (!loop_is_busy(&b->loop))
            return;
        loop_turn(&b->loop);
    }
    check(false, "the loop does not come to rest");
}

static void bench_fini(struct bench *b)
{
    bench_run(b);
    check_number("all connections are gone", 0, (int64_t)b->conns.count);
    check_number("nobody waits in the queue", 0, (int64_t)b->program.queued);
    check_number("no deadline is left", 0, (int64_t)b->loop.heap_len);
    loop_fini(&b->loop);
}

static int bench_connect_to(struct loop *loop, void (*accept)(struct listener *, int), struct listener *l)
{
    int ends[2];

    check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0, "a socket pair");
    accept(l, ends[1]);
    loop_turn(loop);
    return ends[0];
}

static int bench_connect(struct bench *b, void (*accept)(struct listener *, int), struct listener *l)
{
    int fd = bench_connect_to(&b->loop, accept, l);
    bench_run(b);
    return fd;
}

/* Sends in pieces of that size and lets the loop run after each. */
static void bench_send(struct bench *b, int fd, struct span s, size_t piece)
{
    for (size_t at = 0; at < s.n; at += piece) {
        size_t n = s.n - at < piece ? s.n - at : piece;
        if (send(fd, s.p + at, n, MSG_NOSIGNAL) < 0)
            return;                 /* refused and closed before the end */
        bench_run(b);
    }
}

/* What has come so far, as text. */
static const char *bench_answer(int fd)
{
    static char text[128 << 10];
    ssize_t n, len = 0;

    while ((n = read(fd, text + len, sizeof text - 1 - (size_t)len)) > 0)
        len += n;
    text[len] = '\0';
    return text;
}

/* ==== http ======================================================================= */

#define HOST "Host: h\r\n"

/* 0: it is passed on to the program. Each is fed whole and byte by byte. */
static const struct http_row { const char *name, *text; int status; } http_rows[] = {
    { "the least", "GET / HTTP/1.1\r\n" HOST "\r\n", 0 },
    { "1.0 without Host", "GET / HTTP/1.0\r\n\r\n", 0 },
    { "absolute form", "GET http://x/y?z HTTP/1.1\r\n" HOST "\r\n", 0 },
    { "OPTIONS *", "OPTIONS * HTTP/1.1\r\n" HOST "\r\n", 0 },
    { "a body", "POST / HTTP/1.1\r\n" HOST "Content-Length: 3\r\n\r\nabc", 0 },
    { "chunks", "POST / HTTP/1.1\r\n" HOST "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 0 },
    { "1 CL and TE", "POST / HTTP/1.1\r\n" HOST "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400 },
    { "1 TE and CL", "POST / HTTP/1.1\r\n" HOST "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400 },
    { "2 two TE", "POST / HTTP/1.1\r\n" HOST "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400 },
    { "3 TE xchunked", "POST / HTTP/1.1\r\n" HOST "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501 },
    { "3 TE chunked, identity", "POST / HTTP/1.1\r\n" HOST "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400 },
    { "3 TE gzip, chunked", "POST / HTTP/1.1\r\n" HOST "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501 },
    { "3 TE with a vertical tab", "POST / HTTP/1.1\r\n" HOST "Transfer-Encoding: \vchunked\r\n\r\n0\r\n\r\n", 400 },
    { "4 CL +5", "POST / HTTP/1.1\r\n" HOST "Content-Length: +5\r\n\r\nabcde", 400 },
    { "4 CL -1", "POST / HTTP/1.1\r\n" HOST "Content-Length: -1\r\n\r\nabcde", 400 },
    { "4 CL 0x5", "POST / HTTP/1.1\r\n" HOST "Content-Length: 0x5\r\n\r\nabcde", 400 },
    { "4 CL 5,5", "POST / HTTP/1.1\r\n" HOST "Content-Length: 5,5\r\n\r\nabcde", 400 },
    { "4 CL 5 5", "POST / HTTP/1.1\r\n" HOST "Content-Length: 5 5\r\n\r\nabcde", 400 },
    { "4 CL of 20 digits", "POST / HTTP/1.1\r\n" HOST "Content-Length: 99999999999999999999\r\n\r\n", 400 },
    { "4 CL empty", "POST / HTTP/1.1\r\n" HOST "Content-Length: \r\n\r\n", 400 },
    { "4 two CL", "POST / HTTP/1.1\r\n" HOST "Content-Length: 5\r\nContent-Length: 5\r\n\r\nabcde", 400 },
    { "5 bare LF in the head", "GET / HTTP/1.1\n" HOST "\r\n", 400 },
    { "5 bare LF after a field", "GET / HTTP/1.1\r\nHost: h\n\r\n", 400 },
    { "5 bare CR in a field", "GET / HTTP/1.1\r\n" HOST "A: b\rc\r\n\r\n", 400 },
    { "6 a folded line", "GET / HTTP/1.1\r\n" HOST "A: b\r\n c\r\n\r\n", 400 },
    { "7 space before the colon", "GET / HTTP/1.1\r\n" HOST "A : b\r\n\r\n", 400 },
    { "8 space before the first field", "GET / HTTP/1.1\r\n " HOST "\r\n", 400 },
    { "9 control byte in a name", "GET / HTTP/1.1\r\n" HOST "A\x01: b\r\n\r\n", 400 },
    { "9 control byte in a value", "GET / HTTP/1.1\r\n" HOST "A: b\x01\r\n\r\n", 400 },
    { "9 DEL in a value", "GET / HTTP/1.1\r\n" HOST "A: b\x7f\r\n\r\n", 400 },
    { "10 HTTP/0.9", "GET / HTTP/0.9\r\n\r\n", 505 },
    { "10 no version", "GET /\r\n\r\n", 505 },
    { "10 no version, then fields", "GET /\r\n" HOST "Content-Length: 3\r\n\r\nabc", 505 },
    { "10 HTTP/9.9", "GET / HTTP/9.9\r\n" HOST "\r\n", 400 },
    { "10 HTTP/2.0", "GET / HTTP/2.0\r\n" HOST "\r\n", 505 },
    { "10 http/1.1", "GET / http/1.1\r\n" HOST "\r\n", 400 },
    { "10 space after the version", "GET / HTTP/1.1 \r\n" HOST "\r\n", 400 },
    { "11 no Host", "GET / HTTP/1.1\r\n\r\n", 400 },
    { "11 two Hosts", "GET / HTTP/1.1\r\n" HOST HOST "\r\n", 400 },
    { "11 an empty Host", "GET / HTTP/1.1\r\nHost: \r\n\r\n", 400 },
    { "11 a Host with a slash", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400 },
    { "11 a Host with a user", "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", 400 },
    { "a fragment", "GET /#x HTTP/1.1\r\n" HOST "\r\n", 400 },
    { "no slash", "GET x HTTP/1.1\r\n" HOST "\r\n", 400 },
    { "a space in the target", "GET /a b HTTP/1.1\r\n" HOST "\r\n", 400 },
    { "CONNECT", "CONNECT h:80 HTTP/1.1\r\n" HOST "\r\n", 501 },
    { "TRACE", "TRACE / HTTP/1.1\r\n" HOST "\r\n", 501 },
    { "PRI", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 501 },
    { "TE in 1.0", "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400 },
    { "another Expect", "POST / HTTP/1.1\r\n" HOST "Expect: 200-ok\r\nContent-Length: 3\r\n\r\nabc", 417 },
    { "no HTTP at all", "\x16\x03\x01\x02", 400 },
};

static void test_http_heads(void)
{
    EACH(i, http_rows) {
        const struct http_row *row = &http_rows[i];
        for (size_t piece = 1; piece < 100000; piece += 99998) {
            struct bench b;
            bench_init(&b);
            int fd = bench_connect(&b, http_on_accept, &b.http.listener);
            bench_send(&b, fd, span_of(row->text), piece);
            const char *answer = bench_answer(fd);
            int status = strncmp(answer, "HTTP/1.1 ", 9) == 0 ? atoi(answer + 9) : 0;
            check(status == row->status, "%s in pieces of %zu: expected %d, got %.60s", row->name, piece, row->status, answer);
            check((row->status == 0) == (b.program.queued == 1), "%s: %zu reach the program", row->name, b.program.queued);
            if (status)
                check(strstr(answer, "connection: close\r\n") != NULL, "%s: the connection ends", row->name);
            close(fd);
            bench_run(&b);
            clock_ahead_ms += 2 * limits.linger_ms;
            loop_turn(&b.loop);
            bench_fini(&b);
        }
    }
}

/* What reaches the program of a request. */
static void test_http_request(void)
{
    static const char text[] = "POST /a%20b/../c?d=e&f HTTP/1.1\r\nHost: Example.org:80\r\nX-One: 1\r\nx-one: 2 \r\n"
        "Connection: keep-alive, X-Gone\r\nX-Gone: 1\r\nKeep-Alive: 5\r\nTE: trailers\r\nX-Bytes: \xff\r\nContent-Length: 3\r\n\r\nabc";
    static const struct { const char *target, *path, *query, *host; } table[] = {
        { "/", "/", "", "h" }, { "/?", "/", "", "h" }, { "/a?b?c", "/a", "b?c", "h" }, { "//a//b", "//a//b", "", "h" },
        { "http://other", "/", "", "other" }, { "http://other?q", "/", "q", "other" },
        { "https://other:8/x?y", "/x", "y", "other:8" }, { "HTTP://o/", "/", "", "o" }, { "/%ff%00%2e", "/%ff%00%2e", "", "h" },
    };

    for (size_t piece = 1; piece < 100000; piece += 99998) {
        struct bench b;
        bench_init(&b);
        int fd = bench_connect(&b, http_on_accept, &b.http.listener);
        bench_send(&b, fd, SPAN(text), piece);
        check(b.program.queued == 1, "one request waits");
        const struct request *r = &b.program.first->request;
        check(span_eq(request_part(r, r->method), "POST") && span_eq(request_part(r, r->raw_path), "/a%20b/../c")
              && span_eq(request_part(r, r->query), "d=e&f") && r->has_body && strcmp(r->http_version, "1.1") == 0, "its line");
        struct span rest = request_part(r, r->fields), name, value;
        char seen[512] = "";
        while (field_next(&rest, &name, &value))
            snprintf(seen + strlen(seen), sizeof seen - strlen(seen), "%s=%s|", name.p, value.p);
        check_text("its fields", "Host=Example.org:80|X-One=1|x-one=2|X-Bytes=\xff|Content-Length=3|", seen);
        close(fd);
        bench_fini(&b);
    }
    EACH(i, table) {
        struct bench b;
        char request[200];
        bench_init(&b);
        int fd = bench_connect(&b, http_on_accept, &b.http.listener);
        snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: h\r\n\r\n", table[i].target);
        bench_send(&b, fd, span_of(request), 7);
        const struct request *r = b.program.first ? &b.program.first->request : NULL;
        struct span rest = r ? request_part(r, r->fields) : SPAN(""), name, value = SPAN("");
        check(r && span_eq(request_part(r, r->raw_path), table[i].path) && span_eq(request_part(r, r->query), table[i].query)
              && field_next(&rest, &name, &value) && span_eq(value, table[i].host), "target %s", table[i].target);
        close(fd);
        bench_fini(&b);
    }
}

static void test_http_phrases(void)
{
    static const struct { int status; const char *line; } table[] = {
        { 200, "HTTP/1.1 200 OK\r\n" }, { 404, "HTTP/1.1 404 Not Found\r\n" }, { 502, "HTTP/1.1 502 Bad Gateway\r\n" },
        { 999, "HTTP/1.1 999 \r\n" }, { 999, "HTTP/1.1 999 \r\n" }, { 200, "HTTP/1.1 200 OK\r\n" },
    };
    struct http_server server = { 0 };

    EACH(i, table) {
        struct http h = { .server = &server };
        http_add_status_line(&h, table[i].status);
        check_buf("a status line", table[i].line, &h.conn.out);
    }
}

static void test_response_head(void)
{
    static const struct { int status; const char *fields; size_t n; const char *wrong; int64_t length; } table[] = {
        { 200, MP(""), NULL, -1 }, { 200, MP("a\0b\0"), NULL, -1 }, { 999, MP(""), NULL, -1 },
        { 199, MP(""), "a status", 0 }, { 1000, MP(""), "a status", 0 }, { 0, MP(""), "a status", 0 }, { 101, MP(""), "a status", 0 },
        { 200, MP("Content-Length\0" "5\0"), NULL, 5 }, { 200, MP("content-length\0" "0\0"), NULL, 0 },
        { 200, MP("content-length\0" "5\0content-length\0" "5\0"), NULL, 5 },
        { 200, MP("content-length\0" "5\0content-length\0" "6\0"), "a Content-Length", 0 },
        { 200, MP("content-length\0" "+5\0"), "a Content-Length", 0 }, { 200, MP("content-length\0\0"), "a Content-Length", 0 },
        { 200, MP("content-length\0" "5, 5\0"), "a Content-Length", 0 },
        { 200, MP("\0b\0"), "a field whose name", 0 }, { 200, MP("a b\0c\0"), "a field whose name", 0 },
        { 200, MP("a:\0c\0"), "a field whose name", 0 }, { 200, MP("a\r\0c\0"), "a field whose name", 0 },
        { 200, MP("\xc3\xa9\0c\0"), "a field whose name", 0 }, { 200, MP("a\0b\rc\0"), "a field with CR", 0 },
        { 200, MP("a\0b\nc\0"), "a field with CR", 0 }, { 200, MP("a\0\x7f\0"), "a field with CR", 0 },
        { 200, MP("a\0b\tc\0"), NULL, -1 }, { 200, MP("a\0\xe9\0"), NULL, -1 }, { 200, MP("a\0\0"), NULL, -1 },
    };

    EACH(i, table) {
        struct response_head h = { .status = table[i].status, .fields = { table[i].fields, table[i].n } };
        const char *wrong = response_head_check(&h, false);
        check(!wrong == !table[i].wrong && (!wrong || strncmp(wrong, table[i].wrong, strlen(table[i].wrong)) == 0),
              "row %zu: %s", i, wrong ? wrong : "right");
        check(wrong || h.content_length == table[i].length, "row %zu: length %" PRId64, i, h.content_length);
    }
    struct response_head many = { .status = 200, .fields_count = (unsigned)limits.head_fields + 1 };
    check(response_head_check(&many, false) != NULL, "too many fields");
    many = (struct response_head){ .status = 200, .fields = { "", (size_t)limits.head_bytes + 1 } };
    check(response_head_check(&many, false) != NULL, "too large a head");
}

static void test_field_next(void)
{
    static const struct { const char *p; size_t n; const char *seen; size_t left; } table[] = {
        { MP(""), "", 0 }, { MP("a\0b\0"), "a=b|", 0 }, { MP("a\0\0"), "a=|", 0 }, { MP("\0\0"), "=|", 0 },
        { MP("a\0b\0c"), "a=b|", 1 }, { MP("a\0b\0c\0"), "a=b|", 2 }, { MP("a"), "", 1 }, { MP("a\0b"), "", 3 },
        { MP("a\0b\0c\0d\0"), "a=b|c=d|", 0 },
    };

    EACH(i, table) {
        struct span rest = { table[i].p, table[i].n }, name, value;
        char seen[64] = "";
        while (field_next(&rest, &name, &value))
            snprintf(seen + strlen(seen), sizeof seen - strlen(seen), "%.*s=%.*s|", (int)name.n, name.p, (int)value.n, value.p);
        check_text("fields", table[i].seen, seen);
        check_number("what is left", (int64_t)table[i].left, (int64_t)rest.n);
    }
}

/* ==== program ==================================================================== */

static unsigned program_told;

static void told_started(struct program *p, bool ok, struct span text, struct span traceback)
{
    (void)p;
    (void)text;
    (void)traceback;
    program_told += ok;
}

/* An executable that has run for exec_wait_ms counts as started, one that was killed does not. */
static void test_program_started(void)
{
    static const struct { enum runner_state runner; enum program_state program; unsigned told; } table[] = {
        { RUNNER_STARTING, PROGRAM_SERVING, 1 }, { RUNNER_BROKEN, PROGRAM_STARTING, 0 },
    };

    EACH(i, table) {
        struct loop loop;
        struct children children = { 0 };
        struct program p;
        struct runner r = { .state = table[i].runner };
        loop_init(&loop);
        program_init(&p, &loop, &children);
        p.conf.launch = LAUNCH_EXEC;
        p.state = PROGRAM_STARTING;
        p.places->state = PLACE_STARTING;
        p.places->runner = &r;
        p.on_started = told_started;
        program_told = 0;
        p.places->timer.on_deadline(&p.places->timer);
        check_number("its state", table[i].program, p.state);
        check_number("told", table[i].told, program_told);
        check(p.places->timer.heap_at > 0, "row %zu: it is looked at again", i);
        free(loop.heap);
        close(loop.epoll_fd);
    }
}

/* The one with the fewest exchanges, of those that are ready and not full. */
static void test_program_choose(void)
{
    static const struct { enum place_state place[3]; enum runner_state runner[3]; size_t load[3]; int chosen; } table[] = {
        { { PLACE_SERVING, PLACE_SERVING, PLACE_SERVING }, { RUNNER_READY, RUNNER_READY, RUNNER_READY }, { 2, 1, 3 }, 1 },
        { { PLACE_SERVING, PLACE_SERVING, PLACE_SERVING }, { RUNNER_READY, RUNNER_READY, RUNNER_READY }, { 1, 1, 1 }, 0 },
        { { PLACE_SERVING, PLACE_SERVING, PLACE_STARTING }, { RUNNER_READY, RUNNER_BROKEN, RUNNER_STARTING }, { 5, 0, 0 }, 0 },
        { { PLACE_SERVING, PLACE_SERVING, PLACE_SERVING }, { RUNNER_READY, RUNNER_READY, RUNNER_READY }, { 9, 9, 8 }, 2 },
        { { PLACE_SERVING, PLACE_SERVING, PLACE_SERVING }, { RUNNER_READY, RUNNER_READY, RUNNER_READY }, { 9, 9, 9 }, -1 },
        { { PLACE_STARTING, PLACE_STARTING, PLACE_STARTING }, { RUNNER_WARM, RUNNER_READY, RUNNER_STARTING }, { 0, 0, 0 }, -1 },
    };
    struct limits before = limits;

    limits.in_flight = 9;
    EACH(i, table) {
        struct program p;
        struct runner r[3] = { { 0 } };
        program_init(&p, NULL, NULL);
        p.workers = 3;
        for (size_t k = 0; k < 3; k++) {
            r[k].state = table[i].runner[k];
            r[k].load.n = table[i].load[k];
            p.places[k].state = table[i].place[k];
            p.places[k].runner = &r[k];
        }
        const struct runner *chosen = program_choose(&p);
        check_number("chosen", table[i].chosen, chosen ? chosen - r : -1);
    }
    limits = before;
}

/* What counts as a change of the code, for --reload. */
static void test_reload_change(void)
{
    static const struct { uint32_t mask; const char *name; bool is; } table[] = {
        { IN_CLOSE_WRITE, "main.py", true }, { IN_MOVED_TO, "app.js", true }, { IN_DELETE, "a", true },
        { IN_DELETE_SELF, "", true }, { IN_Q_OVERFLOW, "", true }, { IN_IGNORED, "", false }, { IN_OPEN, "main.py", false },
        { IN_CLOSE_WRITE, "main.pyc", false }, { IN_CREATE | IN_ISDIR, "__pycache__", false },
        { IN_CREATE | IN_ISDIR, "node_modules", false }, { IN_CREATE, ".main.py.swp", false }, { IN_CREATE, "db.sqlite3-journal", false },
    };

    EACH(i, table) {
        char bytes[sizeof(struct inotify_event) + 32] = { 0 };
        struct inotify_event e = { .mask = table[i].mask, .len = table[i].name[0] ? 32 : 0 };
        memcpy(bytes, &e, sizeof e);
        snprintf(bytes + sizeof e, 32, "%s", table[i].name);
        check(reload_is_change(bytes, sizeof e + e.len) == table[i].is, "row %zu: %s", i, table[i].name);
    }
}

/* ==== aleph ====================================================================== */

static void aleph_scope(struct buf *out, const char *path, const char *query, const char *field, const char *value)
{
    mp_write_map(out, 1);
    mp_write_key(out, "scope");
    mp_write_map(out, 6);
    mp_write_key(out, "type");
    mp_write_key(out, "http");
    mp_write_key(out, "method");
    mp_write_key(out, "GET");
    mp_write_key(out, "path");
    mp_write_key(out, path);
    mp_write_key(out, "query_string");
    mp_write_key(out, query);
    mp_write_key(out, "headers");
    mp_write_array(out, 1);
    mp_write_array(out, 2);
    mp_write_bin(out, span_of(field));
    mp_write_bin(out, span_of(value));
    mp_write_key(out, "body");
    mp_write_bin(out, SPAN("body"));
}

/* 45, 81: a scope becomes the same request, however it is cut. */
static void test_aleph_request(void)
{
    struct buf map = { 0 };

    aleph_scope(&map, "/a b?\r\n\xc3\xa9%41", "x=y z&%41%\r\n", "X-Name", "value");
    for (size_t piece = 1; piece <= map.len; piece += piece < 20 ? 1 : 17) {
        struct bench b;
        bench_init(&b);
        int fd = bench_connect(&b, aleph_on_accept, &b.aleph.listener);
        bench_send(&b, fd, buf_span(&map), piece);
        const struct request *r = b.program.first ? &b.program.first->request : NULL;
        check(r && span_eq(request_part(r, r->raw_path), "/a%20b%3F%0D%0A%C3%A9%2541")
              && span_eq(request_part(r, r->query), "x=y+z&%41%25%0D%0A") && span_eq(request_part(r, r->method), "GET"),
              "in pieces of %zu", piece);
        struct span rest = r ? request_part(r, r->fields) : SPAN("");
        check(rest.n == sizeof "X-Name\0value\0content-length\0" "4" && memcmp(rest.p, "X-Name\0value\0content-length\0" "4", rest.n) == 0,
              "its fields: %zu bytes", rest.n);
        close(fd);
        bench_fini(&b);
    }
    buf_fini(&map);
}

/* 47, and what is none: the table says whether the machine halts or what the answer holds. */
static void test_aleph_text(void)
{
    static const struct { const char *text; bool eof, halts; const char *answer; } table[] = {
        { "halt", false, true, "" }, { "halt\n", false, true, "" }, { "halt\r\n", false, true, "" }, { "halt", true, true, "" },
        { "hal", false, false, "" }, { "hal", true, false, "\"hal\" is no instruction" }, { "hal\n", false, false, "is no instruction" },
        { "hold", false, false, "\"ho" }, { "h", true, false, "\"h\" is no" }, { "HALT\n", false, false, "0x48" },
        { "", true, false, "" }, { "12", false, false, "" }, { "x", false, false, "0x78" },
        { "5\n", true, false, "configured already" },
    };

    EACH(i, table) {
        for (size_t piece = 1; piece <= 10; piece += 9) {
            struct bench b;
            bench_init(&b);
            int fd = bench_connect(&b, aleph_on_accept, &b.aleph.listener);
            bench_send(&b, fd, span_of(table[i].text), piece);
            if (table[i].eof)
                shutdown(fd, SHUT_WR);
            bench_run(&b);
            check(b.halts == table[i].halts, "\"%s\" in pieces of %zu: halts %u", table[i].text, piece, b.halts);
            const char *answer = bench_answer(fd);
            if (strcmp(table[i].text, "12") != 0)
                check(memmem(answer, 300, table[i].answer, strlen(table[i].answer)) != NULL, "\"%s\": %s", table[i].text, answer);
            close(fd);
            bench_run(&b);
            clock_ahead_ms += 2 * limits.linger_ms;
            loop_turn(&b.loop);
            bench_fini(&b);
        }
    }
}

/* The limits of time: each state is told what it waited for, and ends. */
static void test_aleph_deadlines(void)
{
    static const struct { const char *text; int64_t *limit; const char *answer; } table[] = {
        { "", &limits.silent_ms, "no byte within 30000 ms" }, { "hal", &limits.head_ms, "\"hal\" is no instruction" },
        { "\x81\xa5sco", &limits.head_ms, "instruction: stalled for 30000 ms" },
    };

    EACH(i, table) {
        struct bench b;
        bench_init(&b);
        int fd = bench_connect(&b, aleph_on_accept, &b.aleph.listener);
        bench_send(&b, fd, span_of(table[i].text), 1);
        clock_ahead_ms += *table[i].limit - 1000;
        loop_turn(&b.loop);
        check_text("not yet", "", bench_answer(fd));
        clock_ahead_ms += 2000;
        loop_turn(&b.loop);
        bench_run(&b);
        const char *answer = bench_answer(fd);
        check(memmem(answer, 200, table[i].answer, strlen(table[i].answer)) != NULL, "row %zu: %s", i, answer);
        close(fd);
        bench_fini(&b);
    }
}

/* ==== forward ==================================================================== */

struct relay {
    struct bench   bench;
    struct pumps   pumps;
    struct listener listener;
    int            server, near, far;           /* the test's ends */
    char           path[64], text[80];
};

static void relay_open(struct relay *r)
{
    struct sockaddr_un un = { .sun_family = AF_UNIX };

    bench_init(&r->bench);
    snprintf(r->path, sizeof r->path, "/tmp/unit-%d.sock", (int)getpid());
    snprintf(r->text, sizeof r->text, "hybrid:%s:80", r->path);
    snprintf(un.sun_path, sizeof un.sun_path, "%s", r->path);
    unlink(r->path);
    r->server = socket(AF_UNIX, SOCK_STREAM, 0);
    check(bind(r->server, (void *)&un, sizeof un) == 0 && listen(r->server, 5) == 0, "a host's end");
    r->pumps = (struct pumps){ .conns = &r->bench.conns, .on_failed = forward_on_failed };
    r->listener = (struct listener){ .arg = &r->pumps };
    check(address_parse(&r->pumps.target, r->text), "its address");
    r->near = bench_connect(&r->bench, forward_on_accept, &r->listener);
    r->far = accept4(r->server, NULL, NULL, SOCK_NONBLOCK);
    bench_run(&r->bench);
    check_text("CONNECT goes first", "CONNECT 80\n", bench_answer(r->far));
}

static void relay_close(struct relay *r)
{
    close(r->near);
    close(r->far);
    close(r->server);
    unlink(r->path);
    bench_run(&r->bench);
    clock_ahead_ms += 2 * limits.send_ms;
    loop_turn(&r->bench.loop);
    bench_fini(&r->bench);
}

static void test_forward(void)
{
    static const char hello[] = "OK 1073741824\nhello";
    struct relay r;
    char byte;

    for (size_t piece = 1; piece < sizeof hello; piece += 6) {
        relay_open(&r);
        bench_send(&r.bench, r.near, SPAN("early"), 5);
        check_text("nothing goes on before OK", "", bench_answer(r.far));
        bench_send(&r.bench, r.far, SPAN(hello), piece);
        check_text("what follows OK arrives", "hello", bench_answer(r.near));
        check_text("what was early arrives", "early", bench_answer(r.far));
        shutdown(r.near, SHUT_WR);
        bench_run(&r.bench);
        check(read(r.far, &byte, 1) == 0, "an end is passed on");
        bench_send(&r.bench, r.far, SPAN("late"), 4);
        check_text("the other direction goes on", "late", bench_answer(r.near));
        relay_close(&r);
    }
    relay_open(&r);
    bench_send(&r.bench, r.near, SPAN("last words"), 10);
    close(r.near);
    r.near = -1;
    bench_run(&r.bench);
    bench_send(&r.bench, r.far, SPAN("OK 1\n"), 5);
    check_text("what was said by who has gone arrives", "last words", bench_answer(r.far));
    check(recv(r.far, &byte, 1, 0) == 0, "and its end");
    relay_close(&r);
    relay_open(&r);
    bench_send(&r.bench, r.far, SPAN("OK 1\nno more"), 12);
    shutdown(r.far, SHUT_RD);
    bench_send(&r.bench, r.near, SPAN("a long upload"), 1);
    close(r.far);
    r.far = -1;
    bench_run(&r.bench);
    check_text("an answer in the middle of an upload arrives", "no more", bench_answer(r.near));
    check(recv(r.near, &byte, 1, 0) == 0, "and its end");
    relay_close(&r);
    static const char *const refusals[] = { "NO\n", "OK", "", "OKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOK" };
    int quiet = open("/dev/null", O_WRONLY), err = dup(2);
    dup2(quiet, 2);
    EACH(i, refusals) {
        relay_open(&r);
        bench_send(&r.bench, r.far, span_of(refusals[i]), 100);
        shutdown(r.far, SHUT_WR);
        bench_run(&r.bench);
        check(recv(r.near, &byte, 1, 0) == 0, "refusal %zu ends the connection", i);
        relay_close(&r);
    }
    dup2(err, 2);
    close(err);
    close(quiet);
}

/* ==== faults ===================================================================== */

static void test_read_faults(void)
{
    struct buf b = { 0 };
    char path[] = "/tmp/unit-file.XXXXXX";
    int fd = mkstemp(path);

    fault_short = 3;
    fault_errno = EINTR;
    fault_times = 2;
    check(fd_write_all(fd, "0123456789", 10) == 0, "a write that is interrupted and short");
    fault_times = 2;
    check(file_load(path, &b, 100) == 0, "a read that is interrupted and short");
    check_buf("gets all of it", "0123456789", &b);
    check(file_load(path, &b, 5) < 0 && errno == EFBIG, "a file past the limit");
    buf_fini(&b);
    fault_errno = EIO;
    fault_times = 1;
    check(file_load(path, &b, 100) < 0 && errno == EIO, "a read that fails");
    buf_fini(&b);
    fault_errno = ENOSPC;
    fault_times = 1;
    check(fd_write_all(fd, "x", 1) < 0 && errno == ENOSPC, "a write that fails");
    close(fd);
    unlink(path);
    fault_short = 0;
    check(file_load("/nowhere/at/all", &b, 5) < 0 && errno == ENOENT, "a file that is not there");
}

/* EINTR, EAGAIN and one byte at a time: the same request. An error: the connection ends. */
static void test_conn_faults(void)
{
    static const int errors[] = { EINTR, EAGAIN };
    struct buf map = { 0 };

    aleph_scope(&map, "/", "", "a", "b");
    for (size_t i = 0; i < COUNT(errors); i++) {
        struct bench b;
        bench_init(&b);
        int fd = bench_connect(&b, aleph_on_accept, &b.aleph.listener);
        fault_errno = errors[i];
        fault_times = 5;
        fault_short = 1;
        bench_send(&b, fd, buf_span(&map), map.len);
        check(b.program.queued == 1 && fault_times == 0, "a request through %s", strerror(errors[i]));
        fault_short = 0;
        close(fd);
        bench_fini(&b);
    }
    struct bench b;
    bench_init(&b);
    int fd = bench_connect(&b, aleph_on_accept, &b.aleph.listener);
    fault_errno = ECONNRESET;
    fault_times = 1;
    bench_send(&b, fd, buf_span(&map), map.len);
    check_number("a reset ends the connection", 0, (int64_t)b.conns.count);
    close(fd);
    bench_fini(&b);
    fault_times = 0;
    buf_fini(&map);
}

static void test_output_faults(void)
{
    struct loop l;
    struct output o;

    loop_init(&l);
    log_forget();
    int end = output_open(&o, &l, "x");
    check(end >= 0 && write(end, "one\ntwo", 7) == 7, "a child prints");
    fault_errno = EINTR;
    fault_times = 3;
    fault_short = 2;
    for (int i = 0; i < 10; i++)
        loop_turn(&l);
    close(end);
    loop_turn(&l);
    check(o.watch.fd < 0, "the end of the pipe is seen");
    output_close(&o);
    check_text("through EINTR and short reads", "one|two|", log_lines());
    output_fini(&o);
    fault_short = 0;
    fault_times = 0;
    loop_fini(&l);
    log_forget();
}

static void accept_count(struct listener *l, int fd)
{
    ++*(int *)l->arg;
    close(fd);
}

/* Where nothing is left, vsock's accept sleeps: it is called once for each connection, no more. */
static void test_accept_vsock(void)
{
    char text[64];
    int accepted = 0, fds[3];
    struct bench b;
    struct listener l = { .all = &b.conns, .on_accept = accept_count, .arg = &accepted };

    snprintf(text, sizeof text, "unix:/tmp/unit-%d.sock", (int)getpid());
    bench_init(&b);
    check(address_parse(&l.address, text) && listener_open(&l) == 0, "listen");
    listener_start(&l);
    for (size_t i = 0; i < COUNT(fds); i++) {
        fds[i] = socket(AF_UNIX, SOCK_STREAM, 0);
        check(connect(fds[i], (void *)&l.address.sa, l.address.sa_len) == 0, "connect");
    }
    accepts = 0;
    accepts_vsock = true;
    bench_run(&b);
    accepts_vsock = false;
    check_number("all are accepted", (int64_t)COUNT(fds), accepted);
    check_number("with no call in vain", (int64_t)COUNT(fds), accepts);
    for (size_t i = 0; i < COUNT(fds); i++)
        close(fds[i]);
    listener_close(&l);
    bench_fini(&b);
    unlink(text + 5);
}

/* No descriptor is left. The listener rests, and goes on when one is free again. */
static void test_accept_full(void)
{
    static const int errors[] = { EMFILE, ENFILE, ENOBUFS, ENOMEM };
    char text[64];
    int accepted = 0;

    snprintf(text, sizeof text, "unix:/tmp/unit-%d.sock", (int)getpid());
    for (size_t i = 0; i < COUNT(errors); i++) {
        struct bench b;
        struct listener l = { .all = &b.conns, .on_accept = accept_count, .arg = &accepted };
        bench_init(&b);
        check(address_parse(&l.address, text) && listener_open(&l) == 0, "listen");
        listener_start(&l);
        int fd = socket(AF_UNIX, SOCK_STREAM, 0);
        check(connect(fd, (void *)&l.address.sa, l.address.sa_len) == 0, "connect");
        accepted = accepts = 0;
        fault_errno = errors[i];
        fault_times = 1000;
        bench_run(&b);              /* it comes to rest although a connection waits */
        check(accepts == 1 && accepted == 0, "%s: accept was called %d times", strerror(errors[i]), accepts);
        clock_ahead_ms += 150;
        loop_turn(&b.loop);
        bench_run(&b);
        check(accepts == 2 && accepted == 0, "and again after a while: %d", accepts);
        fault_times = 0;
        clock_ahead_ms += 150;
        loop_turn(&b.loop);
        bench_run(&b);
        check_number("it goes on when it can", 1, accepted);
        close(fd);
        fd = socket(AF_UNIX, SOCK_STREAM, 0);
        check(connect(fd, (void *)&l.address.sa, l.address.sa_len) == 0, "connect");
        fault_times = 1;
        bench_run(&b);
        listener_close(&l);         /* while it waits */
        check_number("closed, it has no deadline", 0, (int64_t)b.loop.heap_len);
        close(fd);
        bench_fini(&b);
    }
    unlink(text + 5);
}

/* ---- websocket ---- */

/* The cost that a client's bytes can have at most never passes the credit. */
static size_t ws_credit;

static size_t ws_credit_left(void *stream)
{
    (void)stream;
    return ws_credit;
}

static void test_websocket(void)
{
    static const struct { unsigned code; bool ok; } codes[] = {
        { 0, false }, { 999, false }, { 1000, true }, { 1003, true }, { 1004, false }, { 1005, false }, { 1006, false },
        { 1007, true }, { 1012, true }, { 1014, true }, { 1015, false }, { 1016, false }, { 2999, false },
        { 3000, true }, { 4999, true }, { 5000, false }, { 65535, false },
    };
    static const struct websocket_user user = { .room = ws_credit_left };
    struct websocket ws = { .user = &user, .stream = &ws };
    struct exchange ex = { .stream = &ws };

    EACH(i, codes)
        check(websocket_code_ok(codes[i].code) == codes[i].ok, "code %u", codes[i].code);
    for (ws_credit = 0; ws_credit < 1000; ws_credit++) {
        size_t raw = websocket_room(&ex);       /* the dearest: empty messages, the first with its last byte only */
        size_t dearest = raw == 0 ? 0 : WEBSOCKET_PIECE_COST * (1 + (raw - 1) / 6) + (raw - 1) % 6 + 1;
        check(dearest <= ws_credit, "credit %zu: %zu bytes may cost %zu", ws_credit, raw, dearest);
        check(raw > 0 || ws_credit < WEBSOCKET_PIECE_COST + 2, "credit %zu: nothing", ws_credit);
    }
    ws.unread = CONN_OUT_HIGH;
    check(websocket_room(&ex) == 0, "a client that does not read its pongs");
    ws.stream = NULL;
    check(websocket_room(&ex) > 0, "a client whose Close is still to come");
}

/* A flood of errors that belong to one connection does not stop the listener. */
static void test_accept_interrupted(void)
{
    static const int errors[] = { EINTR, ECONNABORTED, EAGAIN };
    char text[64];
    int accepted = 0;

    snprintf(text, sizeof text, "unix:/tmp/unit-%d.sock", (int)getpid());
    for (size_t i = 0; i < COUNT(errors); i++) {
        struct bench b;
        struct listener l = { .all = &b.conns, .on_accept = accept_count, .arg = &accepted };
        bench_init(&b);
        check(address_parse(&l.address, text) && listener_open(&l) == 0, "listen");
        listener_start(&l);
        int fd = socket(AF_UNIX, SOCK_STREAM, 0);
        check(connect(fd, (void *)&l.address.sa, l.address.sa_len) == 0, "connect");
        accepted = 0;
        fault_errno = errors[i];
        fault_times = 3;
        bench_run(&b);
        check_number(strerror(errors[i]), 1, accepted);
        close(fd);
        listener_close(&l);
        bench_fini(&b);
    }
    unlink(text + 5);
}

static bool vsock_was_asked(void)
{
    for (size_t i = 0; i < asked_len; i++)
        if (asked_families[i] == AF_VSOCK)
            return true;
    return false;
}

/* In a sandbox no path leads to AF_VSOCK: listening, saying ready again and again, accepting. The
 * same steps for a machine do ask for it (and get an error here), so the test can fail. */
static void test_no_vsock(void)
{
    static struct agent a;
    char wire[64], http[64], ready[64], api[] = "unix:/nowhere/api";

    snprintf(wire, sizeof wire, "unix:/tmp/unit-%d.wire", (int)getpid());
    snprintf(http, sizeof http, "unix:/tmp/unit-%d.http", (int)getpid());
    snprintf(ready, sizeof ready, "unix:/tmp/unit-%d.ready", (int)getpid());
    for (int sandboxed = 1; sandboxed >= 0; sandboxed--) {
        a = (struct agent){ .ready_timer = { .fd = -1, .on_deadline = ready_try } };
        char *argv[] = { "init", "--listen", wire, "--http", http, "--ready", ready, "--api", api };
        if (sandboxed)
            check(init_options(&a.options, COUNT(argv), argv) == 0, "the options of a sandbox");
        agent_init(&a);
        check(a.loop.epoll_fd >= 0, "a loop");
        a.booted = a.ready_said = true;         /* what follows ready is another test's */
        asked_len = 0;
        log_forget();
        init_listen(&a);
        for (int i = 0; i < 3; i++) {
            close(bench_connect_to(&a.loop, bridge_on_accept, &a.bridge.listener));
            loop_turn(&a.loop);
        }
        check_number("the guest API's connections are gone", 0, a.bridge.open);
        a.ready_said = false;
        for (int i = 0; i < 3; i++)
            ready_try(&a.ready_timer);
        check(asked_len >= 7, "sockets were asked for: %zu", asked_len);
        check(vsock_was_asked() == !sandboxed, sandboxed ? "AF_VSOCK is reachable in a sandbox" : "the control asks for it");
        loop_never(&a.loop, &a.ready_timer);
        if (sandboxed) {
            check(a.aleph.listener.watch.fd >= 0 && a.http[0].listener.watch.fd >= 0, "it listens");
            close(a.aleph.listener.watch.fd);
            close(a.http[0].listener.watch.fd);
        }
        settings_fini(&a.options.told);
        loop_fini(&a.loop);
    }
    unlink(wire + 5);
    unlink(http + 5);
}

static void test_init_options(void)
{
    static const struct { const char *words[6]; int rc; } table[] = {
        { { "--listen", "unix:/a", "--ready", "unix:/b" }, 0 },
        { { "--listen", "vsock:52", "--ready", "unix:/b" }, EXIT_USAGE },
        { { "--listen", "unix:/a", "--ready", "vsock:52" }, EXIT_USAGE },
        { { "--listen", "unix:/a" }, EXIT_USAGE }, { { "--ready", "unix:/a" }, EXIT_USAGE },
        { { "--http", "unix:/a" }, EXIT_USAGE }, { { "--api", "unix:/a" }, EXIT_USAGE },
        { { "--listen", "unix:/a", "--ready", "unix:/b", "--api", "vsock:53" }, EXIT_USAGE }, { { "--listen" }, EXIT_USAGE }, { { "--limit", "conns=1" }, EXIT_USAGE },
        { { "--limit", "nothing=1" }, EXIT_USAGE }, { { "--what", "ever" }, EXIT_USAGE }, { { NULL }, 0 },
        { { "--listen", "unix:/a", "--ready", "unix:/b", "--http", "vsock:80" }, EXIT_USAGE },
    };
    int quiet = open("/dev/null", O_WRONLY), err = dup(2);

    dup2(quiet, 2);
    EACH(i, table) {
        struct options o = { 0 };
        char *argv[8] = { "init" };
        int argc = 1;
        while (argc < 7 && table[i].words[argc - 1]) {
            argv[argc] = (char *)(uintptr_t)table[i].words[argc - 1];
            argc++;
        }
        check_number("the exit code", table[i].rc, init_options(&o, argc, argv));
        settings_fini(&o.told);
    }
    dup2(err, 2);
    close(err);
    close(quiet);
}

/* ---- node ---- */

static void test_node_ranges(void)
{
    /* Versions that the range has, then those it has not; -1 for "it is no range" is "!". */
    static const struct { const char *range, *has, *lacks; } table[] = {
        { "18", "18.0.0 18.20.8", "17.9.9 19.0.0" }, { "v18.17.0", "18.17.0", "18.17.1 18.16.9" },
        { "=18.2", "18.2.0 18.2.9", "18.3.0 18.1.9" }, { "18.x", "18.0.0 18.9.9", "19.0.0" }, { "18.2.x", "18.2.3", "18.3.0" },
        { "x.2.3", "1.0.0 18.0.0", "" }, { "*", "0.0.1 24.1.0", "" }, { "", "0.0.1 24.1.0", "" }, { "X", "18.0.0", "" },
        { ">=14", "14.0.0 24.0.0", "13.9.9" }, { ">14", "15.0.0", "14.0.0 14.21.3" }, { ">14.2", "14.3.0", "14.2.9" },
        { "> 14.2.1", "14.2.2", "14.2.1" }, { "<14", "13.9.9", "14.0.0" }, { "<=14", "14.21.3", "15.0.0" },
        { "<= 14.2", "14.2.9", "14.3.0" }, { "<14.2.1", "14.2.0", "14.2.1" }, { ">*", "", "1.0.0" }, { "<*", "", "1.0.0" },
        { "^18.2.0", "18.2.0 18.9.0", "18.1.9 19.0.0" }, { "^18", "18.0.0 18.9.9", "19.0.0" }, { "^0.2.3", "0.2.3 0.2.9", "0.2.2 0.3.0" },
        { "^0.0.3", "0.0.3", "0.0.2 0.0.4" }, { "^0.0", "0.0.9", "0.1.0" }, { "^0", "0.9.9", "1.0.0" }, { "^*", "9.0.0", "" },
        { "~16.3", "16.3.0 16.3.9", "16.2.9 16.4.0" }, { "~16.3.2", "16.3.2 16.3.9", "16.3.1 16.4.0" }, { "~16", "16.9.9", "17.0.0" },
        { "~> 16.3", "16.3.9", "16.4.0" }, { "~*", "1.0.0", "" },
        { "14 || 16", "14.1.0 16.9.0", "15.0.0 17.0.0" }, { "^14.17||>=16", "14.17.0 16.0.0 20.0.0", "14.16.0 15.0.0" },
        { "18 ||", "18.0.0 1.0.0", "" }, { ">=14 <19", "14.0.0 18.9.9", "13.0.0 19.0.0" }, { ">=14<19", "18.9.9", "19.0.0" },
        { "14 - 16", "14.0.0 16.9.9", "13.9.9 17.0.0" }, { "14.2 - 16.3.1 || 20", "14.2.0 16.3.1 20.1.0", "14.1.9 16.3.2 18.0.0" },
        { ">=18 <16", "", "14.0.0 17.0.0 18.0.0" }, { ">=18.0.0-rc.1", "18.0.0", "17.9.9" }, { "<19.0.0-0", "18.9.9", "19.0.0" },
        { ">18.0.0-rc.1", "18.0.0", "17.9.9" }, { "<=18.0.0-rc", "17.9.9", "18.0.0" }, { "18.1.0+build.5", "18.1.0", "18.1.1" },
        { "\t>= v14.0.0 ", "14.0.0", "13.0.0" }, { "999999.999999.999999", "999999.999999.999999", "999999.999999.999998" },
    };
    static const char *const none[] = { "lts", "18.", "18..1", ".1", "v", ">=", "18 - ", "18 -", "18 | 19", "|", "a", "18a", "18.1.2.3",
        "1000000", "99999999999999999999", "18 || b", "^", "~>", "=>14", "14 -16x", "18,19", "<>1" };
    struct node_partial p;

    EACH(i, table)
        for (int lacks = 0; lacks < 2; lacks++)
            for (const char *at = lacks ? table[i].lacks : table[i].has; *at; at += strspn(at, " ")) {
                const char *version = at;
                check(node_take_partial(&at, &p) && p.given == 3, "a version: %s", version);
                check_number(table[i].range, !lacks, node_range_has(table[i].range, node_version(p.part[0], p.part[1], p.part[2])));
            }
    EACH(i, none)
        check_number(none[i], -1, node_range_has(none[i], 0));
}

static void node_test_file(const char *folder, const char *name, const char *text, mode_t mode)
{
    char path[PATH_MAX], parent[PATH_MAX];

    snprintf(path, sizeof path, "%s/%s", folder, name);
    snprintf(parent, sizeof parent, "%.*s", (int)(strrchr(path, '/') - path), path);
    check(mkdir_all(parent, 0755) == 0 && file_write(path, text, strlen(text), mode) == 0, "%s can be written", path);
}

static void test_node_find(void)
{
    static const struct { const char *nvmrc, *package, *found, *why; } table[] = {
        { NULL, NULL, "v22.1.0", "" }, { "18\n", NULL, "v18.20.8", "" }, { "v18.9.0", NULL, "v18.9.0", "" },
        { "# why\n\n  lts/hydrogen # and here\r\n20\n", NULL, "v18.20.8", "" }, { "lts/Iron", NULL, NULL, ".nvmrc asks for Node lts/Iron, " },
        { "lts/*", NULL, "v22.1.0", "" }, { "node", NULL, "v22.1.0", "" }, { "stable", NULL, "v22.1.0", "" }, { "", NULL, "v22.1.0", "" },
        { "lts/nothing", NULL, NULL, ".nvmrc is no version of Node: lts/nothing" }, { "\xff", NULL, NULL, ".nvmrc is no version of Node" },
        { "14", "{\"engines\": {\"node\": \"18\"}}", "v14.21.3", "" },
        { NULL, "{\"engines\": {\"node\": \">=14 <19\"}}", "v18.20.8", "" },
        { NULL, "\xef\xbb\xbf{\"engines\": {\"node\": \"^18.0.0 || ^14\"}}", "v18.20.8", "" },
        { NULL, "{\"engines\": {\"npm\": \"9\"}}", "v22.1.0", "" }, { NULL, "{\"engines\": [\"node 18\"]}", "v22.1.0", "" },
        { NULL, "[]", "v22.1.0", "" }, { NULL, "{\"engines\": {\"node\": 18}}", "v22.1.0", "" },
        { NULL, "{\"engines\": {\"node\": \"17\"}}", NULL, "engines.node in package.json asks for Node 17, " },
        { NULL, "{\"engines\": {\"node\": \"new\"}}", NULL, "engines.node in package.json is no version of Node: new" },
        { NULL, "{", NULL, "package.json: byte " }, { NULL, "", NULL, "package.json: byte " },
    };
    char folder[] = "/tmp/unit-node.XXXXXX", code[64], nvm[64], none[64], path[PATH_MAX], out[PATH_MAX];
    struct buf why = { 0 };

    check(mkdtemp(folder) != NULL, "a folder");
    snprintf(code, sizeof code, "%s/code", folder);
    snprintf(nvm, sizeof nvm, "%s/nvm", folder);
    snprintf(none, sizeof none, "%s/none", folder);
    node_test_file(nvm, "versions/node/v14.21.3/bin/node", "", 0755);
    node_test_file(nvm, "versions/node/v18.9.0/bin/node", "", 0755);
    node_test_file(nvm, "versions/node/v18.20.8/bin/node", "", 0755);
    node_test_file(nvm, "versions/node/v22.1.0/bin/node", "", 0755);
    node_test_file(nvm, "versions/node/v24.0.0-rc.1/bin/node", "", 0755);
    node_test_file(nvm, "versions/node/v23.0.0/bin/node", "", 0644);
    node_test_file(nvm, "versions/node/v25/bin/node", "", 0755);
    node_test_file(nvm, "versions/node/26.0.0/bin/node", "", 0755);
    EACH(i, table) {
        static const char *const names[] = { ".nvmrc", "package.json" };
        for (int k = 0; k < 2; k++) {
            const char *text = k ? table[i].package : table[i].nvmrc;
            snprintf(path, sizeof path, "%s/%s", code, names[k]);
            unlink(path);
            if (text)
                node_test_file(code, names[k], text, 0644);
        }
        check_number("found", table[i].found != NULL, node_find(code, nvm, PATH_PATH, out, sizeof out, &why));
        if (table[i].found) {
            snprintf(path, sizeof path, "%s/versions/node/%s/bin/node", nvm, table[i].found);
            check_text("the Node", path, out);
            check(why.len == 0, "no reason: %s", buf_text(&why));
        } else {
            check(strncmp(buf_text(&why), table[i].why, strlen(table[i].why)) == 0, "expected %s, got %s", table[i].why, buf_text(&why));
        }
        buf_fini(&why);
    }
    /* An unmet pin names what there is. */
    node_test_file(code, ".nvmrc", "4.5", 0644);
    check(!node_find(code, nvm, PATH_PATH, out, sizeof out, &why), "4.5 is not there");
    check(strstr(buf_text(&why), "v14.21.3") && strstr(buf_text(&why), "v22.1.0") && strstr(buf_text(&why), nvm),
          "it says what there is: %s", buf_text(&why));
    buf_fini(&why);
    /* Without nvm it is the one in PATH, whatever the pin, and so it is for "system". */
    char bin[64], in_path[80];
    snprintf(bin, sizeof bin, "%s/bin", folder);
    snprintf(in_path, sizeof in_path, "%s/node", bin);
    check(!node_find(code, none, bin, out, sizeof out, &why) && strstr(buf_text(&why), bin) && strstr(buf_text(&why), none),
          "no Node at all: %s", buf_text(&why));
    buf_fini(&why);
    node_test_file(bin, "node", "", 0755);
    check(node_find(code, none, bin, out, sizeof out, &why) && strcmp(out, in_path) == 0, "PATH without nvm");
    node_test_file(code, ".nvmrc", "system", 0644);
    buf_fini(&why);
    check(node_find(code, nvm, bin, out, sizeof out, &why) && strcmp(out, in_path) == 0, "system");
    buf_fini(&why);
    /* What a program may have put there: a FIFO, a device, a folder, far too much. */
    snprintf(path, sizeof path, "%s/.nvmrc", code);
    for (int kind = 0; kind < 4; kind++) {
        remove(path);
        check(kind == 0 ? mkfifo(path, 0644) == 0 : kind == 1 ? symlink("/dev/zero", path) == 0
            : kind == 2 ? mkdir(path, 0755) == 0 : (node_test_file(code, ".nvmrc", "18", 0644), truncate(path, NODE_FILE_MAX + 1)) == 0, "kind %d", kind);
        check(!node_find(code, nvm, PATH_PATH, out, sizeof out, &why) && strncmp(buf_text(&why), ".nvmrc: ", 8) == 0, "kind %d: %s", kind, buf_text(&why));
        buf_fini(&why);
    }
    snprintf(path, sizeof path, "rm -r %s", folder);
    check(system(path) == 0, "the folder goes");
}

#include "unit_zip.c"
#include "unit_faults.c"

/* ==== all ======================================================================== */

#define TEST(name) { #name, test_##name }

static const struct { const char *name; void (*run)(void); } tests[] = {
    TEST(buf), TEST(span), TEST(log), TEST(log_slow_console), TEST(utf8), TEST(percent), TEST(base32), TEST(number),
    TEST(limits), TEST(mp_heads), TEST(mp_scan), TEST(mp_write), TEST(mp_read), TEST(conf), TEST(conf_json), TEST(conf_network),
    TEST(conf_volumes), TEST(volumes), TEST(conf_copy), TEST(loop_deadlines), TEST(loop_timeout), TEST(loop_soon), TEST(loop_bury), TEST(modules), TEST(root_options), TEST(root_discard), TEST(hosts),
    TEST(zip), TEST(describe), TEST(output_lines), TEST(output_flood), TEST(address), TEST(trust), TEST(interest), TEST(http_heads),
    TEST(http_request), TEST(http_phrases), TEST(response_head), TEST(field_next), TEST(program_started), TEST(program_choose), TEST(reload_change), TEST(aleph_request), TEST(aleph_text),
    TEST(aleph_deadlines), TEST(forward), TEST(read_faults), TEST(conn_faults), TEST(output_faults),
    { "accept, vsock", test_accept_vsock },
    { "76: accept, EMFILE, ENFILE, ENOBUFS, ENOMEM", test_accept_full }, { "76: accept, EINTR, EAGAIN, ECONNABORTED", test_accept_interrupted },
    TEST(websocket), TEST(no_vsock), TEST(init_options), TEST(node_ranges), TEST(node_find),
    { "76: ENOMEM, each allocation once", test_faults_memory }, { "76: ENOMEM, from each allocation on", test_faults_memory_ever },
    { "76: EINTR at each call", test_faults_interrupted }, { "76: EAGAIN at each call", test_faults_again },
    { "76: each transfer cut short", test_faults_short }, { "76: all transfers cut short", test_faults_short_ever },
    { "76: each call fails", test_faults_calls }, { "76: a deadline without memory", test_faults_deadlines },
    { "78: the wall clock and a suspended machine", test_clocks }, { "80: no entropy yet", test_entropy },
    { "76: TLS, ENOMEM at each allocation", test_tls_memory }, { "76: configurations, ENOMEM", test_conf_memory },
    { "76: archives, each call and allocation", test_zip_faults },
};

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGPIPE, SIG_IGN);
    EACH(i, tests) {
        bool wanted = argc == 1;
        for (int k = 1; k < argc; k++)
            wanted = wanted || strcmp(argv[k], tests[i].name) == 0;
        if (!wanted)
            continue;
        test_name = tests[i].name;
        test_checks = test_failed = 0;
        tests[i].run();
        if (test_checks == 0)
            check(false, "made no check");
        if (test_failed == 0)
            printf("ok %s (%u checks)\n", test_name, test_checks);
        all_failed += test_failed;
    }
    free(agent_log.ring);
    return all_failed > 0;
}

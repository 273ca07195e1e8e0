/* agent.c - one static binary that is PID 1 of a microVM.
 *
 * Its life as init:
 *   listen  vsock 52 (the supervisor's wire) and 80 (plain HTTP), then tell the host: ready
 *   boot    put a writable overlay over a read-only root, mount what a program needs
 *   wait    meanwhile a Python interpreter warms up
 *   setup   the host sends a configuration: mount volumes, unpack the code, start the program
 *   serve   carry requests and events to the program, restart it when it dies
 *   halt    stop the program, sync, unmount, answer, reboot(2)
 *
 * Rules that always hold:
 *   - One thread, one epoll loop. Once it runs nothing blocks; what must block (unpacking,
 *     sync) or is done for somebody else (!command) runs in a child that reports by a pipe.
 *   - PID 1 halts the machine, it never exits.
 *   - The host is trusted to configure, not to send well-formed bytes. The program is not
 *     trusted at all. Whatever they choose the size of meets a limit before memory is taken.
 *   - Every failure costs one connection, one exchange or one program, and says so once to
 *     whoever caused it and once in the log.
 *
 * Sections, each using only those above it (grep '^/\* ====' agent.c):
 *   log sys buf loop text mp conf boot net zip vol child tls conn exchange websocket runner worker upstream
 *   node program job data ssh setup aleph http pump bridge call forward hash init run main
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <assert.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/close_range.h>
#include <linux/fs.h>
#include <linux/input.h>
#include <linux/magic.h>
#include <linux/netlink.h>
#include <linux/openat2.h>
#include <linux/rtnetlink.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <mbedtls/base64.h>
#include <mbedtls/pk.h>
#include <mbedtls/platform_util.h>
#include <mbedtls/psa_util.h>
#include <mbedtls/sha1.h>
#include <mbedtls/sha256.h>
#include <mbedtls/ssl.h>
#include <mbedtls/x509_crt.h>
#include <psa/crypto.h>
#include <wslay/wslay.h>
#include <zlib.h>

#include "agent.h"
#include "llhttp.h"
#include "unzip.h"
#include "yyjson.h"
#include "zip.h"

#define COUNT(table)            (sizeof(table) / sizeof *(table))
#define CONTAINER(p, type, m)   ((type *)(void *)((char *)(p) - offsetof(type, m)))
#define PRINTF(fmt, args)       __attribute__((format(printf, fmt, args)))

/* Limits are settings: read from the command line before the loop runs, then constant. */
#define LIMIT_FIELD(name, value, least, most, what) int64_t name;
#define LIMIT_VALUE(name, value, least, most, what) .name = (value),
static struct limits { LIMITS(LIMIT_FIELD) } limits = { LIMITS(LIMIT_VALUE) };

#ifdef __GLIBC__                    /* POSIX has int, and so has musl; debug builds are glibc's */
typedef unsigned long ioctl_request;
#else
typedef int ioctl_request;
#endif

/* unit.c defines these first, to inject failures. */
#ifndef SYS_READ
#define SYS_READ    read
#define SYS_WRITE   write
#define SYS_SOCKET  socket
#define SYS_ACCEPT  accept4
#endif

/* ==== log: console and ring ======================================================
 * A line goes to the ring, always, and to the console if it takes it. The console of a
 * microVM is a serial line that an emulator may serve slowly: it is written without
 * blocking, and lines that find it full are dropped there and counted. */
enum log_level { LOG_ERROR, LOG_INFO, LOG_DEBUG };

struct log {
    enum log_level level;
    int      fd;                    /* the console, non-blocking; -1 = none */
    char    *ring;                  /* NULL: no line yet, or no memory for it */
    size_t   ring_bytes;            /* the limit when the first line came: it may be set later */
    uint64_t ring_head;             /* bytes ever written to the ring */
    char    *pending;               /* taken but not yet by the console */
    size_t   pending_len;
    unsigned dropped;               /* lines lost to the console since it was full */
    char     last[256];             /* last message, to fold repetitions */
    unsigned repeats;
};

#define LOG_PENDING_BYTES   8192

static char log_pending[LOG_PENDING_BYTES], access_pending[LOG_PENDING_BYTES];
static struct log agent_log = { .level = LOG_INFO, .fd = 2, .pending = log_pending };
static struct log access_log = { .fd = -1, .pending = access_pending };     /* no ring: standard output, if it is wanted */

/* The level of that name, or -1. */
static int log_level_of(const char *name)
{
    return strcmp(name, "debug") == 0 ? LOG_DEBUG : strcmp(name, "info") == 0 ? LOG_INFO : -1;
}

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* Microseconds since the kernel started, suspended time included. */
static int64_t kernel_us(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_BOOTTIME, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

static void log_flush_one(struct log *l)
{
    while (l->fd >= 0 && l->pending_len > 0) {
        ssize_t n = write(l->fd, l->pending, l->pending_len);
        if (n <= 0)
            return;
        memmove(l->pending, l->pending + n, l->pending_len - (size_t)n);
        l->pending_len -= (size_t)n;
    }
    if (l->dropped > 0 && l->fd >= 0) {
        l->pending_len = (size_t)snprintf(l->pending, LOG_PENDING_BYTES,
            "agent: console too slow, %u lines dropped\n", l->dropped);
        l->dropped = 0;
    }
}

static void log_flush(void)
{
    log_flush_one(&agent_log);
    log_flush_one(&access_log);
}

/* A line for the next flush. */
static void log_put(struct log *l, const char *line, size_t len)
{
    if (l->pending_len + len > LOG_PENDING_BYTES)
        log_flush_one(l);
    if (l->pending_len + len > LOG_PENDING_BYTES) {
        l->dropped++;
        return;
    }
    memcpy(l->pending + l->pending_len, line, len);
    l->pending_len += len;
}

static void log_ring_add(const char *p, size_t n)
{
    struct log *l = &agent_log;

    if (!l->ring) {
        l->ring_bytes = (size_t)limits.log_ring_bytes;
        l->ring = malloc(l->ring_bytes);
    }
    for (size_t i = 0; l->ring && i < n; i++)
        l->ring[l->ring_head++ % l->ring_bytes] = p[i];
}

/* One line, without its newline; control bytes become '?', as a terminal may be reading. */
static void log_line(const char *who, const char *p, size_t n)
{
    struct log *l = &agent_log;
    char line[512 + 4096];
    int64_t us = kernel_us();
    int head = snprintf(line, 512, "%s[%" PRId64 ".%03d]: ", who, us / 1000000,
                        (int)(us / 1000 % 1000));
    size_t len = (size_t)(head < 512 ? head : 511);

    for (size_t i = 0; i < n && len < sizeof line - 1; i++) {
        unsigned char c = (unsigned char)p[i];
        line[len++] = (c < 0x20 && c != '\t') || c == 0x7f ? '?' : (char)c;
    }
    line[len++] = '\n';
    log_ring_add(line, len);
    if (l->fd < 0)
        return;
    log_put(l, line, len);
    log_flush_one(l);
}

PRINTF(2, 0)
static void log_format(enum log_level level, const char *format, va_list ap)
{
    struct log *l = &agent_log;
    char text[2048], again[64];

    if (level > l->level)
        return;
    int n = vsnprintf(text, sizeof text, format, ap);
    if (n < 0)
        return;
    if (strncmp(text, l->last, sizeof l->last - 1) == 0) {
        l->repeats++;
        return;
    }
    if (l->repeats > 0) {
        int m = snprintf(again, sizeof again, "last line came %u times more", l->repeats);
        log_line("agent", again, (size_t)m);
        l->repeats = 0;
    }
    snprintf(l->last, sizeof l->last, "%s", text);
    log_line("agent", text, strlen(text));
}

PRINTF(1, 2) static void log_info(const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    log_format(LOG_INFO, format, ap);
    va_end(ap);
}

PRINTF(1, 2) static void log_debug(const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    log_format(LOG_DEBUG, format, ap);
    va_end(ap);
}

/* Logs the message and errno's text; returns -1, so that a caller can return it. */
PRINTF(1, 2) static int log_errno(const char *format, ...)
{
    char text[1024];
    int saved = errno;
    va_list ap;

    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    log_info("%s: %s", text, strerror(saved));
    errno = saved;
    return -1;
}

/* For commands only: init never exits. */
PRINTF(1, 2) static _Noreturn void die(const char *format, ...)
{
    va_list ap;

    fputs("agent: ", stderr);
    va_start(ap, format);
    vfprintf(stderr, format, ap);
    va_end(ap);
    fputc('\n', stderr);
    exit(EXIT_FAILED);
}

/* ==== sys: system calls that everybody needs ===================================== */

/* Closes and forgets; accepts -1, keeps errno. */
static void fd_close(int *fd)
{
    int saved = errno;
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
    errno = saved;
}

/* Closes every descriptor past the first three (close_range(2) is Linux 5.9), or, flags being
 * CLOSE_RANGE_CLOEXEC, keeps them from what is executed (Linux 5.11). */
static void fd_close_rest(unsigned flags)
{
    struct rlimit files;

    if (syscall(SYS_close_range, 3, ~0U, flags) == 0 || getrlimit(RLIMIT_NOFILE, &files) < 0)
        return;
    for (int fd = 3; fd < (int)files.rlim_cur; fd++)
        if (flags)
            fcntl(fd, F_SETFD, FD_CLOEXEC);
        else
            close(fd);
}

static int fd_nonblock(int fd)
{
    int flags = fcntl(fd, F_GETFL);
    return flags < 0 ? -1 : fcntl(fd, F_SETFL, flags | O_NONBLOCK);
}

/* Blocking; for small files of proc and sys, and in children. 0 or -1. */
static int fd_write_all(int fd, const void *p, size_t n)
{
    const char *at = p;

    while (n > 0) {
        ssize_t done = SYS_WRITE(fd, at, n);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return -1;
        at += done;
        n -= (size_t)done;
    }
    return 0;
}

/* O_NONBLOCK here and in file_set: a program could have put a FIFO there (open(2)). */
static int file_write(const char *path, const void *p, size_t n, mode_t mode)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NONBLOCK | O_CLOEXEC, mode);
    if (fd < 0)
        return -1;
    int rc = fd_write_all(fd, p, n);
    fd_close(&fd);
    return rc;
}

/* For proc and sys, where a file must not be created. */
static int file_set(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return -1;
    int rc = fd_write_all(fd, text, strlen(text));
    fd_close(&fd);
    return rc;
}

/* Makes every folder of an absolute path. 0 or -1; an existing folder is success. */
static int mkdir_all(const char *path, mode_t mode)
{
    char part[PATH_MAX];

    if (snprintf(part, sizeof part, "%s", path) >= (int)sizeof part) {
        errno = ENAMETOOLONG;
        return -1;
    }
    for (char *p = part + 1; *p; p++) {
        if (*p != '/')
            continue;
        *p = '\0';
        if (mkdir(part, mode) < 0 && errno != EEXIST && errno != EROFS)
            return -1;
        *p = '/';
    }
    return mkdir(part, mode) < 0 && errno != EEXIST ? -1 : 0;
}

/* How many CPUs this process may use (sched_getaffinity(2)). */
static int cpu_count(void)
{
    cpu_set_t cpus;

    return sched_getaffinity(0, sizeof cpus, &cpus) < 0 ? 1 : CPU_COUNT(&cpus);
}

/* ==== buf: growing bytes, and a borrowed span ==================================== */
struct span {
    const char *p;
    size_t      n;
};

#define INLINE static inline __attribute__((always_inline))
#define SPAN(literal) ((struct span){ literal, sizeof literal - 1 })

static struct span span_of(const char *text)
{
    return (struct span){ text, text ? strlen(text) : 0 };
}

/* Inline: the length of a literal is known where it is compared, and most lengths differ. */
INLINE bool span_eq(struct span s, const char *text)
{
    return s.n == strlen(text) && memcmp(s.p, text, s.n) == 0;
}

/* Letters are those of ASCII. strncasecmp(3) takes twice as long: a call for each byte. */
static bool bytes_eq_nocase(const char *a, const char *b, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        unsigned char lower = (unsigned char)(a[i] | 0x20);
        if (a[i] != b[i] && (lower != (b[i] | 0x20) || lower < 'a' || lower > 'z'))
            return false;
    }
    return true;
}

INLINE bool span_eq_nocase(struct span s, const char *text)
{
    return s.n == strlen(text) && bytes_eq_nocase(s.p, text, s.n);
}

/* A copy with a NUL at its end, or NULL: no memory. */
static char *span_dup(struct span s)
{
    char *copy = malloc(s.n + 1);
    if (copy) {
        if (s.n > 0)
            memcpy(copy, s.p, s.n);
        copy[s.n] = '\0';
    }
    return copy;
}

/* Bytes are taken from the front and added at the end. An add that finds no memory sets
 * `failed` and adds nothing, nor does any later one: whoever builds a message checks once. */
struct buf {
    char  *data;
    size_t start, len, cap;     /* the bytes are data[start .. start + len) */
    size_t keep;                /* memory to keep while empty, if more than BUF_KEEP_BYTES */
    bool   failed;
};

#define BUF_KEEP_BYTES  (1 << 10)       /* an empty buf gives back more than this */
#define BUF_PASS_BYTES  (8 << 10)       /* from here on a system call is cheaper than a copy */

static void buf_fini(struct buf *b)
{
    free(b->data);
    *b = (struct buf){ 0 };
}

/* Never NULL: zero bytes may be looked at too. */
static const char *buf_at(const struct buf *b)
{
    return b->data ? b->data + b->start : "";
}

static struct span buf_span(const struct buf *b)
{
    return (struct span){ buf_at(b), b->len };
}

/* Where n more bytes may be written, or NULL. They count once buf_added(). */
static char *buf_room(struct buf *b, size_t n)
{
    if (b->failed)
        return NULL;
    if (b->cap - b->start - b->len >= n)
        return b->data + b->start + b->len;
    if (b->start > 0) {
        memmove(b->data, b->data + b->start, b->len);
        b->start = 0;
    }
    if (b->cap - b->len < n) {
        size_t cap = b->cap < 256 ? 256 : b->cap;
        while (cap - b->len < n && cap <= SIZE_MAX / 2)
            cap *= 2;
        char *data = cap - b->len < n ? NULL : realloc(b->data, cap);
        if (!data) {
            b->failed = true;
            return NULL;
        }
        b->data = data;
        b->cap = cap;
    }
    return b->data + b->len;
}

static void buf_added(struct buf *b, size_t n)
{
    b->len += n;
}

static int buf_add(struct buf *b, const void *p, size_t n)
{
    if (n == 0)
        return b->failed ? -1 : 0;
    bool fits = !b->failed && b->cap - b->start - b->len >= n;
    char *to = fits ? b->data + b->start + b->len : buf_room(b, n);
    if (!to)
        return -1;
    memcpy(to, p, n);
    b->len += n;
    return 0;
}

static int buf_add_span(struct buf *b, struct span s)
{
    return buf_add(b, s.p, s.n);
}

INLINE int buf_add_text(struct buf *b, const char *text)    /* of most texts the length is known */
{
    return buf_add(b, text, strlen(text));
}

static int buf_add_byte(struct buf *b, unsigned char c)
{
    return buf_add(b, &c, 1);
}

PRINTF(2, 3) static int buf_add_format(struct buf *b, const char *format, ...)
{
    char text[1024];
    va_list ap;

    va_start(ap, format);
    int n = vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    return buf_add(b, text, n < (int)sizeof text ? (size_t)n : sizeof text - 1);
}

/* Takes n bytes from the front. */
static void buf_drop(struct buf *b, size_t n)
{
    assert(n <= b->len);
    b->start += n;
    b->len -= n;
    if (b->len > 0)
        return;
    b->start = 0;
    if (b->cap > BUF_KEEP_BYTES && b->cap > b->keep) {
        free(b->data);
        *b = (struct buf){ .keep = b->keep };
    }
}

/* Sends `out` and then long data to a socket, without a copy of it; what the socket does not
 * take now is added. Errors show at the next send. */
static void buf_pass(struct buf *out, int fd, struct span data)
{
    struct iovec iov[2] = { { (char *)(uintptr_t)buf_at(out), out->len }, { (char *)(uintptr_t)data.p, data.n } };
    struct msghdr m = { .msg_iov = iov, .msg_iovlen = 2 };
    size_t before = out->len;

    if (data.n >= BUF_PASS_BYTES && !out->failed) {
        ssize_t n = sendmsg(fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
        size_t sent = n < 0 ? 0 : (size_t)n, old = sent < before ? sent : before;
        buf_drop(out, old);
        data = (struct span){ data.p + (sent - old), data.n - (sent - old) };
    }
    buf_add_span(out, data);
}

/* Keeps the last `most` bytes: the tail of an output. */
static void buf_keep_tail(struct buf *b, size_t most)
{
    if (b->len > most)
        buf_drop(b, b->len - most);
}

/* Ends the bytes with a NUL that does not count and returns them, "" when there is no memory. */
static const char *buf_text(struct buf *b)
{
    char *end = buf_room(b, 1);
    if (!end)
        return "";
    *end = '\0';
    return buf_at(b);
}

/* All that fd gives, at most `most` bytes; -1 and errno (EFBIG: more). */
static int fd_load(int fd, struct buf *out, size_t most)
{
    for (;;) {
        size_t part = out->cap - out->start - out->len;
        if (part == 0)
            part = out->len < 512 ? 512 : out->len;     /* a fresh page costs a boot a millisecond */
        char *to = buf_room(out, part);
        if (!to) {
            errno = ENOMEM;
            return -1;
        }
        ssize_t n = SYS_READ(fd, to, part);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return (int)n;
        buf_added(out, (size_t)n);
        if (out->len > most) {
            errno = EFBIG;
            return -1;
        }
    }
}

/* The whole of a small file. */
static int file_load(const char *path, struct buf *out, size_t most)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    int rc = fd < 0 ? -1 : fd_load(fd, out, most);

    fd_close(&fd);
    return rc;
}

/* As file_load, where a program could have put a FIFO or a device, which may never end
 * (open(2), O_NONBLOCK): EINVAL. */
static int file_load_regular(const char *path, struct buf *out, size_t most)
{
    struct stat st;
    int rc = -1, fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);

    if (fd >= 0 && fstat(fd, &st) == 0) {
        errno = EINVAL;
        rc = S_ISREG(st.st_mode) ? fd_load(fd, out, most) : -1;
    }
    fd_close(&fd);
    return rc;
}

/* ==== loop: epoll, deadlines, end-of-turn work ===================================
 * A turn: descriptors that are ready, deadlines that have passed, work queued with
 * loop_soon, then the burial of what was given up. Nothing that a turn could still point
 * to is freed before its end: a handler may give up any watch, its own included. */
struct watch {
    int           fd;               /* -1: not in epoll, deadlines still work */
    uint32_t      events;           /* what epoll watches now */
    void        (*on_event)(struct watch *, uint32_t events);   /* events 0: from loop_soon */
    void        (*on_deadline)(struct watch *);
    int64_t       deadline_ms;      /* monotonic */
    int64_t       heap_ms;          /* when it is looked at: the deadline, or before it was put off */
    size_t        heap_at;          /* place in the heap, from 1; 0 = no deadline; HEAP_FULL */
    bool          soon, buried;
    struct watch *next_soon, *next_buried, *next_unplaced;
    void        (*on_bury)(struct watch *);
};

struct loop {
    int            epoll_fd;
    bool           stop;
    uint64_t       turn;
    struct watch **heap;            /* heap[1] is looked at next */
    size_t         heap_len, heap_cap;
    struct watch  *unplaced;        /* the heap found no memory for their deadlines: looked at every turn */
    struct watch  *soon_first, **soon_last;
    struct watch  *buried;
};

#define HEAP_FULL       SIZE_MAX
#define HEAP_RETRY_MS   100

static int loop_init(struct loop *l)
{
    *l = (struct loop){ .epoll_fd = epoll_create1(EPOLL_CLOEXEC) };
    l->soon_last = &l->soon_first;
    return l->epoll_fd < 0 ? -1 : 0;
}

/* Watches w->fd for `events` (epoll_ctl(2)); 0: keep it, but ask for nothing. */
static int loop_want(struct loop *l, struct watch *w, uint32_t events)
{
    struct epoll_event e = { .events = events, .data.ptr = w };

    if (w->events == events)
        return 0;
    int op = w->events == 0 ? EPOLL_CTL_ADD : events == 0 ? EPOLL_CTL_DEL : EPOLL_CTL_MOD;
    if (epoll_ctl(l->epoll_fd, op, w->fd, &e) < 0)
        return -1;
    w->events = events;
    return 0;
}

static void heap_put(struct loop *l, size_t at, struct watch *w)
{
    l->heap[at] = w;
    w->heap_at = at;
}

/* Moves the watch at `at` to where its deadline belongs. */
static void heap_sift(struct loop *l, size_t at)
{
    struct watch *w = l->heap[at];

    for (; at > 1 && l->heap[at / 2]->heap_ms > w->heap_ms; at /= 2)
        heap_put(l, at, l->heap[at / 2]);
    for (size_t kid; (kid = 2 * at) <= l->heap_len; at = kid) {
        if (kid < l->heap_len && l->heap[kid + 1]->heap_ms < l->heap[kid]->heap_ms)
            kid++;
        if (l->heap[kid]->heap_ms >= w->heap_ms)
            break;
        heap_put(l, at, l->heap[kid]);
    }
    heap_put(l, at, w);
}

static void loop_never(struct loop *l, struct watch *w)
{
    size_t at = w->heap_at;

    w->heap_at = 0;
    if (at == HEAP_FULL) {
        struct watch **link = &l->unplaced;
        while (*link != w)
            link = &(*link)->next_unplaced;
        *link = w->next_unplaced;
    }
    if (at == 0 || at == HEAP_FULL)
        return;
    struct watch *last = l->heap[l->heap_len--];
    if (last != w) {
        heap_put(l, at, last);
        heap_sift(l, at);
    }
    if (l->heap_cap > 1024 && l->heap_len < l->heap_cap / 4) {      /* a flood has passed */
        struct watch **heap = realloc(l->heap, l->heap_cap / 2 * sizeof(struct watch *));
        l->heap = heap ? heap : l->heap;
        l->heap_cap /= heap ? 2 : 1;
    }
}

static void heap_add(struct loop *l, struct watch *w)
{
    if (l->heap_len + 2 > l->heap_cap) {
        size_t cap = l->heap_cap ? 2 * l->heap_cap : 64;
        struct watch **heap = realloc(l->heap, cap * sizeof(struct watch *));
        if (!heap) {
            w->heap_at = HEAP_FULL;
            w->next_unplaced = l->unplaced;
            l->unplaced = w;
            return;
        }
        l->heap = heap;
        l->heap_cap = cap;
    }
    heap_put(l, ++l->heap_len, w);
    heap_sift(l, l->heap_len);
}

/* Calls w->on_deadline once, `ms` from now, instead of any earlier wish. Every request puts its
 * connection's off: the heap learns of that when the first one comes. */
static void loop_after(struct loop *l, struct watch *w, int64_t ms)
{
    w->deadline_ms = now_ms() + ms;
    if (w->heap_at > 0 && w->deadline_ms >= w->heap_ms)
        return;
    w->heap_ms = w->deadline_ms;
    if (w->heap_at == 0)
        heap_add(l, w);
    else if (w->heap_at != HEAP_FULL)
        heap_sift(l, w->heap_at);
}

/* Calls w->on_event(w, 0) at the end of this turn. */
static void loop_soon(struct loop *l, struct watch *w)
{
    if (w->soon || w->buried)
        return;
    w->soon = true;
    w->next_soon = NULL;
    *l->soon_last = w;
    l->soon_last = &w->next_soon;
}

static void loop_forget_soon(struct loop *l, struct watch *w)
{
    if (!w->soon)
        return;
    for (struct watch **at = &l->soon_first; *at; at = &(*at)->next_soon) {
        if (*at != w)
            continue;
        *at = w->next_soon;
        if (!*at)
            l->soon_last = at;
        break;
    }
    w->soon = false;
}

/* Gives up a watch: closes its descriptor now, calls on_bury (which frees) at the end of the turn. */
static void loop_bury(struct loop *l, struct watch *w, void (*on_bury)(struct watch *))
{
    if (w->buried)
        return;
    loop_never(l, w);
    if (w->fd >= 0 && w->events)
        loop_want(l, w, 0);
    fd_close(&w->fd);
    w->buried = true;
    w->on_bury = on_bury;
    w->next_buried = l->buried;
    l->buried = w;
}

static int loop_timeout(const struct loop *l)
{
    if (l->soon_first)
        return 0;
    int64_t ms = l->heap_len > 0 ? l->heap[1]->heap_ms - now_ms() : 60000;
    if (agent_log.pending_len + access_log.pending_len > 0 && ms > 20)
        ms = 20;                    /* the console takes no interest in being watched */
    if (l->unplaced && ms > HEAP_RETRY_MS)
        ms = HEAP_RETRY_MS;
    return ms < 0 ? 0 : ms > 60000 ? 60000 : (int)ms;
}

static void loop_run_soon(struct loop *l)
{
    struct watch *w = l->soon_first;

    l->soon_first = NULL;
    l->soon_last = &l->soon_first;
    while (w) {
        struct watch *next = w->next_soon;
        w->soon = false;
        if (!w->buried)
            w->on_event(w, 0);
        w = next;
    }
}

/* Tries again to give deadlines a place; without memory they come late, but they come. */
static void loop_place(struct loop *l, int64_t now)
{
    struct watch *first = l->unplaced, *w;

    l->unplaced = NULL;
    while ((w = first)) {
        first = w->next_unplaced;
        w->heap_at = 0;
        heap_add(l, w);
    }
    for (struct watch **link = &l->unplaced; (w = *link);) {
        if (w->deadline_ms > now) {
            link = &w->next_unplaced;
            continue;
        }
        loop_never(l, w);
        w->on_deadline(w);
        link = &l->unplaced;        /* the list is another */
    }
}

/* Newer kernels (seen with Linux 6.18) take it that what wakes a sleeper in epoll_wait(2) is about to
 * sleep itself, and give the sleeper its CPU (WF_SYNC, passed on by fs/eventpoll.c). A program that
 * has written the first of many answers goes on; agent and program would share a CPU while another
 * has nothing to do. Who sleeps in poll(2) is woken where it was. */
static int loop_wait(const struct loop *l, struct epoll_event *events, int max)
{
    struct pollfd any = { .fd = l->epoll_fd, .events = POLLIN };
    int ms = loop_timeout(l);

    if (ms > 0 && poll(&any, 1, ms) == 0)
        return 0;
    return epoll_wait(l->epoll_fd, events, max, 0);
}

static void loop_turn(struct loop *l)
{
    struct epoll_event events[64];
    int n = loop_wait(l, events, COUNT(events));

    l->turn++;
    for (int i = 0; i < n; i++) {
        struct watch *w = events[i].data.ptr;
        if (!w->buried && w->events)
            w->on_event(w, events[i].events);
    }
    int64_t now = now_ms();
    if (l->unplaced)
        loop_place(l, now);
    while (l->heap_len > 0 && l->heap[1]->heap_ms <= now) {
        struct watch *w = l->heap[1];
        if (w->deadline_ms > now) {
            w->heap_ms = w->deadline_ms;
            heap_sift(l, 1);
            continue;
        }
        loop_never(l, w);
        w->on_deadline(w);
    }
    loop_run_soon(l);
    while (l->buried) {
        struct watch *w = l->buried;
        l->buried = w->next_buried;
        loop_forget_soon(l, w);
        w->on_bury(w);
    }
    log_flush();
}

static void loop_run(struct loop *l)
{
    while (!l->stop)
        loop_turn(l);
}

/* ==== text: UTF-8, percent-encoding, base32, numbers ============================= */

/* Length of the valid UTF-8 sequence at p (RFC 3629 section 4), 0 if there is none. */
static size_t utf8_step(const char *text, size_t n)
{
    const unsigned char *p = (const unsigned char *)text;

    if (n >= 1 && p[0] < 0x80)
        return 1;
    if (n >= 2 && p[0] >= 0xc2 && p[0] <= 0xdf && (p[1] & 0xc0) == 0x80)
        return 2;
    if (n >= 3 && (p[0] & 0xf0) == 0xe0 && (p[1] & 0xc0) == 0x80 && (p[2] & 0xc0) == 0x80)
        return (p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xed && p[1] > 0x9f) ? 0 : 3;
    if (n >= 4 && p[0] >= 0xf0 && p[0] <= 0xf4 && (p[1] & 0xc0) == 0x80
        && (p[2] & 0xc0) == 0x80 && (p[3] & 0xc0) == 0x80)
        return (p[0] == 0xf0 && p[1] < 0x90) || (p[0] == 0xf4 && p[1] > 0x8f) ? 0 : 4;
    return 0;
}

static bool utf8_ok(struct span s)
{
    while (s.n > 0) {
        size_t step = utf8_step(s.p, s.n);
        if (step == 0)
            return false;
        s.p += step;
        s.n -= step;
    }
    return true;
}

/* Adds s as UTF-8, each byte that is none as U+FFFD. */
static void utf8_add(struct buf *out, struct span s)
{
    size_t plain = 0;

    while (plain < s.n && (unsigned char)s.p[plain] < 0x80)
        plain++;
    buf_add(out, s.p, plain);
    s = (struct span){ s.p + plain, s.n - plain };
    while (s.n > 0) {
        size_t step = utf8_step(s.p, s.n);
        if (step > 0)
            buf_add(out, s.p, step);
        else
            buf_add_text(out, "\xef\xbf\xbd");
        s.p += step ? step : 1;
        s.n -= step ? step : 1;
    }
}

/* Adds s, whose bytes are ISO 8859-1 if they are not UTF-8, as UTF-8. */
static void utf8_add_latin1(struct buf *out, struct span s)
{
    if (utf8_ok(s)) {
        buf_add_span(out, s);
        return;
    }
    for (size_t i = 0; i < s.n; i++) {
        unsigned char c = (unsigned char)s.p[i];
        if (c >= 0x80)
            buf_add_byte(out, (unsigned char)(0xc0 | c >> 6));
        buf_add_byte(out, c < 0x80 ? c : (unsigned char)(0x80 | (c & 0x3f)));
    }
}

/* Shortens to at most `most` bytes without cutting a character: the start is kept. */
static struct span utf8_cut(struct span s, size_t most)
{
    if (s.n <= most)
        return s;
    s.n = most;
    while (s.n > 0 && (s.p[s.n] & 0xc0) == 0x80)
        s.n--;
    return s;
}

static int hex_value(char c)
{
    return c >= '0' && c <= '9' ? c - '0'
         : c >= 'a' && c <= 'f' ? c - 'a' + 10
         : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* The value of %XX at s, or -1. */
static int percent_value(struct span s)
{
    if (s.n < 3 || s.p[0] != '%' || hex_value(s.p[1]) < 0 || hex_value(s.p[2]) < 0)
        return -1;
    return hex_value(s.p[1]) * 16 + hex_value(s.p[2]);
}

static void percent_decode(struct buf *out, struct span s)
{
    if (s.n == 0 || !memchr(s.p, '%', s.n)) {
        buf_add_span(out, s);
        return;
    }
    for (size_t i = 0; i < s.n; i++) {
        int c = percent_value((struct span){ s.p + i, s.n - i });
        buf_add_byte(out, (unsigned char)(c < 0 ? s.p[i] : c));
        i += c < 0 ? 0 : 2;
    }
}

static void percent_add_byte(struct buf *out, unsigned char c)
{
    static const char digits[] = "0123456789ABCDEF";
    buf_add_byte(out, '%');
    buf_add_byte(out, (unsigned char)digits[c >> 4]);
    buf_add_byte(out, (unsigned char)digits[c & 15]);
}

static bool is_unreserved(unsigned char c)      /* RFC 3986 section 2.3 */
{
    return (c < 0x80 && isalnum(c)) || (c && strchr("-._~", c));
}

/* Encodes a decoded path for a request line: pchar and '/' stay (RFC 3986 section 3.3). */
static void percent_encode_path(struct buf *out, struct span s)
{
    for (size_t i = 0; i < s.n; i++) {
        unsigned char c = (unsigned char)s.p[i];
        if (is_unreserved(c) || (c && strchr("!$&'()*+,;=:@/", c)))
            buf_add_byte(out, c);
        else
            percent_add_byte(out, c);
    }
}

/* Encodes a half-decoded query: space becomes '+', %XX and what a query may hold (RFC 3986
 * section 3.4) stay. */
static void percent_encode_query(struct buf *out, struct span s)
{
    for (size_t i = 0; i < s.n; i++) {
        unsigned char c = (unsigned char)s.p[i];
        bool kept = c == '%' && percent_value((struct span){ s.p + i, s.n - i }) >= 0;
        if (c == ' ')
            buf_add_byte(out, '+');
        else if (kept || is_unreserved(c) || (c && strchr("!$&'()*+,;=:@/?", c)))
            buf_add_byte(out, c);
        else
            percent_add_byte(out, c);
    }
}

/* RFC 4648 base32, lower case, no padding, of the bytes that `hex` spells. -1: not hex. */
static int base32_of_hex(char *out, size_t size, struct span hex)
{
    unsigned bits = 0, have = 0;
    size_t len = 0;

    if (hex.n % 2 != 0 || size < hex.n / 2 * 8 / 5 + 2)
        return -1;
    for (size_t i = 0; i < hex.n; i++) {
        int v = hex_value(hex.p[i]);
        if (v < 0)
            return -1;
        bits = (bits << 4 | (unsigned)v) & 0xff;
        have += 4;
        if (have >= 5) {
            have -= 5;
            out[len++] = "abcdefghijklmnopqrstuvwxyz234567"[bits >> have & 31];
        }
    }
    if (have > 0)
        out[len++] = "abcdefghijklmnopqrstuvwxyz234567"[bits << (5 - have) & 31];
    out[len] = '\0';
    return 0;
}

/* A decimal number from `least` to `most`, nothing else around it. */
static bool number_read(struct span s, int64_t least, int64_t most, int64_t *out)
{
    int64_t value = 0;

    if (s.n == 0 || s.n > 19)
        return false;
    for (size_t i = 0; i < s.n; i++) {
        if (s.p[i] < '0' || s.p[i] > '9')
            return false;
        if (__builtin_mul_overflow(value, 10, &value)
            || __builtin_add_overflow(value, s.p[i] - '0', &value))
            return false;
    }
    *out = value;
    return value >= least && value <= most;
}

static const struct limit {
    const char *name, *what;
    size_t      offset;
    int64_t     least, most;
} limit_table[] = {
#define LIMIT_ROW(name, value, least, most, what) \
    { #name, what, offsetof(struct limits, name), least, most },
    LIMITS(LIMIT_ROW)
};

/* Sets a limit of `all` from "NAME=VALUE". NULL, or what is wrong, for people. */
static const char *limit_set(struct limits *all, const char *assignment)
{
    static char wrong[256];
    const char *eq = strchr(assignment, '=');
    size_t len = eq ? (size_t)(eq - assignment) : strlen(assignment);
    int64_t value;

    for (size_t i = 0; i < COUNT(limit_table); i++) {
        const struct limit *row = &limit_table[i];
        if (strlen(row->name) != len || memcmp(row->name, assignment, len) != 0)
            continue;
        if (eq && number_read(span_of(eq + 1), row->least, row->most, &value)) {
            *(int64_t *)(void *)((char *)all + row->offset) = value;
            return NULL;
        }
        snprintf(wrong, sizeof wrong, "limit %s takes a number from %" PRId64 " to %" PRId64,
                 row->name, row->least, row->most);
        return wrong;
    }
    snprintf(wrong, sizeof wrong, "no limit is named %.*s", (int)len, assignment);
    return wrong;
}

/* ==== mp: msgpack, no I/O ========================================================
 * The format of msgpack.org's spec.md. Two uses: mp_scan finds where a message that still
 * arrives will end, looking at each byte once; mp_read_* take a complete one apart. */
enum mp_type { MP_NIL, MP_BOOL, MP_INT, MP_FLOAT, MP_STR, MP_BIN, MP_ARRAY, MP_MAP, MP_EXT, MP_BAD };

struct mp_head {
    enum mp_type type;
    bool         negative;
    uint64_t     value;             /* number, bool, or count of elements; of a map: pairs */
    uint64_t     bytes;             /* payload that follows the head */
    size_t       head;              /* size of the head itself */
};

static uint64_t big_endian(const unsigned char *p, size_t n)
{
    uint64_t v = 0;
    while (n-- > 0)
        v = v << 8 | *p++;
    return v;
}

/* Reads one head from p. False: more bytes are needed. */
static bool mp_head_read(const char *text, size_t n, struct mp_head *h)
{
    static const struct { unsigned char type, width; } wide[32] = {   /* 0xc0 .. 0xdf */
        { MP_NIL, 0 }, { MP_BAD, 0 }, { MP_BOOL, 0 }, { MP_BOOL, 0 },
        { MP_BIN, 1 }, { MP_BIN, 2 }, { MP_BIN, 4 },
        { MP_EXT, 1 }, { MP_EXT, 2 }, { MP_EXT, 4 },
        { MP_FLOAT, 4 }, { MP_FLOAT, 8 },
        { MP_INT, 1 }, { MP_INT, 2 }, { MP_INT, 4 }, { MP_INT, 8 },
        { MP_INT, 1 }, { MP_INT, 2 }, { MP_INT, 4 }, { MP_INT, 8 },
        { MP_EXT, 0 }, { MP_EXT, 0 }, { MP_EXT, 0 }, { MP_EXT, 0 }, { MP_EXT, 0 },
        { MP_STR, 1 }, { MP_STR, 2 }, { MP_STR, 4 },
        { MP_ARRAY, 2 }, { MP_ARRAY, 4 }, { MP_MAP, 2 }, { MP_MAP, 4 },
    };
    const unsigned char *p = (const unsigned char *)text;

    if (n == 0)
        return false;
    unsigned char c = p[0];
    *h = (struct mp_head){ .head = 1 };
    if (c < 0x80 || c >= 0xe0) {
        h->type = MP_INT;
        h->negative = c >= 0xe0;
        h->value = h->negative ? (uint64_t)(int64_t)(int8_t)c : c;
        return true;
    }
    if (c < 0xc0) {
        h->type = c < 0x90 ? MP_MAP : c < 0xa0 ? MP_ARRAY : MP_STR;
        h->value = c < 0xa0 ? c & 15 : c & 31;
        h->bytes = h->type == MP_STR ? h->value : 0;
        return true;
    }
    h->type = wide[c - 0xc0].type;
    size_t width = wide[c - 0xc0].width;
    h->head = 1 + width;
    if (n < h->head)
        return false;
    h->value = big_endian(p + 1, width);
    switch (h->type) {
    case MP_BOOL:
        h->value = c == 0xc3;
        break;
    case MP_INT:
        if (c >= 0xd0) {            /* signed: extend the sign of `width` bytes */
            unsigned shift = 64 - 8 * (unsigned)width;
            h->value = (uint64_t)((int64_t)(h->value << shift) >> shift);
            h->negative = (int64_t)h->value < 0;
        }
        break;
    case MP_STR:
    case MP_BIN:
        h->bytes = h->value;
        break;
    case MP_EXT:                    /* one byte of type, then the data */
        h->bytes = 1 + (width ? h->value : (uint64_t)1 << (c - 0xd4));
        break;
    default:
        break;
    }
    return true;
}

struct mp_scan {
    size_t   pos;                   /* bytes looked at; at the end: the message's length */
    uint64_t skip;                  /* payload still to pass over */
    unsigned depth;
    uint64_t left[65];              /* values still to come at each depth; [0]: the message */
};

enum scan { SCAN_MORE, SCAN_DONE, SCAN_BAD };

static void mp_scan_init(struct mp_scan *s)
{
    *s = (struct mp_scan){ .left = { 1 } };
}

/* Goes on over the first `n` bytes of a message that is `most` bytes at most. On SCAN_BAD
 * *why says what is wrong; no claim of the message is believed before it is weighed. */
static enum scan mp_scan(struct mp_scan *s, const char *p, size_t n, uint64_t most, const char **why)
{
    struct mp_head h;

    for (;;) {
        uint64_t step = s->skip < n - s->pos ? s->skip : n - s->pos;
        s->pos += (size_t)step;
        s->skip -= step;
        if (s->skip > 0)
            return SCAN_MORE;
        while (s->left[s->depth] == 0) {
            if (s->depth == 0)
                return SCAN_DONE;
            s->depth--;
        }
        if (!mp_head_read(p + s->pos, n - s->pos, &h))
            return SCAN_MORE;
        s->left[s->depth]--;
        s->pos += h.head;
        s->skip = h.bytes;
        uint64_t values = h.type == MP_MAP ? 2 * h.value : h.type == MP_ARRAY ? h.value : 0;
        if (h.type == MP_BAD) {
            *why = "byte 0xc1 is no msgpack";
            return SCAN_BAD;
        }
        if (s->pos + h.bytes > most || values > most - s->pos) {
            *why = "larger than the limit";
            return SCAN_BAD;
        }
        if (values > 0) {
            if (s->depth + 1 > limits.mp_depth) {
                *why = "nested too deep";
                return SCAN_BAD;
            }
            s->left[++s->depth] = values;
        }
    }
}

/* A reader over one complete message. After the first wrong type it stays at `wrong`. */
struct mp_in {
    const char *p;
    size_t      n;
};

static bool mp_next(struct mp_in *in, struct mp_head *h)
{
    return mp_head_read(in->p, in->n, h) && h->type != MP_BAD && h->bytes <= in->n - h->head;
}

static enum mp_type mp_peek(const struct mp_in *in)
{
    struct mp_head h;
    return mp_head_read(in->p, in->n, &h) ? h.type : MP_BAD;
}

static void mp_advance(struct mp_in *in, size_t n)
{
    in->p += n;
    in->n -= n;
}

/* Reads a head of the wanted type; false, and nothing is taken, if it is another. */
static bool mp_read(struct mp_in *in, enum mp_type type, struct mp_head *h)
{
    if (!mp_next(in, h) || h->type != type)
        return false;
    mp_advance(in, h->head);
    return true;
}

static bool mp_read_count(struct mp_in *in, enum mp_type type, uint64_t *count)
{
    struct mp_head h;
    if (!mp_read(in, type, &h))
        return false;
    *count = h.value;
    return true;
}

/* MP_STR or MP_BIN. */
static bool mp_read_bytes(struct mp_in *in, enum mp_type type, struct span *out)
{
    struct mp_head h;
    if (!mp_read(in, type, &h))
        return false;
    *out = (struct span){ in->p, (size_t)h.bytes };
    mp_advance(in, (size_t)h.bytes);
    return true;
}

static bool mp_read_bool(struct mp_in *in, bool *out)
{
    struct mp_head h;
    if (!mp_read(in, MP_BOOL, &h))
        return false;
    *out = h.value != 0;
    return true;
}

static bool mp_read_nil(struct mp_in *in)
{
    struct mp_head h;
    return mp_read(in, MP_NIL, &h);
}

/* Passes over one value of any type. False: it is cut short or nested past the limit. */
static bool mp_skip(struct mp_in *in)
{
    struct mp_scan s;
    const char *why;

    mp_scan_init(&s);
    if (mp_scan(&s, in->p, in->n, in->n, &why) != SCAN_DONE)
        return false;
    mp_advance(in, s.pos);
    return true;
}

static void mp_write_head(struct buf *out, unsigned char tag, uint64_t value, size_t width)
{
    buf_add_byte(out, tag);
    while (width-- > 0)
        buf_add_byte(out, (unsigned char)(value >> 8 * width));
}

static void mp_write_nil(struct buf *out)
{
    buf_add_byte(out, 0xc0);
}

static void mp_write_bool(struct buf *out, bool value)
{
    buf_add_byte(out, value ? 0xc3 : 0xc2);
}

static void mp_write_uint(struct buf *out, uint64_t v)
{
    if (v < 0x80)
        buf_add_byte(out, (unsigned char)v);
    else if (v <= 0xffff)
        mp_write_head(out, 0xcd, v, 2);
    else
        mp_write_head(out, v <= 0xffffffff ? 0xce : 0xcf, v, v <= 0xffffffff ? 4 : 8);
}

static void mp_write_map(struct buf *out, uint32_t pairs)
{
    if (pairs < 16)
        buf_add_byte(out, (unsigned char)(0x80 | pairs));
    else
        mp_write_head(out, 0xdf, pairs, 4);
}

static void mp_write_array(struct buf *out, uint32_t values)
{
    if (values < 16)
        buf_add_byte(out, (unsigned char)(0x90 | values));
    else
        mp_write_head(out, 0xdd, values, 4);
}

static void mp_write_str_head(struct buf *out, size_t n)
{
    if (n < 32)
        buf_add_byte(out, (unsigned char)(0xa0 | n));
    else if (n < 256)
        mp_write_head(out, 0xd9, n, 1);
    else
        mp_write_head(out, 0xdb, n, 4);
}

/* The bytes must be UTF-8. */
static void mp_write_str(struct buf *out, struct span s)
{
    mp_write_str_head(out, s.n);
    buf_add_span(out, s);
}

static void mp_write_key(struct buf *out, const char *key)
{
    mp_write_str(out, span_of(key));
}

static void mp_write_bin(struct buf *out, struct span s)
{
    if (s.n < 256)
        mp_write_head(out, 0xc4, s.n, 1);
    else
        mp_write_head(out, 0xc6, s.n, 4);
    buf_add_span(out, s);
}

/* Any bytes, made UTF-8 and cut to `most` bytes. */
static void mp_write_text(struct buf *out, struct span s, size_t most)
{
    struct buf clean = { 0 };
    utf8_add(&clean, s);
    mp_write_str(out, utf8_cut(buf_span(&clean), most));
    out->failed |= clean.failed;
    buf_fini(&clean);
}

/* ==== conf: what was asked for: readers and one check ============================
 * The supervisor's map (protocol key by key in conf_keys). Its bulk, code and input data,
 * stays where it arrived, in `raw`, until it is unpacked; everything else is copied.
 *
 * A file spells the same map in JSON. Nobody sends code in it: the program is in the image
 * already, and what only a host would say (interface, encoding) follows from the entrypoint. */
enum conf_source { CONF_WIRE = 1, CONF_FILE = 2 };
enum interface { INTERFACE_ASGI, INTERFACE_EXECUTABLE };

/* What the entrypoint is started by. */
enum launch {
    LAUNCH_WORKER,      /* module:attribute: Python, by shims/worker.py */
    LAUNCH_NODE,        /* file.js, .mjs, .cjs, perhaps :export: Node, by shims/node.cjs */
    LAUNCH_PYTHON,      /* file.py and arguments */
    LAUNCH_EXEC,        /* a file and arguments */
};
enum encoding { ENCODING_NONE, ENCODING_PLAIN, ENCODING_ZIP, ENCODING_SQUASHFS };

struct conf_pair { char *name, *value; };
struct conf_volume {
    char *mount, *device;           /* in its shortest form; a name below /dev */
    bool  read_only;
    bool  trusted;                  /* its setuid bits and device nodes count */
};

/* Files: what a server needs for TLS, and whose clients' certificates it demands, if any. */
struct tls_files { char *certificate, *key, *client_ca; };

/* What a file says about the agent and not about the program. */
struct settings {
    char  **listen, **limits;               /* addresses for HTTP; "NAME=VALUE" */
    size_t  listen_len, limits_len;
    char   *wire, *log;                     /* where the supervisor's instructions come in; level */
    struct tls_files tls;
    bool    access_log;
};

struct conf {
    enum conf_source    source;
    uint32_t            seen;               /* which of conf_keys: a bit for each row */
    struct settings     settings;
    char               *folder;             /* of the code, where a file names one */
    char              **args;               /* after those that stand in the entrypoint */
    size_t              args_len;
    int64_t             port;               /* where the program listens; 0: not said */
    int64_t             workers;            /* 0: not said; after conf_check never WORKERS_AUTO */
    char               *name;               /* hostname, where a file gives one */
    struct buf          raw;                /* owned; code and input_data point into it */
    struct span         code, input_data;   /* p is NULL: nil or missing */
    char               *interface_name, *encoding_name, *vm_hash, *entrypoint;
    char               *ip, *route, *ipv6, *ipv6_gateway;
    char              **dns_servers, **authorized_keys;
    size_t              dns_servers_len, authorized_keys_len;
    struct conf_pair   *variables;
    size_t              variables_len;
    struct conf_volume *volumes;
    size_t              volumes_len;
    /* derived by conf_check */
    enum interface      interface;
    enum launch         launch;
    enum encoding       encoding;
    char                hostname[HOSTNAME_MAX + 1];     /* "" = leave it alone */
    char                old_hostname[HOSTNAME_MAX + 2]; /* set by setup_start */
};

#define CONF_ARGS_MAX   64          /* of an entrypoint */
#define WORKERS_AUTO    -1          /* as many as CPUs */
#define CONF_LIST_MAX   64          /* name servers, keys and volumes that one list may hold */

static void strings_free(char **list, size_t len)
{
    for (size_t i = 0; list && i < len; i++)
        free(list[i]);
    free(list);
}

/* A copy at the end of the list. 0, or -1: no memory. */
static int strings_add(char ***list, size_t *len, const char *text)
{
    char *copy = span_dup(span_of(text)), **grown = realloc(*list, (*len + 1) * sizeof(char *));

    if (grown)
        *list = grown;
    if (!grown || !copy) {
        free(copy);
        return -1;
    }
    grown[(*len)++] = copy;
    return 0;
}

/* "NAME=VALUE", for settings_apply. NULL, or what is wrong with it, for people. */
static const char *settings_add_limit(struct settings *s, const char *assignment)
{
    struct limits trial = limits;
    const char *wrong = limit_set(&trial, assignment);

    if (!wrong && strings_add(&s->limits, &s->limits_len, assignment) < 0)
        wrong = "no memory";
    return wrong;
}

static const char *settings_set_log(struct settings *s, const char *level)
{
    free(s->log);
    s->log = span_dup(span_of(level));
    return log_level_of(level) < 0 ? "expected info or debug" : s->log ? NULL : "no memory";
}

static void settings_apply(const struct settings *s)
{
    if (s->log && log_level_of(s->log) >= 0)
        agent_log.level = (enum log_level)log_level_of(s->log);
    for (size_t i = 0; i < s->limits_len; i++)
        limit_set(&limits, s->limits[i]);
}

static void settings_fini(struct settings *s)
{
    strings_free(s->listen, s->listen_len);
    strings_free(s->limits, s->limits_len);
    free(s->wire);
    free(s->log);
    free(s->tls.certificate);
    free(s->tls.key);
    free(s->tls.client_ca);
    *s = (struct settings){ 0 };
}

static void conf_fini(struct conf *c)
{
    settings_fini(&c->settings);
    free(c->folder);
    strings_free(c->args, c->args_len);
    free(c->name);
    buf_fini(&c->raw);
    free(c->interface_name);
    free(c->encoding_name);
    free(c->vm_hash);
    free(c->entrypoint);
    free(c->ip);
    free(c->route);
    free(c->ipv6);
    free(c->ipv6_gateway);
    strings_free(c->dns_servers, c->dns_servers_len);
    strings_free(c->authorized_keys, c->authorized_keys_len);
    for (size_t i = 0; i < c->variables_len; i++) {
        free(c->variables[i].name);
        free(c->variables[i].value);
    }
    free(c->variables);
    for (size_t i = 0; i < c->volumes_len; i++) {
        free(c->volumes[i].mount);
        free(c->volumes[i].device);
    }
    free(c->volumes);
    *c = (struct conf){ 0 };
}

/* Says what is wrong with which field; returns -1 for the caller to return. */
#define conf_wrong(why, ...) (buf_add_format(why, __VA_ARGS__), -1)

/* Text without NUL, as it becomes paths and environment. */
static int conf_str(struct mp_in *in, const char *field, char **out, struct buf *why)
{
    struct span s;

    if (!mp_read_bytes(in, MP_STR, &s))
        return conf_wrong(why, "%s: expected a string", field);
    if (memchr(s.p, 0, s.n))
        return conf_wrong(why, "%s: holds a NUL byte", field);
    if (!utf8_ok(s))
        return conf_wrong(why, "%s: not UTF-8", field);
    *out = span_dup(s);
    return *out ? 0 : conf_wrong(why, "%s: no memory", field);
}

static int conf_bin(struct mp_in *in, const char *field, struct span *out, struct buf *why)
{
    if (mp_read_bytes(in, MP_BIN, out) || mp_read_bytes(in, MP_STR, out))
        return 0;
    return conf_wrong(why, "%s: expected bytes", field);
}

/* A list of at most CONF_LIST_MAX strings. */
static int conf_strs(struct mp_in *in, const char *field, char ***out, size_t *len, struct buf *why)
{
    char name[64];
    uint64_t count;

    if (!mp_read_count(in, MP_ARRAY, &count))
        return conf_wrong(why, "%s: expected a list", field);
    if (count > CONF_LIST_MAX)
        return conf_wrong(why, "%s: %" PRIu64 " entries, at most %d", field, count, CONF_LIST_MAX);
    if (!(*out = calloc((size_t)count + 1, sizeof(char *))))
        return conf_wrong(why, "%s: no memory", field);
    for (*len = 0; *len < count; ++*len) {
        snprintf(name, sizeof name, "%s[%zu]", field, *len);
        if (conf_str(in, name, &(*out)[*len], why) < 0)
            return -1;
    }
    return 0;
}

static int conf_variables(struct mp_in *in, struct conf *c, struct buf *why)
{
    uint64_t count;

    if (!mp_read_count(in, MP_MAP, &count))
        return conf_wrong(why, "variables: expected a map");
    if (count > (uint64_t)limits.variables)
        return conf_wrong(why, "variables: %" PRIu64 " of them, at most %" PRId64, count,
                          limits.variables);
    if (!(c->variables = calloc((size_t)count + 1, sizeof *c->variables)))
        return conf_wrong(why, "variables: no memory");
    for (uint64_t i = 0; i < count; i++) {
        struct conf_pair *v = &c->variables[c->variables_len++];
        char field[128];
        if (conf_str(in, "variables: a name", &v->name, why) < 0)
            return -1;
        if (v->name[0] == '\0' || strchr(v->name, '='))
            return conf_wrong(why, "variables: the name \"%.64s\" is empty or holds '='", v->name);
        snprintf(field, sizeof field, "variables: %.64s", v->name);
        if (conf_str(in, field, &v->value, why) < 0)
            return -1;
    }
    return 0;
}

static int conf_volume(struct mp_in *in, size_t at, bool strict, struct conf_volume *v, struct buf *why)
{
    uint64_t pairs;
    char field[64];
    struct span key;

    snprintf(field, sizeof field, "volumes[%zu]", at);
    if (!mp_read_count(in, MP_MAP, &pairs))
        return conf_wrong(why, "%s: expected a map", field);
    v->read_only = true;
    while (pairs-- > 0) {
        if (!mp_read_bytes(in, MP_STR, &key))
            return conf_wrong(why, "%s: a key is not a string", field);
        snprintf(field, sizeof field, "volumes[%zu].%.*s", at, (int)(key.n < 16 ? key.n : 16), key.p);
        int rc = 0;
        if (span_eq(key, "mount") && !v->mount)
            rc = conf_str(in, field, &v->mount, why);
        else if (span_eq(key, "device") && !v->device)
            rc = conf_str(in, field, &v->device, why);
        else if (span_eq(key, "read_only"))
            rc = mp_read_bool(in, &v->read_only) ? 0 : conf_wrong(why, "%s: expected a bool", field);
        else if (span_eq(key, "trusted"))
            rc = mp_read_bool(in, &v->trusted) ? 0 : conf_wrong(why, "%s: expected a bool", field);
        else if (strict)
            rc = conf_wrong(why, "%s: no such field", field);
        else if (!mp_skip(in))
            rc = conf_wrong(why, "%s: malformed", field);
        if (rc < 0)
            return -1;
    }
    if (!v->mount || !v->device)
        return conf_wrong(why, "volumes[%zu]: needs mount and device", at);
    return 0;
}

static int conf_volumes(struct mp_in *in, struct conf *c, struct buf *why)
{
    uint64_t count;

    if (!mp_read_count(in, MP_ARRAY, &count))
        return conf_wrong(why, "volumes: expected a list");
    if (count > CONF_LIST_MAX)
        return conf_wrong(why, "volumes: %" PRIu64 " of them, at most %d", count, CONF_LIST_MAX);
    if (!(c->volumes = calloc((size_t)count + 1, sizeof *c->volumes)))
        return conf_wrong(why, "volumes: no memory");
    while (c->volumes_len < count) {
        size_t at = c->volumes_len++;
        if (conf_volume(in, at, c->source == CONF_FILE, &c->volumes[at], why) < 0)
            return -1;
    }
    return 0;
}

static int conf_port(struct mp_in *in, const char *field, int64_t *out, struct buf *why)
{
    struct mp_head h;

    if (!mp_read(in, MP_INT, &h) || h.negative || h.value < 1 || h.value > UINT16_MAX)
        return conf_wrong(why, "%s: expected a number from 1 to %d", field, UINT16_MAX);
    *out = (int64_t)h.value;
    return 0;
}

/* A number, or "auto". */
static bool workers_read(struct span text, int64_t *out)
{
    *out = WORKERS_AUTO;
    return span_eq(text, "auto") || number_read(text, 1, WORKERS_MAX, out);
}

static int conf_workers(struct mp_in *in, int64_t *out, struct buf *why)
{
    struct mp_in text = *in;
    struct mp_head h;
    struct span word;

    if (mp_read_bytes(&text, MP_STR, &word) && workers_read(word, out) && *out == WORKERS_AUTO) {
        *in = text;
        return 0;
    }
    if (!mp_read(in, MP_INT, &h) || h.negative || h.value < 1 || h.value > WORKERS_MAX)
        return conf_wrong(why, "workers: expected a number from 1 to %d, or \"auto\"", WORKERS_MAX);
    *out = (int64_t)h.value;
    return 0;
}

static int conf_limits(struct mp_in *in, struct conf *c, struct buf *why)
{
    struct span name;
    struct mp_head value;
    uint64_t count;
    char text[80];

    if (!mp_read_count(in, MP_MAP, &count))
        return conf_wrong(why, "limits: expected a map");
    while (count-- > 0) {
        if (!mp_read_bytes(in, MP_STR, &name))
            return conf_wrong(why, "limits: a name is not a string");
        int n = name.n < 40 ? (int)name.n : 40;
        if (!mp_read(in, MP_INT, &value) || value.negative)
            return conf_wrong(why, "limits.%.*s: expected a whole number", n, name.p);
        snprintf(text, sizeof text, "%.*s=%" PRIu64, n, name.p, value.value);
        const char *wrong = settings_add_limit(&c->settings, text);
        if (wrong)
            return conf_wrong(why, "limits.%.*s: %s", n, name.p, wrong);
    }
    return 0;
}

static int conf_tls(struct mp_in *in, struct tls_files *t, struct buf *why)
{
    const struct { const char *key, *field; char **path; } files[] = {
        { "certificate", "tls.certificate", &t->certificate }, { "key", "tls.key", &t->key },
        { "client_ca", "tls.client_ca", &t->client_ca },
    };
    struct span key;
    uint64_t pairs;

    if (!mp_read_count(in, MP_MAP, &pairs))
        return conf_wrong(why, "tls: expected a map");
    while (pairs-- > 0) {
        if (!mp_read_bytes(in, MP_STR, &key))
            return conf_wrong(why, "tls: a key is not a string");
        size_t i = 0;
        while (i < COUNT(files) && !span_eq(key, files[i].key))
            i++;
        if (i == COUNT(files))
            return conf_wrong(why, "tls.%.*s: no such field", (int)(key.n < 16 ? key.n : 16), key.p);
        if (conf_str(in, files[i].field, files[i].path, why) < 0)
            return -1;
    }
    return 0;
}

enum conf_kind {
    CONF_TLS, CONF_STR, CONF_BIN, CONF_BOOL, CONF_PORT, CONF_WORKERS, CONF_ARGS, CONF_DNS, CONF_KEYS, CONF_LISTEN, CONF_VARIABLES, CONF_VOLUMES, CONF_LIMITS
};

/* Beside where a key may stand: it says something of the agent itself, or of the machine. */
enum { CONF_ANY = CONF_WIRE | CONF_FILE, CONF_SETTING = 4, CONF_MACHINE = 8 };

static const struct conf_key {
    const char    *name;
    enum conf_kind kind;
    unsigned       where;
    size_t         offset;          /* of a char *, a span or a bool */
} conf_keys[] = {
    { "input_data",      CONF_BIN,       CONF_WIRE,               offsetof(struct conf, input_data) },
    { "interface",       CONF_STR,       CONF_WIRE,               offsetof(struct conf, interface_name) },
    { "vm_hash",         CONF_STR,       CONF_WIRE,               offsetof(struct conf, vm_hash) },
    { "encoding",        CONF_STR,       CONF_WIRE,               offsetof(struct conf, encoding_name) },
    { "entrypoint",      CONF_STR,       CONF_ANY,                offsetof(struct conf, entrypoint) },
    { "code",            CONF_BIN,       CONF_WIRE,               offsetof(struct conf, code) },
    { "code",            CONF_STR,       CONF_FILE,               offsetof(struct conf, folder) },
    { "args",            CONF_ARGS,      CONF_FILE,               0 },
    { "port",            CONF_PORT,      CONF_FILE,               0 },
    { "workers",         CONF_WORKERS,   CONF_FILE,               0 },
    { "hostname",        CONF_STR,       CONF_FILE | CONF_MACHINE, offsetof(struct conf, name) },
    { "ip",              CONF_STR,       CONF_ANY | CONF_MACHINE, offsetof(struct conf, ip) },
    { "route",           CONF_STR,       CONF_ANY | CONF_MACHINE, offsetof(struct conf, route) },
    { "dns_servers",     CONF_DNS,       CONF_ANY | CONF_MACHINE, 0 },
    { "volumes",         CONF_VOLUMES,   CONF_ANY | CONF_MACHINE, 0 },
    { "variables",       CONF_VARIABLES, CONF_ANY,                0 },
    { "ipv6",            CONF_STR,       CONF_ANY | CONF_MACHINE, offsetof(struct conf, ipv6) },
    { "ipv6_gateway",    CONF_STR,       CONF_ANY | CONF_MACHINE, offsetof(struct conf, ipv6_gateway) },
    { "authorized_keys", CONF_KEYS,      CONF_ANY | CONF_MACHINE, 0 },
    { "listen",          CONF_LISTEN,    CONF_FILE | CONF_SETTING, 0 },
    { "wire",            CONF_STR,       CONF_FILE | CONF_SETTING, offsetof(struct conf, settings.wire) },
    { "log",             CONF_STR,       CONF_FILE | CONF_SETTING, offsetof(struct conf, settings.log) },
    { "tls",             CONF_TLS,       CONF_FILE | CONF_SETTING, 0 },
    { "access_log",      CONF_BOOL,      CONF_FILE | CONF_SETTING, offsetof(struct conf, settings.access_log) },
    { "limits",          CONF_LIMITS,    CONF_FILE | CONF_SETTING, 0 },
};

/* The first key of the configuration that is of this class, or, `of` being false, that is
 * not; NULL: it holds none. */
static const char *conf_first(const struct conf *c, unsigned class, bool of)
{
    for (size_t i = 0; i < COUNT(conf_keys); i++)
        if (c->seen & 1u << i && ((conf_keys[i].where & class) != 0) == of)
            return conf_keys[i].name;
    return NULL;
}

static int conf_value(struct mp_in *in, struct conf *c, const struct conf_key *key, struct buf *why)
{
    void *field = (char *)c + key->offset;

    if (mp_read_nil(in))
        return 0;
    switch (key->kind) {
    case CONF_STR:
        return conf_str(in, key->name, field, why);
    case CONF_BIN:
        return conf_bin(in, key->name, field, why);
    case CONF_BOOL:
        return mp_read_bool(in, field) ? 0 : conf_wrong(why, "%s: expected a bool", key->name);
    case CONF_PORT:
        return conf_port(in, key->name, &c->port, why);
    case CONF_WORKERS:
        return conf_workers(in, &c->workers, why);
    case CONF_ARGS:
        return conf_strs(in, key->name, &c->args, &c->args_len, why);
    case CONF_DNS:
        return conf_strs(in, key->name, &c->dns_servers, &c->dns_servers_len, why);
    case CONF_KEYS:
        return conf_strs(in, key->name, &c->authorized_keys, &c->authorized_keys_len, why);
    case CONF_LISTEN:
        return conf_strs(in, key->name, &c->settings.listen, &c->settings.listen_len, why);
    case CONF_VARIABLES:
        return conf_variables(in, c, why);
    case CONF_VOLUMES:
        return conf_volumes(in, c, why);
    case CONF_LIMITS:
        return conf_limits(in, c, why);
    case CONF_TLS:
        return conf_tls(in, &c->settings.tls, why);
    }
    return -1;
}

/* "ADDRESS" or "ADDRESS/PREFIX" of the family; the prefix only where `prefix` says so. */
static bool conf_address_ok(const char *text, int family, bool prefix)
{
    char address[INET6_ADDRSTRLEN];
    unsigned char bytes[sizeof(struct in6_addr)];
    const char *slash = strchr(text, '/');
    size_t n = slash ? (size_t)(slash - text) : strlen(text);
    int64_t bits;

    if (n >= sizeof address || (slash && !prefix))
        return false;
    memcpy(address, text, n);
    address[n] = '\0';
    if (inet_pton(family, address, bytes) != 1)
        return false;
    return !slash || number_read(span_of(slash + 1), 0, family == AF_INET ? 32 : 128, &bits);
}

static int conf_check_network(const struct conf *c, struct buf *why)
{
    if (c->ip && !conf_address_ok(c->ip, AF_INET, true))
        return conf_wrong(why, "ip: \"%.64s\" is no IPv4 address with or without /0../32", c->ip);
    if (c->route && !conf_address_ok(c->route, AF_INET, false))
        return conf_wrong(why, "route: \"%.64s\" is no IPv4 address", c->route);
    if (c->ipv6 && !conf_address_ok(c->ipv6, AF_INET6, true))
        return conf_wrong(why, "ipv6: \"%.64s\" is no IPv6 address with or without /0../128", c->ipv6);
    if (c->ipv6_gateway && !conf_address_ok(c->ipv6_gateway, AF_INET6, false))
        return conf_wrong(why, "ipv6_gateway: \"%.64s\" is no IPv6 address", c->ipv6_gateway);
    for (size_t i = 0; i < c->dns_servers_len; i++)
        if (!conf_address_ok(c->dns_servers[i], AF_INET, false)
            && !conf_address_ok(c->dns_servers[i], AF_INET6, false))
            return conf_wrong(why, "dns_servers[%zu]: \"%.64s\" is no address", i, c->dns_servers[i]);
    return 0;
}

/* The entrypoint's first word, which may carry :export if it is Node's. */
static struct span conf_entry_file(const struct conf *c)
{
    return (struct span){ c->entrypoint, strcspn(c->entrypoint, c->launch == LAUNCH_NODE ? ": " : " ") };
}

static bool span_ends(struct span s, const char *end)
{
    size_t n = strlen(end);
    return s.n > n && memcmp(s.p + s.n - n, end, n) == 0;
}

static enum launch conf_launch(const struct conf *c)
{
    struct span word = { c->entrypoint, strcspn(c->entrypoint, ": ") };

    if (span_ends(word, ".js") || span_ends(word, ".mjs") || span_ends(word, ".cjs"))
        return LAUNCH_NODE;
    if (c->interface == INTERFACE_ASGI)
        return LAUNCH_WORKER;
    return span_ends(conf_entry_file(c), ".py") ? LAUNCH_PYTHON : LAUNCH_EXEC;
}

/* A file and perhaps arguments. Plain code is put into that file. */
static int conf_check_command(const struct conf *c, struct buf *why)
{
    struct span file = conf_entry_file(c);
    size_t words = 1;

    for (const char *p = c->entrypoint; *p; p++)
        words += *p == ' ' && p[1] != ' ' && p[1];
    if (file.n == 0 || words > CONF_ARGS_MAX)
        return conf_wrong(why, "entrypoint: \"%.128s\" is not a file and at most %d arguments", c->entrypoint, CONF_ARGS_MAX - 1);
    if (c->launch == LAUNCH_NODE && c->entrypoint[file.n] == ' ')
        return conf_wrong(why, "entrypoint: \"%.128s\": a file for Node takes no arguments", c->entrypoint);
    if (c->encoding == ENCODING_PLAIN && (memchr(file.p, '/', file.n) || file.p[0] == '.'))
        return conf_wrong(why, "entrypoint: \"%.128s\" is no name for a file of plain code", c->entrypoint);
    return 0;
}

/* For a Python worker module.path:attribute; plain code may leave the module out, as it is its own. */
static int conf_check_entrypoint(const struct conf *c, struct buf *why)
{
    const char *e = c->entrypoint, *colon = strchr(e, ':');
    size_t n = strlen(e);

    if (n == 0 || n > ENTRYPOINT_MAX)
        return conf_wrong(why, "entrypoint: %zu bytes, expected 1 to %d", n, ENTRYPOINT_MAX);
    if (c->launch != LAUNCH_WORKER)
        return conf_check_command(c, why);
    if (!colon && c->encoding == ENCODING_PLAIN)
        return 0;
    if (!colon || colon == e || colon[1] == '\0' || strchr(colon + 1, ':'))
        return conf_wrong(why, "entrypoint: \"%.128s\" is not module:attribute", e);
    return 0;
}

/* What the guest itself stands on: the first kind with all that is below, the second alone. */
static bool conf_place_is_system(const char *path)
{
    static const char *const trees[] = { "/proc", "/sys", "/dev", "/run", PATH_OLD_ROOT };
    static const char *const folders[] = { "/", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/usr", "/usr/bin",
                                           "/usr/sbin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/etc" };

    for (size_t i = 0; i < COUNT(trees); i++) {
        size_t n = strlen(trees[i]);
        if (strncmp(path, trees[i], n) == 0 && (path[n] == '\0' || path[n] == '/'))
            return true;
    }
    for (size_t i = 0; i < COUNT(folders); i++)
        if (strcmp(path, folders[i]) == 0)
            return true;
    return false;
}

/* Brings an absolute path into its shortest form, in place. False: it climbs with "..". */
static bool conf_path_shorten(char *path)
{
    char *to = path;

    for (const char *p = path; *p;) {
        size_t n = strcspn(p, "/");
        if (n == 2 && p[0] == '.' && p[1] == '.')
            return false;
        if (n > 0 && !(n == 1 && p[0] == '.')) {
            *to++ = '/';
            memmove(to, p, n);
            to += n;
        }
        p += n + (p[n] == '/');
    }
    if (to == path)
        *to++ = '/';
    *to = '\0';
    return true;
}

static int conf_check_volume(struct conf_volume *v, struct buf *why)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyz0123456789";
    size_t n = strlen(v->device);

    if (n == 0 || n > VOLUME_DEVICE_MAX || v->device[strspn(v->device, letters)] != '\0')
        return conf_wrong(why, "volumes: \"%.64s\" is no device name: 1 to %d of a-z and 0-9", v->device,
                          VOLUME_DEVICE_MAX);
    if (strlen(v->mount) > VOLUME_MOUNT_MAX)
        return conf_wrong(why, "volumes: %s: mount has %zu bytes, at most %d", v->device, strlen(v->mount),
                          VOLUME_MOUNT_MAX);
    if (v->mount[0] != '/' || !conf_path_shorten(v->mount))
        return conf_wrong(why, "volumes: %s: mount \"%.128s\" is no absolute path without \"..\"", v->device,
                          v->mount);
    if (conf_place_is_system(v->mount))
        return conf_wrong(why, "volumes: %s: mount %.128s is a place of the system", v->device, v->mount);
    return 0;
}

static size_t path_depth(const char *path)
{
    size_t depth = 0;
    for (; *path; path++)
        depth += *path == '/';
    return depth;
}

/* A volume inside another is mounted after it. */
static int conf_by_depth(const void *a, const void *b)
{
    const struct conf_volume *v = a, *w = b;
    size_t m = path_depth(v->mount), n = path_depth(w->mount);

    return m != n ? (m < n ? -1 : 1) : strcmp(v->mount, w->mount);
}

/* Code on a disk of its own is a volume like any other. */
static int conf_add_code_volume(struct conf *c, struct buf *why)
{
    struct conf_volume *list = realloc(c->volumes, (c->volumes_len + 1) * sizeof *list);

    if (!list)
        return conf_wrong(why, "volumes: no memory");
    c->volumes = list;
    struct conf_volume *v = &list[c->volumes_len++];
    *v = (struct conf_volume){ .mount = span_dup(SPAN(PATH_CODE)), .device = span_dup(SPAN(CODE_DEVICE)),
                               .read_only = true };
    return v->mount && v->device ? 0 : conf_wrong(why, "volumes: no memory");
}

static int conf_check_volumes(struct conf *c, struct buf *why)
{
    if (c->encoding == ENCODING_SQUASHFS && conf_add_code_volume(c, why) < 0)
        return -1;
    for (size_t i = 0; i < c->volumes_len; i++) {
        struct conf_volume *v = &c->volumes[i];
        if (conf_check_volume(v, why) < 0)
            return -1;
        for (const struct conf_volume *w = c->volumes; w < v; w++) {
            if (strcmp(v->device, w->device) == 0)
                return conf_wrong(why, "volumes: %s stands twice%s", v->device,
                                  c->encoding == ENCODING_SQUASHFS ? "; " CODE_DEVICE " is the code's" : "");
            if (strcmp(v->mount, w->mount) == 0)
                return conf_wrong(why, "volumes: %s and %s are both for %.128s", w->device, v->device, v->mount);
        }
    }
    if (c->volumes_len > 0)
        qsort(c->volumes, c->volumes_len, sizeof *c->volumes, conf_by_depth);
    return 0;
}

/* conn has the addresses; here they are only text. */
static bool address_can_listen(const char *text, bool *tls);

static int conf_check_settings(const struct settings *s, struct buf *why)
{
    bool tls;

    if (s->listen_len > LISTEN_MAX)
        return conf_wrong(why, "listen: %zu addresses, at most %d", s->listen_len, LISTEN_MAX);
    for (size_t i = 0; i < s->listen_len; i++)
        if (!address_can_listen(s->listen[i], &tls))
            return conf_wrong(why, "listen[%zu]: \"%.128s\" is not vsock:PORT, unix:PATH, tcp:HOST:PORT or fd:N, "
                              "with or without tls+ before it", i, s->listen[i]);
    if (s->wire && (!address_can_listen(s->wire, &tls) || tls))
        return conf_wrong(why, "wire: \"%.128s\" is not vsock:PORT, unix:PATH or fd:N", s->wire);
    if (s->wire && strncmp(s->wire, "tcp:", 4) == 0)
        return conf_wrong(why, "wire: \"%.128s\": whoever reaches it runs commands, so not by TCP", s->wire);
    if (!s->tls.certificate != !s->tls.key || (s->tls.client_ca && !s->tls.key))
        return conf_wrong(why, "tls: needs a certificate and its key");
    if (s->log && log_level_of(s->log) < 0)
        return conf_wrong(why, "log: \"%.32s\" is not info or debug", s->log);
    return 0;
}

/* Labels of letters, digits and inner hyphens (RFC 1123 section 2.1). */
static bool hostname_ok(const char *name)
{
    size_t n = strlen(name);

    for (size_t i = 0; i < n; i++) {
        bool edge = i == 0 || i == n - 1 || name[i - 1] == '.' || name[i + 1] == '.';
        if (!(name[i] < 0x7f && isalnum((unsigned char)name[i])) && (edge || !strchr("-.", name[i])))
            return false;
    }
    return n > 0 && n <= HOSTNAME_MAX;
}

static int conf_check_file(struct conf *c, struct buf *why)
{
    if (c->folder && c->folder[0] != '/')
        return conf_wrong(why, "code: \"%.128s\" is no absolute path", c->folder);
    if (c->name && !hostname_ok(c->name))
        return conf_wrong(why, "hostname: \"%.64s\" is none of at most %d characters", c->name, HOSTNAME_MAX);
    snprintf(c->hostname, sizeof c->hostname, "%s", c->name ? c->name : "");
    bool is_module = strchr(c->entrypoint, ':') && !strpbrk(c->entrypoint, " /");
    c->interface = is_module ? INTERFACE_ASGI : INTERFACE_EXECUTABLE;
    c->launch = conf_launch(c);
    if (c->args_len > 0 && (c->launch == LAUNCH_WORKER || c->launch == LAUNCH_NODE))
        return conf_wrong(why, "args: only for an executable or a Python file");
    if (c->port && c->launch == LAUNCH_WORKER)
        return conf_wrong(why, "port: module:attribute listens on none");
    bool has_workers = c->launch == LAUNCH_WORKER || c->launch == LAUNCH_NODE;
    if (c->workers > 1 && !has_workers)
        return conf_wrong(why, "workers: only one of an executable or a Python file, which listens itself");
    if (c->workers == WORKERS_AUTO)
        c->workers = !has_workers ? 1 : cpu_count() < WORKERS_MAX ? cpu_count() : WORKERS_MAX;
    return 0;
}

static int conf_check_wire(struct conf *c, struct buf *why)
{
    if (!c->encoding_name)
        return conf_wrong(why, "encoding: missing");
    c->encoding = strcmp(c->encoding_name, "plain") == 0 ? ENCODING_PLAIN
                : strcmp(c->encoding_name, "zip") == 0 ? ENCODING_ZIP
                : strcmp(c->encoding_name, "squashfs") == 0 ? ENCODING_SQUASHFS : ENCODING_NONE;
    if (c->encoding == ENCODING_NONE)
        return conf_wrong(why, "encoding: \"%.32s\" is not plain, zip or squashfs", c->encoding_name);
    if (c->interface_name && strcmp(c->interface_name, "asgi") != 0) {
        c->interface = INTERFACE_EXECUTABLE;
        if (strcmp(c->interface_name, "executable") != 0)
            return conf_wrong(why, "interface: \"%.32s\" is not asgi or executable", c->interface_name);
    }
    if (c->vm_hash && (strlen(c->vm_hash) > 78
        || base32_of_hex(c->hostname, sizeof c->hostname, span_of(c->vm_hash)) < 0))
        return conf_wrong(why, "vm_hash: expected an even number of hex digits, at most 78");
    if (c->encoding != ENCODING_SQUASHFS && !c->code.p)
        return conf_wrong(why, "code: missing");
    c->launch = conf_launch(c);
    if (c->encoding == ENCODING_PLAIN && c->launch == LAUNCH_WORKER
        && (!utf8_ok(c->code) || memchr(c->code.p, 0, c->code.n)))
        return conf_wrong(why, "code: not UTF-8 text");
    return 0;
}

/* Each becomes a line of a file that sshd(8) reads. */
static int conf_check_keys(const struct conf *c, struct buf *why)
{
    for (size_t i = 0; i < c->authorized_keys_len; i++) {
        struct span key = span_of(c->authorized_keys[i]);
        if (key.n > SSH_KEY_MAX)
            return conf_wrong(why, "authorized_keys[%zu]: %zu bytes, at most %d", i, key.n, SSH_KEY_MAX);
        if (memchr(key.p, '\n', key.n) || memchr(key.p, '\r', key.n))
            return conf_wrong(why, "authorized_keys[%zu]: is more than one line", i);
    }
    return 0;
}

/* The one check that every configuration passes, wherever it was read from. A file need not
 * name a program; then it must not say anything of one. */
static int conf_check(struct conf *c, struct buf *why)
{
    const char *other = conf_first(c, CONF_SETTING, false);

    if (conf_check_settings(&c->settings, why) < 0)
        return -1;
    if (!c->entrypoint && c->source == CONF_FILE && !other)
        return 0;
    if (!c->entrypoint)
        return conf_wrong(why, "entrypoint: missing");
    if ((c->source == CONF_FILE ? conf_check_file(c, why) : conf_check_wire(c, why)) < 0
        || conf_check_entrypoint(c, why) < 0 || conf_check_network(c, why) < 0 || conf_check_volumes(c, why) < 0
        || conf_check_keys(c, why) < 0)
        return -1;
    return 0;
}

/* Takes c->raw apart. 0, or -1 and why. Unknown keys are logged and ignored on the wire,
 * where a newer host may know more than we, and refused in a file, where they are mistakes. */
static int conf_read_map(struct conf *c, struct buf *why)
{
    struct mp_in in = { buf_at(&c->raw), c->raw.len };
    uint64_t pairs, unknown = 0;
    struct span name;

    if (!mp_read_count(&in, MP_MAP, &pairs))
        return conf_wrong(why, "expected a map");
    while (pairs-- > 0) {
        size_t i = 0;
        if (!mp_read_bytes(&in, MP_STR, &name))
            return conf_wrong(why, "a key is not a string");
        while (i < COUNT(conf_keys) && !(conf_keys[i].where & c->source && span_eq(name, conf_keys[i].name)))
            i++;
        if (i == COUNT(conf_keys)) {
            int n = name.n < 64 ? (int)name.n : 64;
            if (c->source == CONF_FILE)
                return conf_wrong(why, "%.*s: no such field", n, name.p);
            if (unknown++ < CONF_LIST_MAX)
                log_info("configuration: unknown key \"%.*s\" ignored", n, name.p);
            if (!mp_skip(&in))
                return conf_wrong(why, "malformed msgpack");
            continue;
        }
        if (c->seen & 1u << i)
            return conf_wrong(why, "%s: stands twice", conf_keys[i].name);
        c->seen |= 1u << i;
        if (conf_value(&in, c, &conf_keys[i], why) < 0)
            return -1;
    }
    if (in.n > 0)
        return conf_wrong(why, "%zu bytes after the map", in.n);
    if (unknown > CONF_LIST_MAX)
        log_info("configuration: %" PRIu64 " unknown keys in all", unknown);
    return 0;
}

/* c->raw is what the host sent. */
static int conf_read_msgpack(struct conf *c, struct buf *why)
{
    c->source = CONF_WIRE;
    return conf_read_map(c, why) < 0 ? -1 : conf_check(c, why);
}

/* ---- JSON (RFC 8259), as the same map in msgpack ---- */

/* Where a value stands, for whoever wrote it: "volumes[1].mount". */
struct json_at {
    const struct json_at *up;       /* NULL: it stands in the outermost map */
    yyjson_val           *key;      /* NULL: it stands in a list */
    size_t                index;
};

static void json_at_add(struct buf *out, const struct json_at *at)
{
    if (at->up)
        json_at_add(out, at->up);
    if (at->key)
        buf_add_format(out, "%s%.*s", at->up ? "." : "",
                       yyjson_get_len(at->key) < 64 ? (int)yyjson_get_len(at->key) : 64, yyjson_get_str(at->key));
    else
        buf_add_format(out, "[%zu]", at->index);
}

static int json_wrong(struct buf *why, const struct json_at *at, const char *what)
{
    if (at) {
        json_at_add(why, at);
        buf_add_text(why, ": ");
    }
    return conf_wrong(why, "%s", what);
}

static int json_to_mp(yyjson_val *v, const struct json_at *at, int64_t depth, struct buf *out, struct buf *why)
{
    yyjson_val *key, *value;
    size_t i, n;
    union { double real; uint64_t bits; } number;

    switch (yyjson_get_type(v)) {
    case YYJSON_TYPE_NULL:
        mp_write_nil(out);
        return 0;
    case YYJSON_TYPE_BOOL:
        mp_write_bool(out, yyjson_get_bool(v));
        return 0;
    case YYJSON_TYPE_NUM:
        number.real = yyjson_get_real(v);
        if (yyjson_is_uint(v))
            mp_write_uint(out, yyjson_get_uint(v));
        else if (yyjson_is_sint(v))
            mp_write_head(out, 0xd3, (uint64_t)yyjson_get_sint(v), 8);
        else
            mp_write_head(out, 0xcb, number.bits, 8);
        return 0;
    case YYJSON_TYPE_STR:
        mp_write_str(out, (struct span){ yyjson_get_str(v), yyjson_get_len(v) });
        return 0;
    case YYJSON_TYPE_ARR:
        if (depth == 0)
            return json_wrong(why, at, "nested too deep");
        mp_write_array(out, (uint32_t)yyjson_arr_size(v));
        yyjson_arr_foreach(v, i, n, value)
            if (json_to_mp(value, &(struct json_at){ at, NULL, i }, depth - 1, out, why) < 0)
                return -1;
        return 0;
    case YYJSON_TYPE_OBJ:
        if (depth == 0 || yyjson_obj_size(v) > (size_t)limits.variables)
            return json_wrong(why, at, depth == 0 ? "nested too deep" : "too many fields");
        mp_write_map(out, (uint32_t)yyjson_obj_size(v));
        yyjson_obj_foreach(v, i, n, key, value) {
            struct json_at here = { at, key, 0 };
            if (yyjson_obj_getn(v, yyjson_get_str(key), yyjson_get_len(key)) != value)
                return json_wrong(why, &here, "stands twice");
            if (json_to_mp(key, &here, depth, out, why) < 0 || json_to_mp(value, &here, depth - 1, out, why) < 0)
                return -1;
        }
        return 0;
    }
    return json_wrong(why, at, "no JSON");
}

/* The text of a file; conf_check is left to the caller, who may have more to say. */
static int conf_read_json(struct conf *c, struct span text, struct buf *why)
{
    yyjson_read_err error;
    yyjson_doc *doc = yyjson_read_opts((char *)(uintptr_t)text.p, text.n, YYJSON_READ_NOFLAG, NULL, &error);
    size_t line = 1;
    int rc;

    c->source = CONF_FILE;
    if (!doc) {
        yyjson_locate_pos(text.p, text.n, error.pos, &line, NULL, NULL);
        return conf_wrong(why, "line %zu: %s", line, error.msg);
    }
    yyjson_val *root = yyjson_doc_get_root(doc);
    if (!yyjson_is_obj(root))
        rc = conf_wrong(why, "expected a map");
    else if ((rc = json_to_mp(root, NULL, limits.mp_depth, &c->raw, why)) == 0)
        rc = c->raw.failed ? conf_wrong(why, "no memory") : conf_read_map(c, why);
    yyjson_doc_free(doc);
    buf_fini(&c->raw);
    return rc;
}

/* Where the code is, and the program's current folder. */
static const char *conf_code_folder(const struct conf *c)
{
    if (c->source == CONF_FILE)
        return c->folder ? c->folder : PATH_CODE;
    return c->interface == INTERFACE_ASGI && c->encoding != ENCODING_SQUASHFS ? PATH_CODE_ASGI : PATH_CODE;
}

/* The file that the entrypoint names: in the folder of the code, or anywhere. */
static void conf_entry_path(const struct conf *c, char *out, size_t size)
{
    struct span file = conf_entry_file(c);

    snprintf(out, size, "%s%s%.*s", file.p[0] == '/' ? "" : conf_code_folder(c), file.p[0] == '/' ? "" : "/",
             (int)file.n, file.p);
}

/* What a program needs to be started again and again: all but the bulk. 0, or -1: no memory. */
static int conf_copy_program(struct conf *to, const struct conf *from)
{
    *to = (struct conf){ .source = from->source, .interface = from->interface, .launch = from->launch,
                         .encoding = from->encoding, .port = from->port, .workers = from->workers };
    memcpy(to->hostname, from->hostname, sizeof to->hostname);
    if (from->folder && !(to->folder = span_dup(span_of(from->folder))))
        goto failed;
    for (size_t i = 0; i < from->args_len; i++)
        if (strings_add(&to->args, &to->args_len, from->args[i]) < 0)
            goto failed;
    to->entrypoint = span_dup(span_of(from->entrypoint));
    to->variables = calloc(from->variables_len + 1, sizeof *to->variables);
    if (!to->entrypoint || !to->variables)
        goto failed;
    for (size_t i = 0; i < from->variables_len; i++) {
        struct conf_pair *v = &to->variables[to->variables_len++];
        v->name = span_dup(span_of(from->variables[i].name));
        v->value = span_dup(span_of(from->variables[i].value));
        if (!v->name || !v->value)
            goto failed;
    }
    if (from->encoding == ENCODING_PLAIN && from->launch == LAUNCH_WORKER) {
        if (buf_add_span(&to->raw, from->code) < 0)
            goto failed;
        to->code = buf_span(&to->raw);
    }
    return 0;
failed:
    conf_fini(to);
    return -1;
}

/* ==== boot: what PID 1 does before it can serve ==================================
 * Every stage is timed and named. A stage that fails is logged and boot goes on as far as
 * it can: a guest that answers "this failed" is worth more than one that panics. */
#define ROOT_WORD_MAX   256

struct boot_stage { const char *name; int64_t kernel_us; };

struct boot {
    int64_t           start_us;     /* since the kernel started, when main began */
    struct boot_stage stages[32];   /* each with the time when it was done */
    size_t            stages_len;
    bool              printed;
    /* as /init of an initramfs: what the kernel command line says of the root */
    char              root[ROOT_WORD_MAX], root_types[ROOT_WORD_MAX], root_flags[ROOT_WORD_MAX];
    bool              root_writable;
    int               modules_fd;   /* the initramfs's, for a root that has none; -1 = none */
};

static void boot_stage(struct boot *b, const char *name)
{
    if (b->stages_len < COUNT(b->stages))
        b->stages[b->stages_len++] = (struct boot_stage){ name, kernel_us() };
}

/* The timeline in one block: milliseconds since the kernel started, since init started,
 * and of the stage itself. Kept in b for whoever asks later. */
static void boot_print(struct boot *b)
{
    int64_t before = b->start_us;

    if (b->printed)
        return;
    b->printed = true;
    log_debug("boot:    kernel      init     stage  (ms)");
    for (size_t i = 0; i < b->stages_len; i++) {
        const struct boot_stage *s = &b->stages[i];
        log_debug("boot: %9.1f %9.1f %9.1f  %s", (double)s->kernel_us / 1e3,
                  (double)(s->kernel_us - b->start_us) / 1e3,
                  (double)(s->kernel_us - before) / 1e3, s->name);
        before = s->kernel_us;
    }
}

struct boot_mount { const char *source, *target, *type; unsigned long flags; const char *data; };

/* Before ready: what modules, the console and the overlay need. */
static const struct boot_mount boot_mounts_early[] = {
    { "proc",     "/proc",     "proc",     MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL },
    { "devtmpfs", "/dev",      "devtmpfs", MS_NOSUID,                        "mode=0755" },
};

/* After ready: what programs expect. */
static const struct boot_mount boot_mounts_late[] = {
    { "sysfs",    "/sys",      "sysfs",    MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL },
    { "tmpfs",    "/run",      "tmpfs",    MS_NOSUID | MS_NODEV,             "mode=0755" },
    { "devpts",   "/dev/pts",  "devpts",   MS_NOSUID | MS_NOEXEC,            "gid=5,mode=0620,ptmxmode=0666" },
    { "tmpfs",    "/dev/shm",  "tmpfs",    MS_NOSUID | MS_NODEV,             "mode=1777" },
};

/* The folder is made where it lacks and can be; EBUSY means that it is mounted already. */
static int boot_mount(const struct boot_mount *m)
{
    if (mkdir(m->target, 0755) < 0 && errno != EEXIST && errno != EROFS)
        return log_errno("mkdir %s", m->target);
    if (mount(m->source, m->target, m->type, m->flags, m->data) < 0 && errno != EBUSY)
        return log_errno("mount %s on %s", m->type, m->target);
    return 0;
}

static bool boot_path_is_mounted(const char *path)
{
    char parent[PATH_MAX];
    struct stat here, above;

    snprintf(parent, sizeof parent, "%s/..", path);
    return stat(path, &here) == 0 && stat(parent, &above) == 0 && here.st_dev != above.st_dev;
}

/* True: something was mounted that was not there before. */
static bool boot_mount_early(void)
{
    bool any = false;

    for (size_t i = 0; i < COUNT(boot_mounts_early); i++)
        if (!boot_path_is_mounted(boot_mounts_early[i].target))
            any |= boot_mount(&boot_mounts_early[i]) == 0;
    return any;
}

/* ---- kernel modules (init_module(2), modprobe.d's modules.dep) ---- */

/* The name of a module file, '-' as '_', without folder and suffix: "a/b-c.ko.xz" is b_c. */
static void module_name(char *out, size_t size, struct span path)
{
    size_t len = 0;

    for (size_t i = path.n; i-- > 0;)
        if (path.p[i] == '/') {
            path.p += i + 1;
            path.n -= i + 1;
            break;
        }
    while (len < path.n && len < size - 1 && path.p[len] != '.') {
        out[len] = path.p[len] == '-' ? '_' : path.p[len];
        len++;
    }
    out[len] = '\0';
}

static int module_insert(const char *folder, struct span file)
{
    char path[PATH_MAX];
    bool packed = file.n < 3 || memcmp(file.p + file.n - 3, ".ko", 3) != 0;
    int rc = -1;

    snprintf(path, sizeof path, "%s/%.*s", folder, (int)file.n, file.p);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return log_errno("module %s", path);
    /* MODULE_INIT_COMPRESSED_FILE is 4 */
    rc = (int)syscall(SYS_finit_module, fd, "", packed ? 4 : 0);
    if (rc < 0 && errno != EEXIST)
        log_errno("module %s", path);
    else
        rc = 0;
    fd_close(&fd);
    return rc;
}

/* Loads a module and, before it, what its line in modules.dep names, last first. */
static int module_load(struct span dep, const char *folder, const char *name)
{
    while (dep.n > 0) {
        const char *end = memchr(dep.p, '\n', dep.n);
        struct span line = { dep.p, end ? (size_t)(end - dep.p) : dep.n };
        const char *colon = memchr(line.p, ':', line.n);
        char found[64];

        dep.p += line.n + (end ? 1 : 0);
        dep.n -= line.n + (end ? 1 : 0);
        if (!colon)
            continue;
        struct span file = { line.p, (size_t)(colon - line.p) };
        module_name(found, sizeof found, file);
        if (strcmp(found, name) != 0)
            continue;
        for (size_t i = line.n, stop = line.n; i > file.n; i--) {
            if (line.p[i - 1] != ' ')
                continue;
            if (stop > i)
                module_insert(folder, (struct span){ line.p + i, stop - i });
            stop = i - 1;
        }
        return module_insert(folder, file);
    }
    errno = ENOENT;
    return -1;
}

/* Whether the kernel is ours; that of a sandbox is not. Set before the loop runs, then constant. */
static bool boot_is_machine;

/* Loads the named modules, in order; those that the kernel's folder lacks are built in or
 * not to be had, which whoever needs them will notice. */
static void boot_modules(const char *const *names)
{
    char folder[128], path[160];
    struct utsname kernel;
    struct buf dep = { 0 };

    if (!boot_is_machine)
        return;
    uname(&kernel);
    snprintf(folder, sizeof folder, "/lib/modules/%.64s", kernel.release);
    snprintf(path, sizeof path, "%s/modules.dep", folder);
    if (file_load(path, &dep, 8 << 20) < 0)
        log_debug("no modules: %s: %s", path, strerror(errno));
    else
        for (; *names; names++)
            if (module_load(buf_span(&dep), folder, *names) < 0)
                log_debug("module %s: %s", *names, strerror(errno));
    buf_fini(&dep);
}

/* Whether a transport to the host is there: its driver knows our own address (vsock(7)). */
static bool boot_has_vsock(void)
{
    unsigned cid = VMADDR_CID_ANY;
    int fd = open("/dev/vsock", O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return false;
    bool ok = ioctl(fd, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &cid) == 0 && cid != VMADDR_CID_ANY;
    fd_close(&fd);
    return ok;
}

/* ---- root ---- */

static bool kernel_has(const char *file_system)
{
    struct buf list = { 0 };
    char line[64];
    bool has = false;

    snprintf(line, sizeof line, "\t%s\n", file_system);
    if (file_load("/proc/filesystems", &list, 64 << 10) == 0)
        has = strstr(buf_text(&list), line) != NULL;
    buf_fini(&list);
    return has;
}

static void boot_move_mounts(const char *root)
{
    for (const char *const *from = (const char *const[]){ "/proc", "/dev", "/sys", NULL }; *from; from++) {
        char to[64];
        snprintf(to, sizeof to, "%s%s", root, *from);
        if (boot_path_is_mounted(*from) && mount(*from, to, NULL, MS_MOVE, NULL) < 0)
            log_errno("move %s to %s", *from, to);
    }
}

/* A read-only root gets a tmpfs over it; the old one stays at /rom (pivot_root(2)). The
 * tmpfs needs a folder to sit on until then, which must exist already. */
static int boot_overlay(struct boot *b)
{
    static const char *const seats[] = { "/run", "/mnt", "/tmp", "/var", NULL };
    static const char *const overlay[] = { "overlay", NULL };
    char size[64], data[256], root[64], path[128];
    struct statvfs fs;
    struct stat st;
    size_t i = 0;

    if (statvfs("/", &fs) < 0 || !(fs.f_flag & ST_RDONLY))
        return 0;
    while (seats[i] && (stat(seats[i], &st) < 0 || !S_ISDIR(st.st_mode)))
        i++;
    if (!seats[i]) {
        errno = ENOENT;
        return log_errno("overlay: no folder /run, /mnt, /tmp or /var to mount on");
    }
    snprintf(size, sizeof size, "mode=0755,size=%" PRId64 "%%", limits.overlay_percent);
    if (mount("overlay", seats[i], "tmpfs", MS_NOATIME, size) < 0)
        return log_errno("overlay: tmpfs on %s", seats[i]);
    for (const char *const *name = (const char *const[]){ "upper", "work", "root", NULL }; *name; name++) {
        snprintf(path, sizeof path, "%s/%s", seats[i], *name);
        if (mkdir(path, 0755) < 0)
            return log_errno("overlay: mkdir %s", path);
    }
    snprintf(root, sizeof root, "%s/root", seats[i]);
    snprintf(data, sizeof data, "lowerdir=/,upperdir=%s/upper,workdir=%s/work", seats[i], seats[i]);
    int rc = mount("overlay", root, "overlay", MS_NOATIME, data);
    if (rc < 0 && errno == ENODEV) {
        boot_modules(overlay);
        boot_stage(b, "modules");
        rc = mount("overlay", root, "overlay", MS_NOATIME, data);
    }
    if (rc < 0) {
        log_errno("overlay: mount on %s", root);
        umount2(seats[i], MNT_DETACH);
        return -1;
    }
    boot_move_mounts(root);
    snprintf(path, sizeof path, "%s" PATH_OLD_ROOT, root);
    if (mkdir(path, 0755) < 0 && errno != EEXIST)
        return log_errno("overlay: mkdir %s", path);
    if (syscall(SYS_pivot_root, root, path) < 0 || chdir("/") < 0)
        return log_errno("overlay: pivot_root");
    return 0;
}

/* ---- as /init of an initramfs: find the real root and go there ------------------------
 * (Documentation/filesystems/ramfs-rootfs-initramfs.rst). The agent is all that such an
 * initramfs needs, with lib/modules where the kernel's drivers are modules. */
#define ROOT_SEAT           "/newroot"
#define ROOT_DEVICE         "/dev/vda"
#define ROOT_TYPES          "ext4,squashfs,btrfs,xfs,erofs"
#define ROOT_POLL_MS        10
#define ROOT_PATIENCE_MS    2000    /* a disk may be found late; then the console is told */
#define ROOT_RETRY_MS       1000

/* The kernel executes /init of an initramfs by this name; one whose init has another
 * (rdinit=) is the root itself. */
static bool boot_is_initramfs(const char *name)
{
    struct statfs fs;

    return strcmp(name, "/init") == 0 && statfs("/", &fs) == 0
        && (fs.f_type == RAMFS_MAGIC || fs.f_type == TMPFS_MAGIC);
}

/* root=, rootfstype=, rootflags=, ro and rw mean what they mean to the kernel. */
static void boot_root_option(struct boot *b, const char *word)
{
    const struct { const char *key; char *value; } options[] = {
        { "root=", b->root }, { "rootfstype=", b->root_types }, { "rootflags=", b->root_flags },
    };

    for (size_t i = 0; i < COUNT(options); i++) {
        size_t n = strlen(options[i].key);
        if (strncmp(word, options[i].key, n) != 0)
            continue;
        if (snprintf(options[i].value, ROOT_WORD_MAX, "%s", word + n) >= ROOT_WORD_MAX)
            log_info("kernel command line: %.32s...: cut at %d bytes", word, ROOT_WORD_MAX - 1);
    }
    if (strcmp(word, "rw") == 0 || strcmp(word, "ro") == 0)
        b->root_writable = word[1] == 'w';
}

/* One file system type, loading its module only if `load`. 0, or -1 and errno. */
static int root_mount_as(const struct boot *b, const char *type, bool load)
{
    const char *const module[] = { type, NULL };

    errno = EINVAL;
    if (kernel_has(type) == load)
        return -1;
    if (load)
        boot_modules(module);
    return mount(b->root, ROOT_SEAT, type, MS_SILENT | (b->root_writable ? 0 : MS_RDONLY),
                 b->root_flags[0] ? b->root_flags : NULL);
}

/* Tries what the kernel has, then what it has modules for: each refuses another's disk. */
static int root_mount(const struct boot *b)
{
    for (int load = 0; load < 2; load++) {
        char types[ROOT_WORD_MAX], *type, *rest;
        snprintf(types, sizeof types, "%s", b->root_types[0] ? b->root_types : ROOT_TYPES);
        for (type = strtok_r(types, ",", &rest); type; type = strtok_r(NULL, ",", &rest)) {
            if (root_mount_as(b, type, load) == 0)
                return 0;
            if (errno != EINVAL && errno != ENODEV)
                return -1;
        }
    }
    errno = EINVAL;
    return -1;
}

/* Until it is mounted, for ever: without a root nobody can be served, and whoever looks at
 * the console must find the reason there and not a panic. */
static void root_wait(const struct boot *b)
{
    static const char *const modules[] = { "virtio_pci", "virtio_mmio", "virtio_blk", NULL };
    int64_t start = now_ms();
    struct stat st;

    if (stat(b->root, &st) < 0)
        boot_modules(modules);
    for (;;) {
        bool is_there = stat(b->root, &st) == 0;
        if (is_there && S_ISBLK(st.st_mode) && root_mount(b) == 0)
            return;
        if (!is_there && now_ms() - start < ROOT_PATIENCE_MS) {
            usleep(ROOT_POLL_MS * 1000);
            continue;
        }
        log_info("root=%s: %s; waiting for it", b->root,
                 is_there && !S_ISBLK(st.st_mode) ? "not a disk" : is_there && errno == EINVAL
                 ? "none of the file systems " ROOT_TYPES " or rootfstype=" : strerror(errno));
        usleep(ROOT_RETRY_MS * 1000);
    }
}

/* What the initramfs holds is memory. Other file systems and the folder `keep` stay. Takes fd. */
static void root_discard_take(int fd, const struct stat *root, const struct stat *keep)
{
    DIR *d = fdopendir(fd);

    for (struct dirent *e; d && (e = readdir(d));) {
        struct stat st;
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0
            || fstatat(fd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0 || st.st_dev != root->st_dev
            || (st.st_dev == keep->st_dev && st.st_ino == keep->st_ino))
            continue;
        int sub = S_ISDIR(st.st_mode) ? openat(fd, e->d_name, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
        if (sub >= 0)
            root_discard_take(sub, root, keep);
        unlinkat(fd, e->d_name, S_ISDIR(st.st_mode) ? AT_REMOVEDIR : 0);
    }
    if (d)
        closedir(d);
    else
        fd_close(&fd);
}

#ifndef OPEN_TREE_CLONE             /* musl leaves these to linux/mount.h, which glibc excludes */
#define OPEN_TREE_CLONE         1
#define OPEN_TREE_CLOEXEC       O_CLOEXEC
#define MOVE_MOUNT_F_EMPTY_PATH 4
#endif

/* Modules that a root lacks come from the initramfs: kept as a mount that has no place yet
 * (open_tree(2), Linux 5.2), until the overlay has made room for one. */
static void root_keep_modules(struct boot *b, struct stat *kept)
{
    char path[160];
    struct utsname kernel;

    uname(&kernel);
    snprintf(path, sizeof path, ROOT_SEAT "/lib/modules/%.64s/modules.dep", kernel.release);
    if (access(path, F_OK) < 0)
        b->modules_fd = (int)syscall(SYS_open_tree, AT_FDCWD, "/lib/modules", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    if (b->modules_fd >= 0)
        stat("/lib/modules", kept);
}

static void boot_attach_modules(struct boot *b)
{
    if (b->modules_fd >= 0 && (mkdir_all("/lib/modules", 0755) < 0
        || syscall(SYS_move_mount, b->modules_fd, "", AT_FDCWD, "/lib/modules", MOVE_MOUNT_F_EMPTY_PATH) < 0))
        log_errno("/lib/modules of the initramfs");
    fd_close(&b->modules_fd);
}

/* Mounts the root, loads what is wanted before its overlay has been made, and goes there. */
static void boot_root(struct boot *b)
{
    static const char *const early[] = { "vmw_vsock_virtio_transport", "overlay", NULL };
    struct stat root, kept = { 0 };

    if (!b->root[0])
        snprintf(b->root, sizeof b->root, ROOT_DEVICE);
    mkdir(ROOT_SEAT, 0755);
    root_wait(b);
    boot_stage(b, "root");
    boot_modules(early);
    boot_stage(b, "modules");
    root_keep_modules(b, &kept);
    boot_move_mounts(ROOT_SEAT);
    int fd = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0 && fstat(fd, &root) == 0)
        root_discard_take(fd, &root, &kept);
    if (chdir(ROOT_SEAT) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
        log_errno("switch to the root");
    boot_mount_early();             /* what the root had no folder for */
    boot_stage(b, "switch");
}

/* ---- cgroups: version 2, or the old hierarchy where the kernel has no other ---- */

static int cgroup_mount_v1(void)
{
    static const struct boot_mount base = { "tmpfs", PATH_CGROUP, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755" };
    struct buf list = { 0 };
    char *line, *rest;

    if (boot_mount(&base) < 0 || file_load("/proc/cgroups", &list, 64 << 10) < 0) {
        buf_fini(&list);
        return -1;
    }
    buf_text(&list);
    for (line = strtok_r(list.data + list.start, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        char name[32], path[96];
        int enabled;
        if (sscanf(line, "%31s %*d %*d %d", name, &enabled) != 2 || !enabled)
            continue;
        snprintf(path, sizeof path, PATH_CGROUP "/%s", name);
        boot_mount(&(struct boot_mount){ "cgroup", path, "cgroup", MS_NOSUID | MS_NODEV, name });
    }
    buf_fini(&list);
    return 0;
}

/* The number that follows the key in a file of proc or sys; -1: it is not there. */
static int64_t kernel_number(const char *path, const char *key)
{
    struct buf text = { 0 };
    const char *at = NULL;
    int64_t value = -1;

    if (file_load(path, &text, 64 << 10) == 0 && text.len > 0 && (at = strstr(buf_text(&text), key)))
        value = strtoll(at + strlen(key), NULL, 10);
    buf_fini(&text);
    return value;
}

static void cgroup_limit(const char *path, int64_t value)
{
    char text[24];

    snprintf(text, sizeof text, "%" PRId64, value);
    if (file_set(path, text) < 0)
        log_debug("%s: %s", path, strerror(errno));
}

/* When the program forks or allocates without end, it is the one to be refused: PID 1 and
 * the host's commands still find a process and a page. The memory that the kernel keeps for
 * itself is nobody's: a share of all of it would let the whole machine run out first. */
static void cgroup_limits(void)
{
    int64_t threads = kernel_number("/proc/sys/kernel/threads-max", "");
    int64_t pids = kernel_number("/proc/sys/kernel/pid_max", "");
    int64_t kib = kernel_number("/proc/meminfo", "MemAvailable:");

    if (threads > pids)
        threads = pids;
    if (threads > 0)
        cgroup_limit(PATH_CGROUP "/program/pids.max", threads * limits.program_pids_percent / 100);
    if (kib > 0)
        cgroup_limit(PATH_CGROUP "/program/memory.max", kib * 1024 * limits.program_memory_percent / 100);
}

static int cgroup_mount(void)
{
    static const struct boot_mount v2 = {
        "cgroup2", PATH_CGROUP, "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL };

    if (!kernel_has("cgroup2"))
        return cgroup_mount_v1();
    if (boot_mount(&v2) < 0)
        return -1;
    if (mkdir(PATH_CGROUP "/program", 0755) < 0 && errno != EEXIST)
        return log_errno("mkdir " PATH_CGROUP "/program");
    for (const char *const *name = (const char *const[]){ "+memory", "+pids", "+cpu", NULL }; *name; name++)
        if (file_set(PATH_CGROUP "/cgroup.subtree_control", *name) < 0)
            log_debug("cgroup %s: %s", *name, strerror(errno));
    cgroup_limits();
    return 0;
}

/* What protects PID 1 from its tenant, and from being chosen when memory ends; and how the two share a CPU. */
static void boot_protect(void)
{
    rlim_t most = 2 * (rlim_t)limits.conns + 1024;      /* each may have its other end at the program */
    struct rlimit files = { most, most };

    prctl(PR_SET_DUMPABLE, 0);
    /* What wakes up waits for what runs, we for the program and it for us (sched(7)): on one CPU each packet
     * would else interrupt it. Children inherit it. musl's own function is a stub, as Linux means a thread. */
    if (syscall(SYS_sched_setscheduler, 0, SCHED_BATCH, &(struct sched_param){ 0 }) < 0)
        log_debug("SCHED_BATCH: %s", strerror(errno));
    if (file_set("/proc/self/oom_score_adj", "-1000") < 0)
        log_debug("oom_score_adj: %s", strerror(errno));
    if (setrlimit(RLIMIT_NOFILE, &files) < 0)
        log_debug("RLIMIT_NOFILE: %s", strerror(errno));
}

/* Descriptors 0 to 2 are open, whatever the kernel gave us and even where there is no /dev:
 * none of our own may land there, as children inherit them, and nothing else that we were given. */
static void boot_descriptors(void)
{
    int fd;

    fd_close_rest(CLOSE_RANGE_CLOEXEC);
    do {
        fd = open("/dev/null", O_RDWR | O_CLOEXEC);
        if (fd < 0)
            fd = open("/", O_RDONLY | O_CLOEXEC);
    } while (fd >= 0 && fd <= 2);
    fd_close(&fd);
}

/* The console is opened again: what others see of it must not become non-blocking. */
static int boot_open_console(const char *path)
{
    return open(path, O_WRONLY | O_APPEND | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
}

/* One of ours to write to without being blocked: a pipe or terminal is opened anew, a socket
 * cannot be, a file need not. */
static int log_descriptor(int fd)
{
    char path[32];
    struct stat st = { 0 };
    int own = -1;

    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (fstat(fd, &st) == 0 && S_ISSOCK(st.st_mode))
        fd_nonblock(fd);
    else if (!S_ISREG(st.st_mode))
        own = boot_open_console(path);
    return own < 0 ? fd : own;
}

static void boot_console(const char *path)
{
    int fd = boot_open_console(path);
    if (fd >= 0)
        agent_log.fd = fd;
}

/* ==== net: netlink (rtnetlink(7)), no external program =========================== */
struct net_message {
    struct nlmsghdr head;
    char            body[256];
};

static void net_start(struct net_message *m, uint16_t type, uint16_t flags, const void *body, size_t n)
{
    *m = (struct net_message){ .head = {
        .nlmsg_len = NLMSG_LENGTH((uint32_t)n), .nlmsg_type = type,
        .nlmsg_flags = (uint16_t)(NLM_F_REQUEST | NLM_F_ACK | flags) } };
    memcpy(NLMSG_DATA(&m->head), body, n);
}

static void net_attr(struct net_message *m, uint16_t type, const void *value, size_t n)
{
    struct rtattr *a = (void *)((char *)m + NLMSG_ALIGN(m->head.nlmsg_len));

    a->rta_type = type;
    a->rta_len = (uint16_t)RTA_LENGTH(n);
    memcpy(RTA_DATA(a), value, n);
    m->head.nlmsg_len = NLMSG_ALIGN(m->head.nlmsg_len) + RTA_ALIGN((uint32_t)a->rta_len);
}

/* Sends one request and reads the kernel's answer, which comes at once. 0, or -1 and errno. */
static int net_call(int fd, struct net_message *m)
{
    struct { struct nlmsghdr head; struct nlmsgerr error; char rest[512]; } answer;

    if (send(fd, m, m->head.nlmsg_len, 0) < 0 || recv(fd, &answer, sizeof answer, 0) < 0)
        return -1;
    if (answer.head.nlmsg_type != NLMSG_ERROR) {
        errno = EPROTO;
        return -1;
    }
    errno = -answer.error.error;
    return errno ? -1 : 0;
}

/* 0: there is no such interface. */
static unsigned net_index(const char *name)
{
    char path[64], text[16] = "";

    snprintf(path, sizeof path, "/sys/class/net/%s/ifindex", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    fd_close(&fd);
    return n > 0 ? (unsigned)strtoul(text, NULL, 10) : 0;
}

/* The way out: eth0, or the first interface with hardware behind it where udev has given it
 * another name. Returns its index, 0 if there is none. */
static unsigned net_find(char name[IF_NAMESIZE])
{
    DIR *d = opendir("/sys/class/net");
    unsigned found;

    snprintf(name, IF_NAMESIZE, "eth0");
    found = net_index(name);
    for (struct dirent *e; found == 0 && d && (e = readdir(d));) {
        char path[PATH_MAX];
        snprintf(path, sizeof path, "/sys/class/net/%s/device", e->d_name);
        if (access(path, F_OK) < 0 || strlen(e->d_name) >= IF_NAMESIZE)
            continue;
        snprintf(name, IF_NAMESIZE, "%s", e->d_name);
        found = net_index(name);
    }
    if (d)
        closedir(d);
    return found;
}

/* flags: IFF_UP, or 0 to take it down, and its routes with it. */
static int net_link(int fd, unsigned index, unsigned flags)
{
    struct net_message m;
    struct ifinfomsg link = { .ifi_index = (int)index, .ifi_flags = flags, .ifi_change = IFF_UP };

    net_start(&m, RTM_NEWLINK, 0, &link, sizeof link);
    return net_call(fd, &m);
}

/* "ADDRESS" or "ADDRESS/PREFIX", checked before. */
static size_t net_parse(const char *text, int family, unsigned char *bytes, unsigned char *prefix)
{
    char address[INET6_ADDRSTRLEN];
    const char *slash = strchr(text, '/');

    snprintf(address, sizeof address, "%.*s", slash ? (int)(slash - text) : INT_MAX, text);
    inet_pton(family, address, bytes);
    if (slash)
        *prefix = (unsigned char)atoi(slash + 1);
    return family == AF_INET ? 4 : 16;
}

/* type: RTM_NEWADDR or RTM_DELADDR. */
static int net_address(int fd, unsigned index, uint16_t type, int family, const char *text)
{
    struct net_message m;
    unsigned char bytes[16];
    /* no duplicate-address detection: the host gives addresses out, and waiting costs a second */
    struct ifaddrmsg a = { .ifa_family = (unsigned char)family, .ifa_index = index,
        .ifa_prefixlen = family == AF_INET ? 24 : 128, .ifa_flags = IFA_F_NODAD };
    size_t n = net_parse(text, family, bytes, &a.ifa_prefixlen);

    net_start(&m, type, type == RTM_NEWADDR ? NLM_F_CREATE | NLM_F_REPLACE : 0, &a, sizeof a);
    net_attr(&m, IFA_LOCAL, bytes, n);
    net_attr(&m, IFA_ADDRESS, bytes, n);
    return net_call(fd, &m);
}

static int net_add_route(int fd, unsigned index, int family, const char *gateway)
{
    struct net_message m;
    unsigned char bytes[16], ignored;
    struct rtmsg r = { .rtm_family = (unsigned char)family, .rtm_table = RT_TABLE_MAIN,
        .rtm_protocol = RTPROT_STATIC, .rtm_scope = RT_SCOPE_UNIVERSE, .rtm_type = RTN_UNICAST,
        .rtm_flags = RTNH_F_ONLINK };   /* a gateway may lie outside of the prefix */
    size_t n = net_parse(gateway, family, bytes, &ignored);

    net_start(&m, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &r, sizeof r);
    net_attr(&m, RTA_GATEWAY, bytes, n);
    net_attr(&m, RTA_OIF, &index, sizeof index);
    return net_call(fd, &m);
}

static int net_open(void)
{
    return socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
}

static int net_loopback(void)
{
    int fd = net_open();
    int rc = fd < 0 ? -1 : net_link(fd, 1, IFF_UP);      /* lo is always the first */

    if (rc < 0)
        log_errno("loopback");
    fd_close(&fd);
    return rc;
}

/* ---- files of /etc: replaced as a whole, also where one is a link that leads nowhere ---- */

#define RESOLVER_PATH   "/etc/resolv.conf"
#define HOSTS_PATH      "/etc/hosts"
#define ETC_BEFORE      ".before-agent"     /* what etc_replace() replaced, for etc_restore() */

static void etc_cover_path(char *out, size_t size, const char *path)
{
    snprintf(out, size, PATH_STATE "/%s", strrchr(path, '/') + 1);
}

/* Where a root is read-only for want of an overlay, a file of ours is bound over the one there. */
static int etc_cover(const char *path, struct span text)
{
    char cover[128], to[PATH_MAX], parent[PATH_MAX + 8];
    ssize_t n = readlink(path, to, sizeof to - 1);

    etc_cover_path(cover, sizeof cover, path);
    if (mkdir_all(PATH_STATE, 0755) < 0 || file_write(cover, text.p, text.n, 0644) < 0)
        return -1;
    if (n > 0 && access(path, F_OK) < 0) {      /* it leads nowhere yet: mostly below /run */
        to[n] = '\0';
        snprintf(parent, sizeof parent, "%s%s", to[0] == '/' ? "" : "/etc/", to);
        *strrchr(parent, '/') = '\0';
        if (mkdir_all(parent, 0755) < 0 || file_write(path, "", 0, 0644) < 0)
            return -1;
    }
    if (mount(cover, path, NULL, MS_BIND, NULL) == 0)
        return 0;
    if (errno == ENOENT)                        /* nothing is there to bind over */
        errno = EROFS;
    return -1;
}

/* At any instant there is a file: a root may be written and its machine lose power. */
static int etc_replace(const char *path, struct span text)
{
    char fresh[64], before[64];

    snprintf(fresh, sizeof fresh, "%s.agent", path);
    snprintf(before, sizeof before, "%s" ETC_BEFORE, path);
    mkdir("/etc", 0755);
    int rc = file_write(fresh, text.p, text.n, 0644);
    if (rc == 0 && link(path, before) < 0)
        rc = errno == ENOENT ? file_write(before, "", 0, 0644) : rename(path, before);
    if (rc == 0)
        rc = rename(fresh, path);
    return rc < 0 && (errno == EROFS || errno == EBUSY) ? etc_cover(path, text) : rc;
}

/* Puts back what etc_replace() found, if it has replaced anything since etc_forget(). */
static void etc_restore(const char *path)
{
    char before[64], cover[128];

    snprintf(before, sizeof before, "%s" ETC_BEFORE, path);
    rename(before, path);
    etc_cover_path(cover, sizeof cover, path);
    if (unlink(cover) == 0)
        umount2(path, MNT_DETACH);
}

static void etc_forget(const char *path)
{
    char before[64];

    snprintf(before, sizeof before, "%s" ETC_BEFORE, path);
    unlink(before);
}

/* resolv.conf(5): the first of each, limits.dns_servers of them. */
static int net_resolver(const struct conf *c)
{
    struct buf text = { 0 };
    int64_t kept = 0;

    for (size_t i = 0; i < c->dns_servers_len && kept < limits.dns_servers; i++) {
        size_t same = 0;
        while (same < i && strcmp(c->dns_servers[same], c->dns_servers[i]) != 0)
            same++;
        if (same < i)
            continue;
        buf_add_format(&text, "nameserver %s\n", c->dns_servers[i]);
        kept++;
    }
    int rc = kept == 0 ? 0 : etc_replace(RESOLVER_PATH, buf_span(&text));
    buf_fini(&text);
    return rc;
}

/* Whether a line of hosts(5) gives the name an address; of the family, unless that is AF_UNSPEC. */
static bool hosts_has(const char *text, int family, const char *name)
{
    bool has = false;

    for (const char *next; *text && !has; text = next + (*next == '\n')) {
        next = text + strcspn(text, "\n");
        char line[1024], *rest, *word;
        snprintf(line, sizeof line, "%.*s", (int)(next - text < 1023 ? next - text : 1023), text);
        line[strcspn(line, "#")] = '\0';
        const char *address = strtok_r(line, " \t\r", &rest);
        if (!address || (family != AF_UNSPEC && (strchr(address, ':') ? AF_INET6 : AF_INET) != family))
            continue;
        while (!has && (word = strtok_r(NULL, " \t\r", &rest)))
            has = strcasecmp(word, name) == 0;
    }
    return has;
}

/* Adds what lacks of localhost and of our own name; what stands there stays. */
static void hosts_complete(struct buf *text, const char *hostname)
{
    if (text->len > 0 && buf_at(text)[text->len - 1] != '\n')
        buf_add_byte(text, '\n');
    if (!hosts_has(buf_text(text), AF_INET, "localhost"))
        buf_add_text(text, "127.0.0.1\tlocalhost\n");
    if (!hosts_has(buf_text(text), AF_INET6, "localhost"))
        buf_add_text(text, "::1\tlocalhost ip6-localhost ip6-loopback\n");
    if (hostname[0] && !hosts_has(buf_text(text), AF_UNSPEC, hostname))
        buf_add_format(text, "127.0.1.1\t%s\n", hostname);
}

/* A program can do without, so a failure is logged only. */
static void net_hosts(const char *hostname)
{
    struct buf text = { 0 };

    if (file_load(HOSTS_PATH, &text, HOSTS_BYTES_MAX) < 0 && errno != ENOENT) {
        log_errno(HOSTS_PATH);
    } else {
        size_t before = text.len;
        hosts_complete(&text, hostname);
        if (!text.failed && text.len > before && etc_replace(HOSTS_PATH, buf_span(&text)) < 0)
            log_errno(HOSTS_PATH);
    }
    buf_fini(&text);
}

/* ---- a configuration's network ---- */

/* Neighbours have no say: no address and no route comes from a router advertisement. Set
 * before the interface goes up (Documentation/networking/ip-sysctl.rst). */
static void net_ignore_advertisements(const char *name)
{
    for (const char *const *key = (const char *const[]){ "accept_ra", "autoconf", NULL }; *key; key++) {
        char path[96];
        snprintf(path, sizeof path, "/proc/sys/net/ipv6/conf/%s/%s", name, *key);
        if (file_set(path, "0") < 0 && errno != ENOENT)     /* a kernel without IPv6 */
            log_errno("%s", path);
    }
}

/* Takes back what net_apply did, as far as it came: what is not there cannot be removed. */
static void net_undo(const struct conf *c)
{
    char name[IF_NAMESIZE];
    unsigned index = c->ip || c->ipv6 ? net_find(name) : 0;
    int fd = index ? net_open() : -1;

    if (fd >= 0 && c->ip)
        net_address(fd, index, RTM_DELADDR, AF_INET, c->ip);
    if (fd >= 0 && c->ipv6)
        net_address(fd, index, RTM_DELADDR, AF_INET6, c->ipv6);
    if (fd >= 0)
        net_link(fd, index, 0);
    fd_close(&fd);
    etc_restore(HOSTS_PATH);
    etc_restore(RESOLVER_PATH);
}

/* Whether a virtio network card waits for its driver, which takes a while to load (virtio-v1.2,
 * 5: network is device 1). */
static bool net_has_card(void)
{
    DIR *d = opendir("/sys/bus/virtio/devices");
    bool has = false;

    for (struct dirent *e; !has && d && (e = readdir(d));) {
        char path[PATH_MAX];
        snprintf(path, sizeof path, "/sys/bus/virtio/devices/%s/device", e->d_name);
        has = kernel_number(path, "0x") == 1;
    }
    if (d)
        closedir(d);
    return has;
}

/* Addresses and routes. 0, or -1, errno and the field that was being applied. */
static int net_interface(const struct conf *c, const char **field)
{
    static const char *const modules[] = { "virtio_net", NULL };
    char name[IF_NAMESIZE];
    unsigned index = net_find(name);
    int rc = -1, fd;

    if (index == 0 && net_has_card()) {
        boot_modules(modules);
        index = net_find(name);
    }
    if (index == 0) {
        log_info("network: no interface to give an address to");
        return 0;
    }
    *field = "interface";
    net_ignore_advertisements(name);
    if ((fd = net_open()) < 0 || net_link(fd, index, IFF_UP) < 0)
        goto done;
    *field = "ip";
    if (c->ip && net_address(fd, index, RTM_NEWADDR, AF_INET, c->ip) < 0)
        goto done;
    *field = "route";
    if (c->ip && c->route && net_add_route(fd, index, AF_INET, c->route) < 0)
        goto done;
    *field = "ipv6";
    if (c->ipv6 && net_address(fd, index, RTM_NEWADDR, AF_INET6, c->ipv6) < 0)
        goto done;
    *field = "ipv6_gateway";
    if (c->ipv6 && c->ipv6_gateway && net_add_route(fd, index, AF_INET6, c->ipv6_gateway) < 0)
        goto done;
    rc = 0;
done:
    fd_close(&fd);
    return rc;
}

/* Addresses, routes, name servers and the hosts file; a machine without a NIC is fine. */
static int net_apply(const struct conf *c, struct buf *why)
{
    const char *field = "dns_servers: " RESOLVER_PATH;

    etc_forget(RESOLVER_PATH);
    etc_forget(HOSTS_PATH);
    net_hosts(c->hostname);
    if (net_resolver(c) == 0 && ((!c->ip && !c->ipv6) || net_interface(c, &field) == 0))
        return 0;
    buf_add_format(why, "network: %s: %s", field, strerror(errno));
    net_undo(c);
    return -1;
}

/* ==== zip: archives, in and out ==================================================
 * Reading takes two passes over an archive in memory: the first believes nothing, unpacks
 * to nowhere and writes nothing; the second writes. What a reader could understand in two
 * ways is refused, as whoever checked the archive before us may have read it the other way.
 * minizip walks the directory; it tolerates junk, overlaps and contradictions, so the
 * places it names are read again here (APPNOTE.TXT 6.3 of PKWARE, section 4.3).
 *
 * All this runs in a child process: it blocks and takes memory by the archive's size. */
#define ZIP_LOCAL_BYTES     30          /* local header, without name and extra field */
#define ZIP_CENTRAL_BYTES   46          /* the same in the directory */
#define ZIP_END_BYTES       22          /* end record, without the comment */
#define ZIP_END64_BYTES     56          /* zip64 end record */
#define ZIP_LOCATOR_BYTES   20          /* where that stands; right before the end record */
#define ZIP_FREE_BYTES      (16 << 20)  /* unpacked without a look at the ratio */
#define ZIP_DESCRIPTOR      0x0008      /* flag: sizes follow the data (4.4.4) */
#define ZIP_ENCRYPTED       0x2041      /* flags: encrypted in any way */
#define ZIP_PATCH           0x0020      /* flag: a difference to another file */
#define ZIP_DOS_1980        0x00210000  /* the first day that its dates know */

enum zip_kind { ZIP_FILE, ZIP_FOLDER, ZIP_LINK };

struct zip_entry {
    struct span   name;             /* in the archive; no "./" before, no '/' behind it */
    struct span   data;             /* in the archive, as packed */
    size_t        at, end;          /* from the local header to behind data and descriptor */
    size_t        order;            /* place in the directory */
    uint64_t      size;             /* unpacked */
    uint32_t      crc;
    mode_t        mode;             /* permission bits */
    time_t        mtime;
    enum zip_kind kind;
    bool          deflated;
    bool          replaced;         /* a later entry has the same name */
};

struct zip {
    struct span       archive;
    struct zip_entry *entries;      /* owned; in the end sorted by zip_by_name */
    size_t            len;
    size_t            start, end;   /* of the directory */
    z_stream          stream;
};

#define zip_wrong(why, name, ...) (zip_blame(why, name), buf_add_format(why, __VA_ARGS__), -1)

static void zip_blame(struct buf *why, struct span name)
{
    buf_add_format(why, "archive: \"%.*s\"%s ", (int)(name.n < 200 ? name.n : 200), name.p,
                   name.n < 200 ? "" : "...");
}

static uint64_t little_endian(const char *p, size_t n)
{
    uint64_t v = 0;
    while (n-- > 0)
        v = v << 8 | (unsigned char)p[n];
    return v;
}

/* Takes the part before the next `c`, or all of it; p is NULL when nothing is left. */
static struct span span_part(struct span *s, char c)
{
    const char *end = s->n > 0 ? memchr(s->p, c, s->n) : NULL;
    struct span part = { s->p, end ? (size_t)(end - s->p) : s->n };

    *s = end ? (struct span){ end + 1, s->n - part.n - 1 } : (struct span){ NULL, 0 };
    return part;
}

/* minizip over memory: reads `in`, or writes `out` of at most `most` bytes. */
struct zip_mem {
    struct span in;
    struct buf *out;                /* borrowed; NULL when reading */
    size_t      pos, most;
};

static size_t zip_mem_size(const struct zip_mem *m)
{
    return m->out ? m->out->len : m->in.n;
}

static voidpf zip_mem_open(voidpf mem, const void *name, int mode)
{
    (void)name;
    (void)mode;
    return mem;
}

static uLong zip_mem_read(voidpf opaque, voidpf mem, void *to, uLong n)
{
    struct zip_mem *m = mem;
    struct span in = m->out ? buf_span(m->out) : m->in;

    (void)opaque;
    if (n > in.n - m->pos)
        n = in.n - m->pos;
    if (n > 0)
        memcpy(to, in.p + m->pos, n);
    m->pos += n;
    return n;
}

static uLong zip_mem_write(voidpf opaque, voidpf mem, const void *from, uLong n)
{
    struct zip_mem *m = mem;
    size_t inside = m->out->len - m->pos < n ? m->out->len - m->pos : n;

    (void)opaque;
    if (n > m->most - m->pos)
        return 0;
    if (inside > 0)                 /* a header is completed once the sizes are known */
        memcpy(m->out->data + m->out->start + m->pos, from, inside);
    if (buf_add(m->out, (const char *)from + inside, n - inside) < 0)
        return 0;
    m->pos += n;
    return n;
}

static ZPOS64_T zip_mem_tell(voidpf opaque, voidpf mem)
{
    (void)opaque;
    return ((struct zip_mem *)mem)->pos;
}

static long zip_mem_seek(voidpf opaque, voidpf mem, ZPOS64_T offset, int origin)
{
    struct zip_mem *m = mem;
    size_t size = zip_mem_size(m);
    uint64_t to = offset + (origin == ZLIB_FILEFUNC_SEEK_CUR ? m->pos
                          : origin == ZLIB_FILEFUNC_SEEK_END ? size : 0);

    (void)opaque;
    if (to > size)                  /* a step back is a large offset: the sum wraps to it */
        return -1;
    m->pos = (size_t)to;
    return 0;
}

static int zip_mem_ok(voidpf opaque, voidpf mem)
{
    (void)opaque;
    (void)mem;
    return 0;
}

static zlib_filefunc64_def zip_mem_functions(struct zip_mem *m)
{
    return (zlib_filefunc64_def){
        zip_mem_open, zip_mem_read, zip_mem_write, zip_mem_tell, zip_mem_seek, zip_mem_ok,
        zip_mem_ok, m
    };
}

/* What makes a name unfit, or NULL. */
static const char *zip_name_fault(struct span name)
{
    int64_t folders = -1;

    if (name.n == 0)
        return "is empty";
    if (name.n >= PATH_MAX)
        return "is too long";
    if (memchr(name.p, '\0', name.n) || memchr(name.p, '\\', name.n))
        return "holds a NUL or a backslash";
    if (!utf8_ok(name))
        return "is not UTF-8";
    if (name.p[0] == '/' || (name.n > 1 && name.p[1] == ':' && isalpha((unsigned char)name.p[0])))
        return "is an absolute path";
    if (name.n >= 2 && memcmp(name.p, "./", 2) == 0)
        name = (struct span){ name.p + 2, name.n - 2 };
    if (name.n > 0 && name.p[name.n - 1] == '/')
        folders++, name.n--;
    while (name.n > 0) {
        struct span part = span_part(&name, '/');
        if (span_eq(part, ".."))
            return "leads out of its folder";
        if (part.n == 0 || span_eq(part, ".") || (name.p && name.n == 0))
            return "holds an empty part";
        if (part.n > NAME_MAX)
            return "has a part of more than 255 bytes";
        folders++;
    }
    return folders > limits.zip_depth ? "is nested too deep" : NULL;
}

/* What makes a link unfit, or NULL. `..` counts folders up from where the link stands,
 * which is no link itself; after a name it could step out of where that name leads. */
static const char *zip_link_fault(struct span name, struct span target)
{
    size_t folders = 0;
    bool named = false;

    for (size_t i = 0; i < name.n; i++)
        folders += name.p[i] == '/';
    if (target.n == 0 || target.n >= PATH_MAX || memchr(target.p, '\0', target.n))
        return "is a link without a usable target";
    if (target.p[0] == '/')
        return "is a link to an absolute path";
    while (target.n > 0) {
        struct span part = span_part(&target, '/');
        if (span_eq(part, "..") && (named || folders-- == 0))
            return "is a link out of the archive's folder";
        named |= part.n > 0 && !span_eq(part, ".") && !span_eq(part, "..");
    }
    return NULL;
}

/* Finds the directory by the end record, which must be the last thing in the archive, and
 * its zip64 form, which may only repeat or extend it. Sets start, end and len. */
static int zip_find_directory(struct zip *z, struct buf *why)
{
    struct span a = z->archive;
    const char *p = NULL, *loc, *wide = NULL;
    size_t at = a.n;

    for (size_t back = ZIP_END_BYTES; !p && back <= a.n && back <= ZIP_END_BYTES + 0xffff; back++)
        if (memcmp(a.p + a.n - back, "PK\5\6", 4) == 0)
            p = a.p + (at = a.n - back);
    if (!p)
        return conf_wrong(why, "archive: no end record: truncated, or not a zip");
    if (little_endian(p + 20, 2) != a.n - at - ZIP_END_BYTES)
        return conf_wrong(why, "archive: its comment does not end where it ends");
    uint64_t disks = little_endian(p + 4, 4), count = little_endian(p + 10, 2);
    uint64_t size = little_endian(p + 12, 4), start = little_endian(p + 16, 4);
    bool lies = disks != 0 || count != little_endian(p + 8, 2);

    loc = at >= ZIP_LOCATOR_BYTES + ZIP_END64_BYTES ? p - ZIP_LOCATOR_BYTES : NULL;
    if (loc && memcmp(loc, "PK\6\7", 4) == 0) {
        uint64_t to = little_endian(loc + 8, 8);
        if (to > at - ZIP_LOCATOR_BYTES - ZIP_END64_BYTES || memcmp(a.p + to, "PK\6\6", 4) != 0)
            return conf_wrong(why, "archive: its zip64 locator points nowhere");
        wide = a.p + (at = (size_t)to);
        lies = little_endian(wide + 4, 8) != (uint64_t)(loc - wide) - 12
            || little_endian(wide + 16, 8) != 0
            || little_endian(wide + 24, 8) != little_endian(wide + 32, 8)
            || (disks != 0 && disks != 0xffffffff)
            || (count != 0xffff && count != little_endian(wide + 32, 8))
            || (size != 0xffffffff && size != little_endian(wide + 40, 8))
            || (start != 0xffffffff && start != little_endian(wide + 48, 8));
        count = little_endian(wide + 32, 8);
        size = little_endian(wide + 40, 8);
        start = little_endian(wide + 48, 8);
    }
    if (lies)
        return conf_wrong(why, "archive: its end records contradict themselves");
    if (count > (uint64_t)limits.zip_entries)
        return conf_wrong(why, "archive: %" PRIu64 " entries, at most %" PRId64, count,
                          limits.zip_entries);
    if (start > at || size != at - start || count > size / ZIP_CENTRAL_BYTES)
        return conf_wrong(why, "archive: its directory is not where the end record says");
    z->start = (size_t)start;
    z->end = at;
    z->len = (size_t)count;
    return 0;
}

/* The zip64 extra field holds those sizes that their 32 bits say are too large (4.5.3). */
static void zip_widen(struct span extra, uint64_t *unpacked, uint64_t *packed)
{
    while (extra.n >= 4) {
        size_t n = (size_t)little_endian(extra.p + 2, 2);
        if (n > extra.n - 4)
            return;
        if (little_endian(extra.p, 2) == 1 && n >= 16) {
            if (*unpacked == 0xffffffff)
                *unpacked = little_endian(extra.p + 4, 8);
            if (*packed == 0xffffffff)
                *packed = little_endian(extra.p + 12, 8);
            return;
        }
        extra = (struct span){ extra.p + 4 + n, extra.n - 4 - n };
    }
}

/* Passes e->end over a descriptor: with or without signature, 32 or 64 bits wide (4.3.9). */
static bool zip_descriptor_ok(const struct zip *z, struct zip_entry *e)
{
    for (size_t form = 0; form < 4; form++) {
        size_t mark = form < 2 ? 4 : 0, width = form % 2 ? 8 : 4, n = mark + 4 + 2 * width;
        const char *p = z->archive.p + e->end;
        if (n > z->start - e->end || (mark && memcmp(p, "PK\7\x8", 4) != 0))
            continue;
        p += mark;
        if (little_endian(p, 4) == e->crc && little_endian(p + 4, width) == e->data.n
            && little_endian(p + 4 + width, width) == e->size) {
            e->end += n;
            return true;
        }
    }
    return false;
}

/* A local header must say what the directory says; with a descriptor it may say 0. */
static int zip_check_local(const struct zip *z, struct zip_entry *e, struct span name,
                           const unz_file_info64 *info, uint64_t data, size_t extra, struct buf *why)
{
    uint64_t head = ZIP_LOCAL_BYTES + name.n + extra;

    if (data < head || data > z->start || info->compressed_size > z->start - data)
        return zip_wrong(why, name, "lies outside the archive");
    const char *p = z->archive.p + (data - head);
    uint64_t flags = little_endian(p + 6, 2), crc = little_endian(p + 14, 4);
    uint64_t packed = little_endian(p + 18, 4), unpacked = little_endian(p + 22, 4);

    if (memcmp(p, "PK\3\4", 4) != 0 || little_endian(p + 26, 2) != name.n
        || little_endian(p + 28, 2) != extra || memcmp(p + ZIP_LOCAL_BYTES, name.p, name.n) != 0)
        return zip_wrong(why, name, "has another name in its local header");
    zip_widen((struct span){ p + head - extra, extra }, &unpacked, &packed);
    bool later = info->flag & ZIP_DESCRIPTOR;
    if (((flags ^ info->flag) & (ZIP_DESCRIPTOR | ZIP_ENCRYPTED | ZIP_PATCH)) != 0
        || little_endian(p + 8, 2) != info->compression_method
        || (crc != info->crc && !(later && crc == 0))
        || (packed != info->compressed_size && !(later && packed == 0))
        || (unpacked != info->uncompressed_size && !(later && unpacked == 0)))
        return zip_wrong(why, name, "has a local header that contradicts the directory");
    e->at = (size_t)(data - head);
    e->data = (struct span){ z->archive.p + data, (size_t)info->compressed_size };
    e->end = (size_t)data + e->data.n;
    if (later && !zip_descriptor_ok(z, e))
        return zip_wrong(why, name, "has a data descriptor that contradicts the directory");
    return 0;
}

/* The kind and the permissions, from the name and the upper half of the attributes, where
 * every tool puts st_mode. */
static int zip_check_mode(struct zip_entry *e, struct span name, uint32_t mode, struct buf *why)
{
    bool folder = name.p[name.n - 1] == '/';
    mode_t type = mode & S_IFMT;

    if (mode & (S_ISUID | S_ISGID | S_ISVTX))
        return zip_wrong(why, name, "has a setuid, setgid or sticky bit");
    if (type != 0 && type != S_IFREG && type != S_IFDIR && type != S_IFLNK)
        return zip_wrong(why, name, "is a device, a pipe or a socket");
    if (folder ? type == S_IFLNK : type == S_IFDIR)
        return zip_wrong(why, name, "has the mode of a %s and the name of a %s",
                         folder ? "link" : "folder", folder ? "folder" : "file");
    e->kind = folder ? ZIP_FOLDER : type == S_IFLNK ? ZIP_LINK : ZIP_FILE;
    e->mode = mode ? (mode & 0777) | 0600 : 0644;
    if (e->kind == ZIP_FOLDER && e->size > 0)
        return zip_wrong(why, name, "is a folder and holds data");
    if (e->kind == ZIP_LINK && e->size >= PATH_MAX)
        return zip_wrong(why, name, "is a link with a target of %" PRIu64 " bytes", e->size);
    return 0;
}

static time_t zip_time(const tm_unz *t)         /* DOS knows no time zone: a guest runs on UTC */
{
    struct tm tm = { .tm_sec = t->tm_sec, .tm_min = t->tm_min, .tm_hour = t->tm_hour,
                     .tm_mday = t->tm_mday, .tm_mon = t->tm_mon, .tm_year = t->tm_year - 1900 };
    return timegm(&tm);
}

/* Fills an entry from where minizip stands; *at moves behind it in the directory. */
static int zip_read_entry(struct zip *z, unzFile file, struct zip_entry *e, size_t *at, struct buf *why)
{
    unz_file_info64 info;

    if (unzGetOffset64(file) != *at || z->end - *at < ZIP_CENTRAL_BYTES
        || unzGetCurrentFileInfo64(file, &info, NULL, 0, NULL, 0, NULL, 0) != UNZ_OK
        || info.size_filename + info.size_file_extra + info.size_file_comment
            > z->end - *at - ZIP_CENTRAL_BYTES)
        return conf_wrong(why, "archive: its directory is broken at entry %zu", e->order);
    struct span name = { z->archive.p + *at + ZIP_CENTRAL_BYTES, info.size_filename };
    *at += ZIP_CENTRAL_BYTES + info.size_filename + info.size_file_extra + info.size_file_comment;

    const char *fault = zip_name_fault(name);
    if (fault)
        return zip_wrong(why, name, "cannot be unpacked: its name %s", fault);
    if (info.flag & (ZIP_ENCRYPTED | ZIP_PATCH))
        return zip_wrong(why, name, "is encrypted");
    if (info.compression_method != 0 && info.compression_method != Z_DEFLATED)
        return zip_wrong(why, name, "is packed with method %lu; known are 0 and 8",
                         info.compression_method);
    if (info.disk_num_start != 0)
        return zip_wrong(why, name, "is on another disk");
    e->size = info.uncompressed_size;
    e->crc = (uint32_t)info.crc;
    e->mtime = zip_time(&info.tmu_date);
    e->deflated = info.compression_method == Z_DEFLATED;
    if (zip_check_mode(e, name, (uint32_t)info.external_fa >> 16, why) < 0)
        return -1;
    if (unzOpenCurrentFile2(file, NULL, NULL, 1) != UNZ_OK)
        return zip_wrong(why, name, "has no local header, or one that contradicts the directory");
    uint64_t data = unzGetCurrentFileZStreamPos64(file);
    int extra = unzGetLocalExtrafield(file, NULL, 0);
    unzCloseCurrentFile(file);
    if (zip_check_local(z, e, name, &info, data, (size_t)extra, why) < 0)
        return -1;
    size_t dot = name.n >= 2 && memcmp(name.p, "./", 2) == 0 ? 2 : 0;
    e->name = (struct span){ name.p + dot, name.n - dot };
    e->name.n -= e->kind == ZIP_FOLDER && e->name.n > 0;
    return 0;
}

/* By what the archive declares: nothing is unpacked to find a bomb. */
static int zip_check_total(const struct zip *z, struct buf *why)
{
    uint64_t total = 0;

    for (size_t i = 0; i < z->len; i++) {
        if (__builtin_add_overflow(total, z->entries[i].size, &total)
            || total > (uint64_t)limits.zip_bytes)
            return conf_wrong(why, "archive: unpacks to more than %" PRId64 " bytes",
                              limits.zip_bytes);
    }
    if (total > ZIP_FREE_BYTES && total / (uint64_t)limits.zip_ratio > z->archive.n)
        return conf_wrong(why, "archive: %" PRIu64 " bytes in %zu, more than %" PRId64 " to 1",
                          total, z->archive.n, limits.zip_ratio);
    return 0;
}

static int zip_by_place(const void *a, const void *b)
{
    const struct zip_entry *x = a, *y = b;
    return x->at < y->at ? -1 : x->at > y->at;
}

/* '/' is the lowest byte, so that what is in a folder follows it; then directory order. */
static int zip_by_name(const void *a, const void *b)
{
    const struct zip_entry *x = a, *y = b;
    size_t n = x->name.n < y->name.n ? x->name.n : y->name.n, i = 0;

    while (i < n && x->name.p[i] == y->name.p[i])
        i++;
    if (i < n) {
        unsigned char c = (unsigned char)x->name.p[i], d = (unsigned char)y->name.p[i];
        return c == '/' ? -1 : d == '/' ? 1 : c < d ? -1 : 1;
    }
    if (x->name.n != y->name.n)
        return x->name.n < y->name.n ? -1 : 1;
    return x->order < y->order ? -1 : 1;
}

static int zip_check_places(struct zip *z, struct buf *why)
{
    size_t end = 0;

    if (z->len > 0)
        qsort(z->entries, z->len, sizeof *z->entries, zip_by_place);
    if ((z->len > 0 ? z->entries[0].at : z->start) != 0)
        return conf_wrong(why, "archive: bytes stand before its first entry");
    for (size_t i = 0; i < z->len; i++) {
        if (z->entries[i].at < end)
            return zip_wrong(why, z->entries[i].name, "overlaps another entry");
        end = z->entries[i].end;
    }
    return 0;
}

static bool zip_is_below(struct span name, struct span folder)
{
    return name.n > folder.n && name.p[folder.n] == '/'
        && memcmp(name.p, folder.p, folder.n) == 0;
}

/* Sorted by name, equal names are neighbours, and a file is followed by what is below it. */
static int zip_check_names(struct zip *z, struct buf *why)
{
    size_t replaced = 0;

    qsort(z->entries, z->len, sizeof *z->entries, zip_by_name);
    for (size_t i = 0; i + 1 < z->len; i++) {
        struct zip_entry *e = &z->entries[i], *next = e + 1;
        if (e->kind != ZIP_FOLDER && zip_is_below(next->name, e->name))
            return zip_wrong(why, next->name, "stands below a %s of the archive",
                             e->kind == ZIP_LINK ? "link" : "file");
        if (e->name.n != next->name.n || memcmp(e->name.p, next->name.p, e->name.n) != 0)
            continue;
        if (e->kind != next->kind || e->kind == ZIP_LINK)
            return zip_wrong(why, e->name, "stands twice, and not both times as a file");
        e->replaced = true;
        if (e->kind == ZIP_FILE && replaced++ == 0)
            log_info("archive: \"%.*s\" stands twice, the last one counts",
                     (int)(e->name.n < 200 ? e->name.n : 200), e->name.p);
    }
    if (replaced > 1)
        log_info("archive: %zu entries are replaced by later ones", replaced);
    return 0;
}

/* Unpacks an entry to fd, to text, or with -1 and NULL to nowhere. */
static int zip_unpack(struct zip *z, const struct zip_entry *e, int fd, struct buf *text, struct buf *why)
{
    z_stream *s = &z->stream;
    unsigned char chunk[64 << 10];
    uint64_t size = 0;
    uLong crc = 0;
    int rc = Z_OK;

    inflateReset(s);
    s->next_in = (Bytef *)(uintptr_t)e->data.p;
    s->avail_in = e->deflated ? (uInt)e->data.n : 0;
    while (rc != Z_STREAM_END) {
        struct span piece = e->data;
        if (e->deflated) {
            s->next_out = chunk;
            s->avail_out = sizeof chunk;
            rc = inflate(s, Z_NO_FLUSH);
            piece = (struct span){ (const char *)chunk, sizeof chunk - s->avail_out };
        } else {
            rc = Z_STREAM_END;
        }
        if (rc != Z_OK && rc != Z_STREAM_END)
            return zip_wrong(why, e->name, "is damaged: %s", s->msg ? s->msg : zError(rc));
        size += piece.n;
        if (size > e->size)
            break;
        crc = crc32_z(crc, (const Bytef *)piece.p, piece.n);
        if (text && piece.n > 0 && buf_add_span(text, piece) < 0)
            return zip_wrong(why, e->name, "finds no memory");
        if (fd >= 0 && fd_write_all(fd, piece.p, piece.n) < 0)
            return zip_wrong(why, e->name, "cannot be written: %s", strerror(errno));
    }
    if (size != e->size || s->avail_in > 0)
        return zip_wrong(why, e->name, "does not unpack to the %" PRIu64 " bytes it declares",
                         e->size);
    if (crc != e->crc)
        return zip_wrong(why, e->name, "is damaged: wrong checksum");
    return 0;
}

/* A link's target, checked. */
static int zip_target(struct zip *z, const struct zip_entry *e, struct buf *target, struct buf *why)
{
    buf_drop(target, target->len);
    if (zip_unpack(z, e, -1, target, why) < 0)
        return -1;
    const char *fault = zip_link_fault(e->name, buf_span(target));
    return fault ? zip_wrong(why, e->name, "%s", fault) : 0;
}

static void zip_close(struct zip *z)
{
    free(z->entries);
    inflateEnd(&z->stream);
}

static int zip_read_directory(struct zip *z, unzFile file, struct buf *why)
{
    size_t at = z->start;

    for (size_t i = 0; i < z->len; i++) {
        z->entries[i].order = i;
        if (i > 0 && unzGoToNextFile(file) != UNZ_OK)
            return conf_wrong(why, "archive: its directory is broken at entry %zu", i);
        if (zip_read_entry(z, file, &z->entries[i], &at, why) < 0)
            return -1;
    }
    if (at != z->end)
        return conf_wrong(why, "archive: its directory holds more than %zu entries", z->len);
    return zip_check_total(z, why) < 0 || zip_check_places(z, why) < 0 ? -1
         : zip_check_names(z, why);
}

/* Everything that can be said without unpacking. zip_close() it, whatever comes out. */
static int zip_open(struct zip *z, struct span archive, struct buf *why)
{
    struct zip_mem mem = { .in = archive };
    zlib_filefunc64_def functions = zip_mem_functions(&mem);
    unz_global_info64 global;

    *z = (struct zip){ .archive = archive };
    if (archive.n > UINT32_MAX)
        return conf_wrong(why, "archive: %zu bytes are too many", archive.n);
    if (zip_find_directory(z, why) < 0)
        return -1;
    z->entries = calloc(z->len + 1, sizeof *z->entries);
    if (!z->entries || inflateInit2(&z->stream, -MAX_WBITS) != Z_OK)
        return conf_wrong(why, "archive: no memory for %zu entries", z->len);
    unzFile file = unzOpen2_64("", &functions);
    int rc = file && unzGetGlobalInfo64(file, &global) == UNZ_OK && global.number_entry == z->len
           ? zip_read_directory(z, file, why)
           : conf_wrong(why, "archive: its end records contradict themselves");
    unzClose(file);
    return rc;
}

/* The first pass: unpacks every entry to nowhere. */
static int zip_verify(struct zip *z, struct buf *why)
{
    struct buf target = { 0 };
    int rc = 0;

    for (size_t i = 0; i < z->len && rc == 0; i++) {
        const struct zip_entry *e = &z->entries[i];
        rc = e->kind == ZIP_LINK ? zip_target(z, e, &target, why) : zip_unpack(z, e, -1, NULL, why);
    }
    buf_fini(&target);
    return rc;
}

/* The folder below `root` where an entry goes. Kept open, as neighbours share it. */
struct zip_place {
    int         root, dir;          /* dir is -1: none */
    struct span path;
};

static struct span zip_parent(struct span path)
{
    while (path.n > 0 && path.p[path.n - 1] != '/')
        path.n--;
    path.n -= path.n > 0;
    return path;
}

/* The last part of a checked path, as C text. */
static const char *zip_base(char out[NAME_MAX + 1], struct span path)
{
    size_t skip = zip_parent(path).n;
    skip += skip > 0;
    memcpy(out, path.p + skip, path.n - skip);
    out[path.n - skip] = '\0';
    return out;
}

static int zip_subfolder(int dir, struct span part, bool make)
{
    char name[NAME_MAX + 1];
    const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
    int fd = openat(dir, zip_base(name, part), flags);

    if (fd >= 0 || errno != ENOENT || !make)
        return fd;
    return mkdirat(dir, name, 0755) < 0 ? -1 : openat(dir, name, flags);
}

/* Goes to a folder one part at a time, following no link, also none that was there before
 * the archive: what RESOLVE_NO_SYMLINKS of openat2(2) does, on every kernel. */
static int zip_enter(struct zip_place *at, struct span path, bool make)
{
    if (at->dir >= 0 && at->path.n == path.n && memcmp(at->path.p, path.p, path.n) == 0)
        return 0;
    fd_close(&at->dir);
    at->path = path;
    at->dir = openat(at->root, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    while (path.n > 0 && at->dir >= 0) {
        int next = zip_subfolder(at->dir, span_part(&path, '/'), make);
        fd_close(&at->dir);
        at->dir = next;
    }
    return at->dir < 0 ? -1 : 0;
}

static int zip_write_file(struct zip *z, const struct zip_entry *e, int dir, const char *name,
                          struct buf *why)
{
    const struct timespec times[2] = { { .tv_sec = e->mtime }, { .tv_sec = e->mtime } };
    int fd = openat(dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);

    if (fd < 0)
        return zip_wrong(why, e->name, "cannot be written: %s", strerror(errno));
    int rc = zip_unpack(z, e, fd, NULL, why);
    if (rc == 0 && fchmod(fd, e->mode) < 0)
        rc = zip_wrong(why, e->name, "cannot be given its mode: %s", strerror(errno));
    futimens(fd, times);            /* without it only Python's byte code is made anew */
    fd_close(&fd);
    return rc;
}

static int zip_write_link(struct zip *z, const struct zip_entry *e, int dir, const char *name,
                          struct buf *why)
{
    struct buf target = { 0 };
    int rc = zip_target(z, e, &target, why);

    if (rc == 0 && symlinkat(buf_text(&target), dir, name) < 0)
        rc = zip_wrong(why, e->name, "cannot be written: %s", strerror(errno));
    buf_fini(&target);
    return rc;
}

static int zip_write_entry(struct zip *z, const struct zip_entry *e, struct zip_place *at,
                           struct buf *why)
{
    char name[NAME_MAX + 1];
    struct span folder = e->kind == ZIP_FOLDER ? e->name : zip_parent(e->name);

    if (e->replaced)
        return 0;
    if (zip_enter(at, folder, true) < 0)
        return zip_wrong(why, folder, "cannot be made a folder: %s", strerror(errno));
    if (e->kind == ZIP_FOLDER)
        return 0;
    if (unlinkat(at->dir, zip_base(name, e->name), 0) < 0 && errno != ENOENT)
        return zip_wrong(why, e->name, "cannot be replaced: %s", strerror(errno));
    return e->kind == ZIP_LINK ? zip_write_link(z, e, at->dir, name, why)
                               : zip_write_file(z, e, at->dir, name, why);
}

/* Python's byte code of a source goes with it: it counts as long as the source's time and size
 * are the same, which the next archive's may well be. */
static void zip_erase_bytecode(int dir, const char *source)
{
    size_t n = strlen(source);
    bool is_source = n > 3 && strcmp(source + n - 3, ".py") == 0;
    int fd = is_source ? openat(dir, "__pycache__", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC) : -1;
    DIR *d = fd < 0 ? NULL : fdopendir(fd);

    if (!d) {
        fd_close(&fd);
        return;
    }
    for (struct dirent *e; (e = readdir(d));)
        if (strncmp(e->d_name, source, n - 2) == 0)     /* "main.": main.cpython-311.opt-2.pyc */
            unlinkat(fd, e->d_name, 0);
    closedir(d);
    unlinkat(dir, "__pycache__", AT_REMOVEDIR);
}

/* Unlinks the first n entries, last first, and every folder of theirs that is empty then. */
static void zip_erase(const struct zip *z, size_t n, int root)
{
    struct zip_place at = { .root = root, .dir = -1 };
    char name[NAME_MAX + 1];

    while (n-- > 0) {
        const struct zip_entry *e = &z->entries[n];
        int flags = e->kind == ZIP_FOLDER ? AT_REMOVEDIR : 0;
        if (e->kind == ZIP_FILE && zip_enter(&at, zip_parent(e->name), false) == 0)
            zip_erase_bytecode(at.dir, zip_base(name, e->name));
        for (struct span path = e->name; path.n > 0; path = zip_parent(path), flags = AT_REMOVEDIR)
            if (zip_enter(&at, zip_parent(path), false) == 0
                && unlinkat(at.dir, zip_base(name, path), flags) < 0 && errno != ENOENT)
                break;
    }
    fd_close(&at.dir);
}

/* The second pass: all of it, or nothing stays. */
static int zip_write(struct zip *z, int root, struct buf *why)
{
    struct zip_place at = { .root = root, .dir = -1 };
    mode_t mask = umask(022);
    size_t i = 0;

    while (i < z->len && zip_write_entry(z, &z->entries[i], &at, why) == 0)
        i++;
    fd_close(&at.dir);
    umask(mask);
    if (i == z->len)
        return 0;
    zip_erase(z, i + 1, root);
    return -1;
}

/* Unpacks an archive below `folder`, which is made if it is not there. 0, or -1 and why, and
 * then nothing of the archive is there. Files that stood in its way are replaced. */
static int zip_extract(struct span archive, const char *folder, struct buf *why)
{
    struct zip z;
    int rc = -1, root = -1;

    if (zip_open(&z, archive, why) < 0 || zip_verify(&z, why) < 0)
        goto done;
    if (mkdir_all(folder, 0755) == 0)
        root = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    rc = root < 0 ? conf_wrong(why, "archive: %s: %s", folder, strerror(errno))
                  : zip_write(&z, root, why);
done:
    fd_close(&root);
    zip_close(&z);
    return rc;
}

/* Takes back what zip_extract() wrote. Folders that were there before and are empty now go
 * too; what else is in a folder keeps it. */
static void zip_remove(struct span archive, const char *folder)
{
    struct buf why = { 0 };
    struct zip z;
    int root = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    if (zip_open(&z, archive, &why) == 0 && root >= 0)
        zip_erase(&z, z.len, root);
    zip_close(&z);
    fd_close(&root);
    buf_fini(&why);
}

/* ---- Packing: the host's side ---- */
struct zip_pack {
    zipFile     file;
    size_t      most;               /* bytes of the archive */
    bool        whole;              /* as it stands: what cannot be packed is left out, nothing else is;
                                       else __pycache__ and .git are left out, and the rest must be fit */
    dev_t       device;             /* of the folder; where another one is mounted is left out of a whole */
    struct buf *why;
    char        path[PATH_MAX];     /* of what is packed now; its name starts at `root` */
    size_t      root;
};

#define zip_pack_wrong(p, ...) (buf_add_format((p)->why, "%s: ", (p)->path), \
                                buf_add_format((p)->why, __VA_ARGS__), -1)

static int zip_pack_full(struct zip_pack *p)
{
    return zip_pack_wrong(p, "the archive is larger than %zu bytes, or memory is full", p->most);
}

/* What is unfit for an archive fails it, or is left out of a whole. */
static int zip_pack_unfit(struct zip_pack *p, const char *fault)
{
    if (!p->whole)
        return zip_pack_wrong(p, "%s", fault);
    log_debug("%s: not packed: %s", p->path, fault);
    return 0;
}

/* Opens an entry of the name at p->path. All times are the same, so that the same folder
 * gives the same bytes. */
static int zip_pack_start(struct zip_pack *p, mode_t mode)
{
    struct span name = span_of(p->path + p->root);
    const zip_fileinfo info = {
        .dosDate = ZIP_DOS_1980,
        .external_fa = (uLong)mode << 16 | (S_ISDIR(mode) ? 0x10 : 0),     /* DOS: a folder */
    };

    if (zipOpenNewFileInZip4_64(p->file, name.p, &info, NULL, 0, NULL, 0, NULL,
            S_ISREG(mode) ? Z_DEFLATED : 0, p->whole ? Z_BEST_SPEED : Z_DEFAULT_COMPRESSION /* a reply waits */,
            0, -MAX_WBITS, DEF_MEM_LEVEL, Z_DEFAULT_STRATEGY, NULL, 0, 3 << 8 | 20 /* made on Unix */, 0x0800 /* UTF-8 */, 0))
        return zip_pack_full(p);
    return 0;
}

static int zip_pack_bytes(struct zip_pack *p, const char *data, size_t n)
{
    if (zipWriteInFileInZip(p->file, data, (unsigned)n) != ZIP_OK)
        return zip_pack_full(p);
    return 0;
}

static int zip_pack_file(struct zip_pack *p, mode_t mode)
{
    char chunk[64 << 10];
    ssize_t n = 0;
    int fd = open(p->path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);

    if (fd < 0)
        return zip_pack_unfit(p, strerror(errno));
    int rc = zip_pack_start(p, S_IFREG | (mode & 0777));

    while (rc == 0 && ((n = SYS_READ(fd, chunk, sizeof chunk)) > 0 || (n < 0 && errno == EINTR)))
        rc = n < 0 ? 0 : zip_pack_bytes(p, chunk, (size_t)n);
    if (n < 0)
        rc = zip_pack_wrong(p, "%s", strerror(errno));
    fd_close(&fd);
    return rc;
}

static int zip_pack_link(struct zip_pack *p)
{
    char target[PATH_MAX];
    ssize_t n = readlink(p->path, target, sizeof target);

    if (n < 0)
        return zip_pack_unfit(p, strerror(errno));
    const char *fault = zip_link_fault(span_of(p->path + p->root), (struct span){ target, (size_t)n });
    if (fault)
        return zip_pack_unfit(p, fault);
    return zip_pack_start(p, S_IFLNK | 0777) < 0 ? -1 : zip_pack_bytes(p, target, (size_t)n);
}

static int zip_pack_not_dots(const struct dirent *d)
{
    return strcmp(d->d_name, ".") != 0 && strcmp(d->d_name, "..") != 0;
}

static int zip_pack_code(const struct dirent *d)
{
    return zip_pack_not_dots(d) && strcmp(d->d_name, "__pycache__") != 0 && strcmp(d->d_name, ".git") != 0;
}

static int zip_pack_folder(struct zip_pack *p);      /* calls itself through zip_pack_any */

static int zip_pack_any(struct zip_pack *p)
{
    struct stat st;

    const char *fault = zip_name_fault(span_of(p->path + p->root));

    if (fault)
        return zip_pack_unfit(p, fault);
    if (lstat(p->path, &st) < 0)
        return zip_pack_unfit(p, strerror(errno));
    if (S_ISLNK(st.st_mode))
        return zip_pack_link(p);
    if (S_ISREG(st.st_mode))
        return zip_pack_file(p, st.st_mode);
    if (!S_ISDIR(st.st_mode))
        return zip_pack_unfit(p, "is a device, a pipe or a socket");
    if (p->whole && st.st_dev != p->device)
        return zip_pack_unfit(p, "is mounted there");
    strcat(p->path, "/");           /* zip_pack_folder() leaves room for it */
    return zip_pack_start(p, S_IFDIR | 0755) < 0 ? -1 : zip_pack_folder(p);
}

/* p->path ends with '/', and again when this returns. */
static int zip_pack_folder(struct zip_pack *p)
{
    struct dirent **names = NULL;
    size_t end = strlen(p->path);
    int rc = 0, n = scandir(p->path, &names, p->whole ? zip_pack_not_dots : zip_pack_code, alphasort);

    if (n < 0)
        return zip_pack_unfit(p, strerror(errno));
    for (int i = 0; i < n; i++) {
        if (rc == 0 && end + strlen(names[i]->d_name) + 2 > sizeof p->path)
            rc = zip_pack_wrong(p, "%s: the path is too long", names[i]->d_name);
        if (rc == 0) {
            strcpy(p->path + end, names[i]->d_name);
            rc = zip_pack_any(p);
        }
        free(names[i]);
    }
    free(names);
    if (rc == 0)
        p->path[end] = '\0';
    return rc;
}

/* p->most and why are set. */
static int zip_pack_run(struct zip_pack *p, const char *folder, struct buf *out)
{
    struct zip_mem mem = { .out = out, .most = p->most };
    zlib_filefunc64_def functions = zip_mem_functions(&mem);
    int n = snprintf(p->path, sizeof p->path, "%s/", folder);

    assert(out->len == 0);
    if (n >= (int)sizeof p->path)
        return conf_wrong(p->why, "%s: the path is too long", folder);
    p->root = (size_t)n;
    p->file = zipOpen2_64("", APPEND_STATUS_CREATE, NULL, &functions);
    if (!p->file)
        return conf_wrong(p->why, "no memory for an archive");
    int rc = zip_pack_folder(p);
    if (zipClose(p->file, NULL) != ZIP_OK && rc == 0)
        rc = zip_pack_full(p);
    return rc;
}

/* Packs a program's code, what is in `folder`. */
static int zip_pack(const char *folder, struct buf *out, struct buf *why)
{
    struct zip_pack p = { .why = why, .most = (size_t)limits.conf_bytes };
    return zip_pack_run(&p, folder, out);
}

/* ==== vol: volumes: probe, mount, unmount ========================================
 * A volume is a disk that the host has attached, with a file system that a tenant has made:
 * its setuid bits and device nodes do not count, its type is read from its superblock, and
 * where it goes is looked at again once every link on the way has been followed. What a
 * broken file system does to its driver is the kernel's matter.
 *
 * All this runs in a child process: a disk may be slow, or never answer. */
#define VOL_HEAD_BYTES  (68 << 10)      /* the farthest superblock, that of btrfs, is at 64 KiB */
#define VOL_POLL_US     10000
#define VOL_FORCE_US    100000          /* the kernel makes read-only in its own time */
#define VOL_RELEASE_MS  2000            /* for the last that hold a volume, when it is taken back */

static const struct vol_type {
    const char *name;
    size_t      at;
    struct span magic;
    bool        mountable, writable;
    const char *options;            /* mount(2)'s data: never a panic, whatever the superblock says */
} vol_types[] = {
    { "squashfs", 0,       { "hsqs", 4 },             true,  false, NULL },
    { "ext4",     0x438,   { "\x53\xef", 2 },         true,  true,  "errors=remount-ro" },  /* ext2 and ext3 too */
    { "btrfs",    0x10040, { "_BHRfS_M", 8 },         true,  true,  NULL },
    { "xfs",      0,       { "XFSB", 4 },             true,  true,  NULL },
    { "swap",     4086,    { "SWAPSPACE2", 10 },      false, false, NULL },
    { "LUKS",     0,       { "LUKS\xba\xbe", 6 },     false, false, NULL },
    { "ISO 9660", 0x8001,  { "CD001", 5 },            false, false, NULL },
    { "EROFS",    0x400,   { "\xe2\xe1\xf5\xe0", 4 }, false, false, NULL },
    { "F2FS",     0x400,   { "\x10\x20\xf5\xf2", 4 }, false, false, NULL },
    { "NTFS",     3,       { "NTFS    ", 8 },         false, false, NULL },
    { "FAT",      54,      { "FAT", 3 },              false, false, NULL },
    { "FAT",      82,      { "FAT32", 5 },            false, false, NULL },
    { "GPT",      512,     { "EFI PART", 8 },         false, false, NULL },
    { "MBR",      510,     { "\x55\xaa", 2 },         false, false, NULL },
};

/* NULL: the first bytes of the disk say nothing that we know. */
static const struct vol_type *vol_probe(struct span head)
{
    for (size_t i = 0; i < COUNT(vol_types); i++) {
        const struct vol_type *t = &vol_types[i];
        if (head.n >= t->at + t->magic.n && memcmp(head.p + t->at, t->magic.p, t->magic.n) == 0)
            return t;
    }
    return NULL;
}

/* Names the volume and says what is wrong with it; returns -1 for the caller to return. */
PRINTF(3, 4) static int vol_wrong(struct buf *why, const struct conf_volume *v, const char *format, ...)
{
    char text[512];
    va_list ap;

    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    return conf_wrong(why, "volume %s on %.128s: %s", v->device, v->mount, text);
}

static void vol_path(char out[VOLUME_DEVICE_MAX + 6], const char *device)
{
    snprintf(out, VOLUME_DEVICE_MAX + 6, "/dev/%s", device);
}

/* Opens the disk, which a slow bus may still be finding, so that nobody else has it: as one
 * that is mounted has (open(2), O_EXCL without O_CREAT). The descriptor, or -1 and why. */
static int vol_open(const struct conf_volume *v, struct buf *why)
{
    int64_t end_ms = now_ms() + limits.device_ms;
    char path[VOLUME_DEVICE_MAX + 6];
    struct stat st;
    int fd, locked = 0;

    vol_path(path, v->device);
    while (stat(path, &st) < 0 && now_ms() < end_ms)
        usleep(VOL_POLL_US);
    if (stat(path, &st) < 0)
        return vol_wrong(why, v, "there is no disk %s", path);
    if (!S_ISBLK(st.st_mode))
        return vol_wrong(why, v, "%s is no disk", path);
    fd = open(path, O_RDONLY | O_EXCL | O_CLOEXEC);
    if (fd < 0 && errno == EBUSY)
        return vol_wrong(why, v, "%s is in use already", path);
    if (fd < 0)
        return vol_wrong(why, v, "%s cannot be opened: %s", path, strerror(errno));
    if (!v->read_only && ioctl(fd, BLKROGET, &locked) == 0 && locked) {
        fd_close(&fd);
        return vol_wrong(why, v, "%s is read-only, and the volume is to be written", path);
    }
    return fd;
}

/* The type of the disk's file system, one that can be mounted as wanted; NULL and why. */
static const struct vol_type *vol_type(const struct conf_volume *v, int fd, struct buf *why)
{
    struct buf head = { 0 };
    char *p = buf_room(&head, VOL_HEAD_BYTES);
    ssize_t n = p ? pread(fd, p, VOL_HEAD_BYTES, 0) : -1;
    const struct vol_type *t = NULL;

    if (n < 0) {
        vol_wrong(why, v, "cannot be read: %s", strerror(errno));
    } else if (!(t = vol_probe((struct span){ p, (size_t)n }))) {
        vol_wrong(why, v, "no file system is on it");
    } else if (!t->mountable || (!v->read_only && !t->writable)) {
        vol_wrong(why, v, "%s is on it, which cannot be %s", t->name, t->mountable ? "written" : "mounted");
        t = NULL;
    }
    buf_fini(&head);
    return t;
}

/* As if / were all there is, and through no link of /proc (openat2(2), Linux 5.6). */
static int vol_open_folder(const char *path)
{
    struct open_how how = { .flags = O_PATH | O_DIRECTORY | O_CLOEXEC,
                            .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS };
    int fd, root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);

    if (root < 0)
        return -1;
    fd = (int)syscall(SYS_openat2, root, path, &how, sizeof how);
    if (fd < 0 && errno == ENOSYS)
        fd = open(path, (int)how.flags);
    fd_close(&root);
    return fd;
}

/* Where a descriptor leads, all links followed; an empty text if that cannot be told. */
static void vol_resolve(char *out, size_t size, int fd)
{
    char link[32];

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, size - 1);
    out[n > 0 ? n : 0] = '\0';
}

/* Opens the mount point, and makes it with the folders above it where they lack: each is
 * looked at before something is made in it. The descriptor, or -1 and why. */
static int vol_open_place(const struct conf_volume *v, struct buf *why)
{
    char part[VOLUME_MOUNT_MAX + 1], real[PATH_MAX], made[PATH_MAX + NAME_MAX + 2];
    const char *base = v->mount;
    int parent = -1, fd = vol_open_folder("/");

    while (*base == '/' && fd >= 0) {
        size_t n = strcspn(++base, "/");
        fd_close(&parent);
        parent = fd;
        snprintf(part, sizeof part, "%.*s", (int)(base + n - v->mount), v->mount);
        fd = vol_open_folder(part);
        if (fd < 0 && errno == ENOENT) {
            vol_resolve(real, sizeof real, parent);
            snprintf(made, sizeof made, "%s/%.*s", real, (int)(n < NAME_MAX ? n : NAME_MAX), base);
            if (conf_place_is_system(made))
                break;
            errno = n > NAME_MAX ? ENAMETOOLONG : ENOENT;
            if (n <= NAME_MAX && mkdirat(parent, strrchr(made, '/') + 1, 0755) == 0)
                fd = vol_open_folder(part);
        }
        base += n;
    }
    fd_close(&parent);
    if (fd < 0)
        return vol_wrong(why, v, "its mount point cannot be made: %s", strerror(errno));
    vol_resolve(real, sizeof real, fd);
    if (conf_place_is_system(real)) {
        fd_close(&fd);
        return vol_wrong(why, v, "its mount point is %.128s, a place of the system", real);
    }
    return fd;
}

/* What the kernel means by the error numbers of a mount that was well asked for. */
static const char *vol_mount_error(int error)
{
    switch (error) {
    case ENODEV:
        return "this kernel has no such file system";
    case EINVAL:
    case EUCLEAN:
    case EBADMSG:
        return "damaged, or made with a feature that this kernel lacks";
    case EROFS:
        return "it was not unmounted cleanly, and the disk cannot be written to mend it";
    default:
        return strerror(error);
    }
}

static int vol_mount_type(const struct conf_volume *v, const struct vol_type *type, int place)
{
    const char *const modules[] = { "crc32c_generic", type->name, NULL };      /* btrfs asks for the first by name */
    unsigned long flags = (v->trusted ? 0 : MS_NOSUID | MS_NODEV) | (v->read_only ? MS_RDONLY : 0);
    char path[VOLUME_DEVICE_MAX + 6], target[32];

    vol_path(path, v->device);
    snprintf(target, sizeof target, "/proc/self/fd/%d", place);
    if (!kernel_has(type->name))
        boot_modules(modules);
    return mount(path, target, type->name, flags, type->options);
}

static int vol_mount_one(const struct conf_volume *v, struct buf *why)
{
    int fd = vol_open(v, why), rc = -1;
    const struct vol_type *type = fd < 0 ? NULL : vol_type(v, fd, why);
    int place = type ? vol_open_place(v, why) : -1;

    fd_close(&fd);                  /* the mount wants the disk for itself */
    if (place >= 0 && (rc = vol_mount_type(v, type, place)) < 0)
        vol_wrong(why, v, "%s cannot be mounted: %s", type->name, vol_mount_error(errno));
    fd_close(&place);
    return rc;
}

/* proc(5) writes blanks and backslashes of a path as three octal digits. */
static void vol_unescape(char *path)
{
    char *to = path;

    for (const char *p = path; *p; p++)
        if (p[0] == '\\' && strspn(p + 1, "01234567") >= 3) {
            *to++ = (char)((p[1] - '0') << 6 | (p[2] - '0') << 3 | (p[3] - '0'));
            p += 3;
        } else {
            *to++ = *p;
        }
    *to = '\0';
}

/* One of these volumes; of none in particular (NULL): anything that is not the system's. */
static bool vol_is_meant(const struct conf_volume *list, size_t len, const char *source, const char *path)
{
    char device[VOLUME_DEVICE_MAX + 6];
    bool meant = !list;

    for (size_t i = 0; i < len && !meant; i++) {
        vol_path(device, list[i].device);
        meant = strcmp(source, device) == 0;
    }
    return meant && !conf_place_is_system(path);
}

/* Whether somebody still has the disk: a file system that is detached, and not closed yet. */
static bool vol_is_held(const char *source)
{
    struct stat st;
    int fd;

    if (strncmp(source, "/dev/", 5) != 0 || stat(source, &st) < 0 || !S_ISBLK(st.st_mode))
        return false;
    fd = open(source, O_RDONLY | O_EXCL | O_CLOEXEC);
    bool held = fd < 0 && errno == EBUSY;
    fd_close(&fd);
    return held;
}

/* Detaches the volumes, last first, with what is mounted on top of them, and waits until
 * their file systems are closed: those that have a file of them open keep them so. list is
 * NULL: everything that the system does not stand on. 0, or -1 and why. */
static int vol_umount(const struct conf_volume *list, size_t len, int64_t end_ms, struct buf *why)
{
    struct buf text = { 0 };
    char *lines[VOLUME_MOUNTS_MAX], *line, *rest;
    size_t n = 0;
    int rc = 0;

    if (file_load("/proc/self/mounts", &text, 1 << 20) < 0)
        return buf_fini(&text), conf_wrong(why, "/proc/self/mounts: %s", strerror(errno));
    buf_text(&text);
    for (line = strtok_r(text.data + text.start, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        char *source = line, *path = strchr(line, ' ');
        if (!path)
            continue;
        *path++ = '\0';
        path[strcspn(path, " ")] = '\0';
        vol_unescape(path);
        if (n < COUNT(lines) && vol_is_meant(list, len, source, path))
            lines[n++] = source;
    }
    for (size_t i = n; i-- > 0;)
        if (umount2(strchr(lines[i], '\0') + 1, MNT_DETACH | UMOUNT_NOFOLLOW) < 0 && errno != EINVAL)
            rc = conf_wrong(why, "%s: %s. ", lines[i], strerror(errno));
    for (size_t i = n; i-- > 0;) {
        while (vol_is_held(lines[i]) && now_ms() < end_ms)
            usleep(VOL_POLL_US);
        if (vol_is_held(lines[i]) && !strstr(buf_text(why), lines[i]))
            rc = conf_wrong(why, "%s is still held. ", lines[i]);
    }
    buf_fini(&text);
    return rc;
}

/* All of them, or none. */
static int vol_mount(const struct conf *c, struct buf *why)
{
    struct buf ignored = { 0 };
    size_t i = 0;

    while (i < c->volumes_len && vol_mount_one(&c->volumes[i], why) == 0)
        i++;
    if (i == c->volumes_len)
        return 0;
    if (i > 0)
        vol_umount(c->volumes, i, now_ms() + VOL_RELEASE_MS, &ignored);
    buf_fini(&ignored);
    return -1;
}

/* The mount points stay, as empty folders. */
static void vol_revert(const struct conf *c)
{
    struct buf why = { 0 };

    if (c->volumes_len > 0 && vol_umount(c->volumes, c->volumes_len, now_ms() + VOL_RELEASE_MS, &why) < 0)
        log_info("volumes: %s", buf_text(&why));
    buf_fini(&why);
}

/* Whatever is still held becomes read-only, so that its journal is written out: the kernel does
 * so in its own time (sysrq.rst). */
static void vol_force_read_only(void)
{
    file_set("/proc/sysrq-trigger", "u");
}

/* For halt, when nothing runs any more. */
static void vol_umount_all(int64_t end_ms)
{
    struct buf why = { 0 };

    if (vol_umount(NULL, 0, end_ms, &why) < 0) {
        log_info("halt: volumes: %s", buf_text(&why));
        vol_force_read_only();
        usleep(VOL_FORCE_US);
    }
    buf_fini(&why);
}

/* ==== child: spawn, signal, reap, say how it ended ===============================
 * As PID 1 the agent is the parent of every orphan: waitpid(2) for any child finds both
 * ours, which have a struct child, and theirs, which are only reaped. A child's death is
 * what waitpid says, never the end of a file that a grandchild can hold open. */
struct child {
    pid_t         pid;                          /* 0: not running */
    pid_t         group;                        /* its process group, which may outlive it */
    const char   *name;                         /* borrowed, for the log */
    void        (*on_exit)(struct child *, int status);     /* status as of waitpid(2) */
    void        (*on_stop)(struct child *, int signal);     /* may be NULL */
    struct child *next;
};

struct children {
    struct child *first;
    bool          has_cgroup;       /* PATH_CGROUP/program is there for programs */
};

#define CHILD_FDS   6

struct spawn {
    char *const *argv;              /* argv[0] is a path; NULL: call run(arg) instead */
    char *const *envp;
    const char  *cwd;               /* NULL: stay */
    int          fds[CHILD_FDS];    /* become 0 and up; -1: /dev/null for 0 to 2, none past them */
    bool         in_cgroup;
    int        (*run)(void *arg);   /* in a fork, its result is the exit code */
    void        *arg;
};

#define CHILD_EXEC_FAILED   127     /* as the shell's; the reason is on its stderr */

static void child_signals_default(void)
{
    sigset_t none;
    struct sigaction usual = { .sa_handler = SIG_DFL };

    for (int sig = 1; sig < NSIG; sig++)
        sigaction(sig, &usual, NULL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

static void child_take_fds(const int *fds)
{
    int high[CHILD_FDS];

    for (int i = 0; i < CHILD_FDS; i++) {               /* first out of the way of each other */
        int fd = fds[i];
        if (fd < 0 && i < 3)
            fd = open("/dev/null", O_RDWR | O_CLOEXEC);
        high[i] = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 10);
    }
    for (int i = 0; i < CHILD_FDS; i++)
        if (high[i] >= 0)
            dup2(high[i], i);
}

static _Noreturn void child_become(const struct spawn *s, bool has_cgroup)
{
    setsid();
    prctl(PR_SET_PDEATHSIG, SIGKILL);           /* where we are not PID 1, we can be killed */
    if (s->in_cgroup && has_cgroup)
        file_set(PATH_CGROUP "/program/cgroup.procs", "0");
    file_set("/proc/self/oom_score_adj", "0");
    child_take_fds(s->fds);
    if (s->run) {                               /* no exec closes what the loop has open */
        fd_close_rest(0);
        agent_log.fd = 2;
        agent_log.pending_len = agent_log.dropped = agent_log.repeats = 0;
        _exit(s->run(s->arg));
    }
    child_signals_default();
    if (s->cwd && chdir(s->cwd) < 0)
        dprintf(2, "chdir %s: %s\n", s->cwd, strerror(errno));
    else {
        execve(s->argv[0], s->argv, s->envp);
        int error = errno;          /* ENOENT may be said of what the file itself needs, execve(2) */
        bool there = error == ENOENT && access(s->argv[0], F_OK) == 0;
        dprintf(2, "exec %s: %s%s\n", s->argv[0], strerror(error), there
                ? ": the interpreter that its first line or its ELF head names" : "");
    }
    _exit(CHILD_EXEC_FAILED);
}

/* Forks. c->name, on_exit and on_stop are set by the caller. 0, or -1 and errno. */
static int child_spawn(struct children *all, struct child *c, const struct spawn *s)
{
    pid_t pid = fork();

    if (pid < 0)
        return -1;
    if (pid == 0)
        child_become(s, all->has_cgroup);
    c->pid = c->group = pid;
    c->next = all->first;
    all->first = c;
    return 0;
}

/* To the child and its process group (it leads one: setsid), once: many a program takes a second
 * SIGTERM for impatience. */
static void child_signal(const struct child *c, int sig)
{
    if ((c->group <= 0 || kill(-c->group, sig) < 0) && c->pid > 0)  /* it may not have called setsid yet */
        kill(c->pid, sig);
}

static void child_forget(struct children *all, struct child *c)
{
    for (struct child **at = &all->first; *at; at = &(*at)->next)
        if (*at == c) {
            *at = c->next;
            break;
        }
    c->pid = 0;
    c->next = NULL;
}

/* Collects up to `most` dead or stopped children. True: there may be more. */
static bool child_reap(struct children *all, int most)
{
    int status;

    while (most-- > 0) {
        pid_t pid = waitpid(-1, &status, WNOHANG | WUNTRACED);
        if (pid <= 0)
            return false;
        struct child *c = all->first;
        while (c && c->pid != pid)
            c = c->next;
        if (!c)
            continue;
        if (WIFSTOPPED(status)) {
            if (c->on_stop)
                c->on_stop(c, WSTOPSIG(status));
            continue;
        }
        child_forget(all, c);
        c->on_exit(c, status);
    }
    return true;
}

/* "exited with code 3", "was killed by signal 9 (Killed)" */
static void child_describe(char *out, size_t size, int status)
{
    if (WIFEXITED(status))
        snprintf(out, size, "exited with exit code %d", WEXITSTATUS(status));
    else
        snprintf(out, size, "was killed by signal %d (%s)", WTERMSIG(status),
                 strsignal(WTERMSIG(status)));
}

/* SIGKILL to each process that a file of proc or cgroup lists. False: it lists none. */
static bool kill_listed(const char *path)
{
    struct buf list = { 0 };
    bool any = file_load(path, &list, 1 << 20) == 0 && list.len > 0 && *buf_text(&list);
    char *rest, *pid = any ? strtok_r(list.data + list.start, " \n", &rest) : NULL;

    for (; pid; pid = strtok_r(NULL, " \n", &rest))
        if (strtol(pid, NULL, 10) > 1)      /* 0: of another namespace; kill(2) takes it for our group */
            kill((pid_t)strtol(pid, NULL, 10), SIGKILL);
    buf_fini(&list);
    return any;
}

/* The whole cgroup of the programs, with whatever they forked (cgroup.kill: Linux 5.14). */
static void cgroup_kill(const struct children *all)
{
    if (all->has_cgroup && file_set(PATH_CGROUP "/program/cgroup.kill", "1") < 0)
        kill_listed(PATH_CGROUP "/program/cgroup.procs");
}

/* Ends every child of ours, adopted ones included (prctl(2), PR_SET_CHILD_SUBREAPER), whose
 * children we adopt in their turn. Only on the way out: it waits. */
static void child_kill_all(void)
{
    char path[64];

    snprintf(path, sizeof path, "/proc/self/task/%d/children", (int)getpid());
    for (int i = 0; i < 50 && kill_listed(path); i++) {
        while (waitpid(-1, NULL, WNOHANG) > 0)
            continue;
        usleep(2000);
    }
}

/* How many processes of the programs the kernel has killed for want of memory. */
static int64_t cgroup_oom_kills(const struct children *all)
{
    return all->has_cgroup ? kernel_number(PATH_CGROUP "/program/memory.events", "oom_kill ") : 0;
}

/* ---- what a child prints, line by line to the log, its end kept for error replies ---- */
struct output {
    struct watch watch;             /* the pipe's reading end */
    struct loop *loop;
    const char  *name;              /* borrowed */
    struct buf   line;              /* begun, no newline yet */
    struct buf   tail;              /* the last limits.error_bytes or more */
    bool         skipping;          /* the line was too long: its rest is dropped */
};

static void output_take(struct output *o, const char *p, size_t n)
{
    size_t most = (size_t)limits.log_line_bytes;

    buf_add(&o->tail, p, n);
    if (o->tail.len > 4 * (size_t)limits.error_bytes)
        buf_keep_tail(&o->tail, (size_t)limits.error_bytes);
    o->tail.failed = o->line.failed = false;
    while (n > 0) {
        const char *end = memchr(p, '\n', n);
        size_t part = end ? (size_t)(end - p) : n;
        size_t room = most - o->line.len;
        if (!o->skipping)
            buf_add(&o->line, p, part < room ? part : room);
        if ((end || part > room) && !o->skipping) {
            log_line(o->name, buf_at(&o->line), o->line.len);
            buf_drop(&o->line, o->line.len);
        }
        o->skipping = !end && (o->skipping || part > room);
        p += part + (end ? 1 : 0);
        n -= part + (end ? 1 : 0);
    }
}

/* Reads what is there, at most `rounds` times 4 KiB: of empty lines that is 4096. */
static void output_read(struct output *o, int rounds)
{
    char bytes[4096];

    while (o->watch.fd >= 0 && rounds-- > 0) {
        ssize_t n = SYS_READ(o->watch.fd, bytes, sizeof bytes);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n <= 0) {               /* its last writer has closed it */
            loop_want(o->loop, &o->watch, 0);
            fd_close(&o->watch.fd);
            return;
        }
        output_take(o, bytes, (size_t)n);
    }
}

static void output_on_event(struct watch *w, uint32_t events)
{
    (void)events;
    output_read(CONTAINER(w, struct output, watch), 1);
}

/* Makes the pipe; returns its writing end for the child, or -1. */
static int output_open(struct output *o, struct loop *loop, const char *name)
{
    int ends[2];

    if (pipe2(ends, O_CLOEXEC) < 0)
        return -1;
    *o = (struct output){ .loop = loop, .name = name,
                          .watch = { .fd = ends[0], .on_event = output_on_event } };
    if (fd_nonblock(ends[0]) < 0 || loop_want(loop, &o->watch, EPOLLIN) < 0) {
        fd_close(&o->watch.fd);
        fd_close(&ends[1]);
        return -1;
    }
    return ends[1];
}

/* Reads what is left and closes; the tail stays until output_fini. */
static void output_close(struct output *o)
{
    output_read(o, 64);
    if (o->line.len > 0)
        output_take(o, "\n", 1);
    if (o->watch.fd >= 0)
        loop_want(o->loop, &o->watch, 0);
    fd_close(&o->watch.fd);
}

static struct span output_tail(struct output *o)
{
    buf_keep_tail(&o->tail, (size_t)limits.error_bytes);
    return buf_span(&o->tail);
}

static void output_fini(struct output *o)
{
    buf_fini(&o->line);
    buf_fini(&o->tail);
}

/* ==== tls: Mbed TLS behind read and write ========================================
 * TLS 1.2 and 1.3 as a server (RFC 5246, RFC 8446): what is not modern is not compiled in
 * (vendor/mbedtls_config.h). No session outlives its connection: there are no tickets, whose keys
 * the clones of a guest would share. The keys belong to all connections that began with them; new
 * files make new keys. */
struct tls_keys {
    unsigned           users;               /* connections, and who has loaded it */
    mbedtls_ssl_config config;
    mbedtls_x509_crt   chain, client_ca;
    mbedtls_pk_context key;
};

struct tls {
    struct tls_keys    *keys;               /* counted */
    mbedtls_ssl_context ssl;
    int                 fd;                 /* borrowed */
    bool                blocked;            /* the socket takes no more now */
    bool                eof;                /* nor has it more */
    bool                open;               /* the handshake is over */
    bool                closed;             /* our last word is said */
    int                 end;                /* why nothing more can be read; 0: it can */
    size_t              writing;            /* bytes that were given for a record the socket has not all of */
    char               *subject;            /* of the client's certificate; NULL: none was asked for */
};

/* For a handshake that came to nothing. */
static const char *tls_why(int rc)
{
    static const struct { int code; const char *text; } whys[] = {
        { MBEDTLS_ERR_SSL_INVALID_RECORD,         "it speaks no TLS" },
        { MBEDTLS_ERR_SSL_UNEXPECTED_MESSAGE,     "it keeps no order" },
        { MBEDTLS_ERR_SSL_DECODE_ERROR,           "a malformed message" },
        { MBEDTLS_ERR_SSL_BAD_PROTOCOL_VERSION,   "neither TLS 1.2 nor 1.3" },
        { MBEDTLS_ERR_SSL_HANDSHAKE_FAILURE,      "no cipher or group in common" },
        { MBEDTLS_ERR_SSL_NO_APPLICATION_PROTOCOL, "it does not want http/1.1" },
        { MBEDTLS_ERR_SSL_NO_CLIENT_CERTIFICATE,  "it has no certificate" },
        { MBEDTLS_ERR_X509_CERT_VERIFY_FAILED,    "its certificate is of another authority or out of date" },
        { MBEDTLS_ERR_SSL_FATAL_ALERT_MESSAGE,    "it refused" },
        { MBEDTLS_ERR_SSL_CONN_EOF,               "it left" },
        { MBEDTLS_ERR_SSL_ALLOC_FAILED,           "no memory" },
    };

    for (size_t i = 0; i < COUNT(whys); i++)
        if (whys[i].code == rc)
            return whys[i].text;
    return "a failure";
}

static void tls_keys_drop(struct tls_keys *k)
{
    if (!k || --k->users > 0)
        return;
    mbedtls_ssl_config_free(&k->config);
    mbedtls_x509_crt_free(&k->chain);
    mbedtls_x509_crt_free(&k->client_ca);
    mbedtls_pk_free(&k->key);
    free(k);
}

/* Reads certificates, or, crt being NULL, a key. */
static int tls_parse(const char *path, mbedtls_x509_crt *crt, mbedtls_pk_context *key, struct buf *why)
{
    struct buf text = { 0 };
    int rc = file_load_regular(path, &text, TLS_FILE_MAX);

    if (rc < 0) {
        buf_add_format(why, "%.512s: %s", path, strerror(errno));
    } else {
        const unsigned char *pem = (const void *)buf_text(&text);   /* its NUL counts */
        rc = crt ? mbedtls_x509_crt_parse(crt, pem, text.len + 1)
           : mbedtls_pk_parse_key(key, pem, text.len + 1, NULL, 0, mbedtls_psa_get_random, MBEDTLS_PSA_RANDOM_STATE);
        if (rc != 0)        /* above 0: so many of its certificates are no good */
            buf_add_format(why, "%.512s: no %s that can be read (Mbed TLS: %d)", path,
                           crt ? "certificate" : "private key without a password", rc);
    }
    if (text.data)
        mbedtls_platform_zeroize(text.data, text.cap);
    buf_fini(&text);
    return rc == 0 ? 0 : -1;
}

/* Whether the kernel has random bytes: early in a boot it may have none yet (random(4)). */
static bool tls_is_seeded(void)
{
    unsigned char byte;

    return getrandom(&byte, 1, GRND_NONBLOCK) == 1;
}

static size_t tls_bytes(const mbedtls_x509_crt *chain, bool names)
{
    size_t bytes = 0;

    for (; chain; chain = chain->next)
        bytes += 8 + (names ? chain->subject_raw.len : chain->raw.len);
    return bytes;
}

static int tls_keys_fill(struct tls_keys *k, const struct tls_files *files, struct buf *why)
{
    static const char *protocols[] = { "http/1.1", NULL };
    mbedtls_ssl_config *c = &k->config;

    if (psa_crypto_init() != PSA_SUCCESS
        || mbedtls_ssl_config_defaults(c, MBEDTLS_SSL_IS_SERVER, MBEDTLS_SSL_TRANSPORT_STREAM, MBEDTLS_SSL_PRESET_DEFAULT)
        || mbedtls_ssl_conf_alpn_protocols(c, protocols))
        return conf_wrong(why, "tls: no memory");
    if (!tls_is_seeded())
        return conf_wrong(why, "tls: the kernel has no random bytes yet");
    mbedtls_ssl_conf_rng(c, mbedtls_psa_get_random, MBEDTLS_PSA_RANDOM_STATE);
    if (tls_parse(files->certificate, &k->chain, NULL, why) < 0 || tls_parse(files->key, NULL, &k->key, why) < 0)
        return -1;
    if (mbedtls_pk_check_pair(&k->chain.pk, &k->key, mbedtls_psa_get_random, MBEDTLS_PSA_RANDOM_STATE))
        return conf_wrong(why, "%.256s: not the key of the certificate in %.256s", files->key, files->certificate);
    if (tls_bytes(&k->chain, false) > MBEDTLS_SSL_OUT_CONTENT_LEN - 64)
        return conf_wrong(why, "%.512s: certificates of more than %d bytes", files->certificate, MBEDTLS_SSL_OUT_CONTENT_LEN - 64);
    if (mbedtls_ssl_conf_own_cert(c, &k->chain, &k->key))
        return conf_wrong(why, "tls: no memory");
    if (!files->client_ca)
        return 0;
    if (tls_parse(files->client_ca, &k->client_ca, NULL, why) < 0)
        return -1;
    mbedtls_ssl_conf_ca_chain(c, &k->client_ca, NULL);
    mbedtls_ssl_conf_authmode(c, MBEDTLS_SSL_VERIFY_REQUIRED);
    if (tls_bytes(&k->client_ca, true) > TLS_CA_LIST_MAX)
        mbedtls_ssl_conf_cert_req_ca_list(c, MBEDTLS_SSL_CERT_REQ_CA_LIST_DISABLED);
    return 0;
}

/* NULL, and why names the file. */
static struct tls_keys *tls_keys_load(const struct tls_files *files, struct buf *why)
{
    struct tls_keys *k = calloc(1, sizeof *k);

    if (!k) {
        buf_add_text(why, "tls: no memory");
        return NULL;
    }
    k->users = 1;
    mbedtls_ssl_config_init(&k->config);
    mbedtls_x509_crt_init(&k->chain);
    mbedtls_x509_crt_init(&k->client_ca);
    mbedtls_pk_init(&k->key);
    if (tls_keys_fill(k, files, why) == 0)
        return k;
    tls_keys_drop(k);
    return NULL;
}

static int tls_on_send(void *arg, const unsigned char *p, size_t n)
{
    struct tls *t = arg;
    ssize_t done = send(t->fd, p, n, MSG_NOSIGNAL);

    t->blocked = done < 0 && (errno == EAGAIN || errno == EINTR);
    return done >= 0 ? (int)done : t->blocked ? MBEDTLS_ERR_SSL_WANT_WRITE : MBEDTLS_ERR_SSL_CONN_EOF;
}

static int tls_on_receive(void *arg, unsigned char *p, size_t n)
{
    struct tls *t = arg;
    ssize_t done = recv(t->fd, p, n, 0);

    t->eof = done == 0;
    return done >= 0 ? (int)done
         : errno == EAGAIN || errno == EINTR ? MBEDTLS_ERR_SSL_WANT_READ : MBEDTLS_ERR_SSL_CONN_EOF;
}

static void tls_free(struct tls *t)
{
    if (!t)
        return;
    mbedtls_ssl_free(&t->ssl);
    tls_keys_drop(t->keys);
    free(t->subject);
    free(t);
}

/* NULL: no memory. */
static struct tls *tls_new(struct tls_keys *keys, int fd)
{
    struct tls *t = calloc(1, sizeof *t);

    if (!t)
        return NULL;
    t->fd = fd;
    t->keys = keys;
    keys->users++;
    mbedtls_ssl_init(&t->ssl);
    if (mbedtls_ssl_setup(&t->ssl, &keys->config)) {
        tls_free(t);
        return NULL;
    }
    mbedtls_ssl_set_bio(&t->ssl, t, tls_on_send, tls_on_receive, NULL);
    return t;
}

/* Takes who the client is from its certificate, which has been verified. */
static int tls_take_subject(struct tls *t)
{
    const mbedtls_x509_crt *crt = mbedtls_ssl_get_peer_cert(&t->ssl);
    char text[TLS_SUBJECT_MAX];

    if (!crt)
        return 0;
    int n = mbedtls_x509_dn_gets(text, sizeof text, &crt->subject);     /* escapes what is not ASCII */
    t->subject = n < 0 ? NULL : span_dup(span_of(text));
    return t->subject ? 0 : n < 0 ? n : MBEDTLS_ERR_SSL_ALLOC_FAILED;
}

/* 1: the connection is open, 0: it waits for the peer (or, `blocked`, for the socket), -1: failed. */
static int tls_handshake(struct tls *t)
{
    int rc = mbedtls_ssl_handshake(&t->ssl);

    if (rc == MBEDTLS_ERR_SSL_WANT_READ || rc == MBEDTLS_ERR_SSL_WANT_WRITE)
        return 0;
    if (rc == 0)
        rc = tls_take_subject(t);
    t->open = rc == 0;
    if (rc != 0)
        log_info("tls: a handshake failed: %s (Mbed TLS: %d)", tls_why(rc), rc);
    return rc == 0 ? 1 : -1;
}

/* As read(2). After the last byte `end` says why nothing follows. */
static ssize_t tls_read(struct tls *t, char *to, size_t size)
{
    size_t got = 0;
    int n = 0;

    while (!t->end && size - got >= MBEDTLS_SSL_IN_CONTENT_LEN      /* so nothing is left inside that epoll does not see */
           && (n = mbedtls_ssl_read(&t->ssl, (unsigned char *)to + got, size - got)) >= 0) {
        got += (size_t)n;
        if (n == 0 && t->eof)       /* else an empty record */
            t->end = MBEDTLS_ERR_SSL_CONN_EOF;
    }
    if (n < 0 && n != MBEDTLS_ERR_SSL_WANT_READ && n != MBEDTLS_ERR_SSL_WANT_WRITE)
        t->end = n;
    if (got > 0)
        return (ssize_t)got;
    if (t->end == MBEDTLS_ERR_SSL_PEER_CLOSE_NOTIFY || t->end == MBEDTLS_ERR_SSL_CONN_EOF)
        return 0;
    errno = t->end ? EPROTO : EAGAIN;
    return -1;
}

/* As send(2). While a record is under way, Mbed TLS wants to be told the same length again. */
static ssize_t tls_write(struct tls *t, const char *p, size_t n)
{
    if (t->writing > 0)
        n = t->writing;
    int rc = mbedtls_ssl_write(&t->ssl, (const unsigned char *)p, n);
    t->writing = rc == MBEDTLS_ERR_SSL_WANT_WRITE ? n : 0;
    if (rc >= 0)
        return rc;
    errno = t->writing > 0 ? EAGAIN : EPIPE;
    return -1;
}

/* close_notify: without it an end could be a cut. False: the socket takes it later. */
static bool tls_close(struct tls *t)
{
    if (t->open && !t->closed)
        t->closed = mbedtls_ssl_close_notify(&t->ssl) != MBEDTLS_ERR_SSL_WANT_WRITE;
    return t->closed || !t->open;
}

/* ==== conn: addresses, listeners, one socket with its buffers and its state ======
 * A vsock address is (CID, port): CID 2 is the host, 3 and up are guests, 1 is loopback
 * (vsock(7)). "Hybrid" is the host's end of it in Firecracker's manner: a Unix socket where
 * the first line says CONNECT PORT and the answer is OK N. */
enum address_kind { ADDRESS_VSOCK, ADDRESS_UNIX, ADDRESS_TCP, ADDRESS_FD, ADDRESS_HYBRID };

struct address {
    enum address_kind kind;
    struct sockaddr_storage sa;
    socklen_t         sa_len;
    int               fd;           /* ADDRESS_FD */
    unsigned          port;         /* ADDRESS_HYBRID, ADDRESS_VSOCK */
    bool              tls;          /* a listener's; tls+ stands before the rest */
    const char       *text;         /* borrowed: as it was written */
    struct span       trust;        /* in it: whose forwarded fields count; n is 0: not said */
};

#define ADDRESS_TRUST   ",trust="   /* after a listener's address: none, all or networks with commas */

static const char address_forms[] =
    "vsock:PORT, unix:PATH, tcp:HOST:PORT, fd:N or (to connect) hybrid:PATH:PORT";

static bool address_unix(struct address *a, struct span path)
{
    struct sockaddr_un *un = (void *)&a->sa;

    if (path.n == 0 || path.n >= sizeof un->sun_path)
        return false;
    un->sun_family = AF_UNIX;
    memcpy(un->sun_path, path.p, path.n);
    a->sa_len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + path.n + 1);
    return true;
}

static bool address_tcp(struct address *a, struct span host, int64_t port)
{
    struct sockaddr_in *in = (void *)&a->sa;
    struct sockaddr_in6 *in6 = (void *)&a->sa;
    char text[INET6_ADDRSTRLEN + 2];

    if (host.n >= 2 && host.p[0] == '[' && host.p[host.n - 1] == ']')
        host = (struct span){ host.p + 1, host.n - 2 };
    if (host.n >= sizeof text)
        return false;
    snprintf(text, sizeof text, "%.*s", (int)host.n, host.p);
    if (span_eq(host, "localhost"))
        snprintf(text, sizeof text, "127.0.0.1");
    if (inet_pton(AF_INET, text, &in->sin_addr) == 1) {
        in->sin_family = AF_INET;
        in->sin_port = htons((uint16_t)port);
        a->sa_len = sizeof *in;
        return true;
    }
    if (inet_pton(AF_INET6, text, &in6->sin6_addr) == 1) {
        in6->sin6_family = AF_INET6;
        in6->sin6_port = htons((uint16_t)port);
        a->sa_len = sizeof *in6;
        return true;
    }
    return false;
}

static void address_vsock(struct address *a, unsigned cid, unsigned port)
{
    struct sockaddr_vm *vm = (void *)&a->sa;

    a->kind = ADDRESS_VSOCK;
    a->port = port;
    vm->svm_family = AF_VSOCK;
    vm->svm_cid = cid;
    vm->svm_port = port;
    a->sa_len = sizeof *vm;
}

/* As 16 bytes: an IPv4 address as the IPv6 address that it is mapped to (RFC 4291 section 2.5.5.2). */
static bool ip_read(struct span s, unsigned char ip[16])
{
    static const unsigned char mapped[12] = { [10] = 0xff, [11] = 0xff };
    char text[INET6_ADDRSTRLEN];

    if (s.n >= sizeof text)
        return false;
    snprintf(text, sizeof text, "%.*s", (int)s.n, s.p);
    memcpy(ip, mapped, sizeof mapped);
    return inet_pton(AF_INET, text, ip + sizeof mapped) == 1 || inet_pton(AF_INET6, text, ip) == 1;
}

struct endpoint {
    char     ip[INET6_ADDRSTRLEN];  /* "": it is no IP address */
    uint16_t port;
};

static void endpoint_take(struct endpoint *e, const struct sockaddr_storage *sa)
{
    const struct sockaddr_in *in = (const void *)sa;
    const struct sockaddr_in6 *in6 = (const void *)sa;

    if (sa->ss_family == AF_INET)
        inet_ntop(AF_INET, &in->sin_addr, e->ip, sizeof e->ip);
    else if (sa->ss_family == AF_INET6 && IN6_IS_ADDR_V4MAPPED(&in6->sin6_addr))
        inet_ntop(AF_INET, (const char *)&in6->sin6_addr + 12, e->ip, sizeof e->ip);
    else if (sa->ss_family == AF_INET6)
        inet_ntop(AF_INET6, &in6->sin6_addr, e->ip, sizeof e->ip);
    if (e->ip[0])                           /* both ports stand at the same place */
        e->port = ntohs(in->sin_port);
}

/* This end of a socket. */
static void endpoint_take_own(struct endpoint *e, int fd)
{
    struct sockaddr_storage sa = { 0 };
    socklen_t size = sizeof sa;

    if (getsockname(fd, (void *)&sa, &size) == 0)
        endpoint_take(e, &sa);
}

/* Of a list with commas, the first item, which is taken from it. */
static struct span list_next(struct span *list)
{
    const char *comma = memchr(list->p, ',', list->n);
    struct span item = { list->p, comma ? (size_t)(comma - list->p) : list->n };
    size_t step = item.n + (comma ? 1 : 0);

    *list = (struct span){ list->p + step, list->n - step };
    return item;
}

/* Whether the network, ADDRESS or ADDRESS/BITS, holds the address. -1: it is no network. */
static int network_has(struct span item, const unsigned char ip[16])
{
    const char *slash = item.n ? memchr(item.p, '/', item.n) : NULL;
    struct span base = { item.p, slash ? (size_t)(slash - item.p) : item.n };
    unsigned char network[16];
    int offset = base.n && memchr(base.p, ':', base.n) ? 0 : 96;
    int64_t bits = 128 - offset;

    if (!ip_read(base, network)
        || (slash && !number_read((struct span){ slash + 1, item.n - base.n - 1 }, 0, bits, &bits)))
        return -1;
    bits += offset;
    for (int i = 0; i < 16; i++) {
        int left = (int)bits - 8 * i;
        int mask = left >= 8 ? 0xff : left <= 0 ? 0 : 0xff << (8 - left) & 0xff;
        if ((network[i] ^ ip[i]) & mask)
            return 0;
    }
    return 1;
}

/* Whether `list`, all or networks with commas, holds the address; with "" whether it is such a list. */
static bool trust_has(struct span list, struct span address)
{
    unsigned char ip[16] = { 0 };
    bool is_ip = ip_read(address, ip);

    if (span_eq(list, "all") || span_eq(list, "none"))
        return list.p[0] == 'a' || address.n == 0;
    while (list.n > 0) {
        int has = network_has(list_next(&list), ip);
        if (address.n == 0 ? has < 0 : has > 0 && is_ip)
            return address.n > 0;
    }
    return address.n == 0;
}

/* False: the text is none of address_forms. A vsock address is a listener's. */
static bool address_parse(struct address *a, const char *text)
{
    const char *colon = strchr(text, ':'), *option = strstr(text, ADDRESS_TRUST);
    struct span scheme = { text, colon ? (size_t)(colon - text) : 0 };
    int64_t n;

    *a = (struct address){ .text = text, .fd = -1 };
    if (!colon || (option && option < colon))
        return false;
    struct span rest = { colon + 1, option ? (size_t)(option - colon - 1) : strlen(colon + 1) };
    if (option) {
        a->trust = span_of(option + strlen(ADDRESS_TRUST));
        if (a->trust.n == 0 || !trust_has(a->trust, SPAN("")))
            return false;
    }
    const char *last = memrchr(rest.p, ':', rest.n);
    struct span port = { last ? last + 1 : NULL, last ? rest.n - (size_t)(last + 1 - rest.p) : 0 };
    struct span front = { rest.p, last ? (size_t)(last - rest.p) : 0 };

    if (span_eq(scheme, "unix")) {
        a->kind = ADDRESS_UNIX;
        return address_unix(a, rest);
    }
    if (span_eq(scheme, "vsock") && number_read(rest, 0, UINT32_MAX, &n)) {
        address_vsock(a, VMADDR_CID_ANY, (unsigned)n);
        return true;
    }
    if (span_eq(scheme, "fd") && number_read(rest, 0, INT_MAX, &n)) {
        a->kind = ADDRESS_FD;
        a->fd = (int)n;
        return true;
    }
    if (span_eq(scheme, "tcp") && last && number_read(port, 0, 65535, &n)) {
        a->kind = ADDRESS_TCP;
        return address_tcp(a, front, n);
    }
    if (span_eq(scheme, "hybrid") && last && number_read(port, 0, UINT32_MAX, &n)) {
        a->kind = ADDRESS_HYBRID;
        a->port = (unsigned)n;
        return address_unix(a, front);
    }
    return false;
}

/* Of a listener that may speak TLS. */
static bool address_parse_tls(struct address *a, const char *text)
{
    bool tls = strncmp(text, "tls+", 4) == 0;
    bool ok = address_parse(a, text + (tls ? 4 : 0)) && a->kind != ADDRESS_HYBRID;

    a->tls = tls;
    a->text = text;
    return ok;
}

static bool address_can_listen(const char *text, bool *tls)
{
    struct address a;
    bool ok = address_parse_tls(&a, text);

    *tls = a.tls;
    return ok;
}

#define LISTEN_BACKLOG      4096    /* connections not yet taken; the kernel has a limit of its own, too */

static int address_socket(const struct address *a)
{
    int fd = SYS_SOCKET(a->sa.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int on = 1;

    if (fd >= 0 && a->kind == ADDRESS_TCP)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return fd;
}

/* A TCP port of the loopback that nobody uses now; 0 and errno: there is none. */
static unsigned address_free_port(void)
{
    struct address a = { .kind = ADDRESS_TCP };
    struct sockaddr_in in;
    socklen_t size = sizeof in;

    address_tcp(&a, SPAN("127.0.0.1"), 0);
    int fd = address_socket(&a);
    bool ok = fd >= 0 && bind(fd, (const void *)&a.sa, a.sa_len) == 0 && getsockname(fd, (void *)&in, &size) == 0;
    fd_close(&fd);
    return ok ? ntohs(in.sin_port) : 0;
}

/* Starts to connect; a Unix socket may be connected at once. -1 and errno. */
static int address_connect(const struct address *a)
{
    int fd = address_socket(a);

    if (fd < 0)
        return -1;
    if (connect(fd, (const void *)&a->sa, a->sa_len) < 0 && errno != EINPROGRESS)
        fd_close(&fd);
    return fd;
}

enum conn_state {
    CONN_CONNECTING,    /* connect(2) is under way */
    CONN_GREETING,      /* hybrid: CONNECT PORT is said, OK N is awaited; only then comes more */
    CONN_HANDSHAKE,     /* TLS is agreed on */
    CONN_OPEN,          /* bytes go both ways */
    CONN_DRAINING,      /* nothing more will be added to out */
    CONN_LINGERING,     /* all sent; what the peer still sends is read so that it can read us */
    CONN_DEAD           /* buried: freed at the end of the turn */
};

struct conn;

/* What one protocol does with its connections. */
struct proto {
    const char *name;
    void (*on_input)(struct conn *);        /* bytes in `in`, or `eof`, or called back by loop_soon */
    void (*on_sent)(struct conn *);         /* `out` got shorter */
    void (*on_deadline)(struct conn *);
    void (*on_close)(struct conn *);        /* gives up everything that hangs from it */
    void (*on_free)(struct conn *);         /* frees the struct that holds it */
    size_t (*room)(struct conn *);          /* how much to read now; NULL: CONN_READ_BYTES. 0 pauses */
    bool reads_to_end;                      /* also from a peer that has gone, however long it takes */
    bool reads_in_place;                    /* on_input only looks at `in` and drops from it */
};

struct conns {
    struct loop *loop;
    size_t       count;
    uint64_t     turn;              /* of the loop, in which */
    unsigned     steps;             /* so many steps of handshakes were made */
};

struct conn {
    struct watch        watch;      /* first member: the loop hands us this address */
    struct conns       *all;
    const struct proto *proto;
    enum conn_state     state;
    struct buf          in, out;    /* not yet parsed, not yet sent */
    unsigned            greets;     /* hybrid: the port to ask for once it is connected; else 0 */
    size_t              in_max;     /* reading stops while `in` holds this much */
    bool                eof;        /* the peer has sent its last byte, and we have read it */
    bool                half;       /* the peer sends no more: epoll has said so once */
    bool                gone;       /* the peer reads no more either */
    bool                reset;      /* it broke off: what it sent need not be all */
    bool                paused;     /* the protocol takes no input now */
    bool                more;       /* there may be input that epoll has told of: read at the end of the turn */
    bool                linger;     /* the peer may be sending what nobody will parse */
    struct tls         *tls;        /* owned; NULL: plain */
};

static void conn_bury(struct watch *w)
{
    struct conn *c = CONTAINER(w, struct conn, watch);
    buf_fini(&c->in);
    buf_fini(&c->out);
    tls_free(c->tls);
    c->proto->on_free(c);
}

/* Ends it now, whatever is unsent. */
static void conn_close(struct conn *c)
{
    if (c->state == CONN_DEAD)
        return;
    c->state = CONN_DEAD;
    c->all->count--;
    loop_bury(c->all->loop, &c->watch, conn_bury);
    c->proto->on_close(c);
}

/* What epoll shall watch. Never nothing: EPOLLHUP keeps us told that the peer is gone. Bytes that
 * come are told once (EPOLLET): a read that gets less than it asked for has taken them all (epoll(7),
 * questions), and epoll need not look whether it did. See conn_settle for those that stay. */
static uint32_t conn_interest(const struct conn *c)
{
    bool blocked = c->tls && c->tls->blocked;
    uint32_t out = c->out.len > 0 || blocked ? EPOLLOUT : 0;

    switch (c->state) {
    case CONN_CONNECTING:
        return EPOLLOUT;
    case CONN_HANDSHAKE:
        return blocked ? EPOLLOUT : EPOLLIN;
    case CONN_OPEN:
        return EPOLLHUP | out | (c->half ? 0 : (uint32_t)EPOLLRDHUP) | (c->tls ? 0 : (uint32_t)EPOLLET)
             | (c->eof || c->paused || c->in.len >= c->in_max ? 0 : (uint32_t)EPOLLIN);
    case CONN_DRAINING:
        return EPOLLHUP | out;
    case CONN_GREETING:
    case CONN_LINGERING:
        return EPOLLIN;
    case CONN_DEAD:
        break;
    }
    return 0;
}

static void conn_flush(struct conn *c)
{
    size_t before = c->out.len;

    if (c->out.failed) {                /* a reply with a hole in it must not go on */
        log_info("%s: no memory for a reply, closed", c->proto->name);
        conn_close(c);
        return;
    }
    while (c->out.len > 0) {
        ssize_t n = c->tls ? tls_write(c->tls, buf_at(&c->out), c->out.len)
                  : send(c->watch.fd, buf_at(&c->out), c->out.len, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            break;
        bool is_gone = errno != ENOMEM && errno != ENOBUFS;
        if (n < 0 && c->state == CONN_OPEN && c->proto->reads_to_end && is_gone) {
            c->gone = true;
            c->reset |= errno == ECONNRESET;        /* EPIPE: after an orderly end */
            buf_drop(&c->out, c->out.len);
            break;
        }
        if (n < 0) {
            conn_close(c);
            return;
        }
        buf_drop(&c->out, (size_t)n);
    }
    if (c->out.len < before && c->state == CONN_DRAINING)
        loop_after(c->all->loop, &c->watch, limits.send_ms);
    if (c->out.len < before && c->state == CONN_OPEN && c->proto->on_sent)
        c->proto->on_sent(c);
}

/* The peer sends no more. Whether it still reads, a vsock tells in no event: there EPOLLHUP
 * means that both ends have shut down. An empty send fails if it does not (EPIPE). */
static void conn_half_closed(struct conn *c)
{
    c->half = true;
    if (send(c->watch.fd, "", 0, MSG_NOSIGNAL) < 0) {
        c->gone = true;
        c->reset |= errno == ECONNRESET;            /* told once only: no read will say it */
    }
}

static char conn_bytes[WORKER_READ_BYTES];  /* what was read last */

/* `in` has looked at conn_bytes: what is left of them is kept. */
static void conn_keep(struct conn *c)
{
    if (c->in.data != conn_bytes)
        return;
    struct span rest = buf_span(&c->in);
    c->in = (struct buf){ 0 };
    if (buf_add_span(&c->in, rest) < 0) {
        log_info("%s: no memory for input, closed", c->proto->name);
        conn_close(c);
    }
}

/* One read of at most `most` bytes, which is no more than CONN_READ_BYTES. */
static void conn_read(struct conn *c, size_t most)
{
    char *bytes = conn_bytes;
    bool tls = c->tls && c->state == CONN_OPEN;
    ssize_t n = tls ? tls_read(c->tls, bytes, CONN_READ_BYTES) : SYS_READ(c->watch.fd, bytes, most);

    c->more = n < 0 ? errno == EINTR : n > 0 && ((size_t)n == most || c->half || c->gone);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        c->eof = true;
        c->gone |= n < 0;
        c->reset |= n < 0;
        return;
    }
    if (c->state != CONN_OPEN)      /* nobody will parse it */
        return;
    c->eof = tls && c->tls->end != 0;
    if (c->proto->reads_in_place && c->in.len == 0) {
        buf_fini(&c->in);
        c->in = (struct buf){ .data = bytes, .len = (size_t)n };
        return;
    }
    if (buf_add(&c->in, bytes, (size_t)n) < 0) {
        log_info("%s: no memory for input, closed", c->proto->name);
        conn_close(c);
    }
}

/* After the last byte of out: close, or read on for a while so that an answer given in the
 * middle of the peer's sending is not destroyed by a reset. */
static void conn_drained(struct conn *c)
{
    if (c->tls && !tls_close(c->tls))
        return;
    if (!c->linger || c->eof) {
        if (!c->eof)
            conn_read(c, CONN_READ_BYTES);      /* closing over unread bytes is a reset too */
        conn_close(c);
        return;
    }
    c->state = CONN_LINGERING;
    shutdown(c->watch.fd, SHUT_WR);
    loop_after(c->all->loop, &c->watch, limits.linger_ms);
}

/* Brings the state up to date with what the protocol left behind. Input that nobody takes now is
 * watched on until some comes (`unread`): most pauses end before, and cost no system call so. */
static void conn_settle(struct conn *c, bool unread)
{
    if (c->state != CONN_DEAD && c->state >= CONN_OPEN && (c->out.len > 0 || c->out.failed))
        conn_flush(c);
    if (c->state == CONN_DRAINING && c->out.len == 0)
        conn_drained(c);
    if (c->state == CONN_DEAD)
        return;
    bool full = c->in.len >= c->in_max && !c->eof && !c->paused && c->state == CONN_OPEN;
    bool waits = c->gone && (full || (c->eof && c->in.len > 0)) && c->state == CONN_OPEN
              && c->proto->reads_to_end;                        /* until conn_soon, deaf to EPOLLHUP */
    if (c->gone && !waits && (full || c->eof || c->paused || c->state != CONN_OPEN)) {
        conn_close(c);
        return;
    }
    uint32_t want = waits ? 0 : conn_interest(c);
    unread |= c->more;
    c->more = unread && want & EPOLLET && want & EPOLLIN;   /* unwatched, it is told of again when watched */
    if (c->more)
        loop_soon(c->all->loop, &c->watch);
    if (want && !unread && c->watch.events == (want | EPOLLIN))
        return;
    if (loop_want(c->all->loop, &c->watch, want) < 0)
        conn_close(c);
}

/* Adds to `out`, or sends at once what is long. */
static void conn_pass(struct conn *c, struct span data)
{
    if (c->state == CONN_OPEN && !c->gone && !c->tls)
        buf_pass(&c->out, c->watch.fd, data);
    else
        buf_add_span(&c->out, data);
}

/* Lets what stands in out go, then closes. */
static void conn_finish(struct conn *c)
{
    if (c->state > CONN_OPEN)
        return;
    c->state = CONN_DRAINING;
    loop_after(c->all->loop, &c->watch, limits.send_ms);
    loop_soon(c->all->loop, &c->watch);
}

static void conn_connected(struct conn *c)
{
    int error = 0;
    socklen_t size = sizeof error;

    getsockopt(c->watch.fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        errno = error;
        conn_close(c);
        return;
    }
    c->state = c->greets ? CONN_GREETING : CONN_OPEN;
    char line[32];
    int n = snprintf(line, sizeof line, "CONNECT %u\n", c->greets);
    if (c->greets && send(c->watch.fd, line, (size_t)n, MSG_NOSIGNAL) != n)
        conn_close(c);
}

/* Byte by byte: what follows the line is not ours. */
static void conn_greeted(struct conn *c)
{
    char byte = 0;
    ssize_t n;

    while (byte != '\n' && c->in.len < CONN_GREETING_MAX && (n = recv(c->watch.fd, &byte, 1, 0)) != 0) {
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n < 0 || buf_add_byte(&c->in, (unsigned char)byte) < 0)
            break;
    }
    bool ok = byte == '\n' && c->in.len > 2 && memcmp(buf_at(&c->in), "OK", 2) == 0;
    buf_drop(&c->in, c->in.len);
    c->state = CONN_OPEN;
    errno = ECONNREFUSED;
    if (!ok)
        conn_close(c);
}

/* Signing takes its time: a turn makes a few steps, epoll brings the others again in the next. */
static void conn_handshake(struct conn *c)
{
    struct conns *all = c->all;

    all->steps = all->turn == all->loop->turn ? all->steps + 1 : 1;
    all->turn = all->loop->turn;
    if (all->steps > TLS_STEPS_PER_TURN)
        return;
    int rc = tls_handshake(c->tls), on = 1;
    if (rc > 0) {                   /* its request may wait for our ACK, which has nothing to go with: tcp(7) */
        setsockopt(c->watch.fd, IPPROTO_TCP, TCP_QUICKACK, &on, sizeof on);
        c->state = CONN_OPEN;
    }
    c->linger = rc < 0;             /* so that it can read the alert */
    if (rc < 0)
        conn_finish(c);
}

static void conn_on_event(struct watch *w, uint32_t events)
{
    struct conn *c = CONTAINER(w, struct conn, watch);

    events |= c->more ? EPOLLIN : 0;
    c->more = false;
    if (c->state == CONN_CONNECTING && events)
        conn_connected(c);
    else if (c->state == CONN_GREETING && events)
        conn_greeted(c);
    if (events & (EPOLLHUP | EPOLLERR))
        c->gone = true;
    if (c->state == CONN_HANDSHAKE && events)
        conn_handshake(c);
    if (events & EPOLLRDHUP && c->state == CONN_OPEN)
        conn_half_closed(c);
    bool wants = c->state == CONN_LINGERING
              || (c->state == CONN_OPEN && !c->eof && !c->paused && c->in.len < c->in_max);
    size_t most = CONN_READ_BYTES;
    if (wants && events & EPOLLIN && c->proto->room && c->state == CONN_OPEN)
        most = c->proto->room(c);
    c->paused |= most == 0;
    wants = wants && most > 0;
    if (wants && events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        conn_read(c, most < CONN_READ_BYTES ? most : CONN_READ_BYTES);
    if (c->state == CONN_LINGERING && c->eof)
        conn_close(c);
    if (c->state == CONN_OPEN)
        c->proto->on_input(c);
    conn_keep(c);
    conn_settle(c, !wants && events & EPOLLIN);
}

static void conn_on_deadline(struct watch *w)
{
    struct conn *c = CONTAINER(w, struct conn, watch);

    if (c->state == CONN_HANDSHAKE) {
        log_info("tls: a handshake took more than %" PRId64 " ms, closed", limits.silent_ms);
        conn_close(c);
    } else if (c->state <= CONN_OPEN) {
        c->proto->on_deadline(c);
        conn_settle(c, false);
    } else {
        conn_close(c);
    }
}

/* Takes a zeroed conn into service. On failure the descriptor is closed and -1 returned. */
static int conn_open(struct conn *c, struct conns *all, const struct proto *proto, int fd, enum conn_state state)
{
    c->watch = (struct watch){ .fd = fd, .on_event = conn_on_event, .on_deadline = conn_on_deadline };
    c->all = all;
    c->proto = proto;
    c->state = state;
    c->in_max = CONN_READ_BYTES;
    if (loop_want(all->loop, &c->watch, conn_interest(c)) < 0) {
        fd_close(&c->watch.fd);
        return -1;
    }
    all->count++;
    return 0;
}

/* Runs the protocol again at the end of the turn: there may be input, output or news. */
static void conn_soon(struct conn *c)
{
    loop_soon(c->all->loop, &c->watch);
}

static void conn_after(struct conn *c, int64_t ms)
{
    loop_after(c->all->loop, &c->watch, ms);
}

/* It stays in the heap, as the next one is not far. */
static void conn_never(struct conn *c)
{
    c->watch.deadline_ms = INT64_MAX;
}

struct listener {
    struct watch   watch;
    struct conns  *all;
    struct address address;
    void         (*on_accept)(struct listener *, int fd);   /* owns fd */
    size_t         extra;           /* places past limits.conns that are only this one's */
    const char    *full;            /* sent and closed when there are too many; may be NULL */
    struct sockaddr_storage peer;   /* during on_accept: of its connection */
    void          *arg;
};

static bool listener_trusts(const struct listener *l, const struct sockaddr_storage *peer)
{
    const struct sockaddr_vm *vm = (const void *)peer;
    bool is_vsock = l->address.kind == ADDRESS_VSOCK || peer->ss_family == AF_VSOCK;

    return !is_vsock || (peer->ss_family == AF_VSOCK && vm->svm_cid == VMADDR_CID_HOST);
}

/* Says why and closes; what has come is read first, as closing over it would be a reset. */
static void listener_turn_away(const struct listener *l, int fd)
{
    char bytes[4096];

    if (l->full)
        send(fd, l->full, strlen(l->full), MSG_NOSIGNAL | MSG_DONTWAIT);
    for (int i = 0; i < 16 && recv(fd, bytes, sizeof bytes, MSG_DONTWAIT) > 0;)
        i++;
    fd_close(&fd);
}

static void listener_on_event(struct watch *w, uint32_t events)
{
    struct listener *l = CONTAINER(w, struct listener, watch);
    (void)events;

    for (int i = 0; i < 64 && w->events; i++) {     /* on_accept may want no more */
        struct sockaddr_storage peer = { 0 };
        socklen_t size = sizeof peer;
        int on = 1, fd = SYS_ACCEPT(w->fd, (void *)&peer, &size, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0 && errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
            log_errno("%s: accept", l->address.text);   /* EMFILE: wait for somebody to leave */
            loop_want(l->all->loop, w, 0);
            loop_after(l->all->loop, w, 100);
        }
        if (fd < 0)
            return;
        if (!listener_trusts(l, &peer)) {
            log_info("%s: a peer that is not the host was turned away", l->address.text);
            fd_close(&fd);
        } else if (l->all->count >= (size_t)limits.conns + l->extra) {
            log_info("%s: more than %" PRId64 " connections, one was turned away",
                     l->address.text, limits.conns);
            listener_turn_away(l, fd);
        } else {
            if (l->address.kind == ADDRESS_TCP)
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
            l->peer = peer;
            l->on_accept(l, fd);
        }
        /* With nothing left, vsock's accept sleeps until the kernel's next tick even so
         * (af_vsock.c: schedule_timeout(0)), and with it everybody: epoll tells of more. */
        if (peer.ss_family == AF_VSOCK)
            return;
    }
}

static void listener_start(struct listener *l)
{
    if (l->watch.fd >= 0 && loop_want(l->all->loop, &l->watch, EPOLLIN) < 0)
        loop_after(l->all->loop, &l->watch, 100);
}

static void listener_on_deadline(struct watch *w)
{
    listener_start(CONTAINER(w, struct listener, watch));
}

static int listener_bind(struct listener *l)
{
    const struct address *a = &l->address;
    int on = 1, fd = a->kind == ADDRESS_FD ? fcntl(a->fd, F_DUPFD_CLOEXEC, 10) : address_socket(a);

    if (fd < 0)
        return -1;
    if (a->kind == ADDRESS_FD) {
        fcntl(a->fd, F_SETFD, FD_CLOEXEC);      /* a program does not inherit it */
        return fd_nonblock(fd) < 0 ? (fd_close(&fd), -1) : fd;
    }
    if (a->kind == ADDRESS_TCP)
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (a->kind == ADDRESS_UNIX)
        unlink(((const struct sockaddr_un *)(const void *)&a->sa)->sun_path);
    mode_t before = umask(0177);        /* a Unix socket is for its owner */
    int rc = bind(fd, (const void *)&a->sa, a->sa_len);
    umask(before);
    if (rc < 0 || listen(fd, LISTEN_BACKLOG) < 0)
        fd_close(&fd);
    return fd;
}

static void listener_close(struct listener *l)
{
    loop_want(l->all->loop, &l->watch, 0);
    loop_never(l->all->loop, &l->watch);    /* it may wait for a descriptor */
    fd_close(&l->watch.fd);
}

/* l->address, all, on_accept, arg are set by the caller. Whoever connects waits until
 * listener_start. 0, or -1 and errno. */
static int listener_open(struct listener *l)
{
    l->watch = (struct watch){ .fd = listener_bind(l), .on_event = listener_on_event,
                               .on_deadline = listener_on_deadline };
    return l->watch.fd < 0 ? -1 : 0;
}

/* ==== exchange: one request and its response in flight ===========================
 * The seam between fronts and backends. A front starts an exchange and hands it the body;
 * a backend answers with one head, body bytes and an end, or with a failure. Neither knows
 * the other: both call the functions here, which keep the order and check the program's
 * answer. Flow control: a front sends no more body than exchange_room, and reports with
 * exchange_consumed what of the response has left its hands. */
enum failure {
    FAILURE_EXCEPTION,      /* the program raised */
    FAILURE_BAD_RESPONSE,   /* the program's answer is none */
    FAILURE_CRASHED,        /* the program died */
    FAILURE_NOT_STARTED,    /* there is no program, or it does not start */
    FAILURE_TIMEOUT,
    FAILURE_NO_MEMORY,
};

/* RFC 9110 section 15.6, for fronts that speak HTTP. */
static const int failure_status[] = {
    [FAILURE_EXCEPTION] = 500, [FAILURE_BAD_RESPONSE] = 502, [FAILURE_CRASHED] = 502,
    [FAILURE_NOT_STARTED] = 503, [FAILURE_TIMEOUT] = 504, [FAILURE_NO_MEMORY] = 503,
};

struct part { uint32_t at, n; };    /* a place in request.text */

struct request {
    bool        is_event;           /* an aleph.message; `body_text` is its body */
    bool        has_body;           /* body bytes follow by exchange_body */
    const char *http_version;       /* "1.0", "1.1" */
    struct buf  text;               /* what the parts point into */
    struct part method, raw_path, query, event;
    struct part upgrade;            /* the protocol that the client offers to change to; n is 0: none */
    struct part client, server;     /* IP addresses, of the client and ours; n is 0: not known */
    uint16_t    client_port, server_port;       /* 0: not known */
    bool        is_https;           /* between the client and whoever spoke TLS with it */
    bool        forwarded;          /* the fields tell of both as well */
    struct part fields;             /* fields_count times name NUL value NUL, as the client wrote them */
    uint32_t    fields_count;
};

/* The fields of a response head, checked: names are tokens, values hold no control bytes. */
struct response_head {
    int         status;
    struct span fields;             /* name NUL value NUL …; hop-by-hop ones still among them */
    unsigned    fields_count;
    int64_t     content_length;     /* -1: none given */
    bool        has_connection;     /* a field Connection, which may name others */
};

struct exchange;

struct front {
    void (*on_room)(struct exchange *);         /* exchange_room has grown */
    void (*on_head)(struct exchange *, const struct response_head *);
    void (*on_data)(struct exchange *, struct span);
    void (*on_end)(struct exchange *);          /* either this or on_fail comes, once, last */
    void (*on_fail)(struct exchange *, enum failure, struct span text, struct span traceback);
};

struct backend {
    size_t (*room)(struct exchange *);          /* body bytes that would be taken now */
    void   (*body)(struct exchange *, struct span, bool last);
    void   (*consumed)(struct exchange *, size_t n);
    void   (*cancel)(struct exchange *);        /* nobody waits any more */
};

/* What somebody is busy with. */
struct load {
    size_t        n;                /* exchanges */
    struct watch *awaits;           /* run at the end of a turn in which n got less; NULL: nobody waits for it */
};

struct exchange {
    const struct front   *front;
    const struct backend *backend;  /* NULL before exchange_start and once it has ended */
    void                 *stream;   /* the backend's own */
    struct load          *load;     /* that it is part of, or NULL */
    struct loop          *loop;
    struct watch          timer;    /* the limit for the response head */
    struct request        request;  /* freed as soon as the backend has sent it on */
    bool                  head_seen;
    bool                  repeated;             /* to the same process, which had closed a connection */
    bool                  may_upgrade;          /* 101 is an answer; then bytes go both ways as they come */
    int64_t               body_left;            /* of a declared Content-Length; -1: none declared */
    struct exchange      *next, **link;         /* in the program's queue */
};

static struct span request_part(const struct request *r, struct part p)
{
    return (struct span){ buf_at(&r->text) + p.at, p.n };
}

static void request_fini(struct request *r)
{
    buf_fini(&r->text);
    *r = (struct request){ 0 };
}

/* Begins a part; request_part_end closes it. */
static struct part request_part_begin(const struct request *r)
{
    return (struct part){ (uint32_t)r->text.len, 0 };
}

static void request_part_end(const struct request *r, struct part *p)
{
    p->n = (uint32_t)r->text.len - p->at;
}

/* The field that tells the program who a client's certificate is made out to. Nobody else may say
 * so, nor with '_', which is the same to WSGI. */
#define FIELD_SUBJECT   "x-client-subject"

static bool field_is_subject(struct span name)
{
    bool same = name.n == strlen(FIELD_SUBJECT);

    for (size_t i = 0; same && i < name.n; i++)
        same = tolower((unsigned char)(name.p[i] == '_' ? '-' : name.p[i])) == FIELD_SUBJECT[i];
    return same;
}

static bool field_is_hop_by_hop(struct span name)      /* RFC 9110 section 7.6.1 */
{
    return span_eq_nocase(name, "connection") || span_eq_nocase(name, "keep-alive")
        || span_eq_nocase(name, "proxy-connection") || span_eq_nocase(name, "proxy-authenticate")
        || span_eq_nocase(name, "proxy-authorization") || span_eq_nocase(name, "te")
        || span_eq_nocase(name, "trailer") || span_eq_nocase(name, "transfer-encoding")
        || span_eq_nocase(name, "upgrade");
}

static bool field_name_ok(struct span s)                /* token, RFC 9110 section 5.6.2 */
{
    static const bool ok[256] = { ['0' ... '9'] = true, ['A' ... 'Z'] = true, ['a' ... 'z'] = true, ['!'] = true,
        ['#' ... '\''] = true, ['*'] = true, ['+'] = true, ['-'] = true, ['.'] = true, ['^' ... '`'] = true,
        ['|'] = true, ['~'] = true };

    for (size_t i = 0; i < s.n; i++)
        if (!ok[(unsigned char)s.p[i]])
            return false;
    return s.n > 0;
}

static bool is_blank(char c)
{
    return c == ' ' || c == '\t';
}

static bool field_value_ok(struct span s)               /* RFC 9110 section 5.5 */
{
    for (size_t i = 0; i < s.n; i++) {
        unsigned char c = (unsigned char)s.p[i];
        if ((c < 0x20 && c != '\t') || c == 0x7f)
            return false;
    }
    return true;
}

/* llhttp takes RTSP and ICE too. `seen` counts what came in pieces before. */
static bool protocol_is_http(unsigned *seen, const char *p, size_t n)
{
    bool is = n <= 4 - *seen && memcmp("HTTP" + *seen, p, n) == 0;

    *seen += is ? (unsigned)n : 0;
    return is;
}

/* Takes one name NUL value NUL from the front of a span. False: it is not there. */
static bool field_next(struct span *rest, struct span *name, struct span *value)
{
    const char *end = rest->n ? memchr(rest->p, 0, rest->n) : NULL;
    if (!end)
        return false;
    *name = (struct span){ rest->p, (size_t)(end - rest->p) };
    struct span after = { end + 1, rest->n - name->n - 1 };
    end = after.n ? memchr(after.p, 0, after.n) : NULL;
    if (!end)
        return false;
    *value = (struct span){ after.p, (size_t)(end - after.p) };
    *rest = (struct span){ end + 1, after.n - value->n - 1 };
    return true;
}

/* Whether a value of Connection names the field: it ends at this connection too. */
static bool field_is_named_in(struct span connection, struct span name)
{
    while (connection.n > 0) {
        const char *comma = memchr(connection.p, ',', connection.n);
        struct span item = { connection.p, comma ? (size_t)(comma - connection.p) : connection.n };
        size_t step = item.n + (comma ? 1 : 0);
        while (item.n > 0 && (item.p[0] == ' ' || item.p[0] == '\t'))
            item = (struct span){ item.p + 1, item.n - 1 };
        while (item.n > 0 && (item.p[item.n - 1] == ' ' || item.p[item.n - 1] == '\t'))
            item.n--;
        if (item.n == name.n && bytes_eq_nocase(item.p, name.p, name.n))
            return true;
        connection = (struct span){ connection.p + step, connection.n - step };
    }
    return false;
}

/* Whether a field of a response goes no further than the connection that it came by. */
static bool field_is_dropped(const struct response_head *h, struct span name)
{
    struct span fields = h->fields, field, value;

    if (field_is_hop_by_hop(name) || !h->has_connection)
        return field_is_hop_by_hop(name);
    while (field_next(&fields, &field, &value))
        if (span_eq_nocase(field, "connection") && field_is_named_in(value, name))
            return true;
    return false;
}

/* "Name: value", as a line of a head. */
static void field_add_line(struct buf *out, struct span name, struct span value)
{
    size_t n = name.n + value.n + 4;
    char *to = buf_room(out, n);

    if (!to)
        return;
    memcpy(to, name.p, name.n);
    memcpy(to + name.n, ": ", 2);
    memcpy(to + name.n + 2, value.p, value.n);
    memcpy(to + n - 2, "\r\n", 2);
    buf_added(out, n);
}

static void exchange_unload(struct exchange *ex)
{
    if (!ex->load)
        return;
    ex->load->n--;
    if (ex->load->awaits)
        loop_soon(ex->loop, ex->load->awaits);
    ex->load = NULL;
}

/* The backend has gone or is done with this exchange. */
static void exchange_leave(struct exchange *ex)
{
    exchange_unload(ex);
    loop_never(ex->loop, &ex->timer);
    ex->backend = NULL;
    ex->stream = NULL;
    request_fini(&ex->request);
}

/* ---- called by backends ---- */

static void exchange_fail(struct exchange *ex, enum failure kind, struct span text, struct span traceback)
{
    exchange_leave(ex);
    ex->front->on_fail(ex, kind, text, traceback);
}

/* Fails an exchange whose backend does not know it yet. */
PRINTF(3, 4)
static void exchange_cancel_fail(struct exchange *ex, enum failure kind, const char *format, ...)
{
    char text[256];
    va_list ap;

    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    log_info("request failed: %s", text);
    if (ex->backend)
        ex->backend->cancel(ex);
    exchange_fail(ex, kind, span_of(text), SPAN(""));
}

/* Checks a head. NULL, or what is wrong with it. */
static const char *response_head_check(struct response_head *h, bool may_upgrade)
{
    struct span rest = h->fields, name, value;
    int64_t length;

    h->content_length = -1;
    if ((h->status < 200 && !(may_upgrade && h->status == 101)) || h->status > 999)
        return "a status outside of 200 to 999";
    if (h->fields_count > limits.head_fields)
        return "too many fields";
    if (h->fields.n > (size_t)limits.head_bytes)
        return "a head that is too large";
    while (field_next(&rest, &name, &value)) {
        if (!field_name_ok(name))
            return "a field whose name is no token";
        if (!field_value_ok(value))
            return "a field with CR, LF or another control byte in its value";
        h->has_connection |= span_eq_nocase(name, "connection");
        if (!span_eq_nocase(name, "content-length"))
            continue;
        if (!number_read(value, 0, INT64_MAX, &length)
            || (h->content_length >= 0 && h->content_length != length))
            return "a Content-Length that is no number, or two that differ";
        h->content_length = length;
    }
    return NULL;
}

static void exchange_head(struct exchange *ex, struct response_head *h)
{
    const char *wrong = response_head_check(h, ex->may_upgrade);

    if (wrong) {
        exchange_cancel_fail(ex, FAILURE_BAD_RESPONSE, "the program answered with %s", wrong);
        return;
    }
    loop_never(ex->loop, &ex->timer);
    ex->head_seen = true;
    ex->body_left = h->content_length;
    ex->front->on_head(ex, h);
}

static void exchange_data(struct exchange *ex, struct span data)
{
    ex->front->on_data(ex, data);
}

static void exchange_end(struct exchange *ex)
{
    exchange_leave(ex);
    ex->front->on_end(ex);
}

static void exchange_room_grew(struct exchange *ex)
{
    ex->front->on_room(ex);
}

static void nothing_cancelled(struct exchange *ex)
{
    (void)ex;
}

static void nothing_consumed(struct exchange *ex, size_t n)
{
    (void)ex;
    (void)n;
}

static void nothing_taken(struct exchange *ex, struct span data, bool last)
{
    (void)ex;
    (void)data;
    (void)last;
}

static size_t nothing_fits(struct exchange *ex)
{
    (void)ex;
    return 0;
}

/* For an exchange that waits, or whose answer is ours. */
static const struct backend nobody_backend = {
    .room = nothing_fits, .body = nothing_taken, .consumed = nothing_consumed, .cancel = nothing_cancelled,
};

/* Answers in the program's place. */
static void exchange_answer(struct exchange *ex, int status, struct span fields, unsigned fields_count, struct span body)
{
    struct response_head h = { .status = status, .fields = fields, .fields_count = fields_count };

    ex->backend = &nobody_backend;
    exchange_head(ex, &h);
    if (ex->backend)
        exchange_data(ex, body);
    if (ex->backend)
        exchange_end(ex);
}

/* ---- called by fronts ---- */

static size_t exchange_room(struct exchange *ex)
{
    return ex->backend ? ex->backend->room(ex) : 0;
}

/* At most exchange_room bytes; `last` ends the body and may come with none. */
static void exchange_body(struct exchange *ex, struct span data, bool last)
{
    if (!ex->backend)
        return;
    if (!ex->head_seen)             /* a long upload is no silence of the program's */
        loop_after(ex->loop, &ex->timer, limits.response_head_ms);
    ex->backend->body(ex, data, last);
}

static void exchange_consumed(struct exchange *ex, size_t n)
{
    if (ex->backend && n > 0)
        ex->backend->consumed(ex, n);
}

/* Nobody waits for the answer any more; nothing is called back after this. */
static void exchange_cancel(struct exchange *ex)
{
    if (!ex->backend)
        return;
    ex->backend->cancel(ex);
    exchange_leave(ex);
}

static void exchange_on_deadline(struct watch *w)
{
    struct exchange *ex = CONTAINER(w, struct exchange, timer);
    exchange_cancel_fail(ex, FAILURE_TIMEOUT, "no response head within %" PRId64 " ms",
                         limits.response_head_ms);
}

/* ex->front and ex->request are set by the front; the backend takes it from here. */
static void exchange_start(struct exchange *ex, struct loop *loop, const struct backend *backend)
{
    ex->loop = loop;
    ex->backend = backend;
    ex->head_seen = false;
    ex->load = NULL;
    ex->may_upgrade = ex->request.upgrade.n > 0;
    ex->body_left = -1;
    ex->timer = (struct watch){ .fd = -1, .on_deadline = exchange_on_deadline };
    loop_after(loop, &ex->timer, limits.response_head_ms);
}

/* ==== websocket: RFC 6455 between a tunnel and a program that has messages ========
 * After a 101 a front hands on bytes as they come, both ways. For a backend whose program
 * knows messages, wslay takes the client's frames apart and checks them; pings are answered
 * here. A piece of a message takes its size and that of a worker's frame of credit, so that
 * empty messages are not free. A Close is answered by a Close, then the connection ends; who
 * does not answer ours has limits.linger_ms. */
#define WEBSOCKET_PIECE_COST    FRAME_HEADER_BYTES
#define WEBSOCKET_REASON_MAX    123     /* a control frame has 125 bytes, section 5.5 */
#define WEBSOCKET_KEY_CHARS     24      /* 16 bytes in base64 */
#define WEBSOCKET_ACCEPT_CHARS  28      /* a SHA-1 in base64 */

/* The backend that has the program. */
struct websocket_user {
    size_t (*room)(void *stream);       /* credit for pieces */
    void   (*piece)(void *stream, bool is_text, struct span, bool last);
    void   (*credit)(void *stream, size_t n);
    void   (*gone)(void *stream, int code, struct span reason);     /* nothing is called after */
};

struct websocket {
    struct exchange             *ex;
    const struct websocket_user *user;
    void                        *stream;    /* the user's own; NULL: only the Close is still to come */
    wslay_event_context_ptr      wslay;
    struct watch                 timer;     /* the next ping, or its answer; the client's Close */
    struct span                  input;     /* what wslay has not read; for one call */
    struct buf                   piece;     /* of the client's message; for one call */
    struct buf                   reason;    /* of the client's Close */
    uint64_t                     message_bytes;     /* of the client's message so far */
    size_t                       unread, cost;      /* not yet taken by the client: bytes, credit for pieces */
    bool                         is_control, is_text;       /* the client's frame, its message */
    bool                         within, within_text;       /* a message of the program */
    bool                         pinged;
};

static bool request_is_websocket(const struct request *r)
{
    return field_is_named_in(request_part(r, r->upgrade), SPAN("websocket"));
}

/* Checks the client's handshake, section 4.2.1, and makes the answer to its key. False: it is
 * refused and the exchange has ended. */
static bool websocket_shake(struct exchange *ex, char accept[WEBSOCKET_ACCEPT_CHARS + 1])
{
    static const char version_field[] = "sec-websocket-version\0" "13";
    struct span rest = request_part(&ex->request, ex->request.fields), name, value, key = SPAN("");
    unsigned char bytes[20], text[] = "------------------------258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    bool is_13 = false;
    unsigned keys = 0;
    size_t n = 0;

    while (field_next(&rest, &name, &value))
        if (span_eq_nocase(name, "sec-websocket-version")) {
            is_13 = span_eq(value, "13");
        } else if (span_eq_nocase(name, "sec-websocket-key")) {
            key = value;
            keys++;
        }
    bool key_ok = keys == 1 && key.n == WEBSOCKET_KEY_CHARS
               && mbedtls_base64_decode(bytes, 16, &n, (const unsigned char *)key.p, key.n) == 0 && n == 16;
    const char *wrong = !span_eq(request_part(&ex->request, ex->request.method), "GET") ? "it is no GET"
                      : !is_13 ? "Sec-WebSocket-Version is not 13"
                      : !key_ok ? "Sec-WebSocket-Key is not 16 bytes in base64" : NULL;
    if (wrong) {
        char why[96];
        snprintf(why, sizeof why, "a WebSocket handshake is refused: %s\n", wrong);
        log_info("%.*s", (int)strlen(why) - 1, why);
        exchange_answer(ex, is_13 ? 400 : 426, (struct span){ version_field, sizeof version_field }, 1, span_of(why));
        return false;
    }
    memcpy(text, key.p, key.n);
    mbedtls_sha1(text, sizeof text - 1, bytes);
    mbedtls_base64_encode((unsigned char *)accept, WEBSOCKET_ACCEPT_CHARS + 1, &n, bytes, sizeof bytes);
    return true;
}

/* May stand in a Close, section 7.4, as IANA lists them. */
static bool websocket_code_ok(unsigned code)
{
    return (code >= 1000 && code <= 1014 && (code < 1004 || code > 1006)) || (code >= 3000 && code <= 4999);
}

static void websocket_free(struct websocket *ws)
{
    loop_never(ws->ex->loop, &ws->timer);
    wslay_event_context_free(ws->wslay);
    buf_fini(&ws->piece);
    buf_fini(&ws->reason);
    free(ws);
}

static void websocket_end(struct websocket *ws)
{
    struct exchange *ex = ws->ex;

    websocket_free(ws);
    exchange_end(ex);
}

/* The program's side is over. */
static void websocket_leave(struct websocket *ws, int code, struct span reason)
{
    if (ws->stream)
        ws->user->gone(ws->stream, code, reason);
    ws->stream = NULL;
    exchange_unload(ws->ex);        /* its process may be gone before the client is */
    loop_after(ws->ex->loop, &ws->timer, limits.linger_ms);
}

/* ---- to the client ---- */

static void websocket_write(struct websocket *ws, struct span data)
{
    ws->unread += data.n;
    exchange_data(ws->ex, data);
}

/* One frame, which a server does not mask: section 5.2. */
static void websocket_frame(struct websocket *ws, enum wslay_opcode opcode, struct span data, bool last)
{
    char head[10] = { (char)((last ? 0x80 : 0) | (int)opcode) };
    size_t more = data.n < 126 ? 0 : data.n <= 0xffff ? 2 : 8;

    head[1] = (char)(more == 0 ? data.n : more == 2 ? 126 : 127);
    for (size_t i = 0; i < more; i++)
        head[2 + i] = (char)((uint64_t)data.n >> 8 * (more - 1 - i));
    websocket_write(ws, (struct span){ head, 2 + more });
    if (data.n > 0)
        websocket_write(ws, data);
}

/* A piece of a message from the program. False: of another kind than the pieces before. */
static bool websocket_send(struct websocket *ws, bool is_text, struct span data, bool last)
{
    if (ws->within && ws->within_text != is_text)
        return false;
    ws->cost += data.n + WEBSOCKET_PIECE_COST;
    websocket_frame(ws, ws->within ? WSLAY_CONTINUATION_FRAME : is_text ? WSLAY_TEXT_FRAME : WSLAY_BINARY_FRAME,
                    data, last);
    ws->within = !last;
    ws->within_text = is_text;
    return true;
}

/* Sends a Close, whose answer ends the exchange; the program is not told. */
static void websocket_close(struct websocket *ws, unsigned code, struct span reason)
{
    ws->stream = NULL;
    wslay_event_queue_close(ws->wslay, (uint16_t)code, (const uint8_t *)reason.p,
                            utf8_cut(reason, WEBSOCKET_REASON_MAX).n);
    wslay_event_send(ws->wslay);
    websocket_leave(ws, 0, reason);
    exchange_room_grew(ws->ex);
}

/* ---- from the client: what wslay calls ---- */

static ssize_t websocket_on_read(wslay_event_context_ptr ctx, uint8_t *to, size_t len, int flags, void *arg)
{
    struct websocket *ws = arg;
    size_t n = ws->input.n < len ? ws->input.n : len;

    (void)flags;
    if (n == 0) {
        wslay_event_set_error(ctx, WSLAY_ERR_WOULDBLOCK);
        return -1;
    }
    memcpy(to, ws->input.p, n);
    ws->input = (struct span){ ws->input.p + n, ws->input.n - n };
    return (ssize_t)n;
}

static ssize_t websocket_on_write(wslay_event_context_ptr ctx, const uint8_t *data, size_t len, int flags, void *arg)
{
    (void)ctx;
    (void)flags;
    websocket_write(arg, (struct span){ (const char *)data, len });
    return (ssize_t)len;
}

static void websocket_on_frame(wslay_event_context_ptr ctx, const struct wslay_event_on_frame_recv_start_arg *frame, void *arg)
{
    struct websocket *ws = arg;

    ws->is_control = wslay_is_ctrl_frame(frame->opcode);
    if (ws->is_control)
        return;
    if (frame->opcode != WSLAY_CONTINUATION_FRAME) {
        ws->is_text = frame->opcode == WSLAY_TEXT_FRAME;
        ws->message_bytes = 0;
    }
    ws->message_bytes += frame->payload_length;
    if (ws->message_bytes > (uint64_t)limits.websocket_message_bytes) {
        wslay_event_queue_close(ctx, WSLAY_CODE_MESSAGE_TOO_BIG, NULL, 0);
        wslay_event_shutdown_read(ctx);
    }
}

static void websocket_on_bytes(wslay_event_context_ptr ctx, const struct wslay_event_on_frame_recv_chunk_arg *chunk, void *arg)
{
    struct websocket *ws = arg;

    if (!ws->is_control && ws->stream && wslay_event_get_read_enabled(ctx))
        buf_add(&ws->piece, chunk->data, chunk->data_length);
}

static void websocket_hand_on(struct websocket *ws, bool last)
{
    if (ws->stream && (ws->piece.len > 0 || last))
        ws->user->piece(ws->stream, ws->is_text, buf_span(&ws->piece), last);
    buf_drop(&ws->piece, ws->piece.len);
}

static void websocket_on_message(wslay_event_context_ptr ctx, const struct wslay_event_on_msg_recv_arg *m, void *arg)
{
    struct websocket *ws = arg;

    if (m->opcode == WSLAY_CONNECTION_CLOSE && m->msg_length > 2)
        buf_add(&ws->reason, m->msg + 2, m->msg_length - 2);
    else if (!wslay_is_ctrl_frame(m->opcode) && wslay_event_get_read_enabled(ctx) && !ws->piece.failed)
        websocket_hand_on(ws, true);
}

/* ---- what the front calls ---- */

/* So many bytes cost no more than the credit: a message has a head of at least 6. */
static size_t websocket_room(struct exchange *ex)
{
    const struct websocket *ws = ex->stream;

    if (!ws->stream)
        return CONN_READ_BYTES;
    size_t room = ws->unread < CONN_OUT_HIGH ? ws->user->room(ws->stream) : 0;
    return room > WEBSOCKET_PIECE_COST ? (room - WEBSOCKET_PIECE_COST) / 2 : 0;
}

static void websocket_body(struct exchange *ex, struct span data, bool last)
{
    static const char protocol_error[] = { (char)(WSLAY_CODE_PROTOCOL_ERROR >> 8), (char)(WSLAY_CODE_PROTOCOL_ERROR & 0xff) };
    struct websocket *ws = ex->stream;

    ws->input = data;
    if (data.n > 0 && ws->stream) {
        ws->pinged = false;
        loop_after(ex->loop, &ws->timer, limits.websocket_ping_ms);
    }
    int rc = wslay_event_recv(ws->wslay);
    bool no_memory = rc == WSLAY_ERR_NOMEM || ws->piece.failed || ws->reason.failed;
    if (!no_memory)
        websocket_hand_on(ws, false);
    if (rc == WSLAY_ERR_CALLBACK_FAILURE) {         /* a malformed frame: its Close would have no code */
        wslay_event_shutdown_write(ws->wslay);
        websocket_frame(ws, WSLAY_CONNECTION_CLOSE, (struct span){ protocol_error, sizeof protocol_error }, true);
    } else if (rc == 0) {
        rc = wslay_event_send(ws->wslay);
    }
    if (wslay_event_get_close_received(ws->wslay) || last || no_memory) {
        bool closed = wslay_event_get_close_received(ws->wslay);
        websocket_leave(ws, closed ? wslay_event_get_status_code_received(ws->wslay) : WSLAY_CODE_ABNORMAL_CLOSURE,
                        buf_span(&ws->reason));
        websocket_end(ws);
    } else if (ws->stream && !wslay_event_get_read_enabled(ws->wslay)) {
        int code = rc == 0 ? wslay_event_get_status_code_sent(ws->wslay) : WSLAY_CODE_PROTOCOL_ERROR;
        log_info("websocket: the client broke the protocol, closed with %d", code);
        websocket_leave(ws, code, SPAN(""));
    }
}

static void websocket_consumed(struct exchange *ex, size_t n)
{
    struct websocket *ws = ex->stream;

    ws->unread -= n < ws->unread ? n : ws->unread;
    size_t credit = ws->unread > 0 && n < ws->cost ? n : ws->cost;
    ws->cost -= credit;
    if (ws->stream && credit > 0)
        ws->user->credit(ws->stream, credit);
    exchange_room_grew(ex);
}

static void websocket_cancel(struct exchange *ex)
{
    struct websocket *ws = ex->stream;

    websocket_leave(ws, WSLAY_CODE_ABNORMAL_CLOSURE, SPAN(""));
    websocket_free(ws);
}

static const struct backend websocket_backend = {
    .room = websocket_room, .body = websocket_body, .consumed = websocket_consumed, .cancel = websocket_cancel,
};

/* A client that says nothing is asked, as long as we would read its answer. */
static void websocket_on_deadline(struct watch *w)
{
    struct websocket *ws = CONTAINER(w, struct websocket, timer);

    if (!ws->stream) {
        websocket_end(ws);
    } else if (websocket_room(ws->ex) > 0 && ws->pinged) {
        log_info("websocket: the client does not answer a ping, closed");
        websocket_leave(ws, WSLAY_CODE_ABNORMAL_CLOSURE, SPAN(""));
        websocket_close(ws, WSLAY_CODE_INTERNAL_SERVER_ERROR, SPAN("no answer to a ping"));
    } else {
        if (!ws->pinged)
            websocket_frame(ws, WSLAY_PING, SPAN(""), true);
        ws->pinged = true;
        loop_after(ws->ex->loop, &ws->timer, limits.websocket_ping_ms);
    }
}

/* The program accepts: answers 101 with its fields and takes the exchange over. NULL: it has
 * failed, user->gone has been called. */
static struct websocket *websocket_open(struct exchange *ex, const char *accept, struct span fields,
                                        const struct websocket_user *user, void *stream)
{
    static const struct wslay_event_callbacks callbacks = {
        .recv_callback = websocket_on_read, .send_callback = websocket_on_write,
        .on_frame_recv_start_callback = websocket_on_frame, .on_frame_recv_chunk_callback = websocket_on_bytes,
        .on_msg_recv_callback = websocket_on_message,
    };
    struct websocket *ws = calloc(1, sizeof *ws);
    struct response_head h = { .status = 101, .fields_count = 3 };
    const struct response_head given = { .fields = fields, .has_connection = true };
    struct span rest = fields, name, value;
    struct buf all = { 0 };

    if (!ws || wslay_event_context_server_init(&ws->wslay, &callbacks, ws) != 0) {
        free(ws);
        exchange_cancel_fail(ex, FAILURE_NO_MEMORY, "no memory for a WebSocket");
        return NULL;
    }
    wslay_event_config_set_no_buffering(ws->wslay, 1);
    ws->ex = ex;
    ws->user = user;
    ws->stream = stream;
    ws->timer = (struct watch){ .fd = -1, .on_deadline = websocket_on_deadline };
    ex->backend = &websocket_backend;
    ex->stream = ws;
    ex->may_upgrade = true;
    buf_add(&all, "upgrade\0websocket\0connection\0Upgrade\0sec-websocket-accept", 58);
    buf_add(&all, accept, WEBSOCKET_ACCEPT_CHARS + 1);
    while (field_next(&rest, &name, &value))
        if (!field_is_dropped(&given, name) && !span_eq_nocase(name, "content-length")
            && !span_eq_nocase(name, "sec-websocket-accept") && !span_eq_nocase(name, "sec-websocket-extensions")) {
            buf_add(&all, name.p, name.n + value.n + 2);
            h.fields_count++;
        }
    h.fields = buf_span(&all);
    if (all.failed)
        exchange_cancel_fail(ex, FAILURE_NO_MEMORY, "no memory for a WebSocket");
    else
        exchange_head(ex, &h);
    buf_fini(&all);
    if (!ex->backend)
        return NULL;
    loop_after(ex->loop, &ws->timer, limits.websocket_ping_ms);
    return ws;
}

/* ==== runner: the program's process ==============================================
 * What a Python worker and a program that speaks HTTP have in common: one child, what it
 * prints, how far it has come, how it ends. The two sections that follow are its kinds; the
 * program, further down, owns it and is told of its life. */
enum runner_state {
    RUNNER_BOOTING,     /* an interpreter starts */
    RUNNER_WARM,        /* it waits for a configuration */
    RUNNER_STARTING,    /* it loads the program, or does not listen yet */
    RUNNER_READY,
    RUNNER_STOPPING,    /* asked to end */
    RUNNER_BROKEN,      /* killed, or gone */
};

#define RUNNER_REAP_MS  200         /* between the end of its connections and its own */

struct runner;

struct runner_owner {
    void (*on_warm)(struct runner *);
    void (*on_ready)(struct runner *);
    void (*on_start_failed)(struct runner *, struct span text, struct span traceback);
    void (*on_refused)(struct runner *, struct exchange *);     /* it listens no more: keep this one */
    void (*on_gone)(struct runner *, int status);   /* dead and reaped: runner_free it */
};

struct runner_kind {
    void (*request)(struct runner *, struct exchange *);        /* its state is RUNNER_READY */
    void (*stop)(struct runner *);                  /* says so before SIGTERM; may be NULL */
    void (*deafen)(struct runner *);                /* nothing that it says counts any more */
    void (*read_rest)(struct runner *);             /* it is dead; its last words */
    void (*fail_all)(struct runner *, enum failure, struct span text, struct span traceback);
    void (*free)(struct runner *);
};

struct runner {
    const struct runner_kind  *kind;
    const struct runner_owner *owner;
    void                      *place;       /* the owner's own */
    struct loop               *loop;
    struct children           *children;
    struct child               child;
    enum runner_state          state;
    bool                       was_ready;   /* it has been RUNNER_READY */
    struct load                load;
    struct watch               timer;       /* the owner's own, like the next */
    struct runner             *next;
    struct output              output;
    char                       name[80];    /* of the program, for the log */
    char                       broken[160]; /* why it was killed, for the error replies */
};

/* Kills one that cannot go on; how it ended is told once it is reaped. */
PRINTF(2, 3) static void runner_break(struct runner *r, const char *format, ...)
{
    va_list ap;

    if (r->state == RUNNER_BROKEN)
        return;
    r->state = RUNNER_BROKEN;
    va_start(ap, format);
    vsnprintf(r->broken, sizeof r->broken, format, ap);
    va_end(ap);
    log_info("%s: %s: killed", r->child.name, r->broken);
    r->kind->deafen(r);
    child_signal(&r->child, SIGKILL);
}

static void runner_on_exit(struct child *c, int status)
{
    struct runner *r = CONTAINER(c, struct runner, child);

    r->kind->read_rest(r);
    output_close(&r->output);
    r->state = RUNNER_BROKEN;
    r->owner->on_gone(r, status);
}

/* A stopped process answers nothing and never dies; one that merely computes is not stopped. */
static void runner_on_stop(struct child *c, int sig)
{
    runner_break(CONTAINER(c, struct runner, child), "it was stopped by signal %d (%s)", sig, strsignal(sig));
}

/* Forks; what the child prints goes to r->output, which the spawn's descriptors 1 and 2 are set
 * to. 0, or -1 and errno. */
static int runner_start(struct runner *r, const char *name, struct spawn *s)
{
    snprintf(r->name, sizeof r->name, "%s", name);
    r->child = (struct child){ .name = r->name, .on_exit = runner_on_exit, .on_stop = runner_on_stop };
    int out = output_open(&r->output, r->loop, r->name);
    if (out < 0)
        return -1;
    s->in_cgroup = true;
    s->fds[1] = s->fds[2] = out;
    int rc = child_spawn(r->children, &r->child, s);
    fd_close(&out);
    if (rc < 0)
        output_close(&r->output);
    return rc;
}

/* Asks it to end; runner_kill follows where it does not. */
static void runner_stop(struct runner *r)
{
    if (r->state == RUNNER_BROKEN)
        return;
    if (r->kind->stop)
        r->kind->stop(r);
    r->state = RUNNER_STOPPING;
    child_signal(&r->child, SIGTERM);
}

static void runner_kill(struct runner *r)
{
    r->state = RUNNER_BROKEN;
    r->kind->deafen(r);
    child_signal(&r->child, SIGKILL);
}

/* ==== worker: the backend that speaks frames to a Python process =================
 * agent.h has the frames, shims/worker.py the other end. The program can write to that
 * socket too: each frame is checked as hostile input, and a worker that breaks the order
 * is killed; only its own exchanges fail. */
#define EMBED(symbol, file)                                             \
    __asm__(".section .rodata\n.global " #symbol "\n.global " #symbol "_end\n" \
            #symbol ":\n.incbin \"" file "\"\n" #symbol "_end:\n.previous\n"); \
    extern const char symbol[], symbol##_end[]

EMBED(shim_worker, "out/shims/worker.py.gz");

#define WORKER_SHIM     "worker.py"
#define WORKER_STREAMS  256         /* buckets; streams are numbered in turn */
#define WORKER_OUT_HIGH (64 << 10)   /* past this no more of any request body is taken */
#define WORKER_OUT_MAX  (16 << 20)  /* past this no more requests are */

struct stream {
    uint32_t         id;
    struct exchange *ex;            /* NULL: cancelled, the worker's last word is still to come */
    struct worker   *worker;
    int64_t          send_credit;   /* body bytes that we may send */
    int64_t          recv_credit;   /* body bytes that the worker may send */
    size_t           owed;          /* credit that it has not been told of */
    bool             is_event, head_seen, body_sent;
    bool             all_here;      /* the response's last byte has come: no credit is of use */
    char             accept[WEBSOCKET_ACCEPT_CHARS + 1];    /* of a WebSocket's handshake, or "" */
    struct websocket *ws;           /* once the program has accepted it, while `ex` is there */
    struct stream   *next;
};

struct worker {
    struct runner  runner;          /* first member */
    struct watch   channel;         /* our end of the socketpair */
    struct buf     in, out;
    struct stream *streams[WORKER_STREAMS];
    uint32_t       next_id;
    uint32_t       body_id, body_left;  /* of a body's frame that has come in part */
    unsigned       body_flags;
    bool           choked;          /* a body waits for `out` to get shorter */
    char          *slots;           /* memory that the worker writes, too; NULL: there is none */
};

#define WORKER_SHARED_BYTES (WORKER_SLOTS_AT + WORKER_SLOTS * (size_t)WORKER_SLOT_BYTES)

static struct worker *worker_of(struct runner *r)
{
    return CONTAINER(r, struct worker, runner);
}

/* ---- marshal version 2, as CPython's Python/marshal.c reads it ---- */

static void marshal_u32(struct buf *out, unsigned char tag, uint32_t v)
{
    unsigned char b[5] = { tag, (unsigned char)v, (unsigned char)(v >> 8), (unsigned char)(v >> 16),
                           (unsigned char)(v >> 24) };
    buf_add(out, b, sizeof b);
}

static void marshal_bytes(struct buf *out, struct span s)
{
    marshal_u32(out, 's', (uint32_t)s.n);
    buf_add_span(out, s);
}

/* ASGI wants the names of fields in lower case. */
static void marshal_lower(struct buf *out, struct span s)
{
    marshal_u32(out, 's', (uint32_t)s.n);
    char *to = buf_room(out, s.n);
    for (size_t i = 0; to && i < s.n; i++)
        to[i] = (char)(s.p[i] >= 'A' && s.p[i] <= 'Z' ? s.p[i] | 0x20 : s.p[i]);
    buf_added(out, to ? s.n : 0);
}

/* The text must be UTF-8. */
static void marshal_str(struct buf *out, struct span s)
{
    marshal_u32(out, 'u', (uint32_t)s.n);
    buf_add_span(out, s);
}

/* Any bytes, as a str with U+FFFD for what is no UTF-8. */
static void marshal_text(struct buf *out, struct span s)
{
    size_t head = out->len;
    marshal_u32(out, 'u', 0);
    size_t from = out->len;
    utf8_add(out, s);
    if (!out->failed) {
        uint32_t n = (uint32_t)(out->len - from);
        unsigned char *len = (unsigned char *)out->data + out->start + head + 1;
        for (int i = 0; i < 4; i++)
            len[i] = (unsigned char)(n >> 8 * i);
    }
}

static void marshal_key(struct buf *out, const char *key)
{
    marshal_str(out, span_of(key));
}

static void marshal_list(struct buf *out, uint32_t n)
{
    marshal_u32(out, '[', n);
}

static void marshal_tuple(struct buf *out, uint32_t n)
{
    marshal_u32(out, '(', n);
}

static void marshal_int(struct buf *out, int32_t v)
{
    marshal_u32(out, 'i', (uint32_t)v);
}

static void marshal_double(struct buf *out, double v)
{
    buf_add_byte(out, 'g');
    buf_add(out, &v, sizeof v);     /* IEEE 754, little endian, as every machine we build for has it */
}

/* '{', then key and value in turn, then '0'. */
#define MARSHAL_DICT        '{'
#define MARSHAL_DICT_END    '0'
#define MARSHAL_NONE        'N'

/* What the worker makes the ASGI scope of (asgi.readthedocs.io, HTTP connection scope) or that of an
 * event: a tuple, as it knows the keys by itself. */
static void marshal_scope(struct buf *out, const struct request *r)
{
    struct span rest, name, value;
    struct buf path = { 0 };

    if (r->is_event) {
        marshal_tuple(out, 2);
        marshal_key(out, "aleph.message");
        marshal_text(out, request_part(r, r->event));
        return;
    }
    marshal_tuple(out, 10);
    marshal_key(out, request_is_websocket(r) ? "websocket" : "http");
    marshal_key(out, r->http_version);
    marshal_str(out, request_part(r, r->method));
    marshal_key(out, r->is_https ? "https" : "http");
    percent_decode(&path, request_part(r, r->raw_path));
    marshal_text(out, buf_span(&path));
    out->failed |= path.failed;
    buf_fini(&path);
    marshal_bytes(out, request_part(r, r->raw_path));
    marshal_bytes(out, request_part(r, r->query));
    if (r->client.n > 0) {
        marshal_tuple(out, 2);
        marshal_str(out, request_part(r, r->client));
        marshal_int(out, r->client_port);
    } else {
        buf_add_byte(out, MARSHAL_NONE);
    }
    marshal_tuple(out, 2);
    marshal_str(out, r->server.n > 0 ? request_part(r, r->server) : SPAN("localhost"));
    marshal_int(out, r->server.n > 0 ? r->server_port : r->is_https ? PORT_HTTPS : PORT_HTTP);
    marshal_list(out, r->fields_count);
    for (rest = request_part(r, r->fields); field_next(&rest, &name, &value);) {
        marshal_tuple(out, 2);
        marshal_lower(out, name);
        marshal_bytes(out, value);
    }
}

/* ---- frames out ---- */

static uint32_t frame_u32(const char *text)
{
    const unsigned char *p = (const unsigned char *)text;
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void frame_head(char *to, uint32_t length, uint32_t stream, enum frame_type type, unsigned flags)
{
    for (int i = 0; i < 4; i++) {
        to[i] = (char)(length >> 8 * i);
        to[4 + i] = (char)(stream >> 8 * i);
    }
    to[8] = (char)type;
    to[9] = (char)flags;
    to[10] = to[11] = 0;
}

static uint32_t worker_interest(const struct worker *w)
{
    return EPOLLIN | (w->out.len > 0 ? EPOLLOUT : 0);
}

/* A frame whose payload is built in place: begin, add to w->out, end. */
static size_t frame_begin(struct worker *w)
{
    size_t at = w->out.len;
    char head[FRAME_HEADER_BYTES] = { 0 };
    buf_add(&w->out, head, sizeof head);
    return at;
}

static void frame_end(struct worker *w, size_t at, uint32_t stream, enum frame_type type, unsigned flags)
{
    if (!w->out.failed)
        frame_head(w->out.data + w->out.start + at,
                   (uint32_t)(w->out.len - at - FRAME_HEADER_BYTES), stream, type, flags);
    loop_soon(w->runner.loop, &w->channel);
}

static void frame_send(struct worker *w, uint32_t stream, enum frame_type type, unsigned flags, struct span payload)
{
    size_t at = frame_begin(w);

    if (!w->out.failed)
        frame_head(w->out.data + w->out.start + at, (uint32_t)payload.n, stream, type, flags);
    buf_pass(&w->out, w->channel.fd, payload);
    loop_soon(w->runner.loop, &w->channel);
}

static void frame_window(struct worker *w, uint32_t stream, size_t bytes)
{
    char n[4] = { (char)bytes, (char)(bytes >> 8), (char)(bytes >> 16), (char)(bytes >> 24) };
    frame_send(w, stream, FRAME_WINDOW, 0, (struct span){ n, sizeof n });
}

/* ---- streams ---- */

static struct stream **stream_find(struct worker *w, uint32_t id)
{
    struct stream **at = &w->streams[id % WORKER_STREAMS];
    while (*at && (*at)->id != id)
        at = &(*at)->next;
    return at;
}

/* Ends a stream; its exchange, if there still is one, is returned. */
static struct exchange *stream_close(struct stream **at)
{
    struct stream *s = *at;
    struct exchange *ex = s->ex;

    *at = s->next;
    free(s);
    return ex;
}

static size_t stream_credit(void *stream)
{
    const struct stream *s = stream;

    if (s->worker->out.len >= WORKER_OUT_HIGH) {
        s->worker->choked = true;
        return 0;
    }
    return s->send_credit > 0 && !s->body_sent ? (size_t)s->send_credit : 0;
}

static size_t stream_room(struct exchange *ex)
{
    return stream_credit(ex->stream);
}

/* Lets the bodies go on that found `out` too long. */
static void worker_unchoke(struct worker *w)
{
    w->choked = false;
    for (size_t i = 0; i < WORKER_STREAMS; i++)
        for (struct stream *s = w->streams[i]; s; s = s->next)
            if (s->ex && !s->body_sent)
                exchange_room_grew(s->ex);
}

static void stream_body(struct exchange *ex, struct span data, bool last)
{
    struct stream *s = ex->stream;

    if (s->body_sent)
        return;
    assert((int64_t)data.n <= s->send_credit);
    s->send_credit -= (int64_t)data.n;
    s->body_sent = last;
    frame_send(s->worker, s->id, FRAME_REQUEST_BODY, last ? FRAME_END : 0, data);
}

static void stream_give(void *stream, size_t n)
{
    struct stream *s = stream;

    if (s->all_here || (s->owed += n) < WORKER_CREDIT / 2)      /* a short response needs none back */
        return;
    s->recv_credit += (int64_t)s->owed;
    frame_window(s->worker, s->id, s->owed);
    s->owed = 0;
}

static void stream_consumed(struct exchange *ex, size_t n)
{
    stream_give(ex->stream, n);
}

static void stream_cancel(struct exchange *ex)
{
    struct stream *s = ex->stream;

    s->ex = NULL;
    frame_send(s->worker, s->id, FRAME_DISCONNECT, 0, SPAN(""));
}

static void stream_piece(void *stream, bool is_text, struct span data, bool last)
{
    struct stream *s = stream;

    s->send_credit -= (int64_t)data.n + WEBSOCKET_PIECE_COST;
    assert(s->send_credit >= 0);
    frame_send(s->worker, s->id, is_text ? FRAME_TEXT : FRAME_BINARY, last ? FRAME_END : 0, data);
}

static void stream_gone(void *stream, int code, struct span reason)
{
    struct stream *s = stream;
    char text[2 + WEBSOCKET_REASON_MAX] = { (char)code, (char)(code >> 8) };

    memcpy(text + 2, reason.p, reason.n);
    s->ex = NULL;
    s->ws = NULL;
    frame_send(s->worker, s->id, FRAME_DISCONNECT, 0, (struct span){ text, 2 + reason.n });
}

static const struct websocket_user worker_websockets = {
    .room = stream_credit, .piece = stream_piece, .credit = stream_give, .gone = stream_gone,
};

static const struct backend worker_backend = {
    .room = stream_room, .body = stream_body, .consumed = stream_consumed, .cancel = stream_cancel,
};

/* Sends the request on; body bytes may follow at once. -1: no memory. */
static int worker_request(struct worker *w, struct exchange *ex, const char *accept)
{
    struct stream *s = w->out.failed ? NULL : calloc(1, sizeof *s);     /* failed: a frame is cut */

    if (!s)
        return -1;
    *s = (struct stream){ .id = w->next_id, .ex = ex, .worker = w, .send_credit = WORKER_CREDIT,
                          .recv_credit = WORKER_CREDIT, .is_event = ex->request.is_event,
                          .body_sent = !ex->request.has_body };
    memcpy(s->accept, accept, sizeof s->accept);
    size_t at = frame_begin(w);
    marshal_scope(&w->out, &ex->request);
    if (w->out.failed) {            /* the frames before this one are whole */
        w->out.failed = false;
        w->out.len = at;
        free(s);
        return -1;
    }
    frame_end(w, at, s->id, FRAME_REQUEST, ex->request.has_body ? 0 : FRAME_END);
    w->next_id = w->next_id == UINT32_MAX ? 1 : w->next_id + 1;
    struct stream **head = &w->streams[s->id % WORKER_STREAMS];
    s->next = *head;
    *head = s;
    ex->backend = &worker_backend;
    ex->stream = s;
    ex->may_upgrade = false;
    request_fini(&ex->request);
    return 0;
}

/* ---- frames in ---- */

/* Message NUL traceback. */
static void failure_split(struct span payload, struct span *text, struct span *traceback)
{
    const char *nul = payload.n ? memchr(payload.p, 0, payload.n) : NULL;

    *text = (struct span){ payload.p, nul ? (size_t)(nul - payload.p) : payload.n };
    *traceback = nul ? (struct span){ nul + 1, payload.n - text->n - 1 } : SPAN("");
}

static void worker_on_head(struct worker *w, struct stream *s, struct span payload)
{
    struct response_head h = { 0 };
    struct span rest, name, value;
    unsigned n = 0;

    if (s->head_seen || s->is_event || payload.n < 4) {
        runner_break(&w->runner, "it sent %s", s->head_seen ? "two heads for one request"
                     : s->is_event ? "a head for an event" : "a head cut short");
        return;
    }
    uint32_t both = frame_u32(payload.p);
    h.status = (int)(both & 0xffff);
    h.fields_count = both >> 16;
    h.fields = rest = (struct span){ payload.p + 4, payload.n - 4 };
    while (field_next(&rest, &name, &value))
        n++;
    if (rest.n > 0 || n != h.fields_count) {
        runner_break(&w->runner, "it sent a head that is not %u names and values", h.fields_count);
        return;
    }
    s->head_seen = true;
    if (s->ex && s->accept[0] && h.status == 101) {
        s->body_sent = false;
        s->ws = websocket_open(s->ex, s->accept, h.fields, &worker_websockets, s);
    } else if (s->ex) {
        exchange_head(s->ex, &h);
    }
}

static void worker_on_body(struct worker *w, struct stream **at, struct span payload, bool last)
{
    struct stream *s = *at;

    if (s->ws || (s->ex && !s->head_seen && !s->is_event)) {
        runner_break(&w->runner, "it sent a body %s", s->ws ? "through a WebSocket" : "before its head");
        return;
    }
    s->recv_credit -= (int64_t)payload.n;
    if (s->recv_credit < 0) {
        runner_break(&w->runner, "it sent more of a body than it had credit for");
        return;
    }
    s->all_here = last;
    if (s->ex && payload.n > 0)
        exchange_data(s->ex, payload);
    if (!last)
        return;
    struct exchange *ex = stream_close(at);
    if (ex)
        exchange_end(ex);
}

/* A slot is the worker's again as soon as its bytes are handed on. If it writes there before, it
 * changes its own answer and nothing else: nobody looks twice at a body. */
static void worker_on_slot(struct worker *w, struct stream **at, struct span payload, bool last)
{
    uint32_t slot = payload.n == 8 ? frame_u32(payload.p) : WORKER_SLOTS;
    uint32_t n = payload.n == 8 ? frame_u32(payload.p + 4) : 0;

    if (!w->slots || slot >= WORKER_SLOTS || n > WORKER_SLOT_BYTES) {
        runner_break(&w->runner, "it sent a body of %u bytes in slot %u, which cannot be", n, slot);
        return;
    }
    worker_on_body(w, at, (struct span){ w->slots + WORKER_SLOTS_AT + slot * (size_t)WORKER_SLOT_BYTES, n }, last);
    __atomic_store_n(&w->slots[slot], 0, __ATOMIC_RELEASE);
}

static void stream_fail(struct stream **at, enum failure kind, struct span text, struct span traceback)
{
    struct websocket *ws = (*at)->ws;
    struct exchange *ex = stream_close(at);

    if (ws)
        websocket_close(ws, WSLAY_CODE_INTERNAL_SERVER_ERROR, SPAN(""));
    else if (ex)
        exchange_fail(ex, kind, text, traceback);
}

static void worker_on_failure(struct stream **at, struct span payload)
{
    struct span text, traceback;

    failure_split(payload, &text, &traceback);
    if ((*at)->ex)
        log_info("request failed: %.*s", (int)text.n, text.p);
    stream_fail(at, FAILURE_EXCEPTION, text, traceback);
}

static void worker_on_piece(struct worker *w, struct stream *s, unsigned type, struct span payload, bool last)
{
    s->recv_credit -= (int64_t)payload.n + WEBSOCKET_PIECE_COST;
    if (s->recv_credit < 0 || (s->ex && !s->ws))
        runner_break(&w->runner, "it sent a message %s", s->recv_credit < 0
                     ? "that it had no credit for" : "where there is no WebSocket");
    else if (s->ws && !websocket_send(s->ws, type == FRAME_TEXT, payload, last))
        runner_break(&w->runner, "it sent a message of two kinds");
}

static void worker_on_close(struct worker *w, struct stream **at, struct span payload)
{
    struct websocket *ws = (*at)->ws;
    unsigned code = payload.n < 2 ? 0 : frame_u32((char[4]){ payload.p[0], payload.p[1] });
    struct span reason = { payload.p + 2, payload.n - 2 };

    if (!websocket_code_ok(code) || reason.n > WEBSOCKET_REASON_MAX || !utf8_ok(reason) || ((*at)->ex && !ws)) {
        runner_break(&w->runner, "it closed a WebSocket with %u, which cannot be", code);
        return;
    }
    stream_close(at);
    if (ws)
        websocket_close(ws, code, reason);
}

static void worker_on_stream(struct worker *w, uint32_t id, unsigned type, unsigned flags, struct span payload)
{
    struct stream **at = stream_find(w, id), *s = *at;

    if (!s) {
        runner_break(&w->runner, "it sent a frame for request %u, which is not open", id);
        return;
    }
    switch (type) {
    case FRAME_RESPONSE_HEAD:
        worker_on_head(w, s, payload);
        break;
    case FRAME_RESPONSE_BODY:
        worker_on_body(w, at, payload, flags & FRAME_END);
        break;
    case FRAME_RESPONSE_SLOT:
        worker_on_slot(w, at, payload, flags & FRAME_END);
        break;
    case FRAME_FAILURE:
        worker_on_failure(at, payload);
        break;
    case FRAME_TEXT:
    case FRAME_BINARY:
        worker_on_piece(w, s, type, payload, flags & FRAME_END);
        break;
    case FRAME_CLOSE:
        worker_on_close(w, at, payload);
        break;
    case FRAME_WINDOW:
        if (payload.n != 4 || (s->send_credit += frame_u32(payload.p)) > WORKER_CREDIT)
            runner_break(&w->runner, "it gave more credit than it had taken");
        else if (s->ex && !s->body_sent)
            exchange_room_grew(s->ex);
        break;
    default:
        runner_break(&w->runner, "it sent a frame of unknown type %u", type);
    }
}

/* Stream 0: what the worker says of itself, each once and in this order. */
static void worker_on_self(struct worker *w, unsigned type, struct span payload)
{
    struct span text, traceback;

    if (type == FRAME_HELLO && w->runner.state == RUNNER_BOOTING) {
        w->runner.state = RUNNER_WARM;
        w->runner.owner->on_warm(&w->runner);
    } else if (type == FRAME_READY && w->runner.state == RUNNER_STARTING) {
        w->runner.state = RUNNER_READY;
        w->runner.owner->on_ready(&w->runner);
    } else if (type == FRAME_START_FAILED && w->runner.state == RUNNER_STARTING) {
        w->runner.state = RUNNER_STOPPING;
        failure_split(payload, &text, &traceback);
        w->runner.owner->on_start_failed(&w->runner, text, traceback);
    } else if (w->runner.state != RUNNER_STOPPING) {
        runner_break(&w->runner, "it sent a frame of type %u out of turn", type);
    }
}

/* Hands on what is here of a body's frame, as a frame of its own. */
static size_t worker_take_body(struct worker *w, struct span in)
{
    size_t n = in.n < w->body_left ? in.n : w->body_left;

    w->body_left -= (uint32_t)n;
    worker_on_stream(w, w->body_id, FRAME_RESPONSE_BODY, w->body_left ? 0 : w->body_flags, (struct span){ in.p, n });
    return n;
}

/* Takes one frame from the front, or of a long body what has come. 0: it is not whole. */
static size_t worker_take(struct worker *w, struct span in)
{
    if (w->body_left > 0)
        return worker_take_body(w, in);
    if (in.n < FRAME_HEADER_BYTES)
        return 0;
    uint32_t length = frame_u32(in.p), id = frame_u32(in.p + 4);
    unsigned type = (unsigned char)in.p[8], flags = (unsigned char)in.p[9];
    struct span rest = { in.p + FRAME_HEADER_BYTES, in.n - FRAME_HEADER_BYTES };

    if (length > WORKER_FRAME_MAX || in.p[10] || in.p[11] || flags & ~(unsigned)FRAME_END) {
        runner_break(&w->runner, "it sent a malformed frame (%u bytes of type %u)", length, type);
        return 0;
    }
    if (rest.n < length && type == FRAME_RESPONSE_BODY && id != 0) {
        const struct stream *s = *stream_find(w, id);
        if (s && s->recv_credit < (int64_t)length) {    /* what it gets back meanwhile does not count */
            runner_break(&w->runner, "it sent more of a body than it had credit for");
            return 0;
        }
        w->body_id = id;
        w->body_left = length;
        w->body_flags = flags;
        return FRAME_HEADER_BYTES;
    }
    if (rest.n < length)
        return 0;
    rest.n = length;
    if (id == 0)
        worker_on_self(w, type, rest);
    else
        worker_on_stream(w, id, type, flags, rest);
    return FRAME_HEADER_BYTES + length;
}

/* Takes what is whole; how many bytes that was. */
static size_t worker_take_all(struct worker *w, struct span in)
{
    size_t used = 0, n;

    while (used < in.n && w->runner.state != RUNNER_BROKEN
           && (n = worker_take(w, (struct span){ in.p + used, in.n - used })) > 0)
        used += n;
    return used;
}

static void worker_parse(struct worker *w)
{
    buf_drop(&w->in, worker_take_all(w, buf_span(&w->in)));
}

/* A process that ends closes its channel first and is reaped a moment later: how it ended
 * says more than that it hung up, so that moment is given. */
static void worker_hung_up(struct worker *w)
{
    loop_want(w->runner.loop, &w->channel, 0);
    if (w->runner.child.pid > 0 && w->runner.state != RUNNER_STOPPING && !w->channel.heap_at)
        loop_after(w->runner.loop, &w->channel, RUNNER_REAP_MS);
}

static void worker_on_deadline(struct watch *watch)
{
    runner_break(&CONTAINER(watch, struct worker, channel)->runner, "it closed its channel");
}

/* Reads once and handles what has come, of which only the start of a frame is kept. False:
 * there is no more for now. */
static bool worker_read(struct worker *w)
{
    char *bytes = conn_bytes;       /* no connection looks at them now: each reads in a call of the loop's */

    if (w->channel.fd < 0 || w->runner.state == RUNNER_BROKEN)
        return false;
    ssize_t n = SYS_READ(w->channel.fd, bytes, sizeof conn_bytes);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (n <= 0) {
        worker_hung_up(w);
        return false;
    }
    size_t used = w->in.len > 0 ? 0 : worker_take_all(w, (struct span){ bytes, (size_t)n });
    if (buf_add(&w->in, bytes + used, (size_t)n - used) < 0)
        runner_break(&w->runner, "no memory for its frames");
    else if (used == 0)
        worker_parse(w);
    return true;
}

static void worker_flush(struct worker *w)
{
    if (w->out.failed) {            /* a frame is missing in the middle: nothing after it makes sense */
        runner_break(&w->runner, "no memory for frames to it");
        return;
    }
    while (w->out.len > 0) {
        ssize_t n = send(w->channel.fd, buf_at(&w->out), w->out.len, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            break;
        if (n < 0) {
            worker_hung_up(w);
            return;
        }
        buf_drop(&w->out, (size_t)n);
    }
    if (w->choked && w->out.len == 0)
        worker_unchoke(w);
    if (w->runner.state != RUNNER_BROKEN && !w->channel.heap_at
        && loop_want(w->runner.loop, &w->channel, worker_interest(w)) < 0)
        runner_break(&w->runner, "its channel cannot be watched");
}

static void worker_on_event(struct watch *watch, uint32_t events)
{
    struct worker *w = CONTAINER(watch, struct worker, channel);

    if (events & ~(uint32_t)EPOLLOUT)
        worker_read(w);
    if (w->runner.state != RUNNER_BROKEN && w->channel.fd >= 0)
        worker_flush(w);
}

/* ---- start, stop, death ---- */

static void worker_bury(struct watch *watch)
{
    struct worker *w = CONTAINER(watch, struct worker, channel);
    output_fini(&w->runner.output);
    buf_fini(&w->in);
    buf_fini(&w->out);
    if (w->slots)
        munmap(w->slots, WORKER_SHARED_BYTES);
    free(w);
}

static void worker_free(struct runner *r)
{
    loop_bury(r->loop, &worker_of(r)->channel, worker_bury);
}

static void worker_fail_all(struct runner *r, enum failure kind, struct span text, struct span traceback)
{
    struct worker *w = worker_of(r);

    for (size_t i = 0; i < WORKER_STREAMS; i++)
        while (w->streams[i])
            stream_fail(&w->streams[i], kind, text, traceback);
}

static void worker_deafen(struct runner *r)
{
    loop_want(r->loop, &worker_of(r)->channel, 0);
}

/* What it had answered before it died still counts. */
static void worker_read_rest(struct runner *r)
{
    for (int i = 0; i < 1024 && worker_read(worker_of(r)); i++)
        ;
}

/* Asks for lifespan shutdown and an end. */
static void worker_stop(struct runner *r)
{
    frame_send(worker_of(r), 0, FRAME_SHUTDOWN, 0, SPAN(""));
}

static void worker_request_any(struct runner *r, struct exchange *ex)
{
    struct worker *w = worker_of(r);
    char accept[WEBSOCKET_ACCEPT_CHARS + 1] = "";

    if (request_is_websocket(&ex->request) && !websocket_shake(ex, accept))
        return;
    if (w->out.len >= WORKER_OUT_MAX)
        exchange_fail(ex, FAILURE_NOT_STARTED, SPAN("too many requests wait for the program to read them"), SPAN(""));
    else if (worker_request(w, ex, accept) == 0)
        exchange_room_grew(ex);
    else
        exchange_fail(ex, FAILURE_NO_MEMORY, SPAN("no memory for the request"), SPAN(""));
}

static const struct runner_kind worker_kind = {
    .request = worker_request_any, .stop = worker_stop, .deafen = worker_deafen,
    .read_rest = worker_read_rest, .fail_all = worker_fail_all, .free = worker_free,
};

/* Maps w->slots; returns their descriptor for the worker. It can neither cut nor extend them, so
 * that we never look past their end (memfd_create(2), F_ADD_SEALS). -1 and errno. */
static int worker_map_slots(struct worker *w)
{
    int fd = memfd_create("bodies", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    void *at = MAP_FAILED;

    if (fd >= 0 && ftruncate(fd, WORKER_SHARED_BYTES) == 0
        && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0)
        at = mmap(NULL, WORKER_SHARED_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) {
        fd_close(&fd);
        return -1;
    }
    w->slots = at;
    return fd;
}

/* Starts an interpreter with the shim. argv: interpreter, options, WORKER_SHIM. It comes to
 * on_warm, on_ready … and at its end always to on_gone. NULL and errno. */
static struct runner *worker_start(const struct runner *base, const char *name, char *const *argv, char *const *envp)
{
    struct worker *w = calloc(1, sizeof *w);
    int ends[2] = { -1, -1 }, slots = -1;

    if (!w)
        return NULL;
    w->runner = *base;
    w->runner.kind = &worker_kind;
    w->next_id = 1;
    w->out.keep = WORKER_OUT_HIGH;
    w->channel = (struct watch){ .fd = -1, .on_event = worker_on_event, .on_deadline = worker_on_deadline };
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
        goto failed;
    w->channel.fd = ends[0];
    if ((slots = worker_map_slots(w)) < 0)
        log_errno("%s: no shared memory, long bodies go through its socket", name);
    for (int i = 0; i < 2; i++)         /* fewer turns for long bodies */
        setsockopt(ends[i], SOL_SOCKET, SO_SNDBUF, &(int){ WORKER_SOCKET_BYTES }, sizeof(int));
    if (fd_nonblock(ends[0]) < 0 || loop_want(base->loop, &w->channel, EPOLLIN) < 0
        || runner_start(&w->runner, name, &(struct spawn){ .argv = argv, .envp = envp,
                        .fds = { -1, -1, -1, ends[1], slots, -1 } }) < 0)
        goto failed;
    fd_close(&ends[1]);
    fd_close(&slots);
    return &w->runner;
failed:
    log_errno("%s: start", name);
    fd_close(&ends[1]);
    fd_close(&slots);
    worker_free(&w->runner);
    return NULL;
}

static void worker_configure(struct runner *r, const char *name, struct buf *marshalled)
{
    struct worker *w = worker_of(r);

    snprintf(r->name, sizeof r->name, "%s", name);
    assert(r->state == RUNNER_WARM);
    r->state = RUNNER_STARTING;
    frame_send(w, 0, FRAME_CONFIGURE, 0, buf_span(marshalled));
    w->out.failed |= marshalled->failed;
}

/* ==== upstream: the backend that speaks HTTP/1.1 to the program ==================
 * The program is a process that listens on a TCP port of the loopback; the agent is the
 * gateway in front of it (RFC 9110 section 3.7). What it answers is hostile input: llhttp
 * parses it strictly, what is ambiguous is refused, and a connection on which anything was
 * odd carries no second exchange. Node's shim gets the listening socket from us and says by
 * frames on fd 4 how far it is; whether another program listens, the kernel tells. */
EMBED(shim_node, "out/shims/node.cjs.gz");

#define NODE_SHIM           "node.cjs"
#define UPSTREAM_CREDIT     (64 << 10)      /* response bytes that the front has not passed on */
#define UPSTREAM_IDLE_MAX   256             /* connections kept for later */
#define UPSTREAM_SURE_MS    1000            /* idle for less, a connection is still good */
#define UPSTREAM_PROBE_MS   10              /* between two looks whether it listens */
#define UPSTREAM_TUNNEL_MS  1000            /* from one end of a tunnel to the other */

enum up_state { UP_HEAD, UP_BODY, UP_TUNNEL };

/* One connection to the program. */
struct up {
    struct conn      conn;          /* first member */
    struct upstream *of;
    struct up       *next, **link;  /* in of->busy or of->idle */
    struct exchange *ex;            /* NULL: idle */
    enum up_state    state;
    llhttp_t         parser;
    const char      *wrong;         /* what is wrong with the response, set by a callback */
    struct buf       head;          /* its fields, name NUL value NUL … */
    struct part      name;          /* the last of them */
    unsigned         fields;
    unsigned         protocol_bytes;                /* of "HTTP" seen */
    size_t           head_bytes;    /* interim responses count too, and what up_count counts */
    size_t           held;          /* see UPSTREAM_CREDIT */
    bool             connected;
    bool             parked;        /* in of->idle */
    bool             reused;        /* it has carried an exchange before */
    bool             answered;      /* a byte of the response has come */
    bool             chunked;       /* the request's body goes in chunks */
    bool             body_sent, is_head, interim, complete, keep_alive;
};

struct upstream {
    struct runner    runner;        /* first member */
    struct conns     conns;         /* apart from the fronts', which have a limit */
    struct address   address;       /* where it listens */
    struct address   near;          /* and Node's shim for us alone; sa_len 0: nowhere */
    unsigned         port;
    bool             elsewhere;     /* no process of ours: the target of `agent forward` */
    struct up       *busy, *idle;   /* the last used first */
    size_t           idle_len;
    struct watch     reports;       /* from Node's shim; fd is -1 for any other program */
    struct buf       in;            /* of them */
    struct watch     probe;
    struct exchange *lost;          /* whose connections have ended: perhaps the program has */
    struct watch     lost_timer;
};

static struct upstream *upstream_of(struct runner *r)
{
    return CONTAINER(r, struct upstream, runner);
}

static void up_link(struct up **list, struct up *u)
{
    u->next = *list;
    if (u->next)
        u->next->link = &u->next;
    u->link = list;
    *list = u;
}

static void up_unlink(struct up *u)
{
    *u->link = u->next;
    if (u->next)
        u->next->link = u->link;
}

/* ---- exchanges whose connection ended: the process may be about to be reaped ---- */

static void lost_unlink(struct exchange *ex)
{
    *ex->link = ex->next;
    if (ex->next)
        ex->next->link = ex->link;
}

static const struct backend lost_backend = {
    .room = nothing_fits, .body = nothing_taken, .consumed = nothing_consumed, .cancel = lost_unlink,
};

static void lost_add(struct upstream *up, struct exchange *ex)
{
    ex->backend = &lost_backend;
    ex->next = up->lost;
    if (ex->next)
        ex->next->link = &ex->next;
    ex->link = &up->lost;
    up->lost = ex;
    if (!up->lost_timer.heap_at)
        loop_after(up->runner.loop, &up->lost_timer, RUNNER_REAP_MS);
}

static void lost_fail_all(struct upstream *up, enum failure kind, struct span text, struct span traceback)
{
    while (up->lost) {
        struct exchange *ex = up->lost;
        lost_unlink(ex);
        exchange_fail(ex, kind, text, traceback);
    }
}

/* It has not died: it only closed its connections. */
static void lost_on_deadline(struct watch *t)
{
    struct upstream *up = CONTAINER(t, struct upstream, lost_timer);

    while (up->lost) {
        struct exchange *ex = up->lost;
        exchange_cancel_fail(ex, FAILURE_BAD_RESPONSE, "the program closed the connection %s",
                             ex->head_seen ? "within its response" : "without an answer");
    }
}

/* ---- the request ---- */

static bool method_is_idempotent(struct span method)       /* RFC 9110 section 9.2.2 */
{
    static const char *const names[] = { "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE" };

    for (size_t i = 0; i < COUNT(names); i++)
        if (span_eq(method, names[i]))
            return true;
    return false;
}

/* An event is a request too: its text is the body. */
static void up_add_event(struct buf *out, struct span event)
{
    buf_add_format(out, "POST / HTTP/1.1\r\nHost: localhost\r\nAleph-Event: aleph.message\r\n"
                   "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n", event.n);
    buf_add_span(out, event);
}

/* Writes the head anew, from its parts. True: the body goes in chunks. */
static bool up_add_request(struct buf *out, const struct request *r)
{
    struct span rest, name, value;
    struct span host = SPAN("localhost");
    bool has_host = false, has_length = false;

    buf_add_span(out, request_part(r, r->method));
    buf_add_byte(out, ' ');
    buf_add_span(out, request_part(r, r->raw_path));
    if (r->query.n > 0 || r->query.at == r->raw_path.at + r->raw_path.n + 1)
        buf_add_byte(out, '?');         /* a query may be there and empty */
    buf_add_span(out, request_part(r, r->query));
    buf_add_text(out, " HTTP/1.1\r\n");
    for (rest = request_part(r, r->fields); field_next(&rest, &name, &value);) {
        if (span_eq_nocase(name, "expect"))
            continue;                   /* the front has answered it */
        if (span_eq_nocase(name, "host"))
            has_host = true, host = value;
        has_length = has_length || span_eq_nocase(name, "content-length");
        field_add_line(out, name, value);
    }
    if (!has_host)
        field_add_line(out, SPAN("Host"), host);
    if (r->client.n > 0 && !r->forwarded) {
        field_add_line(out, SPAN("X-Forwarded-For"), request_part(r, r->client));
        field_add_line(out, SPAN("X-Forwarded-Proto"), span_of(r->is_https ? "https" : "http"));
        field_add_line(out, SPAN("X-Forwarded-Host"), host);
    }
    if (r->upgrade.n > 0) {
        buf_add_text(out, "Connection: Upgrade\r\n");
        field_add_line(out, SPAN("Upgrade"), request_part(r, r->upgrade));
    }
    bool chunked = r->has_body && !has_length;
    buf_add_text(out, chunked ? "Transfer-Encoding: chunked\r\n\r\n" : "\r\n");
    return chunked;
}

static size_t up_room(struct exchange *ex)
{
    const struct up *u = ex->stream;

    return u->body_sent || u->conn.out.len >= CONN_OUT_HIGH ? 0 : CONN_OUT_HIGH - u->conn.out.len;
}

/* The client sends no more into the tunnel: the program is told, and has a moment to end too. */
static void up_end_tunnel(struct up *u)
{
    if (u->body_sent && u->state == UP_TUNNEL && u->conn.out.len == 0)
        shutdown(u->conn.watch.fd, SHUT_WR);
}

static void up_body(struct exchange *ex, struct span data, bool last)
{
    struct up *u = ex->stream;
    struct buf *out = &u->conn.out;

    if (u->body_sent)
        return;
    if (u->chunked && data.n > 0)
        buf_add_format(out, "%zx\r\n", data.n);
    conn_pass(&u->conn, data);
    if (u->chunked && data.n > 0)
        buf_add_text(out, "\r\n");
    if (u->chunked && last)
        buf_add_text(out, "0\r\n\r\n");
    u->body_sent = last;
    if (last && u->state == UP_TUNNEL) {
        conn_after(&u->conn, UPSTREAM_TUNNEL_MS);
        up_end_tunnel(u);
    }
    conn_soon(&u->conn);
}

static void up_consumed(struct exchange *ex, size_t n)
{
    struct up *u = ex->stream;

    u->held -= n < u->held ? n : u->held;
    conn_soon(&u->conn);
}

static void up_cancel(struct exchange *ex)
{
    struct up *u = ex->stream;

    u->ex = NULL;
    conn_close(&u->conn);
}

static const struct backend up_backend = {
    .room = up_room, .body = up_body, .consumed = up_consumed, .cancel = up_cancel,
};

/* ---- the response: callbacks copy and return ---- */

static struct up *up_of(llhttp_t *parser)
{
    return CONTAINER(parser, struct up, parser);
}

static int up_wrong(struct up *u, const char *why)
{
    u->wrong = why;
    return -1;
}

/* Of what comes with the body: chunk extensions and trailers, which are dropped. */
static int up_count(struct up *u, size_t n)
{
    u->head_bytes += n;
    return u->head_bytes > (size_t)limits.head_bytes ? up_wrong(u, "a head that is too large") : 0;
}

static int up_on_protocol(llhttp_t *parser, const char *p, size_t n)
{
    struct up *u = up_of(parser);

    return protocol_is_http(&u->protocol_bytes, p, n) ? 0 : up_wrong(u, "a protocol other than HTTP");
}

static int up_on_status(llhttp_t *parser, const char *p, size_t n)
{
    struct up *u = up_of(parser);

    if (!field_value_ok((struct span){ p, n }))
        return up_wrong(u, "a control byte in its status line");
    return 0;
}

static int up_on_text(llhttp_t *parser, const char *p, size_t n)
{
    struct up *u = up_of(parser);

    if (u->state != UP_HEAD)
        return up_count(u, n);
    return buf_add(&u->head, p, n) < 0 ? up_wrong(u, "a head that there is no memory for") : 0;
}

static int up_on_field_complete(llhttp_t *parser)
{
    struct up *u = up_of(parser);

    return u->state == UP_HEAD ? buf_add_byte(&u->head, 0) : 0;
}

static int up_on_value_complete(llhttp_t *parser)
{
    struct up *u = up_of(parser);
    struct buf *head = &u->head;

    if (u->state != UP_HEAD)
        return 0;
    while (head->len > 0 && is_blank(buf_at(head)[head->len - 1]))
        head->len--;                /* white space around a value is none of it */
    if (++u->fields > limits.head_fields)
        return up_wrong(u, "too many fields");
    return buf_add_byte(head, 0);
}

/* RFC 9112 section 6: a coding that the parser did not take for chunked would make the rest
 * of the connection the body, another response included. */
static int up_check_coding(struct up *u)
{
    struct span rest = buf_span(&u->head), name, value;
    unsigned codings = 0, lengths = 0;
    bool clear = true;

    while (field_next(&rest, &name, &value)) {
        bool is_coding = span_eq_nocase(name, "transfer-encoding");
        codings += is_coding;
        clear = clear && (!is_coding || span_eq_nocase(value, "chunked"));
        lengths += span_eq_nocase(name, "content-length");
    }
    if (!clear || codings > 1 || (codings == 1 && !(u->parser.flags & F_CHUNKED)))
        return up_wrong(u, "a Transfer-Encoding that is not clearly chunked");
    if (codings > 0 && (lengths > 0 || u->parser.http_minor == 0))
        return up_wrong(u, "a Transfer-Encoding where none may be");
    return 0;
}

static int up_on_headers_complete(llhttp_t *parser)
{
    struct up *u = up_of(parser);
    struct response_head h = { .status = parser->status_code, .fields_count = u->fields };

    if (parser->http_major != 1 || parser->http_minor > 1)
        return up_wrong(u, "neither HTTP/1.0 nor HTTP/1.1");
    if (h.status < 200 && h.status != 101) {        /* interim: the front has told the client already */
        u->interim = true;
        return 0;
    }
    if (h.status == 101 && !u->ex->may_upgrade)
        return up_wrong(u, "a change of protocol that nobody asked for");
    if (up_check_coding(u) < 0)
        return -1;
    u->state = h.status == 101 ? UP_TUNNEL : UP_BODY;
    u->body_sent = u->body_sent && u->state != UP_TUNNEL;
    h.fields = buf_span(&u->head);
    exchange_head(u->ex, &h);
    bool bodyless = u->is_head || h.status == 204 || h.status == 304;      /* whatever its length says */
    return !u->ex ? -1 : u->state == UP_TUNNEL ? HPE_PAUSED : bodyless;
}

static int up_on_body(llhttp_t *parser, const char *p, size_t n)
{
    struct up *u = up_of(parser);

    if (u->state != UP_BODY)
        return up_wrong(u, "a body in an interim response");
    u->held += n;
    exchange_data(u->ex, (struct span){ p, n });
    return u->ex ? 0 : -1;
}

static int up_on_message_complete(llhttp_t *parser)
{
    struct up *u = up_of(parser);

    u->complete = true;
    u->keep_alive = llhttp_should_keep_alive(parser);
    return HPE_PAUSED;
}

static int up_on_extension(llhttp_t *parser, const char *p, size_t n)
{
    (void)p;
    return up_count(up_of(parser), n);
}

static const llhttp_settings_t up_settings = {
    .on_protocol = up_on_protocol, .on_status = up_on_status, .on_header_field = up_on_text, .on_header_value = up_on_text,
    .on_header_field_complete = up_on_field_complete, .on_header_value_complete = up_on_value_complete,
    .on_headers_complete = up_on_headers_complete, .on_body = up_on_body,
    .on_message_complete = up_on_message_complete,
    .on_chunk_extension_name = up_on_extension, .on_chunk_extension_value = up_on_extension,
};

/* ---- a connection's life ---- */

/* Ready for a response, after the one before or an interim one. */
static void up_reset(struct up *u)
{
    llhttp_init(&u->parser, HTTP_RESPONSE, &up_settings);
    buf_fini(&u->head);
    u->fields = u->protocol_bytes = 0;
    u->interim = u->complete = false;
    u->state = UP_HEAD;
}

/* The response is complete: the connection waits for another exchange, if all went as it should. */
static void up_finish(struct up *u)
{
    struct upstream *up = u->of;
    struct exchange *ex = u->ex;
    const struct conn *c = &u->conn;

    u->ex = NULL;
    if (u->keep_alive && u->body_sent && c->out.len == 0 && c->in.len == 0 && !c->half && !c->gone
        && up->idle_len < UPSTREAM_IDLE_MAX && up->runner.state == RUNNER_READY) {
        up_unlink(u);
        up_link(&up->idle, u);
        up->idle_len++;
        u->parked = u->reused = true;
        up_reset(u);
        conn_after(&u->conn, limits.upstream_idle_ms);
    } else {
        conn_close(&u->conn);
    }
    exchange_end(ex);
}

static void up_take_tunnel(struct up *u)
{
    struct conn *c = &u->conn;
    size_t room = UPSTREAM_CREDIT - u->held, n = room < c->in.len ? room : c->in.len;

    u->held += n;
    exchange_data(u->ex, (struct span){ buf_at(&c->in), n });
    if (u->ex)
        buf_drop(&c->in, n);
}

/* Gives the parser what may be taken now. */
static void up_parse(struct up *u)
{
    struct conn *c = &u->conn;
    size_t room = UPSTREAM_CREDIT - u->held, n = room < c->in.len ? room : c->in.len;
    size_t left = (size_t)limits.head_bytes - u->head_bytes;
    const char *from = buf_at(&c->in);

    if (u->state == UP_HEAD && n > left)
        n = left;
    llhttp_errno_t error = llhttp_execute(&u->parser, from, n);
    size_t used = error == HPE_OK ? n : (size_t)(llhttp_get_error_pos(&u->parser) - from);

    if (!u->ex)                     /* a callback has ended it */
        return;
    if (u->state == UP_HEAD && !u->wrong && (u->head_bytes += used) >= (size_t)limits.head_bytes) {
        u->wrong = "a head that is too large";      /* white space comes in no callback */
        error = HPE_USER;
    }
    if (error != HPE_OK && error != HPE_PAUSED) {
        exchange_cancel_fail(u->ex, FAILURE_BAD_RESPONSE, "the program answered with %s",
                             u->wrong ? u->wrong : llhttp_get_error_reason(&u->parser));
        return;
    }
    buf_drop(&c->in, used);
    if (error == HPE_OK)
        return;
    if (u->state == UP_TUNNEL)
        exchange_room_grew(u->ex);
    else if (u->interim)
        up_reset(u);
    else
        up_finish(u);
}

/* The program sends no more. A response without a length ends so; any other is cut short. */
static void up_on_eof(struct up *u)
{
    bool ends = u->state == UP_TUNNEL;

    if (u->state == UP_BODY && !u->conn.reset && llhttp_message_needs_eof(&u->parser)) {
        llhttp_finish(&u->parser);
        ends = u->complete;
    }
    if (ends) {
        u->keep_alive = false;
        up_finish(u);
    } else {
        conn_close(&u->conn);
    }
}

static void up_on_input(struct conn *c)
{
    struct up *u = CONTAINER(c, struct up, conn);

    u->connected = true;
    if (!u->ex && (c->in.len > 0 || c->half || c->eof)) {   /* idle, and it speaks or leaves */
        conn_close(c);
        return;
    }
    u->answered = u->answered || c->in.len > 0;
    while (u->ex && c->in.len > 0 && u->held < UPSTREAM_CREDIT) {
        if (u->state == UP_TUNNEL)
            up_take_tunnel(u);
        else
            up_parse(u);
    }
    if (u->ex && c->eof && c->in.len == 0)
        up_on_eof(u);
}

static void up_on_sent(struct conn *c)
{
    struct up *u = CONTAINER(c, struct up, conn);

    up_end_tunnel(u);
    if (u->ex && !u->body_sent)
        exchange_room_grew(u->ex);
}

static void up_on_deadline(struct conn *c)
{
    struct up *u = CONTAINER(c, struct up, conn);

    u->keep_alive = false;
    if (u->ex)                      /* a tunnel with one end */
        up_finish(u);
    else
        conn_close(c);
}

static void upstream_repeat(struct upstream *up, struct exchange *ex);
static void upstream_refused(struct upstream *up, struct exchange *ex);

/* Whatever still waits for an answer on it gets another connection, if that repeats nothing. */
static void up_on_close(struct conn *c)
{
    struct up *u = CONTAINER(c, struct up, conn);
    struct upstream *up = u->of;
    struct exchange *ex = u->ex;
    bool repeatable = u->reused && !u->answered && ex && !ex->request.has_body
                   && method_is_idempotent(request_part(&ex->request, ex->request.method));

    up_unlink(u);
    up->idle_len -= u->parked;
    u->ex = NULL;
    buf_fini(&u->head);
    if (!ex)
        return;
    if (!u->connected)
        upstream_refused(up, ex);
    else if (repeatable && up->runner.state == RUNNER_READY)
        upstream_repeat(up, ex);
    else
        lost_add(up, ex);
}

static void up_on_free(struct conn *c)
{
    free(CONTAINER(c, struct up, conn));
}

static const struct proto up_proto = {
    .name = "upstream", .on_input = up_on_input, .on_sent = up_on_sent,
    .on_deadline = up_on_deadline, .on_close = up_on_close, .on_free = up_on_free,
    .reads_to_end = true, .reads_in_place = true,
};

/* Whether an idle connection is still what it was: no byte and no end has come (recv(2)). */
static bool up_is_sure(const struct up *u)
{
    char byte;

    return u->conn.watch.deadline_ms - now_ms() > limits.upstream_idle_ms - UPSTREAM_SURE_MS
        && recv(u->conn.watch.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN;
}

/* An idle connection for the request, or NULL. One that the program may be about to close
 * would do for a request that can be repeated, and for no other. */
static struct up *upstream_reuse(struct upstream *up, const struct request *r)
{
    struct up *u = up->idle;

    if (!u || ((r->is_event || r->has_body || !method_is_idempotent(request_part(r, r->method))) && !up_is_sure(u)))
        return NULL;
    up_unlink(u);
    up->idle_len--;
    u->parked = false;
    return u;
}

/* By TCP also where Node's shim does not serve the Unix socket, or too many wait there (connect(2),
 * EAGAIN). */
static int upstream_dial(const struct upstream *up)
{
    int fd = up->near.sa_len > 0 ? address_connect(&up->near) : -1;

    return fd >= 0 ? fd : address_connect(&up->address);
}

/* NULL and errno. */
static struct up *upstream_connect(struct upstream *up)
{
    struct up *u = calloc(1, sizeof *u);
    int fd = u ? upstream_dial(up) : -1;

    if (fd < 0 || conn_open(&u->conn, &up->conns, &up_proto, fd, CONN_CONNECTING) < 0) {
        free(u);
        return NULL;
    }
    u->conn.greets = up->address.kind == ADDRESS_HYBRID ? up->address.port : 0;
    u->of = up;
    up_reset(u);
    return u;
}

/* On this idle connection, or on a new one if it is NULL. */
static void upstream_send(struct upstream *up, struct exchange *ex, struct up *u)
{
    struct request *q = &ex->request;

    ex->backend = &nobody_backend;
    if (!u && !(u = upstream_connect(up))) {
        if (errno == ECONNREFUSED || errno == ENOENT)
            upstream_refused(up, ex);
        else
            exchange_cancel_fail(ex, FAILURE_NO_MEMORY, "no connection to the program: %s", strerror(errno));
        return;
    }
    up_link(&up->busy, u);
    conn_never(&u->conn);
    u->ex = ex;
    u->answered = false;
    u->head_bytes = u->held = 0;
    u->is_head = span_eq(request_part(q, q->method), "HEAD");
    u->body_sent = !q->has_body;
    u->chunked = false;
    if (q->is_event)
        up_add_event(&u->conn.out, request_part(q, q->event));
    else
        u->chunked = up_add_request(&u->conn.out, q);
    ex->backend = &up_backend;
    ex->stream = u;
    if (u->conn.out.failed) {
        exchange_cancel_fail(ex, FAILURE_NO_MEMORY, "no memory for the request");
        return;
    }
    conn_soon(&u->conn);
    exchange_room_grew(ex);
}

/* Not on another idle connection, which may have ended as well. */
static void upstream_repeat(struct upstream *up, struct exchange *ex)
{
    ex->repeated = true;
    upstream_send(up, ex, NULL);
}

static void upstream_request(struct runner *r, struct exchange *ex)
{
    struct upstream *up = upstream_of(r);

    upstream_send(up, ex, upstream_reuse(up, &ex->request));
}

/* ---- does it listen? ---- */

/* Looks in a table of the kernel's (proc(5), /proc/net/tcp) for a socket that listens on the
 * port, on the loopback or everywhere. Those that listen stand first. */
static bool port_listens(const char *table, unsigned port)
{
    char line[256], address[33];
    unsigned found, state;
    bool listens = false;
    FILE *f = fopen(table, "re");

    while (f && !listens && fgets(line, sizeof line, f)) {
        if (sscanf(line, " %*d: %32[0-9A-F]:%4X %*32[0-9A-F]:%*4X %2X", address, &found, &state) != 3)
            continue;               /* the heading */
        if (state != 10 /* TCP_LISTEN */)
            break;
        listens = found == port && (strspn(address, "0") == strlen(address) || strcmp(address, "0100007F") == 0
                                    || strcmp(address, "00000000000000000000000001000000") == 0);
    }
    if (f)
        fclose(f);
    return listens;
}

static void upstream_probe(struct watch *t)
{
    struct upstream *up = CONTAINER(t, struct upstream, probe);
    bool v4 = port_listens("/proc/net/tcp", up->port);

    if (!v4 && !port_listens("/proc/net/tcp6", up->port)) {
        loop_after(up->runner.loop, &up->probe, UPSTREAM_PROBE_MS);
        return;
    }
    address_tcp(&up->address, v4 ? SPAN("127.0.0.1") : SPAN("::1"), up->port);
    up->runner.state = RUNNER_READY;
    up->runner.owner->on_ready(&up->runner);
}

/* It listened once and does no more. A request waits until it does, or another process; what this
 * one has been sent may be what ended it, and is for no other. */
static void upstream_refused(struct upstream *up, struct exchange *ex)
{
    if (up->elsewhere) {
        exchange_cancel_fail(ex, FAILURE_BAD_RESPONSE, "%s cannot be reached", up->address.text);
        return;
    }
    if (up->runner.state == RUNNER_READY && up->reports.fd < 0) {
        up->runner.state = RUNNER_STARTING;
        loop_after(up->runner.loop, &up->probe, UPSTREAM_PROBE_MS);
    }
    if (up->runner.state == RUNNER_STARTING && !ex->repeated)
        up->runner.owner->on_refused(&up->runner, ex);
    else
        lost_add(up, ex);
}

/* ---- what Node's shim says of itself ---- */

static void upstream_on_report(struct upstream *up, unsigned type, struct span payload)
{
    struct runner *r = &up->runner;
    struct span text, traceback;

    if (type == FRAME_READY && r->state == RUNNER_STARTING) {
        r->state = RUNNER_READY;
        r->owner->on_ready(r);
    } else if (type == FRAME_START_FAILED && r->state == RUNNER_STARTING) {
        r->state = RUNNER_STOPPING;
        failure_split(payload, &text, &traceback);
        r->owner->on_start_failed(r, text, traceback);
    } else if (r->state != RUNNER_STOPPING) {
        runner_break(r, "it sent a frame of type %u out of turn", type);
    }
}

static void upstream_on_reports(struct watch *watch, uint32_t events)
{
    struct upstream *up = CONTAINER(watch, struct upstream, reports);
    struct runner *r = &up->runner;
    char bytes[4096];
    ssize_t n = SYS_READ(watch->fd, bytes, sizeof bytes);

    (void)events;
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {                   /* how it ended, waitpid says */
        loop_want(r->loop, watch, 0);
        return;
    }
    if (buf_add(&up->in, bytes, (size_t)n) < 0) {
        runner_break(r, "no memory for its frames");
        return;
    }
    while (up->in.len >= FRAME_HEADER_BYTES && r->state != RUNNER_BROKEN) {
        const char *p = buf_at(&up->in);
        uint32_t length = frame_u32(p);
        if (length > WORKER_FRAME_MAX || frame_u32(p + 4) != 0) {
            runner_break(r, "it sent a malformed frame (%u bytes)", length);
            return;
        }
        if (up->in.len < FRAME_HEADER_BYTES + length)
            return;
        upstream_on_report(up, (unsigned char)p[8], (struct span){ p + FRAME_HEADER_BYTES, length });
        buf_drop(&up->in, FRAME_HEADER_BYTES + length);
    }
}

/* ---- start, stop, death ---- */

static void upstream_deafen(struct runner *r)
{
    struct upstream *up = upstream_of(r);

    loop_never(r->loop, &up->probe);
    if (up->reports.fd >= 0)
        loop_want(r->loop, &up->reports, 0);
}

/* What it had sent before it died still counts. */
static void upstream_read_rest(struct runner *r)
{
    struct upstream *up = upstream_of(r);
    struct up *next;

    if (up->reports.fd >= 0 && up->reports.events)
        upstream_on_reports(&up->reports, 0);
    for (struct up *u = up->busy; u; u = next) {
        next = u->next;             /* handling it moves or closes it, and no other of this list */
        if (u->connected)
            u->conn.watch.on_event(&u->conn.watch, EPOLLIN);
    }
}

static void upstream_fail_all(struct runner *r, enum failure kind, struct span text, struct span traceback)
{
    struct upstream *up = upstream_of(r);

    while (up->busy) {
        struct exchange *ex = up->busy->ex;
        up->busy->ex = NULL;
        conn_close(&up->busy->conn);
        exchange_fail(ex, kind, text, traceback);
    }
    lost_fail_all(up, kind, text, traceback);
}

static void upstream_bury(struct watch *watch)
{
    struct upstream *up = CONTAINER(watch, struct upstream, reports);

    output_fini(&up->runner.output);
    buf_fini(&up->in);
    free(up);
}

static void upstream_free(struct runner *r)
{
    struct upstream *up = upstream_of(r);

    while (up->idle)
        conn_close(&up->idle->conn);
    loop_never(r->loop, &up->probe);
    loop_never(r->loop, &up->lost_timer);
    loop_bury(r->loop, &up->reports, upstream_bury);
}

static const struct runner_kind upstream_kind = {
    .request = upstream_request, .deafen = upstream_deafen, .read_rest = upstream_read_rest,
    .fail_all = upstream_fail_all, .free = upstream_free,
};

/* One whose program somebody else runs; up->address is set. */
static void upstream_init(struct upstream *up, struct loop *loop)
{
    up->elsewhere = true;
    up->runner.kind = &upstream_kind;
    up->runner.state = RUNNER_READY;
    up->runner.loop = up->conns.loop = loop;
    up->reports.fd = up->probe.fd = -1;
    up->lost_timer = (struct watch){ .fd = -1, .on_deadline = lost_on_deadline };
}

/* The socket that Node's shim serves on, or -1 and errno. */
static int upstream_listen(unsigned port)
{
    struct address a = { .kind = ADDRESS_TCP, .fd = -1 };

    address_tcp(&a, SPAN("127.0.0.1"), port);
    int on = 1, fd = address_socket(&a);
    if (fd >= 0 && (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) < 0
                    || bind(fd, (const void *)&a.sa, a.sa_len) < 0 || listen(fd, LISTEN_BACKLOG) < 0))
        fd_close(&fd);
    return fd;
}

/* The socket that Node's shim serves the agent on: a Unix socket, which costs half of what the
 * loopback does, with a name that the kernel chose (unix(7), autobind). -1 and errno. */
static int upstream_listen_near(struct address *a)
{
    socklen_t size = sizeof a->sa;

    *a = (struct address){ .kind = ADDRESS_UNIX, .sa.ss_family = AF_UNIX, .fd = -1 };
    int fd = address_socket(a);
    if (fd >= 0 && (bind(fd, (const void *)&a->sa, sizeof a->sa.ss_family) < 0 || listen(fd, LISTEN_BACKLOG) < 0
                    || getsockname(fd, (void *)&a->sa, &size) < 0))
        fd_close(&fd);
    a->sa_len = size;
    return fd;
}

/* Starts a program that listens on 127.0.0.1 or ::1, `port`; with a listening socket it is
 * Node's shim and gets that as fd 3, fd 4 to report by, fd 5 to serve us on. NULL and errno. */
static struct runner *upstream_start(const struct runner *base, const char *name, struct spawn *spawn,
                                     unsigned port, int listener)
{
    struct upstream *up = calloc(1, sizeof *up);
    int ends[2] = { -1, -1 }, near = -1;

    if (!up)
        return NULL;
    up->runner = *base;
    up->runner.kind = &upstream_kind;
    up->runner.state = RUNNER_STARTING;
    up->conns.loop = base->loop;
    up->port = port;
    up->address = (struct address){ .kind = ADDRESS_TCP, .text = "the program", .fd = -1 };
    address_tcp(&up->address, SPAN("127.0.0.1"), port);
    up->reports = (struct watch){ .fd = -1, .on_event = upstream_on_reports };
    up->probe = (struct watch){ .fd = -1, .on_deadline = upstream_probe };
    up->lost_timer = (struct watch){ .fd = -1, .on_deadline = lost_on_deadline };
    if (listener >= 0) {
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
            goto failed;
        up->reports.fd = ends[0];
        near = upstream_listen_near(&up->near);
        if (near < 0 || fd_nonblock(ends[0]) < 0 || loop_want(base->loop, &up->reports, EPOLLIN) < 0)
            goto failed;
    }
    spawn->fds[0] = -1;
    spawn->fds[3] = listener;
    spawn->fds[4] = ends[1];
    spawn->fds[5] = near;
    if (runner_start(&up->runner, name, spawn) < 0)
        goto failed;
    fd_close(&ends[1]);
    fd_close(&near);
    if (listener < 0)
        loop_after(base->loop, &up->probe, UPSTREAM_PROBE_MS);
    return &up->runner;
failed:
    log_errno("%s: start", name);
    fd_close(&ends[1]);
    fd_close(&near);
    upstream_free(&up->runner);
    return NULL;
}

/* ==== node: which Node runs a program ============================================
 * A program may pin its Node: nvm reads .nvmrc, npm calls it engines.node in package.json.
 * Either is a range of versions (npm's semver): alternatives between "||", each some
 * comparators that all hold, and every comparator is one interval. */
struct node_pin {
    const char *from;                   /* where it stands, for people; NULL: there is none */
    char        text[NODE_PIN_MAX + 1];
    char        range[512];             /* the same without nvm's words; "": any version */
    bool        in_path;                /* nvm's "system" */
};

struct node_partial {                   /* as 18.x */
    uint64_t part[3];
    size_t   given;                     /* how many of them are numbers */
    bool     prerelease;
};

struct node_range { uint64_t from, below; };

static uint64_t node_version(uint64_t major, uint64_t minor, uint64_t patch)
{
    return major << 40 | minor << 20 | patch;
}

/* Takes a version or a part of one. False: none is there. */
static bool node_take_partial(const char **at, struct node_partial *p)
{
    const char *s = *at + strspn(*at, "v= \t");
    int64_t number;

    *p = (struct node_partial){ 0 };
    for (size_t i = 0; i < COUNT(p->part); i++) {
        struct span digits = { s, strspn(s, "0123456789") };
        if (number_read(digits, 0, NODE_PART_MAX, &number)) {
            if (p->given == i)          /* after an x no number counts */
                p->part[p->given++] = (uint64_t)number;
            s += digits.n;
        } else if (*s && strchr("xX*", *s)) {
            s++;
        } else {
            return false;
        }
        if (i + 1 == COUNT(p->part) || *s != '.')
            break;
        s++;
    }
    p->prerelease = *s == '-';
    if (*s == '-' || *s == '+')
        s += strcspn(s, " \t|");
    *at = s;
    return !*s || strchr(" \t|<>=~^", *s);
}

/* What `op` and a version, perhaps a part of one, mean. or_equal: as in <= and >=. */
static struct node_range node_comparator(char op, bool or_equal, const struct node_partial *p)
{
    const uint64_t *v = p->part;
    uint64_t from = node_version(v[0], v[1], v[2]);
    /* The first version past those that share the first 0, 1, 2, 3 parts. */
    uint64_t past[] = { UINT64_MAX, node_version(v[0] + 1, 0, 0), node_version(v[0], v[1] + 1, 0), from + 1 };
    uint64_t below = past[p->given];
    size_t fixed = 0;

    switch (op) {
    case '<':
        return (struct node_range){ 0, or_equal && !p->prerelease ? below : from };
    case '>':
        return (struct node_range){ or_equal || p->prerelease ? from : below, UINT64_MAX };
    case '~':                           /* the patch may differ */
        return (struct node_range){ from, past[p->given < 2 ? p->given : 2] };
    case '^':                           /* what follows the first part that is not 0 may */
        while (fixed < p->given && v[fixed++] == 0)
            ;
        return (struct node_range){ from, past[fixed] };
    default:
        return (struct node_range){ from, below };
    }
}

/* Whether the range has the version; -1: it is no range. */
static int node_range_has(const char *range, uint64_t version)
{
    bool any = false, all = true;

    for (const char *s = range + strspn(range, " \t"); ; s += strspn(s, " \t")) {
        if (!*s || strncmp(s, "||", 2) == 0) {
            any = any || all;
            all = true;
            if (!*s)
                return any;
            s += 2;
            continue;
        }
        struct node_partial p, last;
        char op = strchr("<>~^", *s) ? *s++ : '=';
        bool or_equal = (op == '<' || op == '>') && *s == '=';
        s += op == '~' && *s == '>';    /* an old way to write ~ */
        if (!node_take_partial(&s, &p))
            return -1;
        struct node_range r = node_comparator(op, or_equal, &p);
        const char *dash = s + strspn(s, " \t");
        if (op == '=' && dash > s && dash[0] == '-' && (dash[1] == ' ' || dash[1] == '\t')) {
            s = dash + 1;
            if (!node_take_partial(&s, &last))
                return -1;
            r.below = node_comparator('<', true, &last).below;
        }
        all = all && version >= r.from && version < r.below;
    }
}

/* nvm's words as a range; anything else stays. */
static void node_pin_translate(struct node_pin *pin)
{
    static const char *const any[] = { "node", "stable", "latest", "current" };
    static const char *const lines[] = {    /* of long-term support: every even major from 4 on */
        "argon", "boron", "carbon", "dubnium", "erbium", "fermium", "gallium", "hydrogen", "iron", "jod", "krypton" };
    bool lts = strcmp(pin->text, "lts/*") == 0;
    size_t len = 0;

    snprintf(pin->range, sizeof pin->range, "%s", pin->text);
    pin->in_path = strcmp(pin->text, "system") == 0;
    for (size_t i = 0; i < COUNT(any); i++)
        if (strcmp(pin->text, any[i]) == 0 || pin->in_path)
            pin->range[0] = '\0';
    for (int major = 4; lts && major < NODE_LTS_MAX; major += 2)
        len += (size_t)snprintf(pin->range + len, sizeof pin->range - len, "%s%d", len ? "||" : "", major);
    for (size_t i = 0; i < COUNT(lines); i++)
        if (strncmp(pin->text, "lts/", 4) == 0 && strcasecmp(pin->text + 4, lines[i]) == 0)
            snprintf(pin->range, sizeof pin->range, "%zu", 4 + 2 * i);
}

/* The first line of .nvmrc that is neither empty nor a comment. */
static struct span node_nvmrc_line(struct span text)
{
    for (size_t step; text.n > 0; text.p += step, text.n -= step) {
        const char *end = memchr(text.p, '\n', text.n);
        struct span line = { text.p, end ? (size_t)(end - text.p) : text.n };
        const char *comment = memchr(line.p, '#', line.n);
        step = line.n + (end != NULL);
        if (comment)
            line.n = (size_t)(comment - line.p);
        while (line.n > 0 && isspace((unsigned char)line.p[line.n - 1]))
            line.n--;
        for (; line.n > 0 && isspace((unsigned char)line.p[0]); line.p++)
            line.n--;
        if (line.n > 0)
            return line;
    }
    return text;
}

/* Sets the pin to what stands in a file of the program. -1: it cannot be one, why says it. */
static int node_pin_set(struct node_pin *pin, const char *from, struct span text, struct buf *why)
{
    bool printable = true;

    for (size_t i = 0; i < text.n; i++)
        printable = printable && text.p[i] >= 0x20 && text.p[i] < 0x7f;
    if (!printable || text.n > NODE_PIN_MAX) {
        buf_add_format(why, "%s is no version of Node", from);
        return -1;
    }
    pin->from = from;
    snprintf(pin->text, sizeof pin->text, "%.*s", (int)text.n, text.p);
    node_pin_translate(pin);
    if (node_range_has(pin->range, 0) >= 0)
        return 0;
    buf_add_format(why, "%s is no version of Node: %s", from, pin->text);
    return -1;
}

/* 1: loaded, 0: there is none, -1: why says what is wrong. */
static int node_file_load(const char *folder, const char *name, struct buf *text, struct buf *why)
{
    char path[PATH_MAX];

    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path)
        return 0;
    if (file_load_regular(path, text, NODE_FILE_MAX) == 0)
        return 1;
    if (errno == ENOENT || errno == ENOTDIR)
        return 0;
    buf_add_format(why, "%s: %s", name, errno == EINVAL ? "no regular file" : strerror(errno));
    return -1;
}

static int node_package_pin(struct span text, struct node_pin *pin, struct buf *why)
{
    yyjson_read_err wrong;
    size_t bom = text.n >= 3 && memcmp(text.p, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;
    yyjson_doc *doc = yyjson_read_opts((char *)(uintptr_t)text.p + bom, text.n - bom, 0, NULL, &wrong);
    int rc = 0;

    if (!doc) {
        buf_add_format(why, "package.json: byte %zu: %s", wrong.pos + bom, wrong.msg);
        return -1;
    }
    yyjson_val *node = yyjson_obj_get(yyjson_obj_get(yyjson_doc_get_root(doc), "engines"), "node");
    if (yyjson_is_str(node))
        rc = node_pin_set(pin, "engines.node in package.json",
                          (struct span){ yyjson_get_str(node), yyjson_get_len(node) }, why);
    yyjson_doc_free(doc);
    return rc;
}

static int node_pin_read(const char *folder, struct node_pin *pin, struct buf *why)
{
    struct buf text = { 0 };
    int rc = node_file_load(folder, ".nvmrc", &text, why);

    if (rc > 0)
        rc = node_pin_set(pin, ".nvmrc", node_nvmrc_line(buf_span(&text)), why);
    else if (rc == 0 && (rc = node_file_load(folder, "package.json", &text, why)) > 0)
        rc = node_package_pin(buf_span(&text), pin, why);
    buf_fini(&text);
    return rc;
}

/* The highest version below nvm_dir that the range has; there lists those it has not. */
static bool node_best(const char *nvm_dir, const char *range, char *out, size_t size, struct buf *there)
{
    char path[PATH_MAX];
    uint64_t best = 0;
    int looked = 0;

    if (snprintf(path, sizeof path, "%s/versions/node", nvm_dir) >= (int)sizeof path)
        return false;
    DIR *d = opendir(path);
    for (struct dirent *e; d && looked < NODE_VERSIONS_MAX && (e = readdir(d)); looked++) {
        struct node_partial p;
        const char *at = e->d_name;
        if (*at != 'v' || !node_take_partial(&at, &p) || *at || p.given < COUNT(p.part) || p.prerelease
            || snprintf(path, sizeof path, "%s/versions/node/%s/bin/node", nvm_dir, e->d_name) >= (int)sizeof path
            || access(path, X_OK) < 0)
            continue;
        uint64_t version = node_version(p.part[0], p.part[1], p.part[2]);
        if (node_range_has(range, version) > 0 && version >= best && strlen(path) < size) {
            best = version;
            memcpy(out, path, strlen(path) + 1);
        }
        if (there->len < NODE_LIST_MAX)
            buf_add_format(there, "%s%s", there->len ? ", " : "", e->d_name);
    }
    if (d)
        closedir(d);
    return best > 0;
}

/* The first executable file of that name in the PATH. False: there is none. */
static bool program_find(const char *path, const char *name, char *out, size_t size)
{
    for (const char *at = path; *at; at += strcspn(at, ":"), at += *at == ':') {
        snprintf(out, size, "%.*s/%s", (int)strcspn(at, ":"), at, name);
        if (access(out, X_OK) == 0)
            return true;
    }
    return false;
}

/* The Node for the program in the folder: the highest of nvm's that meets its pin, or where
 * nvm has none at all, the one in the PATH. nvm_dir may be NULL. False: why says it. */
static bool node_find(const char *folder, const char *nvm_dir, const char *path, char *out, size_t size,
                      struct buf *why)
{
    struct node_pin pin = { 0 };
    struct buf there = { 0 };

    if (node_pin_read(folder, &pin, why) < 0)
        return false;
    if (!nvm_dir)
        nvm_dir = access(PATH_NVM_HOME, X_OK) == 0 ? PATH_NVM_HOME : PATH_NVM_OPT;
    bool found = !pin.in_path && node_best(nvm_dir, pin.range, out, size, &there);
    if (!found && there.len > 0) {
        buf_add_format(why, "%s asks for Node %s, %.200s has %s", pin.from, pin.text, nvm_dir, buf_text(&there));
    } else if (!found && !(found = program_find(path, "node", out, size))) {
        buf_add_format(why, "there is no node in %.400s and none in %.400s", path, nvm_dir);
    } else if (pin.from && !pin.in_path && there.len == 0) {
        log_info("%s asks for Node %s: %s is all there is", pin.from, pin.text, out);
    }
    buf_fini(&there);
    return found;
}

/* ==== program: the user's code, its launch, its restarts, as one =================
 * A program has as many places as workers; each has at most one runner, which is started again
 * when it dies and disturbs no other. A request goes to the runner that has the fewest, and
 * waits here while none takes any. A runner that is retired (halt, or newer code) ends what it
 * has and gets no more; others that have lost their place are killed and only waited for. */
enum program_state {
    PROGRAM_NONE,       /* nothing configured; a warm interpreter may be waiting */
    PROGRAM_STARTING,   /* for the first time: on_started will be told */
    PROGRAM_SERVING,    /* it has started once; how far it is now, its places know */
    PROGRAM_STOPPED     /* for halt: nothing starts any more */
};

#define PROGRAM_SHIM_MAX    (256 << 10)     /* bytes of a shim, unpacked */

enum place_state {
    PLACE_EMPTY,        /* nothing is to run here, but a warm interpreter may */
    PLACE_STARTING,     /* its runner loads the program */
    PLACE_SERVING,      /* or, if it is no shim of ours that starts it, not listening yet */
    PLACE_WAITING,      /* for the back-off to pass */
};

struct place {
    struct program    *program;
    enum place_state   state;
    struct runner     *runner;      /* the current one, or NULL */
    unsigned           port;        /* where it listens, if it is no Python worker */
    int                listener;    /* Node's, -1: none; it outlives who was killed and may not be dead yet */
    unsigned           listener_port;
    struct watch       timer;       /* limit for a start or to listen; back-off */
    int64_t            backoff_ms;
    int64_t            served_ms;   /* when it last became ready; 0: never */
};

struct program {
    struct loop       *loop;
    struct children   *children;
    enum program_state state;
    struct conf        conf;
    struct place       places[WORKERS_MAX];
    size_t             workers;     /* of them in use */
    struct runner     *retired;
    struct watch       room;        /* a runner has ended an exchange that somebody waits for */
    bool               picks_port;  /* a free one, anew for every start: the machine is not ours */
    bool               reloads;     /* where no start succeeds, the next one follows a change of the code */
    int64_t            drain_ms;    /* for the exchanges of a retired runner, before it is asked to end */
    bool               is_late;     /* it does not listen within limits.loading_ms */
    struct buf         ended, ended_tail;   /* how it ended before it was ready; empty: it did not */
    enum failure       ended_as;
    struct watch       stalls;      /* its cgroup's memory.pressure */
    int64_t            oom_kills;   /* as counted last */
    const char        *optimize;    /* "-OO", "-O" or "": none; NULL: not looked for yet */
    char *const       *env;         /* borrowed: what every program gets */
    const char        *folder;      /* borrowed: ours, for the shims */
    int                status;      /* of its last end, as of waitpid(2); -1: none yet */
    const char        *missing;     /* why there is no program, for whoever asks; borrowed */
    struct exchange   *first, **last;
    size_t             queued;
    void             (*on_started)(struct program *, bool ok, struct span text, struct span traceback);
    void             (*on_stopped)(struct program *);
    void             (*before_launch)(struct program *);    /* every time; may be NULL */
    void              *owner;
};

/* ---- how Python is launched ---- */

/* PATH of the environment that every program gets. */
static const char *program_path(const struct program *p)
{
    for (char *const *v = p->env; *v; v++)
        if (strncmp(*v, "PATH=", 5) == 0)
            return *v + 5;
    return PATH_PATH;
}

static bool folder_has(const char *folder, const char *pattern)
{
    bool has = false;
    DIR *d = opendir(folder);

    for (struct dirent *e; d && !has && (e = readdir(d));)
        has = fnmatch(pattern, e->d_name, 0) == 0;
    if (d)
        closedir(d);
    return has;
}

/* The optimisation level whose byte code the runtime ships: Python loads NAME.opt-2.pyc
 * only under -OO, and compiles everything anew under another level (PEP 488). */
static const char *program_optimize(void)
{
    static const char *const bases[] = { "/usr/local/lib", "/usr/lib" };
    static const char *const folders[] = { "__pycache__", "asyncio/__pycache__", "dist-packages/__pycache__" };
    bool one = false, two = folder_has(PATH_LIBS "/__pycache__", "*.opt-2.pyc");

    for (size_t b = 0; b < COUNT(bases) && !two; b++) {
        DIR *d = opendir(bases[b]);
        for (struct dirent *e; d && !two && (e = readdir(d));) {
            if (fnmatch("python3*", e->d_name, 0) != 0)
                continue;
            for (size_t i = 0; i < COUNT(folders) && !two; i++) {
                char path[PATH_MAX];
                snprintf(path, sizeof path, "%s/%s/%s", bases[b], e->d_name, folders[i]);
                two = folder_has(path, "*.opt-2.pyc");
                one = one || folder_has(path, "*.opt-1.pyc");
            }
        }
        if (d)
            closedir(d);
    }
    return two ? "-OO" : one ? "-O" : NULL;
}

/* What a guest gives every program. */
static char *const program_env_guest[] = {
    "PATH=" PATH_PATH,
    "HOME=/root",
    "LANG=C.UTF-8",
    "PYTHONPATH=" PATH_LIBS,
    "ALEPH_INIT_VERSION=" ALEPH_VERSION,
    "ALEPH_API_HOST=http://localhost",
    "ALEPH_API_UNIX_SOCKET=" PATH_API_SOCKET,
    "ALEPH_REMOTE_CRYPTO_HOST=http://localhost",
    "ALEPH_REMOTE_CRYPTO_UNIX_SOCKET=" PATH_API_SOCKET,
    NULL
};

/* What the interpreter or its libraries read when they start, before a warm one could be told. */
static bool variable_is_early(const char *name)
{
    static const char *const prefixes[] = { "PYTHON", "LD_", "MALLOC_", "GLIBC_", "LC_", "LANG", "PATH", "TZ" };

    for (size_t i = 0; i < COUNT(prefixes); i++)
        if (strncmp(name, prefixes[i], strlen(prefixes[i])) == 0)
            return true;
    return false;
}

/* No interpreter that is warm already will do. */
static bool program_needs_cold(const struct conf *c)
{
    if (c->launch != LAUNCH_WORKER)
        return true;
    for (size_t i = 0; i < c->variables_len; i++)
        if (variable_is_early(c->variables[i].name))
            return true;
    return false;
}

/* Adds NAME=VALUE, n bytes of NAME, instead of an earlier one of that name. False: no memory. */
static bool env_set(char **env, const char *name, size_t n, const char *value)
{
    size_t at = 0;
    struct buf text = { 0 };

    buf_add(&text, name, n);
    buf_add_byte(&text, '=');
    buf_add_text(&text, value);
    char *entry = text.failed ? NULL : span_dup(buf_span(&text));
    buf_fini(&text);
    while (env[at] && (strncmp(env[at], name, n) != 0 || env[at][n] != '='))
        at++;
    if (entry) {
        free(env[at]);
        env[at] = entry;
    }
    return entry != NULL;
}

static bool env_put(char **env, const char *name, const char *value)
{
    return env_set(env, name, strlen(name), value);
}

/* NULL: not set. */
static const char *env_get(char *const *env, const char *name)
{
    size_t n = strlen(name);

    for (; *env; env++)
        if (strncmp(*env, name, n) == 0 && (*env)[n] == '=')
            return *env + n + 1;
    return NULL;
}

static void env_free(char **env)
{
    for (size_t i = 0; env && env[i]; i++)
        free(env[i]);
    free(env);
}

/* The environment at exec, NULL-terminated, strings owned; NULL: no memory. What a program that
 * listens must know comes last, as nothing else may stand in its place. */
static char **program_env(const struct program *p, unsigned number)
{
    const struct conf *c = &p->conf;
    char port[8], modules[PATH_MAX];
    size_t base = 0;

    while (p->env[base])
        base++;
    char **env = calloc(base + c->variables_len + 5, sizeof(char *));
    bool ok = env != NULL;

    snprintf(port, sizeof port, "%u", number);
    snprintf(modules, sizeof modules, "%s/node_modules:" PATH_NODE_MODULES, conf_code_folder(c));
    for (size_t i = 0; ok && i < base; i++)
        if (strchr(p->env[i], '='))     /* the caller's environment may hold anything */
            ok = env_set(env, p->env[i], strcspn(p->env[i], "="), strchr(p->env[i], '=') + 1);
    if (ok && c->hostname[0] && c->source == CONF_WIRE)
        ok = env_put(env, "ALEPH_ADDRESS_TO_USE", c->hostname);
    if (ok && c->launch == LAUNCH_NODE)
        ok = env_put(env, "NODE_PATH", modules);
    for (size_t i = 0; ok && i < c->variables_len; i++)
        ok = env_put(env, c->variables[i].name, c->variables[i].value);
    if (ok && c->launch != LAUNCH_WORKER)
        ok = env_put(env, "PORT", port) && env_put(env, "HOST", "127.0.0.1");
    if (ok)
        return env;
    env_free(env);
    return NULL;
}

static const struct runner_owner program_owner;

/* Both shims are files of ours, written anew, as a program may have made them something else, and
 * put there whole, as an interpreter may just be reading. Puts the path into `out`. */
static int program_write_shim(const struct program *p, const char *name, const char *packed, const char *end,
                              char *out, size_t size, struct buf *why)
{
    z_stream s = { .next_in = (Bytef *)(uintptr_t)packed, .avail_in = (uInt)(end - packed) };
    char *text = malloc(PROGRAM_SHIM_MAX), part[PATH_MAX];

    snprintf(out, size, "%s/%s", p->folder, name);
    snprintf(part, sizeof part, "%s/new", p->folder);
    unlink(part);
    errno = ENOMEM;
    int rc = text && inflateInit2(&s, MAX_WBITS + 16) == Z_OK ? 0 : -1;     /* + 16: as gzip has it */
    if (rc == 0) {
        s.next_out = (Bytef *)text;
        s.avail_out = PROGRAM_SHIM_MAX;
        rc = inflate(&s, Z_FINISH) == Z_STREAM_END ? 0 : -1;
        inflateEnd(&s);
        assert(rc == 0);                        /* it is ours: the build has made it */
        rc = mkdir_all(p->folder, 0755) < 0 || file_write(part, text, s.total_out, 0644) < 0 ? -1 : rename(part, out);
    }
    free(text);
    return rc < 0 ? conf_wrong(why, "cannot write %s: %s", out, strerror(errno)) : 0;
}

static int program_find_python(const struct program *p, char *out, size_t size, struct buf *why)
{
    if (program_find(program_path(p), "python3", out, size))
        return 0;
    return conf_wrong(why, "there is no python3 in %.512s", program_path(p));
}

/* Starts an interpreter that waits for its configuration. */
static struct runner *program_spawn_worker(struct program *p, const struct runner *base, const char *name,
                                           char **env, struct buf *why)
{
    char python[PATH_MAX], shim[PATH_MAX], option[8];
    char *argv[] = { python, option, shim, NULL };

    if (program_find_python(p, python, sizeof python, why) < 0
        || program_write_shim(p, WORKER_SHIM, shim_worker, shim_worker_end, shim, sizeof shim, why) < 0)
        return NULL;
    if (!p->optimize)
        p->optimize = program_optimize() ? program_optimize() : "";
    snprintf(option, sizeof option, "%s", p->optimize);
    if (!option[0]) {
        argv[1] = shim;
        argv[2] = NULL;
    }
    return worker_start(base, name, argv, env);
}

/* Sees to the listener, which only Node has a use for. */
static int place_listen(struct place *at, struct buf *why)
{
    bool is_node = at->program->conf.launch == LAUNCH_NODE;

    if (!is_node || at->listener_port != at->port)
        fd_close(&at->listener);
    if (!is_node || at->listener >= 0)
        return 0;
    at->listener_port = at->port;
    at->listener = upstream_listen(at->port);
    return at->listener < 0 ? conf_wrong(why, "cannot listen on port %u for Node: %s", at->port, strerror(errno)) : 0;
}

/* Starts what the entrypoint names: a file for Node's shim or for Python, or an executable with
 * its arguments. */
static struct runner *program_spawn_upstream(struct place *at, const struct runner *base, char **env,
                                             struct buf *why)
{
    const struct program *p = at->program;
    const struct conf *c = &p->conf;
    char *argv[2 * CONF_ARGS_MAX + 4], path[PATH_MAX], interpreter[PATH_MAX], shim[PATH_MAX];
    char *words = span_dup(span_of(c->entrypoint)), *rest;
    struct runner *r = NULL;
    size_t n = 0;
    int rc = 0;

    if (!words)
        return NULL;
    conf_entry_path(c, path, sizeof path);
    if (place_listen(at, why) < 0) {
        rc = -1;
    } else if (c->launch == LAUNCH_NODE) {
        if (!node_find(conf_code_folder(c), env_get(env, "NVM_DIR"), program_path(p), interpreter, sizeof interpreter, why))
            rc = -1;
        else
            rc = program_write_shim(p, NODE_SHIM, shim_node, shim_node_end, shim, sizeof shim, why);
        argv[n++] = interpreter;
        argv[n++] = shim;
        argv[n++] = path;
        argv[n++] = strchr(words, ':') ? strchr(words, ':') + 1 : "";
    } else {
        if (c->launch == LAUNCH_PYTHON) {
            rc = program_find_python(p, interpreter, sizeof interpreter, why);
            argv[n++] = interpreter;
        }
        argv[n++] = path;
        strtok_r(words, " ", &rest);
        for (char *word; n < CONF_ARGS_MAX + 2 && (word = strtok_r(NULL, " ", &rest));)
            argv[n++] = word;
        for (size_t i = 0; i < c->args_len; i++)
            argv[n++] = c->args[i];
    }
    argv[n] = NULL;
    if (rc == 0)
        r = upstream_start(base, c->entrypoint, &(struct spawn){ .argv = argv, .envp = env,
                           .cwd = conf_code_folder(c) }, at->port, at->listener);
    free(words);
    return r;
}

static void program_on_grace(struct watch *t);

/* The port for what starts here: the one that was asked for is the first's. False: there is none. */
static bool place_choose_port(struct place *at)
{
    const struct program *p = at->program;

    if (at > p->places || (p->picks_port && !p->conf.port))
        return (at->port = address_free_port()) != 0;
    at->port = p->conf.port ? (unsigned)p->conf.port : PORT_PROGRAM;
    return true;
}

/* Starts the process; -1: the reason is in why. */
static int place_spawn(struct place *at, const char *name, struct buf *why)
{
    struct program *p = at->program;
    struct runner base = { .owner = &program_owner, .place = at, .loop = p->loop, .children = p->children,
                           .timer = { .fd = -1, .on_deadline = program_on_grace } };

    if (p->conf.launch != LAUNCH_WORKER && !place_choose_port(at))
        return conf_wrong(why, "there is no free port: %s", strerror(errno));
    char **env = program_env(p, at->port);
    p->is_late = false;
    buf_fini(&p->ended);
    buf_fini(&p->ended_tail);
    if (env)
        at->runner = p->conf.launch == LAUNCH_WORKER ? program_spawn_worker(p, &base, name, env, why)
                                                     : program_spawn_upstream(at, &base, env, why);
    if (!at->runner && why->len == 0)
        buf_add_format(why, "cannot start %s: %s", name, strerror(errno));
    env_free(env);
    return at->runner ? 0 : -1;
}

/* Starts an interpreter while the host still thinks about its configuration. */
static void program_prewarm(struct program *p)
{
    struct buf why = { 0 };

    if (p->state == PROGRAM_NONE && !p->places->runner && place_spawn(p->places, "python", &why) < 0)
        log_info("prewarm: %s", buf_text(&why));
    buf_fini(&why);
}

/* The configuration as worker.py reads it. */
static void program_marshal(const struct conf *c, struct buf *out)
{
    buf_add_byte(out, MARSHAL_DICT);
    marshal_key(out, "entry");
    marshal_key(out, c->entrypoint);
    marshal_key(out, "code");
    if (c->encoding == ENCODING_PLAIN)
        marshal_bytes(out, c->code);
    else
        buf_add_byte(out, MARSHAL_NONE);
    marshal_key(out, "dir");
    marshal_key(out, conf_code_folder(c));
    marshal_key(out, "path");
    marshal_list(out, 1);
    marshal_key(out, PATH_PACKAGES);
    marshal_key(out, "lifespan_s");
    marshal_double(out, (double)limits.lifespan_ms / 1e3);
    marshal_key(out, "env");
    buf_add_byte(out, MARSHAL_DICT);
    if (c->hostname[0] && c->source == CONF_WIRE) {
        marshal_key(out, "ALEPH_ADDRESS_TO_USE");
        marshal_key(out, c->hostname);
    }
    for (size_t i = 0; i < c->variables_len; i++) {
        marshal_key(out, c->variables[i].name);
        marshal_key(out, c->variables[i].value);
    }
    buf_add_byte(out, MARSHAL_DICT_END);
    buf_add_byte(out, MARSHAL_DICT_END);
}

static void place_configure(struct place *at)
{
    const struct conf *c = &at->program->conf;
    struct buf text = { 0 };

    program_marshal(c, &text);
    worker_configure(at->runner, c->entrypoint, &text);
    buf_fini(&text);
}

/* ---- the queue ---- */

static void program_dequeue(struct program *p, struct exchange *ex)
{
    *ex->link = ex->next;
    if (ex->next)
        ex->next->link = ex->link;
    else
        p->last = ex->link;
    p->queued--;
}

static void queue_cancel(struct exchange *ex)
{
    program_dequeue(ex->stream, ex);
}

/* The body stays with the client until somebody reads it. */
static const struct backend queue_backend = {
    .room = nothing_fits, .body = nothing_taken, .consumed = nothing_consumed, .cancel = queue_cancel,
};

static void program_enqueue(struct program *p, struct exchange *ex)
{
    ex->backend = &queue_backend;
    ex->stream = p;
    ex->next = NULL;
    ex->link = p->last;
    *p->last = ex;
    p->last = &ex->next;
    p->queued++;
}

static void program_fail_queue(struct program *p, struct span text, struct span traceback)
{
    while (p->first) {
        struct exchange *ex = p->first;
        program_dequeue(p, ex);
        exchange_fail(ex, FAILURE_NOT_STARTED, text, traceback);
    }
}

/* It does not listen yet: a page that browsers load again, if the runtime has one. */
static void program_say_loading(struct program *p, struct exchange *ex)
{
    static const char fields[] = "content-type\0text/html; charset=utf-8\0cache-control\0no-store\0retry-after\0" "5";
    struct buf page = { 0 };
    char text[96];

    snprintf(text, sizeof text, "the program does not listen on port %u yet", p->places->port);
    if (!ex->request.is_event && file_load_regular(PATH_LOADING_PAGE, &page, LOADING_PAGE_MAX) == 0)
        exchange_answer(ex, 503, (struct span){ fields, sizeof fields }, 3, buf_span(&page));
    else
        exchange_fail(ex, FAILURE_NOT_STARTED, span_of(text), SPAN(""));
    buf_fini(&page);
}

/* The runner that has the fewest exchanges; NULL: none can take one. */
static struct runner *program_choose(const struct program *p)
{
    struct runner *best = NULL;

    for (const struct place *at = p->places; at < p->places + p->workers; at++)
        if (at->state == PLACE_SERVING && at->runner && at->runner->state == RUNNER_READY
            && at->runner->load.n < (size_t)limits.in_flight && (!best || at->runner->load.n < best->load.n))
            best = at->runner;
    return best;
}

static void runner_give(struct runner *r, struct exchange *ex)
{
    ex->load = &r->load;
    r->load.n++;
    r->kind->request(r, ex);
}

/* Gives to those that can take. What is left waits for one that ends an exchange, or is ready. */
static void program_dispatch(struct program *p)
{
    struct runner *r;

    while (p->first && (r = program_choose(p))) {
        struct exchange *ex = p->first;
        program_dequeue(p, ex);
        runner_give(r, ex);
    }
    for (struct place *at = p->places; at < p->places + p->workers; at++)
        if (at->runner)
            at->runner->load.awaits = p->first ? &p->room : NULL;
}

/* The front has filled ex->request; the answer, also a refusal, comes through ex->front. */
static void program_request(struct program *p, struct exchange *ex)
{
    struct runner *r = p->first ? NULL : program_choose(p);     /* each in its turn */

    exchange_start(ex, p->loop, &nobody_backend);
    if (r) {
        runner_give(r, ex);
    } else if (p->state == PROGRAM_NONE || p->state == PROGRAM_STOPPED) {
        exchange_fail(ex, FAILURE_NOT_STARTED, p->state == PROGRAM_NONE
                      ? span_of(p->missing) : SPAN("the machine is halting"), SPAN(""));
    } else if (p->ended.len > 0) {
        exchange_fail(ex, p->ended_as, buf_span(&p->ended), buf_span(&p->ended_tail));
    } else if (p->is_late) {
        program_say_loading(p, ex);
    } else if (p->queued >= (size_t)limits.queue) {
        exchange_fail(ex, FAILURE_NOT_STARTED, SPAN("too many requests wait for the program"), SPAN(""));
    } else {
        program_enqueue(p, ex);
        program_dispatch(p);
    }
}

/* ---- life and death ---- */

/* The next wait before a restart. */
static int64_t backoff_after(int64_t ms)
{
    return 2 * ms < limits.backoff_max_ms ? 2 * ms : limits.backoff_max_ms;
}

/* Whether some place is in that state. */
static bool program_has(const struct program *p, enum place_state state)
{
    for (const struct place *at = p->places; at < p->places + p->workers; at++)
        if (at->state == state)
            return true;
    return false;
}

/* What a program has forked, out of its process group even. All are in one cgroup: only once
 * no runner lives. */
static void program_kill_rest(struct program *p)
{
    bool lives = p->retired != NULL;

    for (const struct place *at = p->places; at < p->places + p->workers; at++)
        lives = lives || at->runner;
    if (!lives)
        cgroup_kill(p->children);
}

/* Gives the current runner up; it is only waited for now. */
static void place_drop(struct place *at)
{
    struct runner *r = at->runner;

    at->state = PLACE_EMPTY;
    loop_never(at->program->loop, &at->timer);
    if (!r)
        return;
    at->runner = NULL;
    runner_kill(r);
    program_kill_rest(at->program);
}

static void program_drop_all(struct program *p)
{
    for (struct place *at = p->places; at < p->places + p->workers; at++)
        place_drop(at);
}

/* Its exchanges have ended, or their time has: asks it to end, too. */
static void program_end_retired(struct runner *r)
{
    loop_after(r->loop, &r->timer, limits.grace_ms);
    runner_stop(r);
}

/* Takes the runner out of its place: it ends what it has. */
static void place_retire(struct place *at)
{
    struct program *p = at->program;
    struct runner *r = at->runner;

    at->runner = NULL;
    place_drop(at);
    r->next = p->retired;
    p->retired = r;
    r->load.awaits = &p->room;
    if (r->load.n > 0 && p->drain_ms > 0)
        loop_after(p->loop, &r->timer, p->drain_ms);
    else
        program_end_retired(r);
}

/* Out of the list. False: it was not retired. */
static bool program_unretire(struct program *p, struct runner *r)
{
    for (struct runner **at = &p->retired; *at; at = &(*at)->next) {
        if (*at != r)
            continue;
        *at = r->next;
        loop_never(p->loop, &r->timer);
        return true;
    }
    return false;
}

static void program_on_grace(struct watch *t)
{
    struct runner *r = CONTAINER(t, struct runner, timer);
    struct program *p = ((struct place *)r->place)->program;

    if (r->state < RUNNER_STOPPING) {
        program_end_retired(r);
        return;
    }
    log_info("%s: did not end within %" PRId64 " ms: killed", r->name, limits.grace_ms);
    runner_kill(r);
    if (p->state != PROGRAM_STOPPED)
        return;
    cgroup_kill(p->children);
    if (boot_is_machine)
        p->on_stopped(p);           /* dying can take a second: the disks need it, too */
}

static void program_on_room(struct watch *w, uint32_t events)
{
    struct program *p = CONTAINER(w, struct program, room);

    (void)events;
    program_dispatch(p);
    for (struct runner *r = p->retired; r; r = r->next)
        if (r->load.n == 0 && r->state < RUNNER_STOPPING)
            program_end_retired(r);
}

/* No place serves, and with --reload none is to until the code changes. */
static void program_await_change(struct program *p, struct span text, struct span traceback)
{
    bool first = p->state == PROGRAM_STARTING;

    program_drop_all(p);
    p->state = PROGRAM_SERVING;
    program_fail_queue(p, text, traceback);
    buf_add_span(&p->ended, text);
    buf_add_span(&p->ended_tail, traceback);
    p->ended_as = FAILURE_NOT_STARTED;
    log_info("%s: does not start: %.*s; waits for a change", p->conf.entrypoint, (int)text.n, text.p);
    if (first)
        p->on_started(p, true, SPAN(""), SPAN(""));
}

/* The program did not come up. First start: that is the answer to the configuration.
 * A restart: whoever waits is told, if nobody else may come, and it is tried again after the
 * back-off. */
static void place_start_failed(struct place *at, struct span text, struct span traceback)
{
    struct program *p = at->program;
    struct buf kept = { 0 }, trace = { 0 };

    buf_add_span(&kept, text);          /* they may point into the worker */
    buf_add_span(&trace, traceback);
    place_drop(at);
    if (p->reloads && !program_has(p, PLACE_SERVING)) {
        program_await_change(p, buf_span(&kept), buf_span(&trace));
    } else if (p->state == PROGRAM_STARTING) {
        p->state = PROGRAM_NONE;
        program_drop_all(p);
        program_fail_queue(p, buf_span(&kept), buf_span(&trace));
        conf_fini(&p->conf);
        p->on_started(p, false, buf_span(&kept), buf_span(&trace));
    } else {
        if (!program_has(p, PLACE_SERVING) && !program_has(p, PLACE_STARTING))
            program_fail_queue(p, buf_span(&kept), buf_span(&trace));
        log_info("%s: does not start: %s; next try in %" PRId64 " ms", p->conf.entrypoint,
                 buf_text(&kept), at->backoff_ms);
        at->state = PLACE_WAITING;
        loop_after(p->loop, &at->timer, at->backoff_ms);
        at->backoff_ms = backoff_after(at->backoff_ms);
    }
    buf_fini(&kept);
    buf_fini(&trace);
}

/* A program that no shim of ours starts does not say when it is ready: one that has run for
 * a moment counts as started, and may take its time to listen. */
static bool program_tells(const struct program *p)
{
    return p->conf.launch == LAUNCH_WORKER || p->conf.launch == LAUNCH_NODE;
}

static void place_launch(struct place *at, int64_t ms)
{
    struct program *p = at->program;
    struct buf why = { 0 };

    if (p->retired && p->conf.port) {   /* one of them may have it still */
        at->state = PLACE_WAITING;
        loop_after(p->loop, &at->timer, RUNNER_REAP_MS);
        return;
    }
    at->state = PLACE_STARTING;
    if (p->before_launch)
        p->before_launch(p);
    loop_after(p->loop, &at->timer, program_tells(p) || ms < limits.exec_wait_ms ? ms : limits.exec_wait_ms);
    if (!at->runner && place_spawn(at, p->conf.entrypoint, &why) < 0)
        place_start_failed(at, buf_span(&why), SPAN(""));
    else if (at->runner->state == RUNNER_WARM)
        place_configure(at);
    buf_fini(&why);
}

/* In every place, as far as the start goes on. */
static void program_launch(struct program *p, int64_t ms)
{
    for (struct place *at = p->places; at < p->places + p->workers; at++)
        if (at == p->places || p->places->state != PLACE_EMPTY)
            place_launch(at, ms);
}

static void program_on_warm(struct runner *r)
{
    struct place *at = r->place;
    if (r == at->runner && at->state == PLACE_STARTING)
        place_configure(at);
}

/* Its start is over, whether it listens already or not. */
static void place_serve(struct place *at)
{
    struct program *p = at->program;

    at->state = PLACE_SERVING;
    at->served_ms = now_ms();
    if (p->state != PROGRAM_STARTING)
        return;
    p->state = PROGRAM_SERVING;
    p->on_started(p, true, SPAN(""), SPAN(""));
}

static void program_on_ready(struct runner *r)
{
    struct place *at = r->place;
    struct program *p = at->program;

    if (r != at->runner)
        return;
    loop_never(p->loop, &at->timer);
    log_info("%s: %s", p->conf.entrypoint, at->state == PLACE_STARTING && at->served_ms ? "serving again" : "serving");
    r->was_ready = true;
    p->is_late = false;
    if (at->state != PLACE_SERVING)
        place_serve(at);
    program_dispatch(p);
}

static void program_on_start_failed(struct runner *r, struct span text, struct span traceback)
{
    struct place *at = r->place;
    if (r == at->runner)
        place_start_failed(at, text, traceback);
}

/* It listens no more, though it runs: the request waits as if it had just been started. */
static void program_on_refused(struct runner *r, struct exchange *ex)
{
    struct place *at = r->place;

    exchange_unload(ex);
    if (r != at->runner || at->state != PLACE_SERVING) {
        exchange_fail(ex, FAILURE_CRASHED, SPAN("the program listens no more"), SPAN(""));
        return;
    }
    program_enqueue(at->program, ex);
    if (!at->timer.heap_at)
        loop_after(r->loop, &at->timer, limits.loading_ms);
}

static void program_describe_end(struct program *p, struct runner *r, int status, struct buf *out)
{
    char how[128];
    int64_t kills = cgroup_oom_kills(p->children);

    bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
    child_describe(how, sizeof how, status);
    buf_add_format(out, "the program %s %s", r->name, r->broken[0] && killed ? "was killed" : how);
    if (r->broken[0])
        buf_add_format(out, ": %s", r->broken);
    else if (killed && kills > p->oom_kills)
        buf_add_text(out, ": out of memory");
    p->oom_kills = kills;
}

static void place_ended(struct place *at, bool was_ready, struct span text, struct span tail)
{
    struct program *p = at->program;

    switch (at->state) {
    case PLACE_STARTING:
        place_start_failed(at, text, tail);
        break;
    case PLACE_SERVING:
        if (!was_ready) {               /* whoever waits for it to listen waits in vain */
            program_fail_queue(p, text, tail);
            buf_add_span(&p->ended, text);
            buf_add_span(&p->ended_tail, tail);
            p->ended_as = FAILURE_CRASHED;
        }
        if (now_ms() - at->served_ms > limits.backoff_max_ms)
            at->backoff_ms = limits.backoff_ms;
        at->state = PLACE_WAITING;
        log_info("%s: starts again in %" PRId64 " ms", p->conf.entrypoint, at->backoff_ms);
        loop_after(p->loop, &at->timer, at->backoff_ms);
        at->backoff_ms = backoff_after(at->backoff_ms);
        break;
    case PLACE_EMPTY:               /* a warm interpreter died: the next start is a cold one */
    case PLACE_WAITING:
        break;
    }
}

static void program_on_gone(struct runner *r, int status)
{
    struct place *at = r->place;
    struct program *p = at->program;
    bool is_current = r == at->runner, is_retired = program_unretire(p, r);
    struct buf text = { 0 };

    if (is_current)
        at->runner = NULL;
    if (is_current || is_retired) {
        program_describe_end(p, r, status, &text);
        log_info("%s", buf_text(&text));
        p->status = is_current ? status : p->status;
        child_signal(&r->child, SIGKILL);       /* what it forked */
        program_kill_rest(p);
        r->kind->fail_all(r, FAILURE_CRASHED, buf_span(&text), output_tail(&r->output));
    } else {
        r->kind->fail_all(r, FAILURE_CRASHED, SPAN("the program was replaced"), SPAN(""));
    }
    if (is_current)
        place_ended(at, r->was_ready, buf_span(&text), output_tail(&r->output));
    buf_fini(&text);
    r->kind->free(r);
    if (p->state == PROGRAM_STOPPED && !p->retired)
        p->on_stopped(p);
}

static const struct runner_owner program_owner = {
    .on_warm = program_on_warm, .on_ready = program_on_ready,
    .on_start_failed = program_on_start_failed, .on_refused = program_on_refused, .on_gone = program_on_gone,
};

static void place_on_deadline(struct watch *t)
{
    struct place *at = CONTAINER(t, struct place, timer);
    struct program *p = at->program;
    char text[160];

    switch (at->state) {
    case PLACE_WAITING:
        place_launch(at, limits.start_ms);
        break;
    case PLACE_STARTING:
        if (!program_tells(p) && at->runner->state == RUNNER_BROKEN) {
            loop_after(p->loop, &at->timer, RUNNER_REAP_MS);    /* killed, and about to be reaped */
            break;
        }
        if (!program_tells(p)) {
            place_serve(at);
            loop_after(p->loop, &at->timer, limits.loading_ms);
            break;
        }
        snprintf(text, sizeof text, "the program did not start within %" PRId64 " ms", limits.start_ms);
        place_start_failed(at, span_of(text), output_tail(&at->runner->output));
        break;
    case PLACE_SERVING:
        log_info("%s: does not listen on port %u within %" PRId64 " ms", p->conf.entrypoint, at->port, limits.loading_ms);
        p->is_late = true;
        while (p->first) {
            struct exchange *ex = p->first;
            program_dequeue(p, ex);
            program_say_loading(p, ex);
        }
        break;
    case PLACE_EMPTY:
        break;
    }
}

/* At its limit of memory a program may go on for ever without getting anywhere: the kernel
 * takes the pages of its code away to read them again, and sees no reason to kill. */
static void program_on_stall(struct watch *w, uint32_t events)
{
    struct program *p = CONTAINER(w, struct program, stalls);
    struct runner *largest = NULL;
    int64_t kib, most = -2;             /* kernel_number says -1 */
    char path[48];

    if (!(events & EPOLLPRI))
        loop_want(p->loop, w, 0);
    for (struct place *at = p->places; events & EPOLLPRI && at < p->places + p->workers; at++) {
        snprintf(path, sizeof path, "/proc/%d/status", at->runner ? (int)at->runner->child.pid : 0);
        if (at->runner && (kib = kernel_number(path, "VmRSS:")) > most) {
            largest = at->runner;
            most = kib;
        }
    }
    if (largest)
        runner_break(largest, "out of memory: it stood still for half of 10 s");
}

/* Once its cgroup is there (Documentation/accounting/psi.rst); old kernels have no such file. */
static void program_watch_memory(struct program *p)
{
    static const char trigger[] = "full 5000000 10000000";      /* stalled us, window us */

    p->stalls = (struct watch){ .on_event = program_on_stall,
        .fd = open(PATH_CGROUP "/program/memory.pressure", O_RDWR | O_NONBLOCK | O_CLOEXEC) };
    if (p->stalls.fd < 0 || fd_write_all(p->stalls.fd, trigger, sizeof trigger) < 0
        || loop_want(p->loop, &p->stalls, EPOLLPRI) < 0) {
        log_debug("memory.pressure: %s", strerror(errno));
        fd_close(&p->stalls.fd);
    }
}

static void program_init(struct program *p, struct loop *loop, struct children *children)
{
    *p = (struct program){ .loop = loop, .children = children, .workers = 1,
                           .env = program_env_guest, .folder = PATH_STATE, .status = -1,
                           .missing = "no program is configured yet",
                           .room = { .fd = -1, .on_event = program_on_room } };
    p->last = &p->first;
    for (struct place *at = p->places; at < p->places + WORKERS_MAX; at++)
        *at = (struct place){ .program = p, .port = PORT_PROGRAM, .listener = -1, .timer = { .fd = -1, .on_deadline = place_on_deadline } };
}

/* Takes the configuration, whose code is in place, and starts it within `ms`; p->on_started
 * follows. */
static void program_start(struct program *p, struct conf *conf, int64_t ms)
{
    struct place *first = p->places;

    assert(p->state == PROGRAM_NONE);
    p->conf = *conf;
    *conf = (struct conf){ 0 };
    p->state = PROGRAM_STARTING;
    p->status = -1;
    p->oom_kills = cgroup_oom_kills(p->children);
    p->workers = p->conf.workers > 0 ? (size_t)p->conf.workers : 1;
    for (struct place *at = first; at < first + p->workers; at++) {
        at->backoff_ms = limits.backoff_ms;
        at->served_ms = 0;
    }
    if (first->runner && (program_needs_cold(&p->conf) || first->runner->state > RUNNER_WARM))
        place_drop(first);
    program_launch(p, ms);
}

/* No runner is given anything more: those that serve end what they have, and then themselves. */
static void program_retire_all(struct program *p)
{
    for (struct place *at = p->places; at < p->places + p->workers; at++)
        if (at->state == PLACE_SERVING)
            place_retire(at);
        else
            place_drop(at);             /* it has nothing to finish */
}

/* The code has changed: requests wait for what it is now. */
static void program_reload(struct program *p)
{
    if (p->state != PROGRAM_STARTING && p->state != PROGRAM_SERVING)
        return;
    log_info("%s: changed, starts anew", p->conf.entrypoint);
    program_retire_all(p);
    program_launch(p, limits.start_ms);
}

/* For halt: lifespan shutdown and SIGTERM, SIGKILL to all after the grace, then on_stopped. */
static void program_stop(struct program *p)
{
    bool starting = p->state == PROGRAM_STARTING;

    p->state = PROGRAM_STOPPED;
    program_fail_queue(p, SPAN("the machine is halting"), SPAN(""));
    program_retire_all(p);
    if (starting)
        p->on_started(p, false, SPAN("the machine is halting"), SPAN(""));
    if (!p->retired)
        p->on_stopped(p);
}

/* ==== job: work that may block, in a child of its own ============================
 * The child inherits a copy of our memory, does its work and writes at most one sentence
 * into a page that both share. Hostile data costs that child, a stuck device its deadline. */
struct job {
    struct child child;
    struct watch timer;
    struct loop *loop;
    char        *report;            /* JOB_REPORT_BYTES, shared; "" = success */
    int64_t      ms;                /* its time */
    bool         late, killed;      /* it took longer; it ended without a word of its own */
    int        (*run)(void *arg, struct buf *why);
    void        *arg;
    void       (*on_done)(struct job *, bool ok, struct span report);
};

#define JOB_REPORT_BYTES    4096

static int job_child(void *arg)
{
    struct job *j = arg;
    struct buf why = { 0 };

    if (j->run(j->arg, &why) == 0)
        return 0;
    snprintf(j->report, JOB_REPORT_BYTES, "%s", buf_text(&why));
    return 1;
}

static void job_on_exit(struct child *c, int status)
{
    struct job *j = CONTAINER(c, struct job, child);
    char report[JOB_REPORT_BYTES], how[128];

    loop_never(j->loop, &j->timer);
    memcpy(report, j->report, sizeof report - 1);
    report[sizeof report - 1] = '\0';
    munmap(j->report, JOB_REPORT_BYTES);
    j->report = NULL;
    bool ok = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    j->killed = !ok && report[0] == '\0';
    if (j->killed) {
        child_describe(how, sizeof how, status);
        if (j->late)
            snprintf(how, sizeof how, "took longer than %" PRId64 " ms", j->ms);
        snprintf(report, sizeof report, "%s %s", c->name, how);
    }
    j->on_done(j, ok, ok ? SPAN("") : span_of(report));
}

static void job_on_deadline(struct watch *t)
{
    struct job *j = CONTAINER(t, struct job, timer);
    log_info("%s: took too long: killed", j->child.name);
    j->late = true;
    child_signal(&j->child, SIGKILL);
}

/* j->run, arg and on_done are set by the caller. 0, or -1 and errno. */
static int job_start(struct job *j, struct loop *loop, struct children *children, const char *name, int64_t ms)
{
    j->loop = loop;
    j->ms = ms;
    j->late = false;
    j->child = (struct child){ .name = name, .on_exit = job_on_exit };
    j->timer = (struct watch){ .fd = -1, .on_deadline = job_on_deadline };
    j->report = mmap(NULL, JOB_REPORT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (j->report == MAP_FAILED)
        return -1;
    if (child_spawn(children, &j->child, &(struct spawn){ .run = job_child, .arg = j,
                    .fds = { -1, 2, 2, -1, -1, -1 } }) < 0) {
        munmap(j->report, JOB_REPORT_BYTES);
        return -1;
    }
    loop_after(loop, &j->timer, ms);
    return 0;
}

/* ==== data: what a program leaves in /data =======================================
 * A reply on port 52 carries what is there, packed, when it has changed since a reply carried
 * it last. The tree is as large as the program likes: a child looks and packs. */
struct data_seen {                  /* told by the child, in memory that both share */
    bool     walked;
    uint64_t signature;             /* of all that is there */
    size_t   bytes;                 /* of the archive; 0: nothing has changed */
    char     archive[];
};

struct data {
    struct loop      *loop;
    struct children  *children;
    bool              on;           /* there is a program, and the machine is ours */
    uint64_t          signature;    /* of what was unpacked there, then of what a reply carried */
    struct job        job;
    struct data_seen *seen;         /* NULL: no child is at it */
    size_t            most;         /* bytes of its archive */
    void            (*on_packed)(struct data *, struct span archive, struct span error);   /* archive empty:
                                       no change */
    void             *owner;
};

struct data_walk {
    dev_t           device;
    int64_t         entries;
    uint64_t        sum;            /* of each entry's hash: whatever order they are read in */
    struct timespec newest;         /* change of any */
};

static uint64_t data_hash(uint64_t hash, const void *p, size_t n)      /* FNV-1a */
{
    for (const unsigned char *at = p; n-- > 0; at++)
        hash = (hash ^ *at) * UINT64_C(0x100000001b3);
    return hash;
}

static bool time_is_before(const struct timespec *a, const struct timespec *b)
{
    return a->tv_sec != b->tv_sec ? a->tv_sec < b->tv_sec : a->tv_nsec < b->tv_nsec;
}

/* Adds what is in a folder, which it closes. Any change of an entry moves its ctime; its inode
 * number says nothing, an overlay makes them up. Mounted volumes are not entered: what is
 * there stays there. */
static int data_walk_folder(struct data_walk *w, int fd, uint64_t path, int64_t depth, struct buf *why)
{
    DIR *d = depth > limits.zip_depth ? NULL : fdopendir(fd);
    int rc = 0;

    if (!d) {
        fd_close(&fd);
        return depth > limits.zip_depth ? conf_wrong(why, PATH_DATA ": folders more than %" PRId64 " deep", limits.zip_depth)
                                        : conf_wrong(why, PATH_DATA ": %s", strerror(errno));
    }
    for (struct dirent *e; rc == 0 && (e = readdir(d));) {
        struct stat st;
        if (!zip_pack_not_dots(e) || fstatat(fd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0
            || (S_ISDIR(st.st_mode) && st.st_dev != w->device))
            continue;
        if (++w->entries > limits.zip_entries)
            rc = conf_wrong(why, PATH_DATA ": more than %" PRId64 " entries", limits.zip_entries);
        const int64_t facts[] = { st.st_mode, st.st_size, st.st_mtim.tv_sec, st.st_mtim.tv_nsec,
                                  st.st_ctim.tv_sec, st.st_ctim.tv_nsec };
        uint64_t name = data_hash(path, e->d_name, strlen(e->d_name) + 1);
        w->sum += data_hash(name, facts, sizeof facts);
        if (time_is_before(&w->newest, &st.st_ctim))
            w->newest = st.st_ctim;
        if (!S_ISDIR(st.st_mode) || rc < 0)
            continue;
        int sub = openat(fd, e->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (sub >= 0)
            rc = data_walk_folder(w, sub, name, depth + 1, why);
        else if (errno != ENOENT)
            rc = conf_wrong(why, PATH_DATA ": %s", strerror(errno));
    }
    closedir(d);
    return rc;
}

/* Walks all of it; nothing there is a sum of 0. */
static int data_look(struct data_walk *w, struct buf *why)
{
    struct stat st;
    int fd = open(PATH_DATA, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);

    if (fd < 0)
        return 0;
    w->device = fstat(fd, &st) == 0 ? st.st_dev : 0;
    return data_walk_folder(w, fd, UINT64_C(0xcbf29ce484222325), 1, why);
}

/* Waits until files that change from now on get a time that was not seen: the kernel's clock
 * for them goes by ticks. */
static void data_await_tick(const struct data_walk *w)
{
    struct timespec now;

    for (int i = 0; i < 50; i++) {          /* unless the clock has been set back */
        if (clock_gettime(CLOCK_REALTIME_COARSE, &now) < 0 || time_is_before(&w->newest, &now))
            return;
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
    }
}

/* In the child. */
static int data_run(void *arg, struct buf *why)
{
    struct data *d = arg;
    struct data_walk w = { 0 };

    if (data_look(&w, why) < 0)
        return -1;
    d->seen->signature = w.sum;
    d->seen->walked = true;
    if (w.sum == d->signature)
        return 0;
    data_await_tick(&w);
    struct zip_pack p = { .why = why, .most = d->most, .whole = true, .device = w.device };
    struct buf out = { .data = d->seen->archive, .cap = d->most };      /* never grows: most is its size */
    if (zip_pack_run(&p, PATH_DATA, &out) < 0)
        return -1;
    d->seen->bytes = out.len;
    return 0;
}

/* Worth a child? Asks nothing of a file system that the program may have mounted there
 * (AT_STATX_DONT_SYNC): it might not answer. */
static bool data_is_there(const struct data *d)
{
    const int flags = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC;
    struct statx root, data;

    return d->on && statx(AT_FDCWD, PATH_DATA, flags, STATX_TYPE, &data) == 0 && S_ISDIR(data.stx_mode)
        && statx(AT_FDCWD, "/", flags, STATX_TYPE, &root) == 0
        && root.stx_dev_major == data.stx_dev_major && root.stx_dev_minor == data.stx_dev_minor;
}

static void data_on_done(struct job *j, bool ok, struct span report)
{
    struct data *d = CONTAINER(j, struct data, job);
    struct data_seen *seen = d->seen;
    size_t most = d->most;
    struct span archive = { seen->archive, ok && seen->bytes <= most ? seen->bytes : 0 };

    if (!ok)
        log_info("output data: %.*s", (int)report.n, report.p);
    if (seen->walked) {
        d->signature = seen->signature;     /* also when it failed: it would again */
    } else {
        log_info("output data: none from now on");
        d->on = false;
    }
    d->seen = NULL;
    d->on_packed(d, archive, ok ? SPAN("") : report);
    munmap(seen, sizeof *seen + most);
}

/* Begins to look; on_packed follows. 0, or -1 and errno. */
static int data_pack(struct data *d, size_t most)
{
    assert(!d->seen);
    d->most = most;
    d->job.run = data_run;
    d->job.arg = d;
    d->job.on_done = data_on_done;
    d->seen = mmap(NULL, sizeof *d->seen + most, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (d->seen == MAP_FAILED)
        d->seen = NULL;
    if (d->seen && job_start(&d->job, d->loop, d->children, "output data", limits.data_ms) == 0)
        return 0;
    if (d->seen)
        munmap(d->seen, sizeof *d->seen + most);
    d->seen = NULL;
    return -1;
}

/* What was packed has reached nobody: the next reply shall carry it. */
static void data_untaken(struct data *d)
{
    d->signature = ~d->signature;
}

/* ==== ssh: the host's keys for root, and a server only when there are any ========= */
#define SSH_FOLDER      "root/.ssh"         /* below / */
#define SSH_KEYS        "authorized_keys"
#define SSH_KEYS_FRESH  "authorized_keys.agent"
#define SSH_KEYS_BEFORE "authorized_keys.before-agent"

/* Opens /root/.ssh, following no link: -1 and errno. */
static int ssh_folder(bool make)
{
    struct zip_place at = { .root = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC), .dir = -1 };
    int rc = at.root < 0 ? -1 : zip_enter(&at, SPAN(SSH_FOLDER), make);

    fd_close(&at.root);
    return rc < 0 ? -1 : at.dir;
}

/* What stands there is kept for ssh_restore_keys, and replaced at once by all of the new. */
static int ssh_replace_keys(int folder, struct span text)
{
    unlinkat(folder, SSH_KEYS_BEFORE, 0);
    unlinkat(folder, SSH_KEYS_FRESH, 0);
    int fd = openat(folder, SSH_KEYS_FRESH, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    int rc = fd < 0 ? -1 : fd_write_all(fd, text.p, text.n);
    fd_close(&fd);
    if (rc == 0 && linkat(folder, SSH_KEYS, folder, SSH_KEYS_BEFORE, 0) < 0 && errno != ENOENT)
        rc = -1;
    if (rc == 0)
        rc = renameat(folder, SSH_KEYS_FRESH, folder, SSH_KEYS);
    if (rc < 0) {
        int saved = errno;
        unlinkat(folder, SSH_KEYS_FRESH, 0);
        unlinkat(folder, SSH_KEYS_BEFORE, 0);
        errno = saved;
    }
    return rc;
}

static int ssh_write_keys(const struct conf *c, struct buf *why)
{
    struct buf text = { 0 };
    int rc = -1, folder = -1;

    if (c->authorized_keys_len == 0)
        return 0;
    for (size_t i = 0; i < c->authorized_keys_len; i++) {
        buf_add_text(&text, c->authorized_keys[i]);
        buf_add_byte(&text, '\n');
    }
    errno = ENOMEM;
    if (!text.failed && (folder = ssh_folder(true)) >= 0 && fchown(folder, 0, 0) == 0
        && fchmod(folder, 0700) == 0)
        rc = ssh_replace_keys(folder, buf_span(&text));
    if (rc < 0)
        rc = conf_wrong(why, "authorized_keys: /" SSH_FOLDER "/" SSH_KEYS ": %s", strerror(errno));
    fd_close(&folder);
    buf_fini(&text);
    return rc;
}

static void ssh_restore_keys(const struct conf *c)
{
    int folder = c->authorized_keys_len > 0 ? ssh_folder(false) : -1;

    if (folder >= 0 && renameat(folder, SSH_KEYS_BEFORE, folder, SSH_KEYS) < 0) {
        unlinkat(folder, SSH_KEYS, 0);
        rmdir("/" SSH_FOLDER);          /* unless something else is in it */
    }
    fd_close(&folder);
}

struct ssh {
    struct child  child;            /* the server, once its host keys are made */
    struct output output;
};

/* In the child: makes what the server needs, and becomes it. */
static int ssh_run(void *arg)
{
    char *keygen[] = { SSH_KEYGEN, "-A", NULL }, *server[] = { SSH_SERVER, "-D", "-e", NULL };
    char *env[] = { "PATH=" PATH_PATH, "HOME=/root", NULL };

    (void)arg;
    child_signals_default();
    mkdir("/run/sshd", 0755);
    pid_t pid = fork();
    if (pid == 0) {
        execve(keygen[0], keygen, env);
        dprintf(2, "%s: %s\n", keygen[0], strerror(errno));
        _exit(CHILD_EXEC_FAILED);
    }
    while (pid > 0 && waitpid(pid, NULL, 0) < 0 && errno == EINTR)
        continue;
    execve(server[0], server, env);
    dprintf(2, "%s: %s\n", server[0], strerror(errno));
    return CHILD_EXEC_FAILED;
}

static void ssh_on_exit(struct child *c, int status)
{
    struct ssh *s = CONTAINER(c, struct ssh, child);
    char how[128];

    child_describe(how, sizeof how, status);
    log_info("sshd %s", how);
    c->group = 0;                   /* the number may be another's by the time of a halt */
    output_close(&s->output);
    output_fini(&s->output);
}

/* Starts the server, if there is one. Once: it is not started again when it ends. */
static void ssh_start(struct ssh *s, struct loop *loop, struct children *children)
{
    if (access(SSH_SERVER, X_OK) < 0) {
        log_info("ssh: keys are given, but there is no " SSH_SERVER);
        return;
    }
    int out = output_open(&s->output, loop, "sshd");
    s->child = (struct child){ .name = "sshd", .on_exit = ssh_on_exit };
    if (out < 0 || child_spawn(children, &s->child, &(struct spawn){ .run = ssh_run, .fds = { -1, out, out, -1, -1, -1 } }) < 0) {
        log_errno("sshd");
        if (out >= 0)
            output_close(&s->output);
    }
    fd_close(&out);
}

/* ==== setup: a configuration becomes a running program ==========================
 * The steps run in one child, as each can block on a device or works on hostile data, in
 * the order in which a later one may build on an earlier one. The first that fails ends it:
 * the steps before are taken back, so that another configuration may follow. */
struct setup_step {
    const char *name;
    int       (*apply)(const struct conf *, struct buf *why);   /* leaves nothing when it fails */
    void      (*revert)(const struct conf *);
};

static int setup_set_hostname(const struct conf *c, struct buf *why)
{
    (void)why;
    if (c->hostname[0] && sethostname(c->hostname, strlen(c->hostname)) < 0)
        log_errno("hostname");      /* a program can do without */
    return 0;
}

static void setup_reset_hostname(const struct conf *c)
{
    if (c->hostname[0])
        sethostname(c->old_hostname, strlen(c->old_hostname));
}

static int setup_unpack_data(const struct conf *c, struct buf *why)
{
    return c->input_data.n > 0 ? zip_extract(c->input_data, PATH_DATA, why) : 0;
}

static void setup_remove_data(const struct conf *c)
{
    if (c->input_data.n > 0)
        zip_remove(c->input_data, PATH_DATA);
}

/* An archive may have lost the permission to execute, a read-only file system cannot be given it. */
static void setup_make_executable(const struct conf *c)
{
    char path[PATH_MAX];
    struct stat st;

    conf_entry_path(c, path, sizeof path);
    if (c->launch == LAUNCH_EXEC && access(path, X_OK) < 0 && stat(path, &st) == 0 && S_ISREG(st.st_mode))
        chmod(path, (st.st_mode & 07777) | 0111);
}

static int setup_unpack_code(const struct conf *c, struct buf *why)
{
    char path[PATH_MAX];
    int rc = 0;

    if (c->encoding == ENCODING_ZIP)
        rc = zip_extract(c->code, conf_code_folder(c), why);
    if (c->encoding == ENCODING_PLAIN && c->launch != LAUNCH_WORKER) {
        conf_entry_path(c, path, sizeof path);
        if (mkdir_all(conf_code_folder(c), 0755) < 0 || file_write(path, c->code.p, c->code.n, 0755) < 0)
            rc = conf_wrong(why, "code: %s: %s", path, strerror(errno));
    }
    if (rc == 0)
        setup_make_executable(c);
    return rc;
}

static void setup_remove_code(const struct conf *c)
{
    char path[PATH_MAX];

    conf_entry_path(c, path, sizeof path);
    if (c->encoding == ENCODING_ZIP)
        zip_remove(c->code, conf_code_folder(c));
    else if (c->encoding == ENCODING_PLAIN && c->launch != LAUNCH_WORKER)
        unlink(path);
}

static const struct setup_step setup_steps[] = {
    { "hostname",   setup_set_hostname, setup_reset_hostname },
    { "volumes",    vol_mount,          vol_revert },
    { "network",    net_apply,          net_undo },
    { "input data", setup_unpack_data,  setup_remove_data },
    { "SSH keys",   ssh_write_keys,     ssh_restore_keys },
    { "code",       setup_unpack_code,  setup_remove_code },
};

/* What the child tells while it works, in memory that both share. */
struct setup_progress {
    size_t  done;                   /* steps, from the first, with the one that it is at */
    int64_t us[COUNT(setup_steps)]; /* each one's time */
    bool     data_walked;
    uint64_t data_signature;        /* of /data before the program runs */
};

struct setup {
    struct loop     *loop;
    struct children *children;
    struct program  *program;
    bool             is_ours;       /* the machine is: the steps are taken */
    struct conf      conf;          /* being applied; once done, only what halt must take back */
    struct job       job;
    struct data      data;
    struct ssh       ssh;
    int64_t          started_ms;
    enum { SETUP_NONE, SETUP_APPLYING, SETUP_STARTING, SETUP_REVERTING, SETUP_DONE } state;
    struct setup_progress *progress;
    struct buf       text, trace;   /* the answer, while the steps are taken back */
    void           (*on_done)(struct setup *, bool ok, struct span text, struct span traceback);
    void            *owner;
};

static int setup_apply(void *arg, struct buf *why)
{
    struct setup *s = arg;
    struct data_walk data = { 0 };

    for (size_t i = 0; i < COUNT(setup_steps); i++) {
        int64_t start_us = kernel_us();
        s->progress->done = i + 1;
        if (setup_steps[i].apply(&s->conf, why) < 0) {
            s->progress->done = i;
            return -1;
        }
        s->progress->us[i] = kernel_us() - start_us;
    }
    if (data_look(&data, why) < 0) {
        log_info("output data: none: %s", buf_text(why));
        return 0;
    }
    s->progress->data_signature = data.sum;
    s->progress->data_walked = true;
    return 0;
}

static int setup_revert(void *arg, struct buf *why)
{
    struct setup *s = arg;
    size_t done = s->progress->done;

    (void)why;
    for (size_t i = done < COUNT(setup_steps) ? done : COUNT(setup_steps); i-- > 0;)
        setup_steps[i].revert(&s->conf);
    return 0;
}

static void setup_finish(struct setup *s, bool ok, struct span text, struct span traceback)
{
    if (ok) {
        log_info("setup: done in %" PRId64 " ms", now_ms() - s->started_ms);
        for (size_t i = 0; s->progress && i < COUNT(setup_steps); i++)
            log_debug("setup: %9.1f ms  %s", (double)s->progress->us[i] / 1e3, setup_steps[i].name);
        s->data.loop = s->loop;
        s->data.children = s->children;
        s->data.on = s->progress && s->progress->data_walked;
        s->data.signature = s->data.on ? s->progress->data_signature : 0;
        if (s->is_ours && s->conf.authorized_keys_len > 0)
            ssh_start(&s->ssh, s->loop, s->children);
        buf_fini(&s->conf.raw);         /* the bulk */
        s->conf.code = s->conf.input_data = (struct span){ 0 };
    } else {
        log_info("setup: failed: %.*s", (int)(text.n < 400 ? text.n : 400), text.p);
        conf_fini(&s->conf);
    }
    if (s->progress)
        munmap(s->progress, sizeof *s->progress);
    s->progress = NULL;
    s->state = ok ? SETUP_DONE : SETUP_NONE;
    s->on_done(s, ok, text, traceback);
    if (!ok)
        program_prewarm(s->program);
}

static void setup_on_reverted(struct job *j, bool ok, struct span report)
{
    struct setup *s = CONTAINER(j, struct setup, job);
    struct buf text = s->text, trace = s->trace;

    s->text = s->trace = (struct buf){ 0 };
    if (!ok)
        log_info("setup: taking it back: %.*s", (int)report.n, report.p);
    setup_finish(s, false, buf_span(&text), buf_span(&trace));
    buf_fini(&text);
    buf_fini(&trace);
}

/* Takes the steps back that were done, then answers. */
static void setup_fail(struct setup *s, struct span text, struct span traceback)
{
    if (!s->is_ours) {
        setup_finish(s, false, text, traceback);
        return;
    }
    s->state = SETUP_REVERTING;
    s->job.run = setup_revert;
    s->job.on_done = setup_on_reverted;
    buf_add_span(&s->text, text);
    buf_add_span(&s->trace, traceback);
    if (job_start(&s->job, s->loop, s->children, "undo", limits.start_ms) < 0)
        setup_on_reverted(&s->job, false, SPAN("no child can be started"));
}

static void setup_on_started(struct program *p, bool ok, struct span text, struct span traceback)
{
    struct setup *s = p->owner;

    if (ok || p->state == PROGRAM_STOPPED)
        setup_finish(s, ok, text, traceback);
    else
        setup_fail(s, text, traceback);
}

static void setup_on_applied(struct job *j, bool ok, struct span report)
{
    struct setup *s = CONTAINER(j, struct setup, job);
    struct conf program = { 0 };
    char text[256];

    if (s->program->state != PROGRAM_NONE) {    /* when halting nothing of it outlives the machine */
        setup_finish(s, false, SPAN("the machine is halting"), SPAN(""));
    } else if (!ok && j->killed && s->progress->done > 0) {
        snprintf(text, sizeof text, "%s: %.*s", setup_steps[s->progress->done - 1].name, (int)report.n, report.p);
        setup_fail(s, span_of(text), SPAN(""));
    } else if (!ok) {
        setup_fail(s, report, SPAN(""));
    } else if (conf_copy_program(&program, &s->conf) < 0) {
        setup_fail(s, SPAN("no memory for the configuration"), SPAN(""));
    } else {
        int64_t left = s->started_ms + limits.start_ms - now_ms();
        s->state = SETUP_STARTING;
        program_start(s->program, &program, left > 0 ? left : 0);
    }
}

/* Takes the checked configuration; s->on_done, which the caller has set, follows once. */
static void setup_start(struct setup *s, struct conf *conf)
{
    assert(s->state == SETUP_NONE);
    s->conf = *conf;
    *conf = (struct conf){ 0 };
    s->started_ms = now_ms();
    s->state = SETUP_APPLYING;
    s->program->owner = s;
    s->program->on_started = setup_on_started;
    gethostname(s->conf.old_hostname, sizeof s->conf.old_hostname - 1);
    s->job.run = setup_apply;
    s->job.arg = s;
    s->job.on_done = setup_on_applied;
    if (!s->is_ours) {
        setup_on_applied(&s->job, true, SPAN(""));
        return;
    }
    s->progress = mmap(NULL, sizeof *s->progress, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (s->progress == MAP_FAILED)
        s->progress = NULL;
    if (!s->progress || job_start(&s->job, s->loop, s->children, "setup", limits.start_ms) < 0)
        setup_finish(s, false, SPAN("no child can be started to apply the configuration"), SPAN(""));
}

/* ==== aleph: the supervisor's wire, vsock 52 =====================================
 * One instruction for each connection; its first byte says which: a digit begins a
 * configuration, '!' a command for the shell, 'h' halt, anything else must be a msgpack
 * map, a request or an event. No instruction but the configuration has a length: each ends
 * where its own syntax ends. Whatever happens an answer is sent: the host destroys a
 * machine that says nothing. */
enum aleph_state {
    ALEPH_FIRST,        /* no byte yet */
    ALEPH_CONF,         /* decimal length, newline, map */
    ALEPH_MAP,
    ALEPH_TEXT,         /* !command or halt */
    ALEPH_WAITING       /* for the program, the shell, the setup or the halt */
};

struct aleph_server {
    struct loop      *loop;
    struct conns     *conns;
    struct children  *children;
    struct program   *program;
    struct setup     *setup;
    struct listener   listener;
    struct aleph     *configurer;       /* who gets the answer; NULL: it has hung up */
    struct aleph     *halting;          /* list: who gets STOP and STOPZ */
    struct aleph     *finishing;        /* list: replies that lack but the output data */
    unsigned          commands;
    void            (*on_halt)(struct aleph_server *);
    void             *owner;
};

struct aleph {
    struct conn          conn;      /* first member */
    struct aleph_server *server;
    enum aleph_state     state;
    struct mp_scan       scan;
    size_t               conf_bytes;        /* of the announced map; 0: not announced yet */
    struct exchange      ex;
    size_t               body_at, body_left;    /* request body, in conn.in */
    struct buf           reply;
    size_t               reply_body_at;         /* where its length stands in reply; 0: no head yet */
    struct command      *command;
    struct aleph        *next_halting, *next_finishing;
    bool                 is_packing;            /* /data has been looked at for it */
};

/* ---- answers ---- */

static void aleph_send(struct aleph *a, struct buf *answer)
{
    struct conn *c = &a->conn;

    if (c->state != CONN_OPEN) {
        buf_fini(answer);
        return;
    }
    a->state = ALEPH_WAITING;
    c->paused = true;
    if (c->out.len == 0) {
        buf_fini(&c->out);
        c->out = *answer;
    } else {
        buf_add_span(&c->out, buf_span(answer));
        c->out.failed |= answer->failed;
        buf_fini(answer);
    }
    *answer = (struct buf){ 0 };
    conn_finish(c);
}

/* {"error", "traceback", "output"}: the host looks for the traceback to tell a failure. */
static void aleph_error(struct aleph *a, struct span text, struct span traceback)
{
    struct buf out = { 0 };
    size_t most = (size_t)limits.error_bytes;

    mp_write_map(&out, 3);
    mp_write_key(&out, "error");
    mp_write_text(&out, text, most);
    mp_write_key(&out, "traceback");
    mp_write_text(&out, traceback.n > 0 ? traceback : text, most);
    mp_write_key(&out, "output");
    mp_write_nil(&out);
    aleph_send(a, &out);
}

/* The peer's mistake: told to it and logged, once each. */
PRINTF(2, 3) static void aleph_refuse(struct aleph *a, const char *format, ...)
{
    char text[512];
    va_list ap;

    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    log_info("aleph: refused: %s", text);
    a->conn.linger = true;
    buf_fini(&a->conn.in);
    aleph_error(a, span_of(text), SPAN(""));
}

/* {"success"} or {"success", "error", "traceback"}, no key more: the host takes no others. */
static void aleph_configured(struct aleph *a, bool ok, struct span text, struct span traceback)
{
    struct buf out = { 0 };

    mp_write_map(&out, ok ? 1 : 3);
    mp_write_key(&out, "success");
    mp_write_bool(&out, ok);
    if (!ok) {
        mp_write_key(&out, "error");
        mp_write_text(&out, text, 4096);
        mp_write_key(&out, "traceback");
        mp_write_text(&out, traceback.n > 0 ? traceback : text, (size_t)limits.error_bytes);
    }
    aleph_send(a, &out);
}

PRINTF(2, 3) static void aleph_refuse_conf(struct aleph *a, const char *format, ...)
{
    char text[512];
    va_list ap;

    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    log_info("aleph: configuration refused: %s", text);
    a->conn.linger = true;
    buf_fini(&a->conn.in);
    aleph_configured(a, false, span_of(text), SPAN(""));
}

/* ---- configuration ---- */

static void aleph_on_setup(struct setup *setup, bool ok, struct span text, struct span traceback)
{
    struct aleph_server *s = setup->owner;
    struct aleph *a = s->configurer;

    s->configurer = NULL;
    if (a)
        aleph_configured(a, ok, text, traceback);
}

/* Reads the decimal length. False: answered, or more is needed. */
static bool aleph_conf_length(struct aleph *a)
{
    struct conn *c = &a->conn;
    const char *p = buf_at(&c->in), *end = memchr(p, '\n', c->in.len);
    size_t digits = end ? (size_t)(end - p) : c->in.len, good = 0;
    int64_t length;

    while (good < digits && isdigit((unsigned char)p[good]))
        good++;
    if (!end && digits <= CONF_PREFIX_MAX && good == digits) {
        if (c->eof)
            aleph_refuse_conf(a, "the connection ended within the length");
        return false;
    }
    if (!number_read((struct span){ p, digits < 20 ? digits : 20 }, 1, INT64_MAX, &length) || digits > CONF_PREFIX_MAX) {
        aleph_refuse_conf(a, "its length is no decimal number of at most %d digits and a newline", CONF_PREFIX_MAX);
        return false;
    }
    if (length > limits.conf_bytes) {
        aleph_refuse_conf(a, "%" PRId64 " bytes, at most %" PRId64, length, limits.conf_bytes);
        return false;
    }
    buf_drop(&c->in, digits + 1);
    a->conf_bytes = (size_t)length;
    c->in_max = a->conf_bytes;
    mp_scan_init(&a->scan);
    return true;
}

static void aleph_on_conf(struct aleph *a)
{
    struct aleph_server *s = a->server;
    struct conn *c = &a->conn;
    struct conf conf = { 0 };
    struct buf why = { 0 };
    const char *wrong = "";

    if (s->setup->state != SETUP_NONE) {
        aleph_refuse_conf(a, s->setup->state == SETUP_DONE ? "this machine is configured already"
                          : "another configuration is being applied");
        return;
    }
    if (a->conf_bytes == 0 && !aleph_conf_length(a))
        return;
    enum scan scan = mp_scan(&a->scan, buf_at(&c->in), c->in.len, a->conf_bytes, &wrong);
    if (scan == SCAN_BAD || (scan == SCAN_DONE && a->scan.pos < a->conf_bytes)) {
        aleph_refuse_conf(a, "malformed at byte %zu of %zu: %s", a->scan.pos, a->conf_bytes,
                          scan == SCAN_BAD ? wrong : "the map ends before its announced length");
        return;
    }
    if (c->in.len < a->conf_bytes || scan == SCAN_MORE) {
        if (c->eof)
            aleph_refuse_conf(a, "the connection ended after %zu of %zu bytes", c->in.len, a->conf_bytes);
        else if (c->in.len >= a->conf_bytes)
            aleph_refuse_conf(a, "its map does not end within %zu bytes", a->conf_bytes);
        return;
    }
    if (c->in.len > a->conf_bytes) {
        aleph_refuse_conf(a, "%zu bytes after its announced length", c->in.len - a->conf_bytes);
        return;
    }
    conf.raw = c->in;
    c->in = (struct buf){ 0 };
    if (conf_read_msgpack(&conf, &why) < 0) {
        conf_fini(&conf);
        aleph_refuse_conf(a, "%s", buf_text(&why));
    } else {
        a->state = ALEPH_WAITING;
        c->paused = true;
        conn_never(c);
        s->configurer = a;
        s->setup->owner = s;
        s->setup->on_done = aleph_on_setup;
        setup_start(s->setup, &conf);
    }
    buf_fini(&why);
}

/* ---- requests and events ---- */

static void aleph_on_room(struct exchange *ex)
{
    struct aleph *a = CONTAINER(ex, struct aleph, ex);

    while (a->body_left > 0) {
        size_t room = exchange_room(ex), n = room < a->body_left ? room : a->body_left;
        if (n == 0)
            return;
        struct span piece = { buf_at(&a->conn.in) + a->body_at, n };
        a->body_at += n;
        a->body_left -= n;
        exchange_body(ex, piece, a->body_left == 0);
    }
    buf_fini(&a->conn.in);
}

static size_t aleph_reply_max(void)
{
    static uint64_t quarter;        /* of the memory that there was at the first reply */
    struct sysinfo info;

    if (quarter == 0)
        quarter = sysinfo(&info) == 0 ? (uint64_t)info.totalram * info.mem_unit / 4 : UINT64_MAX;
    return quarter < (uint64_t)limits.reply_bytes ? (size_t)quarter : (size_t)limits.reply_bytes;
}

static void aleph_on_packed(struct data *d, struct span archive, struct span error);     /* also packs again */

/* The reply is built where it will be sent from: the body's length is filled in at the end. */
static void aleph_on_head(struct exchange *ex, const struct response_head *h)
{
    struct aleph *a = CONTAINER(ex, struct aleph, ex);
    struct span rest = h->fields, name, value;
    uint32_t kept = 0;

    while (field_next(&rest, &name, &value))
        kept += !field_is_dropped(h, name);
    mp_write_map(&a->reply, 4);
    mp_write_key(&a->reply, "headers");
    mp_write_map(&a->reply, 3);
    mp_write_key(&a->reply, "type");
    mp_write_key(&a->reply, "http.response.start");
    mp_write_key(&a->reply, "status");
    mp_write_uint(&a->reply, (uint64_t)h->status);
    mp_write_key(&a->reply, "headers");
    mp_write_array(&a->reply, kept);
    for (rest = h->fields; field_next(&rest, &name, &value);) {
        struct buf text = { 0 };
        if (field_is_dropped(h, name))
            continue;
        mp_write_array(&a->reply, 2);
        mp_write_bin(&a->reply, name);
        utf8_add_latin1(&text, value);      /* the host decodes as UTF-8 */
        mp_write_bin(&a->reply, buf_span(&text));
        a->reply.failed |= text.failed;
        buf_fini(&text);
    }
    mp_write_key(&a->reply, "body");
    mp_write_map(&a->reply, 2);
    mp_write_key(&a->reply, "type");
    mp_write_key(&a->reply, "http.response.body");
    mp_write_key(&a->reply, "body");
    mp_write_head(&a->reply, 0xc6, 0, 4);   /* bin 32 */
    a->reply_body_at = a->reply.len;
}

static void aleph_on_data(struct exchange *ex, struct span data)
{
    struct aleph *a = CONTAINER(ex, struct aleph, ex);
    size_t most = aleph_reply_max();

    if (a->reply.len + data.n > most) {
        buf_fini(&a->reply);
        exchange_cancel_fail(ex, FAILURE_BAD_RESPONSE, "the response is larger than %zu bytes", most);
        return;
    }
    if (buf_add_span(&a->reply, data) < 0) {
        buf_fini(&a->reply);
        exchange_cancel_fail(ex, FAILURE_NO_MEMORY, "no memory for the response");
        return;
    }
    exchange_consumed(ex, data.n);
}

/* Writes the last two keys and sends. `output` is where an error may stand that leaves the
 * response whole. */
static void aleph_complete(struct aleph *a, struct span output, struct span data)
{
    struct buf *out = &a->reply;

    mp_write_key(out, "output");
    mp_write_text(out, output, (size_t)limits.error_bytes);
    mp_write_key(out, "output_data");
    if (data.n > 0)
        mp_write_bin(out, data);
    else
        mp_write_nil(out);
    if (out->failed)
        aleph_error(a, SPAN("no memory for the response"), SPAN(""));
    else
        aleph_send(a, out);
}

/* Has /data looked at for all replies that wait for it. Those that end meanwhile wait for the
 * next time: their program may have changed it since. */
static void aleph_pack(struct aleph_server *s)
{
    size_t longest = 0, most = aleph_reply_max();

    for (struct aleph *a = s->finishing; a; a = a->next_finishing) {
        a->is_packing = true;
        longest = a->reply.len > longest ? a->reply.len : longest;
    }
    longest += ALEPH_TAIL_BYTES;
    if (s->finishing && data_pack(&s->setup->data, most > longest ? most - longest : 0) < 0)
        aleph_on_packed(&s->setup->data, SPAN(""), SPAN("output data: no child can be started"));
}

/* The first that waits gets it: for the others nothing has changed since that reply. */
static void aleph_on_packed(struct data *d, struct span archive, struct span error)
{
    struct aleph_server *s = d->owner;
    bool taken = false;

    for (struct aleph *a; (a = s->finishing) && a->is_packing;) {
        s->finishing = a->next_finishing;
        aleph_complete(a, taken ? SPAN("") : error, taken ? SPAN("") : archive);
        taken = true;
    }
    if (!taken && archive.n > 0)
        data_untaken(d);
    aleph_pack(s);
}

static void aleph_finish(struct aleph *a)
{
    struct aleph_server *s = a->server;
    struct aleph **last = &s->finishing;

    if (!data_is_there(&s->setup->data)) {
        aleph_complete(a, SPAN(""), SPAN(""));
        return;
    }
    while (*last)
        last = &(*last)->next_finishing;
    *last = a;
    if (!s->setup->data.seen)
        aleph_pack(s);
}

static void aleph_on_event_end(struct aleph *a)
{
    struct buf out = { 0 };
    struct mp_in in = { buf_at(&a->reply), a->reply.len };

    mp_write_map(&out, 4);
    mp_write_key(&out, "headers");
    mp_write_map(&out, 0);
    mp_write_key(&out, "body");
    if (a->reply.len == 0)
        mp_write_map(&out, 0);
    else
        buf_add_span(&out, buf_span(&a->reply));
    if (a->reply.len == 0 || (mp_skip(&in) && in.n == 0)) {
        buf_fini(&a->reply);
        a->reply = out;
        aleph_finish(a);
        return;
    }
    buf_fini(&out);
    aleph_error(a, SPAN("the program answered the event with what is no msgpack"), SPAN(""));
}

static void aleph_on_end(struct exchange *ex)
{
    struct aleph *a = CONTAINER(ex, struct aleph, ex);
    struct buf *out = &a->reply;

    if (a->reply_body_at == 0 && !out->failed) {
        aleph_on_event_end(a);
        return;
    }
    uint64_t n = out->len - a->reply_body_at;
    for (size_t i = 0; i < 4 && !out->failed; i++)
        out->data[out->start + a->reply_body_at - 4 + i] = (char)(n >> (24 - 8 * i));
    aleph_finish(a);
}

static void aleph_on_fail(struct exchange *ex, enum failure kind, struct span text, struct span traceback)
{
    (void)kind;
    aleph_error(CONTAINER(ex, struct aleph, ex), text, traceback);
}

static const struct front aleph_front = {
    .on_room = aleph_on_room, .on_head = aleph_on_head, .on_data = aleph_on_data,
    .on_end = aleph_on_end, .on_fail = aleph_on_fail,
};

/* The scope's values as they stand in the message. p is NULL: the key is missing. */
struct aleph_scope {
    struct span  type, method, path, query, body;
    struct mp_in headers;
};

static bool aleph_read_value(struct mp_in *in, struct span *out)
{
    return mp_read_bytes(in, MP_STR, out) || mp_read_bytes(in, MP_BIN, out);
}

/* NULL, or what is wrong. Unknown keys are passed over. */
static const char *aleph_read_scope(struct mp_in *in, struct aleph_scope *out)
{
    uint64_t pairs;
    struct span key;

    if (!mp_read_count(in, MP_MAP, &pairs))
        return "scope: expected a map";
    while (pairs-- > 0) {
        if (!mp_read_bytes(in, MP_STR, &key))
            return "scope: a key is not a string";
        if (span_eq(key, "type") && !mp_read_bytes(in, MP_STR, &out->type))
            return "scope.type: expected a string";
        else if (span_eq(key, "method") && !aleph_read_value(in, &out->method))
            return "scope.method: expected a string";
        else if (span_eq(key, "path") && !aleph_read_value(in, &out->path))
            return "scope.path: expected a string";
        else if (span_eq(key, "query_string") && !aleph_read_value(in, &out->query))
            return "scope.query_string: expected a string";
        else if (span_eq(key, "body") && !aleph_read_value(in, &out->body))
            return "scope.body: expected bytes";
        else if (span_eq(key, "headers")) {
            out->headers = *in;
            if (mp_peek(in) != MP_ARRAY || !mp_skip(in))
                return "scope.headers: expected a list";
        } else if (!span_eq(key, "type") && !span_eq(key, "method") && !span_eq(key, "path")
                   && !span_eq(key, "query_string") && !span_eq(key, "body") && !mp_skip(in))
            return "scope: malformed";
    }
    return NULL;
}

static void request_add_field(struct request *r, struct span name, struct span value)
{
    buf_add_span(&r->text, name);
    buf_add_byte(&r->text, 0);
    buf_add_span(&r->text, value);
    buf_add_byte(&r->text, 0);
    r->fields_count++;
}

/* Copies the list into r, hop-by-hop fields, those that Connection names and the length
 * left out: the message is not sent on, it is made anew. NULL, or what is wrong. */
static const char *aleph_read_fields(struct mp_in in, struct request *r, struct span body)
{
    struct span name, value, connection = { 0 };
    struct mp_in again = in;
    uint64_t count, two, bytes = 0;
    bool had_length = false;
    char length[24];

    mp_read_count(&in, MP_ARRAY, &count);
    if (count > (uint64_t)limits.head_fields)
        return "scope.headers: too many";
    for (uint64_t i = 0; i < count; i++) {
        if (!mp_read_count(&in, MP_ARRAY, &two) || two != 2 || !aleph_read_value(&in, &name)
            || !aleph_read_value(&in, &value))
            return "scope.headers: expected a list of pairs of bytes";
        if (!field_name_ok(name))
            return "scope.headers: a name is no token";
        if (!field_value_ok(value))
            return "scope.headers: a value holds control bytes";
        if ((bytes += name.n + value.n) > (uint64_t)limits.http_head_bytes)
            return "scope.headers: too large";
        if (span_eq_nocase(name, "connection"))
            connection = value;
    }
    mp_read_count(&again, MP_ARRAY, &count);
    for (uint64_t i = 0; i < count; i++) {
        mp_read_count(&again, MP_ARRAY, &two);
        aleph_read_value(&again, &name);
        aleph_read_value(&again, &value);
        if (span_eq_nocase(name, "content-length"))
            had_length = true;
        else if (!field_is_hop_by_hop(name) && !field_is_named_in(connection, name) && !field_is_subject(name))
            request_add_field(r, name, value);
    }
    if (had_length || body.n > 0) {
        snprintf(length, sizeof length, "%zu", body.n);
        request_add_field(r, SPAN("content-length"), span_of(length));
    }
    return NULL;
}

/* Makes the request of a scope: what came decoded is encoded again. NULL, or what is wrong. */
static const char *aleph_build_request(const struct aleph_scope *s, struct request *r)
{
    if (!s->method.p || !field_name_ok(s->method))
        return s->method.p ? "scope.method: no token" : "scope.method: missing";
    if (!s->path.p || s->path.n == 0 || s->path.p[0] != '/')
        return s->path.p ? "scope.path: does not begin with /" : "scope.path: missing";
    if (s->path.n + s->query.n > (size_t)limits.http_target_bytes)
        return "scope.path and query_string: too long";
    if (!s->query.p)
        return "scope.query_string: missing";
    if (!s->headers.p)
        return "scope.headers: missing";
    if (!s->body.p)
        return "scope.body: missing";
    if (s->body.n > (size_t)limits.body_bytes)
        return "scope.body: larger than the limit for a request body";
    r->http_version = "1.1";
    r->has_body = s->body.n > 0;
    r->method = request_part_begin(r);
    buf_add_span(&r->text, s->method);
    request_part_end(r, &r->method);
    r->raw_path = request_part_begin(r);
    percent_encode_path(&r->text, s->path);
    request_part_end(r, &r->raw_path);
    r->query = request_part_begin(r);
    percent_encode_query(&r->text, s->query);
    request_part_end(r, &r->query);
    r->fields = request_part_begin(r);
    const char *wrong = aleph_read_fields(s->headers, r, s->body);
    request_part_end(r, &r->fields);
    return wrong;
}

static const char *aleph_build_event(const struct aleph_scope *s, struct request *r)
{
    if (!s->body.p)
        return "scope.body: missing";
    r->is_event = true;
    r->event = request_part_begin(r);
    buf_add_span(&r->text, s->body);
    request_part_end(r, &r->event);
    return NULL;
}

/* Takes a whole instruction apart and passes it on. */
static void aleph_run_map(struct aleph *a)
{
    struct conn *c = &a->conn;
    struct mp_in in = { buf_at(&c->in), a->scan.pos };
    struct aleph_scope scope = { 0 };
    const char *wrong = "no key \"scope\"";
    uint64_t pairs = 0;
    struct span key;

    if (!mp_read_count(&in, MP_MAP, &pairs))
        wrong = "expected a map";
    while (pairs-- > 0) {
        if (!mp_read_bytes(&in, MP_STR, &key)) {
            wrong = "a key is not a string";
            break;
        }
        if (span_eq(key, "scope") && (wrong = aleph_read_scope(&in, &scope)))
            break;
        if (!span_eq(key, "scope"))
            mp_skip(&in);
    }
    if (!wrong && !scope.type.p)
        wrong = "scope.type: missing";
    if (!wrong)
        wrong = span_eq(scope.type, "http") ? aleph_build_request(&scope, &a->ex.request)
              : span_eq(scope.type, "aleph.message") ? aleph_build_event(&scope, &a->ex.request)
              : "scope.type: neither http nor aleph.message";
    if (!wrong && a->ex.request.text.failed)
        wrong = "no memory for it";
    if (wrong) {
        request_fini(&a->ex.request);
        aleph_refuse(a, "instruction: %s", wrong);
        return;
    }
    a->state = ALEPH_WAITING;
    c->paused = true;
    conn_never(c);
    if (a->ex.request.has_body) {
        a->body_at = (size_t)(scope.body.p - buf_at(&c->in));
        a->body_left = scope.body.n;
    } else {
        buf_fini(&c->in);
    }
    a->ex.front = &aleph_front;
    program_request(a->server->program, &a->ex);
}

static void aleph_on_map(struct aleph *a)
{
    struct conn *c = &a->conn;
    uint64_t most = (uint64_t)limits.body_bytes + (uint64_t)limits.http_head_bytes + (uint64_t)limits.http_target_bytes;
    const char *wrong = "";

    c->in_max = (size_t)most + CONN_READ_BYTES;
    switch (mp_scan(&a->scan, buf_at(&c->in), c->in.len, most, &wrong)) {
    case SCAN_BAD:
        aleph_refuse(a, "instruction: malformed at byte %zu: %s (body at most %" PRId64 " bytes)",
                     a->scan.pos, wrong, limits.body_bytes);
        break;
    case SCAN_MORE:
        if (c->eof)
            aleph_refuse(a, "instruction: the connection ended within its map, after %zu bytes", c->in.len);
        break;
    case SCAN_DONE:
        if (a->server->setup->state != SETUP_DONE && a->server->program->state == PROGRAM_NONE)
            aleph_refuse(a, "instruction: %s", a->server->program->missing);
        else
            aleph_run_map(a);
    }
}

/* ---- !command and halt ---- */

/* One shell command; it outlives its connection until it is reaped. */
struct command {
    struct watch         pipe;      /* first member: its output */
    struct child         child;
    struct watch         timer;
    struct aleph_server *server;
    struct aleph        *aleph;     /* NULL: nobody reads */
    int64_t              left;      /* output bytes that may still come */
    bool                 dead;
};

static void command_bury(struct watch *w)
{
    free(CONTAINER(w, struct command, pipe));
}

/* Ends the shell, if it runs still, and the connection; frees cmd once the shell is reaped. */
static void command_end(struct command *cmd, const char *why)
{
    struct aleph *a = cmd->aleph;

    child_signal(&cmd->child, SIGKILL);
    if (!cmd->pipe.buried)
        loop_want(cmd->server->loop, &cmd->pipe, 0);
    if (a) {
        cmd->aleph = NULL;
        a->command = NULL;
        buf_add_text(&a->conn.out, why);
        conn_finish(&a->conn);
    }
    if (!cmd->dead || cmd->pipe.buried)
        return;
    cmd->server->commands--;
    loop_never(cmd->server->loop, &cmd->timer);
    loop_bury(cmd->server->loop, &cmd->pipe, command_bury);
}

/* Passes output on while the peer keeps up. */
static void command_read(struct command *cmd)
{
    char bytes[16384];

    for (int i = 0; i < 8 && cmd->aleph && cmd->aleph->conn.out.len < CONN_OUT_HIGH; i++) {
        ssize_t n = SYS_READ(cmd->pipe.fd, bytes, sizeof bytes);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
            if (cmd->dead)
                command_end(cmd, "");
            else
                loop_want(cmd->server->loop, &cmd->pipe, EPOLLIN);
            return;
        }
        if (n <= 0) {
            loop_want(cmd->server->loop, &cmd->pipe, 0);
            if (cmd->dead)
                command_end(cmd, "");
            return;
        }
        if ((cmd->left -= n) < 0) {
            log_info("aleph: !command: more than %" PRId64 " bytes of output: killed", limits.command_out_bytes);
            command_end(cmd, "\nagent: too much output, killed\n");
            return;
        }
        buf_add(&cmd->aleph->conn.out, bytes, (size_t)n);
        conn_soon(&cmd->aleph->conn);
    }
    if (cmd->aleph)
        loop_want(cmd->server->loop, &cmd->pipe,
                  cmd->aleph->conn.out.len < CONN_OUT_HIGH ? EPOLLIN : 0);
}

static void command_on_event(struct watch *w, uint32_t events)
{
    (void)events;
    command_read(CONTAINER(w, struct command, pipe));
}

static void command_on_exit(struct child *c, int status)
{
    struct command *cmd = CONTAINER(c, struct command, child);

    (void)status;
    cmd->dead = true;
    child_signal(c, SIGKILL);       /* what it left in the background */
    c->group = 0;                   /* the number may be another's by the time all is read */
    if (cmd->aleph)
        command_read(cmd);
    else
        command_end(cmd, "");
}

static void command_on_deadline(struct watch *t)
{
    struct command *cmd = CONTAINER(t, struct command, timer);
    log_info("aleph: !command: longer than %" PRId64 " ms: killed", limits.command_ms);
    command_end(cmd, "\nagent: took too long, killed\n");
}

static int command_start(struct aleph *a, const char *text)
{
    struct aleph_server *s = a->server;
    struct command *cmd = calloc(1, sizeof *cmd);
    char *argv[] = { "/bin/sh", "-c", (char *)(uintptr_t)text, NULL };
    int ends[2] = { -1, -1 };
    int rc = -1;

    if (!cmd)
        return -1;
    char **env = program_env(s->program, s->program->places->port);
    if (env && pipe2(ends, O_CLOEXEC) == 0 && fd_nonblock(ends[0]) == 0) {
        *cmd = (struct command){ .server = s, .aleph = a, .left = limits.command_out_bytes,
            .pipe = { .fd = ends[0], .on_event = command_on_event },
            .timer = { .fd = -1, .on_deadline = command_on_deadline },
            .child = { .name = "!command", .on_exit = command_on_exit } };
        rc = child_spawn(s->children, &cmd->child, &(struct spawn){ .argv = argv, .envp = env,
                         .cwd = "/", .fds = { -1, ends[1], ends[1], -1, -1, -1 } });
    }
    env_free(env);
    fd_close(&ends[1]);
    if (rc < 0) {
        fd_close(&ends[0]);
        free(cmd);
        return -1;
    }
    loop_want(s->loop, &cmd->pipe, EPOLLIN);
    loop_after(s->loop, &cmd->timer, limits.command_ms);
    a->command = cmd;
    s->commands++;
    return 0;
}

static void aleph_run_command(struct aleph *a, size_t length)
{
    struct conn *c = &a->conn;
    char *text = span_dup((struct span){ buf_at(&c->in) + 1, length - 1 });

    a->state = ALEPH_WAITING;
    c->paused = true;
    conn_never(c);
    buf_fini(&c->in);
    if (a->server->commands >= (unsigned)limits.commands)
        aleph_refuse(a, "!command: %" PRId64 " are running already", limits.commands);
    else if (!text || command_start(a, text) < 0)
        aleph_refuse(a, "!command: cannot be started: %s", strerror(errno));
    free(text);
}

static void aleph_run_halt(struct aleph *a)
{
    struct aleph_server *s = a->server;

    a->state = ALEPH_WAITING;
    a->conn.paused = true;
    conn_never(&a->conn);
    a->next_halting = s->halting;
    s->halting = a;
    s->on_halt(s);
}

/* `done`: no byte will follow, or has for command_gap_ms. */
static void aleph_on_text(struct aleph *a, bool done)
{
    struct conn *c = &a->conn;
    const char *p = buf_at(&c->in), *end = memchr(p, '\n', c->in.len);
    size_t n = end ? (size_t)(end - p) : c->in.len;

    if (p[0] == 'h') {
        if (n >= 4 && memcmp(p, "halt", 4) == 0 && (n == 4 || (n == 5 && p[4] == '\r')))
            aleph_run_halt(a);
        else if (done || end || n >= 4 || memcmp(p, "halt", n) != 0)
            aleph_refuse(a, "\"%.*s\" is no instruction", (int)(n < 32 ? n : 32), p);
        return;
    }
    if (n > (size_t)limits.command_bytes)
        aleph_refuse(a, "!command: more than %" PRId64 " bytes", limits.command_bytes);
    else if (end || done)
        aleph_run_command(a, n);
    else
        conn_after(c, limits.command_gap_ms);
}

/* ---- the connection ---- */

static void aleph_on_first(struct aleph *a)
{
    struct conn *c = &a->conn;
    unsigned char first = (unsigned char)buf_at(&c->in)[0];

    conn_after(c, limits.head_ms);
    if (isdigit(first)) {
        a->state = ALEPH_CONF;
    } else if (first == '!' || first == 'h') {
        a->state = ALEPH_TEXT;
        c->in_max = (size_t)limits.command_bytes + 1;       /* past the limit it can be told apart */
    } else if ((first & 0xf0) == 0x80 || first == 0xde || first == 0xdf) {
        a->state = ALEPH_MAP;
        mp_scan_init(&a->scan);
    } else {
        aleph_refuse(a, "its first byte, 0x%02x, begins no instruction", first);
    }
}

static void aleph_on_input(struct conn *c)
{
    struct aleph *a = CONTAINER(c, struct aleph, conn);

    if (a->state == ALEPH_FIRST && c->in.len > 0)
        aleph_on_first(a);
    if (a->state == ALEPH_FIRST && c->eof) {
        conn_close(c);              /* somebody looked whether we listen */
        return;
    }
    if (a->state == ALEPH_CONF) {
        conn_after(c, limits.head_ms);      /* it may be large: what counts is that it goes on */
        aleph_on_conf(a);
    } else if (a->state == ALEPH_MAP) {
        conn_after(c, limits.head_ms);
        aleph_on_map(a);
    } else if (a->state == ALEPH_TEXT) {
        aleph_on_text(a, c->eof);
    }
}

static void aleph_on_sent(struct conn *c)
{
    struct aleph *a = CONTAINER(c, struct aleph, conn);
    if (a->command)
        command_read(a->command);
}

static void aleph_on_deadline(struct conn *c)
{
    struct aleph *a = CONTAINER(c, struct aleph, conn);

    switch (a->state) {
    case ALEPH_FIRST:
        aleph_refuse(a, "no byte within %" PRId64 " ms", limits.silent_ms);
        break;
    case ALEPH_CONF:
        aleph_refuse_conf(a, "stalled for %" PRId64 " ms", limits.head_ms);
        break;
    case ALEPH_MAP:
        aleph_refuse(a, "instruction: stalled for %" PRId64 " ms", limits.head_ms);
        break;
    case ALEPH_TEXT:
        aleph_on_text(a, true);
        break;
    case ALEPH_WAITING:
        break;
    }
}

static void aleph_on_close(struct conn *c)
{
    struct aleph *a = CONTAINER(c, struct aleph, conn);
    struct aleph_server *s = a->server;

    exchange_cancel(&a->ex);
    request_fini(&a->ex.request);
    buf_fini(&a->reply);
    if (a->command) {
        a->command->aleph = NULL;
        command_end(a->command, "");
        a->command = NULL;
    }
    if (s->configurer == a) {
        log_info("aleph: the host hung up before the answer to its configuration");
        s->configurer = NULL;
    }
    for (struct aleph **at = &s->halting; *at; at = &(*at)->next_halting)
        if (*at == a) {
            *at = a->next_halting;
            break;
        }
    for (struct aleph **at = &s->finishing; *at; at = &(*at)->next_finishing)
        if (*at == a) {
            *at = a->next_finishing;
            break;
        }
}

static void aleph_on_free(struct conn *c)
{
    free(CONTAINER(c, struct aleph, conn));
}

static const struct proto aleph_proto = {
    .name = "aleph", .on_input = aleph_on_input, .on_sent = aleph_on_sent,
    .on_deadline = aleph_on_deadline, .on_close = aleph_on_close, .on_free = aleph_on_free,
};

static void aleph_on_accept(struct listener *l, int fd)
{
    struct aleph_server *s = l->arg;
    struct aleph *a = calloc(1, sizeof *a);

    if (!a || conn_open(&a->conn, s->conns, &aleph_proto, fd, CONN_OPEN) < 0) {
        log_info("aleph: no memory for a connection");
        if (!a)
            listener_turn_away(l, fd);
        free(a);
        return;
    }
    a->server = s;
    conn_after(&a->conn, limits.silent_ms);
}

/* The disks are safe: tells every host that waits. */
static void aleph_say_stopped(struct aleph_server *s)
{
    while (s->halting) {
        struct aleph *a = s->halting;
        s->halting = a->next_halting;
        buf_add_text(&a->conn.out, "STOP\nSTOPZ\n");
        conn_finish(&a->conn);
    }
}

static int aleph_open(struct aleph_server *s)
{
    s->setup->data.on_packed = aleph_on_packed;
    s->setup->data.owner = s;
    s->listener.all = s->conns;
    s->listener.extra = 64;         /* clients of port 80 must not keep the host's halt out */
    s->listener.on_accept = aleph_on_accept;
    s->listener.full = "\x83\xa5" "error" "\xb4" "too many connections"
                       "\xa9" "traceback" "\xb4" "too many connections" "\xa6" "output" "\xc0";
    s->listener.arg = s;
    return listener_open(&s->listener);
}

/* ==== http: the front for everybody, vsock 80 ====================================
 * HTTP/1.1 (RFC 9112) through llhttp in its strict mode; what that lets through and a
 * server must not is refused here (http_check_*). One exchange at a time: requests that
 * are pipelined wait in the input buffer. A response is streamed as it comes. */
enum http_state {
    HTTP_IN_HEAD,          /* between requests, or in a head */
    HTTP_IN_BODY,          /* the request goes to the program; its response may come already */
    HTTP_ANSWERING,        /* the request is complete */
    HTTP_TUNNEL            /* after 101: bytes go both ways as they come */
};

struct http_server {
    struct loop    *loop;
    struct conns   *conns;
    struct program *program;
    struct tls_keys **keys;         /* borrowed: those of connections to come */
    struct upstream *target;        /* instead of a program: `agent forward` */
    struct listener listener;
    int             line_status;    /* of `line`, the status line made last */
    char            line[64];
    time_t          date_s;         /* of `date`, the field made last */
    char            date[64];
};

struct http {
    struct conn         conn;       /* first member */
    struct http_server *server;
    struct endpoint     peer, own;  /* what is connected with what */
    bool                trusted;                    /* what it says of whom it speaks for counts */
    enum http_state     state;
    llhttp_t            parser;
    struct exchange     ex;
    const char         *wrong;      /* why the request is refused, set by a callback */
    int                 wrong_status;
    struct part         authority, name;            /* in ex.request.text */
    struct buf          connection, upgrade;        /* values of those fields */
    size_t              head_bytes, extra_bytes;    /* of this request: head; extensions, trailers */
    size_t              line_bytes;                 /* between two pieces of its body */
    int64_t             body_bytes;
    unsigned            fields, hosts, codings;     /* all, Host and Transfer-Encoding fields */
    unsigned            protocol_bytes;             /* of "HTTP" seen */
    bool                head_done, request_done, response_done, head_sent;
    bool                expects;                    /* 100-continue */
    bool                keep_alive, is_head;
    bool                served;                     /* a request before this one was answered */
    bool                chunked;                    /* our response is */
    bool                no_body;                    /* our response has none */
    size_t              owed;       /* response bytes not yet credited to the program */
    struct buf          line;       /* of the access log, as far as the response; empty: none is due */
    int64_t             begun_us, sent;
    int                 status;     /* 0: no response has begun */
};

/* Adds the reason phrase, for people: BAD_GATEWAY becomes "Bad Gateway". */
static void http_add_phrase(struct buf *out, int status)
{
    static const struct { int status; const char *name; } phrases[] = {
#define HTTP_PHRASE(number, name, string) { number, #string },
        HTTP_STATUS_MAP(HTTP_PHRASE)
    };
    size_t i = 0;

    while (i < COUNT(phrases) && phrases[i].status != status)
        i++;
    if (i == COUNT(phrases))
        return;
    bool start = true, whole = status == 200;       /* "OK" is spelled so */
    for (const char *p = phrases[i].name; *p; p++) {
        buf_add_byte(out, (unsigned char)(*p == '_' ? ' ' : start || whole ? *p : tolower((unsigned char)*p)));
        start = *p == '_';
    }
}

static void http_add_status_line(struct http *h, int status)
{
    struct http_server *s = h->server;
    struct buf line = { 0 };

    if (s->line_status != status) {
        buf_add_format(&line, "HTTP/1.1 %d ", status);
        http_add_phrase(&line, status);
        snprintf(s->line, sizeof s->line, "%s\r\n", buf_text(&line));
        s->line_status = line.failed ? 0 : status;
        h->conn.out.failed |= line.failed;
        buf_fini(&line);
    }
    buf_add_text(&h->conn.out, s->line);
}

/* IMF-fixdate, RFC 9110 section 5.6.7. */
static void http_add_date(struct http *h)
{
    struct http_server *s = h->server;
    time_t now = time(NULL);
    struct tm utc;

    if (s->date_s != now || !s->date[0]) {
        gmtime_r(&now, &utc);
        strftime(s->date, sizeof s->date, "date: %a, %d %b %Y %H:%M:%S GMT\r\n", &utc);
        s->date_s = now;
    }
    buf_add_text(&h->conn.out, s->date);
}

/* ---- the access log: the Common Log Format and milliseconds ---- */

/* Bytes that could end the field, the line, or mislead a terminal become \xHH. */
static void http_log_text(struct buf *out, struct span text)
{
    size_t most = out->len + (size_t)limits.log_line_bytes;

    for (size_t i = 0; i < text.n && out->len < most; i++) {
        unsigned char c = (unsigned char)text.p[i];
        if (c < 0x20 || c >= 0x7f || c == '"' || c == '\\')
            buf_add_format(out, "\\x%02x", c);
        else
            buf_add_byte(out, c);
    }
}

static void http_log_begin(struct http *h)
{
    const struct request *r = &h->ex.request;
    struct sockaddr_storage peer = { 0 };
    socklen_t size = sizeof peer;
    char text[INET6_ADDRSTRLEN] = "-", date[40];
    time_t now = time(NULL);
    struct tm utc;

    if (access_log.fd < 0 || h->line.len > 0)
        return;
    if (getpeername(h->conn.watch.fd, (void *)&peer, &size) == 0 && peer.ss_family == AF_INET)
        inet_ntop(AF_INET, &((struct sockaddr_in *)(void *)&peer)->sin_addr, text, sizeof text);
    else if (peer.ss_family == AF_INET6)
        inet_ntop(AF_INET6, &((struct sockaddr_in6 *)(void *)&peer)->sin6_addr, text, sizeof text);
    gmtime_r(&now, &utc);
    strftime(date, sizeof date, "[%d/%b/%Y:%H:%M:%S +0000]", &utc);
    buf_add_format(&h->line, "%s - - %s \"", text, date);
    if (h->head_done) {
        http_log_text(&h->line, request_part(r, r->method));
        buf_add_byte(&h->line, ' ');
        http_log_text(&h->line, request_part(r, r->raw_path));
        if (r->query.n > 0)
            buf_add_byte(&h->line, '?');
        http_log_text(&h->line, request_part(r, r->query));
        buf_add_format(&h->line, " HTTP/%s", r->http_version);
    } else {
        buf_add_byte(&h->line, '-');
    }
    h->begun_us = kernel_us();
    h->sent = h->status = 0;
}

static void http_log_end(struct http *h)
{
    char status[12] = "-";

    if (h->line.len == 0)
        return;
    if (h->status)
        snprintf(status, sizeof status, "%d", h->status);
    buf_add_format(&h->line, "\" %s %" PRId64 " %.3f\n", status, h->sent, (double)(kernel_us() - h->begun_us) / 1e3);
    if (!h->line.failed)
        log_put(&access_log, buf_at(&h->line), h->line.len);
    buf_fini(&h->line);
}

/* ---- answers of our own ---- */

/* A whole response with one line of text, after which the connection ends. */
static void http_answer(struct http *h, int status, struct span text)
{
    struct buf *out = &h->conn.out;

    http_log_begin(h);
    h->status = status;
    h->sent = h->is_head ? 0 : (int64_t)text.n + 1;
    http_add_status_line(h, status);
    buf_add_format(out, "content-type: text/plain; charset=utf-8\r\n"
                   "content-length: %zu\r\nconnection: close\r\n%s", text.n + 1, status == 503 ? "retry-after: 1\r\n" : "");
    http_add_date(h);
    buf_add_text(out, "\r\n");
    if (!h->is_head) {
        buf_add_span(out, text);
        buf_add_text(out, "\n");
    }
    h->head_sent = h->response_done = true;
    h->conn.linger = !h->request_done;
    conn_finish(&h->conn);
}

/* The client's mistake. */
static void http_refuse(struct http *h, int status, const char *why)
{
    log_info("http: refused with %d: %s", status, why);
    exchange_cancel(&h->ex);
    if (h->head_sent)
        conn_close(&h->conn);
    else
        http_answer(h, status, span_of(why));
}

/* ---- the program's answer ---- */

/* The program agrees to change the protocol (RFC 9110 section 7.8). */
static void http_on_switched(struct http *h, const struct response_head *head)
{
    struct buf *out = &h->conn.out;
    struct span rest = head->fields, name, value;

    http_add_status_line(h, head->status);
    while (field_next(&rest, &name, &value))
        if (span_eq_nocase(name, "connection") || span_eq_nocase(name, "upgrade")
            || !field_is_dropped(head, name))
            field_add_line(out, name, value);
    buf_add_text(out, "\r\n");
    h->head_sent = true;
    h->request_done = h->keep_alive = false;
    h->state = HTTP_TUNNEL;
    h->conn.paused = false;
    conn_soon(&h->conn);
}

static void http_on_head(struct exchange *ex, const struct response_head *head)
{
    struct http *h = CONTAINER(ex, struct http, ex);
    struct buf *out = &h->conn.out;
    struct span rest = head->fields, name, value;
    h->status = head->status;
    bool dated = false, measured = false, is_11 = h->parser.http_minor == 1;

    if (head->status == 101) {
        http_on_switched(h, head);
        return;
    }
    h->no_body = h->is_head || head->status == 204 || head->status == 304;
    h->chunked = !h->no_body && head->content_length < 0 && is_11;
    if (!h->no_body && head->content_length < 0 && !is_11)
        h->keep_alive = false;      /* its end is the connection's */
    http_add_status_line(h, head->status);
    while (field_next(&rest, &name, &value)) {
        bool length = span_eq_nocase(name, "content-length");
        if (field_is_dropped(head, name) || (length && (measured || head->status == 204)))
            continue;
        measured = measured || length;
        dated = dated || span_eq_nocase(name, "date");
        field_add_line(out, name, value);
    }
    if (!dated)
        http_add_date(h);
    if (h->chunked)
        buf_add_text(out, "transfer-encoding: chunked\r\n");
    if (!h->keep_alive)
        buf_add_text(out, "connection: close\r\n");
    else if (!is_11)
        buf_add_text(out, "connection: keep-alive\r\n");
    buf_add_text(out, "\r\n");
    h->head_sent = true;
    conn_after(&h->conn, limits.send_ms);
    conn_soon(&h->conn);
}

/* Lets the program send on, unless the client is slow. */
static void http_credit(struct http *h)
{
    size_t n = h->owed;

    if (h->conn.out.len >= CONN_OUT_HIGH)
        return;
    h->owed = 0;
    exchange_consumed(&h->ex, n);
}

static void http_on_data(struct exchange *ex, struct span data)
{
    struct http *h = CONTAINER(ex, struct http, ex);
    struct buf *out = &h->conn.out;

    if (h->no_body) {
        exchange_consumed(ex, data.n);
        return;
    }
    if (ex->body_left >= 0 && (ex->body_left -= (int64_t)data.n) < 0) {
        exchange_cancel_fail(ex, FAILURE_BAD_RESPONSE, "the program sent more than its Content-Length");
        return;
    }
    if (h->chunked)
        buf_add_format(out, "%zx\r\n", data.n);
    conn_pass(&h->conn, data);
    if (h->chunked)
        buf_add_text(out, "\r\n");
    h->owed += data.n;
    h->sent += (int64_t)data.n;
    http_credit(h);
    conn_after(&h->conn, limits.send_ms);
    conn_soon(&h->conn);
}

static void http_finish_exchange(struct http *h);

static void http_on_end(struct exchange *ex)
{
    struct http *h = CONTAINER(ex, struct http, ex);

    if (!h->no_body && ex->body_left > 0) {
        log_info("http: the program sent %" PRId64 " bytes less than its Content-Length", ex->body_left);
        conn_close(&h->conn);
        return;
    }
    if (h->chunked)
        buf_add_text(&h->conn.out, "0\r\n\r\n");
    h->response_done = true;
    http_finish_exchange(h);
}

static void http_on_fail(struct exchange *ex, enum failure kind, struct span text, struct span traceback)
{
    struct http *h = CONTAINER(ex, struct http, ex);
    struct buf clean = { 0 };

    (void)traceback;                /* for the log, which has it, not for a remote client */
    if (h->head_sent) {
        conn_close(&h->conn);       /* cut short: the only way left to say so */
        return;
    }
    utf8_add(&clean, text);
    http_answer(h, failure_status[kind], buf_span(&clean));
    buf_fini(&clean);
}

static void http_on_room(struct exchange *ex)
{
    conn_soon(&CONTAINER(ex, struct http, ex)->conn);
}

static const struct front http_front = {
    .on_room = http_on_room, .on_head = http_on_head, .on_data = http_on_data,
    .on_end = http_on_end, .on_fail = http_on_fail,
};

/* ---- parsing: callbacks copy and return ---- */

static int http_wrong(struct http *h, int status, const char *why)
{
    h->wrong = why;
    h->wrong_status = status;
    return -1;
}

static struct http *http_of(llhttp_t *parser)
{
    return CONTAINER(parser, struct http, parser);
}

static int http_on_url(llhttp_t *parser, const char *p, size_t n)
{
    struct http *h = http_of(parser);

    if (h->ex.request.text.len + n > (size_t)limits.http_target_bytes)
        return http_wrong(h, 414, "the request target is too long");
    return buf_add(&h->ex.request.text, p, n);
}

/* Trailers come through the same callbacks, after the body began: they are dropped. */
static int http_on_trailer(struct http *h, size_t n)
{
    h->extra_bytes += n;
    return h->extra_bytes > (size_t)limits.http_chunk_ext_bytes
         ? http_wrong(h, 400, "chunk extensions or trailers are too long") : 0;
}

static int http_on_field(llhttp_t *parser, const char *p, size_t n)
{
    struct http *h = http_of(parser);

    if (h->head_done)
        return http_on_trailer(h, n);
    return buf_add(&h->ex.request.text, p, n);
}

static int http_on_field_complete(llhttp_t *parser)
{
    struct http *h = http_of(parser);

    if (h->head_done)
        return 0;
    request_part_end(&h->ex.request, &h->name);
    return buf_add_byte(&h->ex.request.text, 0);
}

static int http_on_value(llhttp_t *parser, const char *p, size_t n)
{
    struct http *h = http_of(parser);

    if (h->head_done)
        return http_on_trailer(h, n);
    return buf_add(&h->ex.request.text, p, n);
}

/* A name, an IPv4 address or an IPv6 address in brackets, and perhaps a port: RFC 9110
 * section 7.2, RFC 3986 section 3.2. */
static bool http_host_ok(struct span host)
{
    const char *p = host.p, *end = host.p + host.n;
    char v6[INET6_ADDRSTRLEN];
    struct in6_addr ignored;

    if (p < end && *p == '[') {
        const char *close = memchr(p, ']', host.n);
        if (!close || close - p > (ptrdiff_t)sizeof v6)
            return false;
        snprintf(v6, sizeof v6, "%.*s", (int)(close - p - 1), p + 1);
        if (inet_pton(AF_INET6, v6, &ignored) != 1)
            return false;
        p = close + 1;
    } else {
        while (p < end && *p != ':')
            if (*p == '%' && end - p > 2 && isxdigit((unsigned char)p[1]) && isxdigit((unsigned char)p[2]))
                p += 3;
            else if (is_unreserved((unsigned char)*p) || (*p && strchr("!$&'()*+,;=", *p)))
                p++;
            else
                return false;
        if (p == host.p)
            return false;
    }
    if (p < end && *p++ != ':')
        return false;
    while (p < end && isdigit((unsigned char)*p))
        p++;
    return p == end;
}

/* What proxies say of the client (RFC 7239 and its forerunners). To programs that make variables
 * of names '_' is as good as '-'. */
static bool field_is_forwarded(struct span name)
{
    static const char prefix[] = "x-forwarded-";

    if (span_eq_nocase(name, "forwarded"))
        return true;
    for (size_t i = 0; i < strlen(prefix); i++)
        if (i == name.n || (tolower((unsigned char)name.p[i]) != prefix[i] && !(prefix[i] == '-' && name.p[i] == '_')))
            return false;
    return true;
}

/* The fields that decide how a message is read; llhttp has its own idea of them, which a
 * proxy before us need not share: whatever is ambiguous is refused. */
static int http_check_field(struct http *h, struct span name, struct span value)
{
    int64_t length;

    if (!field_name_ok(name) || !field_value_ok(value))
        return http_wrong(h, 400, "a field holds bytes that it must not");
    if (span_eq_nocase(name, "host") && (h->hosts++ > 0 || !http_host_ok(value)))
        return http_wrong(h, 400, h->hosts > 1 ? "two Host fields" : "a Host that is no host");
    if (span_eq_nocase(name, "content-length") && !number_read(value, 0, INT64_MAX, &length))
        return http_wrong(h, 400, "a Content-Length that is no number");
    if (span_eq_nocase(name, "transfer-encoding")) {
        if (h->codings++ > 0)
            return http_wrong(h, 400, "two Transfer-Encoding fields");
        if (!span_eq_nocase(value, "chunked"))
            return http_wrong(h, 501, "a Transfer-Encoding other than chunked");
    }
    if (span_eq_nocase(name, "expect")) {
        if (!span_eq_nocase(value, "100-continue"))
            return http_wrong(h, 417, "an Expect other than 100-continue");
        h->expects = true;
    }
    h->ex.request.forwarded |= field_is_forwarded(name);
    return 0;
}

static int http_on_value_complete(llhttp_t *parser)
{
    struct http *h = http_of(parser);
    struct request *r = &h->ex.request;

    if (h->head_done)
        return 0;
    size_t at = h->name.at + h->name.n + 1;
    while (r->text.len > at && is_blank(buf_at(&r->text)[r->text.len - 1]))
        r->text.len--;                      /* white space around a value is none of it */
    struct span name = request_part(r, h->name);
    struct span value = { buf_at(&r->text) + at, r->text.len - at };
    if (++h->fields > limits.head_fields)
        return http_wrong(h, 431, "too many fields");
    if (http_check_field(h, name, value) < 0)
        return -1;
    if (field_is_subject(name)) {
        r->text.len = h->name.at;
    } else if (field_is_hop_by_hop(name)) {        /* ends at this connection */
        struct buf *kept = span_eq_nocase(name, "connection") ? &h->connection
                         : span_eq_nocase(name, "upgrade") ? &h->upgrade : NULL;
        if (kept && kept->len > 0)
            buf_add_byte(kept, ',');
        if (kept)
            r->text.failed |= buf_add_span(kept, value) < 0;
        r->text.len = h->name.at;
    } else {
        if (span_eq_nocase(name, "host") && h->authority.n > 0) {      /* RFC 9112 section 3.2.2 */
            r->text.len = at;
            struct buf copy = { 0 };
            buf_add_span(&copy, request_part(r, h->authority));
            buf_add_span(&r->text, buf_span(&copy));
            r->text.failed |= copy.failed;
            buf_fini(&copy);
        }
        buf_add_byte(&r->text, 0);
        r->fields_count++;
    }
    h->name = request_part_begin(r);
    return r->text.failed ? -1 : 0;
}

/* The target is complete: origin-form, absolute-form or '*' (RFC 9112 section 3.2). */
static int http_on_url_complete(llhttp_t *parser)
{
    struct http *h = http_of(parser);
    struct request *r = &h->ex.request;
    struct span all = buf_span(&r->text), s = all;

    if (parser->method == HTTP_PRI || parser->method == HTTP_CONNECT || parser->method == HTTP_TRACE)
        return http_wrong(h, 501, "a method that is not served");
    if (s.n > 7 && (strncasecmp(s.p, "http://", 7) == 0 || strncasecmp(s.p, "https://", 8) == 0)) {
        size_t skip = s.p[4] == ':' ? 7 : 8;
        s = (struct span){ s.p + skip, s.n - skip };
        h->authority.at = (uint32_t)skip;
        while (h->authority.n < s.n && !strchr("/?#", s.p[h->authority.n]))
            h->authority.n++;
        if (!http_host_ok((struct span){ s.p, h->authority.n }))
            return http_wrong(h, 400, "a request target whose host is none");
        s = (struct span){ s.p + h->authority.n, s.n - h->authority.n };
    } else if (s.n == 0 || (s.p[0] != '/' && !(span_eq(s, "*") && parser->method == HTTP_OPTIONS))) {
        return http_wrong(h, 400, "a request target of unknown form");
    }
    if (memchr(s.p, '#', s.n))
        return http_wrong(h, 400, "a request target with a fragment");
    const char *mark = s.n ? memchr(s.p, '?', s.n) : NULL;
    r->raw_path = (struct part){ (uint32_t)(s.p - all.p), (uint32_t)(mark ? (size_t)(mark - s.p) : s.n) };
    r->query = (struct part){ r->raw_path.at + r->raw_path.n + (mark ? 1 : 0),
                              (uint32_t)(s.n - r->raw_path.n - (mark ? 1 : 0)) };
    if (r->raw_path.n == 0) {               /* "http://host" asks for "/" */
        r->raw_path = request_part_begin(r);
        buf_add_byte(&r->text, '/');
        request_part_end(r, &r->raw_path);
    }
    r->method = request_part_begin(r);
    buf_add_text(&r->text, llhttp_method_name((llhttp_method_t)parser->method));
    request_part_end(r, &r->method);
    r->fields = h->name = request_part_begin(r);
    return 0;
}

static int http_on_protocol(llhttp_t *parser, const char *p, size_t n)
{
    struct http *h = http_of(parser);

    return protocol_is_http(&h->protocol_bytes, p, n) ? 0 : http_wrong(h, 400, "a protocol other than HTTP");
}

static int http_check_head(struct http *h)
{
    const llhttp_t *p = &h->parser;

    if (p->http_major != 1 || p->http_minor > 1)
        return http_wrong(h, 505, "neither HTTP/1.0 nor HTTP/1.1");
    if (p->http_minor == 1 && h->hosts == 0)
        return http_wrong(h, 400, "no Host field");
    if (p->http_minor == 0 && h->codings > 0)
        return http_wrong(h, 400, "Transfer-Encoding in HTTP/1.0");
    if (h->codings > 0 && !(p->flags & F_CHUNKED))      /* the parser must agree on the length */
        return http_wrong(h, 400, "a Transfer-Encoding that is not clearly chunked");
    if (p->flags & F_CONTENT_LENGTH && (p->content_length > INT64_MAX
        || (int64_t)p->content_length > limits.http_body_bytes))
        return http_wrong(h, 413, "the body is larger than the limit");
    return 0;
}

static bool http_is_named(const struct http *h, struct span name)
{
    return field_is_named_in(buf_span(&h->connection), name)
        && !span_eq_nocase(name, "host") && !span_eq_nocase(name, "content-length");   /* never of the connection */
}

static bool http_is_forged(const struct http *h, struct span name)
{
    (void)h;
    return field_is_forwarded(name);
}

static void http_drop_fields(struct http *h, bool (*drops)(const struct http *, struct span name))
{
    struct request *r = &h->ex.request;
    struct span rest = request_part(r, r->fields), name, value;
    struct buf kept = { 0 };
    uint32_t count = 0;

    while (field_next(&rest, &name, &value)) {
        if (drops(h, name))
            continue;
        buf_add(&kept, name.p, name.n + value.n + 2);       /* they stand one after the other */
        count++;
    }
    if (count < r->fields_count || kept.failed) {
        r->text.len = r->fields.at;
        r->text.failed |= kept.failed || buf_add_span(&r->text, buf_span(&kept)) < 0;
        r->fields_count = count;
        request_part_end(r, &r->fields);
    }
    buf_fini(&kept);
}

/* An item of X-Forwarded-For without white space, brackets and a port. */
static struct span forwarded_address(struct span item)
{
    while (item.n > 0 && is_blank(item.p[0]))
        item = (struct span){ item.p + 1, item.n - 1 };
    while (item.n > 0 && is_blank(item.p[item.n - 1]))
        item.n--;
    const char *close = item.n > 2 && item.p[0] == '[' ? memchr(item.p, ']', item.n) : NULL;
    if (close)
        return (struct span){ item.p + 1, (size_t)(close - item.p - 1) };
    const char *colon = item.n ? memchr(item.p, ':', item.n) : NULL;
    if (colon && colon == memrchr(item.p, ':', item.n))
        item.n = (size_t)(colon - item.p);
    return item;
}

/* Each proxy has added whom it heard: the last one who is not trusted is the client. */
static struct span forwarded_client(struct span list, struct span trust)
{
    struct span client = SPAN("");
    unsigned char ip[16];

    while (list.n > 0) {
        const char *comma = memrchr(list.p, ',', list.n);
        size_t at = comma ? (size_t)(comma + 1 - list.p) : 0;
        struct span address = forwarded_address((struct span){ list.p + at, list.n - at });
        if (!ip_read(address, ip))
            break;
        client = address;
        if (trust.n > 0 && !trust_has(trust, client))
            break;
        list.n = comma ? (size_t)(comma - list.p) : 0;
    }
    return client;
}

/* Who asks, and by what scheme: as the connection tells, or a proxy that may. */
static void http_take_client(struct http *h)
{
    struct request *r = &h->ex.request;
    struct span client = span_of(h->peer.ip), rest = request_part(r, r->fields), name, value;

    r->client_port = h->peer.port;
    if (r->forwarded && !h->trusted) {
        http_drop_fields(h, http_is_forged);
        r->forwarded = false;
    }
    while (r->forwarded && field_next(&rest, &name, &value)) {
        if (span_eq_nocase(name, "x-forwarded-for")) {
            struct span told = forwarded_client(value, h->server->listener.address.trust);
            client = told.n > 0 ? told : client;
            r->client_port = told.n > 0 ? 0 : r->client_port;
        } else if (span_eq_nocase(name, "x-forwarded-proto")) {
            r->is_https = value.n >= 5 && strncasecmp(value.p + value.n - 5, "https", 5) == 0;
        }
    }
    char copy[INET6_ADDRSTRLEN - 1];        /* the text may move when it grows */
    if (client.n > sizeof copy)
        client.n = sizeof copy;
    memcpy(copy, client.p, client.n);
    r->client = request_part_begin(r);
    buf_add(&r->text, copy, client.n);
    request_part_end(r, &r->client);
    r->server = request_part_begin(r);
    buf_add_text(&r->text, h->own.ip);
    request_part_end(r, &r->server);
    r->server_port = h->own.port;
}

/* Only what the client names in Connection too is an offer (RFC 9110 section 7.8). */
static void http_take_upgrade(struct http *h)
{
    struct request *r = &h->ex.request;

    if (!field_is_named_in(buf_span(&h->connection), SPAN("upgrade")) || h->parser.http_minor == 0)
        return;
    r->upgrade = request_part_begin(r);
    buf_add_span(&r->text, buf_span(&h->upgrade));
    request_part_end(r, &r->upgrade);
}

static int http_on_headers_complete(llhttp_t *parser)
{
    struct http *h = http_of(parser);
    struct request *r = &h->ex.request;

    if (http_check_head(h) < 0)
        return -1;
    request_part_end(r, &r->fields);
    if (h->connection.len > 0)
        http_drop_fields(h, http_is_named);
    if ((r->is_https = h->conn.tls) && h->conn.tls->subject) {  /* after that: Connection cannot name it */
        request_add_field(r, SPAN(FIELD_SUBJECT), span_of(h->conn.tls->subject));
        request_part_end(r, &r->fields);
    }
    if (h->peer.ip[0] || r->forwarded)
        http_take_client(h);
    if (h->upgrade.len > 0)
        http_take_upgrade(h);
    if (r->text.failed)
        return -1;
    if (parser->flags & F_CHUNKED || parser->content_length > 0) {
        if (span_eq_nocase(request_part(r, r->upgrade), "websocket"))
            return http_wrong(h, 400, "a WebSocket request with a body");
        r->upgrade.n = 0;                   /* clients that would like HTTP/2 offer it with any request */
    }
    r->http_version = parser->http_minor == 1 ? "1.1" : "1.0";
    r->has_body = parser->flags & F_CHUNKED || parser->content_length > 0;
    h->is_head = parser->method == HTTP_HEAD;
    h->keep_alive = llhttp_should_keep_alive(parser);
    parser->upgrade = 0;                    /* the program decides; until then it is HTTP */
    h->head_done = true;
    return HPE_PAUSED;
}

static int http_on_body(llhttp_t *parser, const char *p, size_t n)
{
    struct http *h = http_of(parser);

    if ((h->body_bytes += (int64_t)n) > limits.http_body_bytes)
        return http_wrong(h, 413, "the body is larger than the limit");
    exchange_body(&h->ex, (struct span){ p, n }, false);
    return 0;
}

static int http_on_message_complete(llhttp_t *parser)
{
    struct http *h = http_of(parser);

    h->request_done = true;
    if (parser->flags & F_CHUNKED || parser->content_length > 0 || h->body_bytes > 0)
        exchange_body(&h->ex, SPAN(""), true);
    return HPE_PAUSED;
}

static int http_on_extension(llhttp_t *parser, const char *p, size_t n)
{
    (void)p;
    return http_on_trailer(http_of(parser), n);
}

static const llhttp_settings_t http_settings = {
    .on_url = http_on_url, .on_url_complete = http_on_url_complete, .on_protocol = http_on_protocol,
    .on_header_field = http_on_field, .on_header_field_complete = http_on_field_complete,
    .on_header_value = http_on_value, .on_header_value_complete = http_on_value_complete,
    .on_headers_complete = http_on_headers_complete, .on_body = http_on_body,
    .on_message_complete = http_on_message_complete,
    .on_chunk_extension_name = http_on_extension, .on_chunk_extension_value = http_on_extension,
};

/* ---- the connection ---- */

static void http_reset(struct http *h)
{
    llhttp_init(&h->parser, HTTP_REQUEST, &http_settings);
    request_fini(&h->ex.request);
    buf_fini(&h->connection);
    buf_fini(&h->upgrade);
    h->state = HTTP_IN_HEAD;
    h->authority = h->name = (struct part){ 0 };
    h->head_bytes = h->extra_bytes = h->line_bytes = h->owed = 0;
    h->body_bytes = 0;
    h->fields = h->hosts = h->codings = h->protocol_bytes = 0;
    h->head_done = h->request_done = h->response_done = h->head_sent = false;
    h->expects = h->keep_alive = h->is_head = h->chunked = h->no_body = false;
}

/* Both directions done: next request or the end. */
static void http_finish_exchange(struct http *h)
{
    struct conn *c = &h->conn;

    http_log_end(h);
    if (!h->request_done) {         /* it answered without reading all: what is left is not ours to parse */
        c->linger = h->state != HTTP_TUNNEL;        /* where not every host sees that a vsock is half-closed */
        h->keep_alive = false;
    }
    if (!h->keep_alive) {
        conn_finish(c);
        return;
    }
    http_reset(h);
    h->served = true;
    c->paused = false;
    conn_after(c, limits.idle_ms);
    conn_soon(c);
}

/* Gives `n` bytes of input to the parser and drops what it took. False: the request was refused. */
static bool http_feed(struct http *h, size_t n)
{
    struct conn *c = &h->conn;
    const char *from = c->in.len > 0 ? buf_at(&c->in) : "";
    int64_t before = h->body_bytes;
    bool in_head = !h->head_done;
    llhttp_errno_t error = llhttp_execute(&h->parser, from, n);
    size_t used = error == HPE_OK ? n : (size_t)(llhttp_get_error_pos(&h->parser) - from);

    if (!h->head_done)
        h->head_bytes += used;
    h->line_bytes = in_head || h->body_bytes > before ? 0 : h->line_bytes + used;
    if (h->line_bytes > (size_t)limits.http_head_bytes && !h->request_done) {   /* zeros before a chunk's size */
        http_refuse(h, 400, "a chunk's line is too long");
        return false;
    }
    if (error == HPE_OK || error == HPE_PAUSED) {
        if (error == HPE_PAUSED)
            llhttp_resume(&h->parser);
        buf_drop(&c->in, used);
        return true;
    }
    if (h->ex.request.text.failed)
        http_refuse(h, 503, "no memory for the head");
    else if (h->wrong)
        http_refuse(h, h->wrong_status, h->wrong);
    else
        http_refuse(h, 400, llhttp_get_error_reason(&h->parser));
    return false;
}

static void http_on_request(struct http *h)
{
    bool has_body = h->ex.request.has_body;

    h->state = has_body ? HTTP_IN_BODY : HTTP_ANSWERING;
    h->request_done = h->conn.paused = !has_body;
    conn_never(&h->conn);
    if (h->expects && has_body && h->parser.http_minor == 1)
        buf_add_text(&h->conn.out, "HTTP/1.1 100 Continue\r\n\r\n");
    h->ex.front = &http_front;
    http_log_begin(h);
    if (h->server->target) {
        exchange_start(&h->ex, h->server->loop, &nobody_backend);
        upstream_request(&h->server->target->runner, &h->ex);
    } else {
        program_request(h->server->program, &h->ex);
    }
}

static void http_read_head(struct http *h)
{
    struct conn *c = &h->conn;
    size_t left = (size_t)limits.http_head_bytes - h->head_bytes;

    if (h->head_bytes == 0)
        conn_after(c, limits.head_ms);
    if (!http_feed(h, c->in.len < left ? c->in.len : left))
        return;
    if (h->head_done)
        http_on_request(h);
    else if (h->head_bytes >= (size_t)limits.http_head_bytes)
        http_refuse(h, 431, "the head is too large");
}

/* Within an exchange: who keeps us waiting? A client has a limit, the program its own. */
static void http_await(struct http *h)
{
    struct conn *c = &h->conn;

    if (c->out.len > 0)
        conn_after(c, limits.send_ms);
    else if (h->state == HTTP_IN_BODY && c->in.len == 0 && !c->paused)
        conn_after(c, limits.body_ms);
    else
        conn_never(c);
}

/* Hands on as much of the body as the program takes now. */
static void http_read_body(struct http *h)
{
    struct conn *c = &h->conn;
    size_t room = exchange_room(&h->ex), n = room < c->in.len ? room : c->in.len;

    if (n > 0 && !http_feed(h, n))
        return;
    c->paused = h->request_done || exchange_room(&h->ex) == 0;
    if (h->request_done) {
        h->state = HTTP_ANSWERING;
    } else if (c->eof && c->in.len == 0) {
        log_info("http: the client left within its request");
        conn_close(c);
        return;
    }
    http_await(h);
}

/* A body that is not taken now stays in the socket. */
static size_t http_room(struct conn *c)
{
    struct http *h = CONTAINER(c, struct http, conn);
    return h->state == HTTP_IN_BODY ? exchange_room(&h->ex) : CONN_READ_BYTES;
}

/* Hands on what the client sends after 101, as far as the program keeps up. */
static void http_read_tunnel(struct http *h)
{
    struct conn *c = &h->conn;
    size_t room;

    while (c->in.len > 0 && (room = exchange_room(&h->ex)) > 0) {      /* a WebSocket asks for less than it has room for */
        size_t n = room < c->in.len ? room : c->in.len;
        exchange_body(&h->ex, (struct span){ buf_at(&c->in), n }, false);
        buf_drop(&c->in, n);
    }
    if (c->eof && c->in.len == 0 && !h->request_done) {
        h->request_done = true;
        exchange_body(&h->ex, SPAN(""), true);
    }
    http_await(h);
}

/* Goes on as far as input and the program's appetite allow. */
static void http_on_input(struct conn *c)
{
    struct http *h = CONTAINER(c, struct http, conn);

    if (c->state == CONN_OPEN && h->state == HTTP_TUNNEL)
        http_read_tunnel(h);

    while (c->state == CONN_OPEN && h->state == HTTP_IN_HEAD && c->in.len > 0
           && c->out.len < CONN_OUT_HIGH)       /* the answers before are to be read first */
        http_read_head(h);
    if (c->state == CONN_OPEN && h->state == HTTP_IN_BODY)
        http_read_body(h);
    if (c->state == CONN_OPEN && h->state == HTTP_IN_HEAD && c->eof && c->out.len < CONN_OUT_HIGH)
        conn_finish(c);             /* it sends no more, but may still read its answer */
}

static void http_on_sent(struct conn *c)
{
    struct http *h = CONTAINER(c, struct http, conn);

    http_credit(h);
    if (h->state != HTTP_IN_HEAD) {
        http_await(h);
    } else {
        conn_after(c, c->out.len > 0 ? limits.send_ms : h->head_bytes > 0 ? limits.head_ms : limits.idle_ms);
        if (c->in.len > 0 || c->eof || c->paused || c->tls)
            conn_soon(c);           /* the next request may have waited for room in `out` */
    }
}

static void http_on_deadline(struct conn *c)
{
    struct http *h = CONTAINER(c, struct http, conn);

    if (c->out.len > 0) {
        log_info("http: the client read nothing for %" PRId64 " ms, closed", limits.send_ms);
        conn_close(c);
    } else if (h->state == HTTP_IN_BODY) {
        http_refuse(h, 408, "the body stalled");
    } else if (h->head_bytes > 0) {
        http_refuse(h, 408, "the head took too long");
    } else if (!h->served) {
        http_refuse(h, 408, "no request came");
    } else {
        conn_finish(c);             /* idle between requests: its right */
    }
}

static void http_on_close(struct conn *c)
{
    struct http *h = CONTAINER(c, struct http, conn);
    http_log_end(h);
    exchange_cancel(&h->ex);
    request_fini(&h->ex.request);
    buf_fini(&h->connection);
    buf_fini(&h->upgrade);
}

static void http_on_free(struct conn *c)
{
    free(CONTAINER(c, struct http, conn));
}

static const struct proto http_proto = {
    .name = "http", .on_input = http_on_input, .on_sent = http_on_sent,
    .on_deadline = http_on_deadline, .on_close = http_on_close, .on_free = http_on_free,
    .room = http_room, .reads_in_place = true,
};

/* Who is connected, and whether it is trusted: by default unless it has an IP address. */
static void http_take_peer(struct http *h, const struct listener *l)
{
    struct span trust = l->address.trust;

    endpoint_take(&h->peer, &l->peer);
    if (h->peer.ip[0])
        endpoint_take_own(&h->own, h->conn.watch.fd);
    h->trusted = trust.n == 0 ? !h->peer.ip[0] : trust_has(trust, h->peer.ip[0] ? span_of(h->peer.ip) : SPAN("-"));
}

static void http_on_accept(struct listener *l, int fd)
{
    struct http_server *s = l->arg;
    struct http *h = calloc(1, sizeof *h);
    bool tls = l->address.tls;

    if (h && tls)
        h->conn.tls = tls_new(*s->keys, fd);
    bool ok = h && (h->conn.tls || !tls);
    if (!ok || conn_open(&h->conn, s->conns, &http_proto, fd, tls ? CONN_HANDSHAKE : CONN_OPEN) < 0) {
        log_info("http: no memory for a connection");
        if (!ok)
            listener_turn_away(l, fd);
        if (h)
            tls_free(h->conn.tls);
        free(h);
        return;
    }
    h->server = s;
    http_take_peer(h, l);
    http_reset(h);
    conn_after(&h->conn, limits.silent_ms);
}

static int http_open(struct http_server *s)
{
    s->listener.all = s->conns;
    s->listener.on_accept = http_on_accept;
    s->listener.arg = s;
    s->listener.full = s->listener.address.tls ? NULL : "HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    return listener_open(&s->listener);
}

/* ==== pump: bytes both ways between two connections ==============================
 * A connection that was accepted, the near end, gets a far end to one target. What an end has
 * read is handed over whole as soon as the other has sent all it had: at most CONN_READ_BYTES
 * stand on each side of a direction, and who reads slowly slows the writer. The end of one
 * direction is passed on while the other goes on; a pair ends with both. */
struct pump;

struct pumps {
    struct conns  *conns;
    struct address target;
    int64_t        idle_ms;         /* a pair that carries nothing for so long ends; 0: never */
    void         (*on_failed)(struct pump *near, const char *why);  /* no far end: close near, or
                                       give it a deadline, after which it is tried again */
    void         (*on_end)(struct pump *near);      /* may be NULL */
};

struct pump {
    struct conn   conn;             /* first member */
    struct pumps *pumps;
    struct pump  *peer;             /* NULL: it has ended, or there is none yet */
    const char   *failed;           /* far: what was wrong with the handshake */
    int64_t       since_ms;         /* near: when it was accepted */
    bool          is_far;
    bool          up;               /* connected, and the handshake is over */
    bool          sent_eof;         /* shutdown(2) was passed on to this end */
};

/* The near end's deadline is the pair's. */
static void pump_touch(struct pump *near)
{
    if (near->pumps->idle_ms > 0)
        conn_after(&near->conn, near->pumps->idle_ms);
    else
        conn_never(&near->conn);
}

static void pump_move(struct pump *from, struct pump *to)
{
    struct conn *in = &from->conn, *out = &to->conn;

    if (!from->up || !to->up || out->state != CONN_OPEN)
        return;
    if (in->in.len > 0 && out->out.len == 0) {
        struct buf sent = out->out;
        out->out = in->in;
        in->in = sent;
        pump_touch(from->is_far ? to : from);
        conn_soon(in);                  /* it may read again */
        conn_soon(out);
    }
    if (in->eof && in->in.len == 0 && out->out.len == 0 && !to->sent_eof) {
        to->sent_eof = true;
        shutdown(out->watch.fd, SHUT_WR);
        if (out->eof && out->in.len == 0)
            conn_close(out);
    }
}

static void pump_on_input(struct conn *c)
{
    struct pump *p = CONTAINER(c, struct pump, conn);

    if (!p->up) {
        p->up = true;
        c->in_max = 1;                  /* nothing more is read until it was handed over */
        pump_touch(p->peer);
        conn_soon(&p->peer->conn);
    }
    if (p->peer)
        pump_move(p, p->peer);
    if (p->peer)
        pump_move(p->peer, p);
}

static void pump_on_sent(struct conn *c)
{
    struct pump *p = CONTAINER(c, struct pump, conn);
    if (p->peer && c->out.len == 0)
        conn_soon(&p->peer->conn);
}

/* Gives a near end its far end, now or when pumps->on_failed says so. */
static void pump_connect(struct pump *near);

static void pump_on_deadline(struct conn *c)
{
    struct pump *near = CONTAINER(c, struct pump, conn);

    if (!near->peer) {
        pump_connect(near);
    } else if (!near->peer->up) {
        near->peer->failed = "it does not answer";
        conn_close(&near->peer->conn);
    } else {
        log_info("%s: nothing came for %" PRId64 " ms, closed", near->pumps->target.text, near->pumps->idle_ms);
        conn_close(c);
    }
}

static void pump_on_close(struct conn *c)
{
    struct pump *p = CONTAINER(c, struct pump, conn), *peer = p->peer;
    const char *why = p->failed ? p->failed : strerror(errno);

    p->peer = NULL;
    if (peer)
        peer->peer = NULL;
    if (!p->is_far && p->pumps->on_end)
        p->pumps->on_end(p);
    if (peer && p->is_far && !p->up)
        p->pumps->on_failed(peer, why);
    else if (peer)
        conn_finish(&peer->conn);
}

static void pump_on_free(struct conn *c)
{
    free(CONTAINER(c, struct pump, conn));
}

static const struct proto pump_proto = {
    .name = "pump", .on_input = pump_on_input, .on_sent = pump_on_sent,
    .on_deadline = pump_on_deadline, .on_close = pump_on_close, .on_free = pump_on_free,
    .reads_to_end = true,
};

static void pump_connect(struct pump *near)
{
    struct pumps *all = near->pumps;
    struct pump *far = calloc(1, sizeof *far);
    int fd = far ? address_connect(&all->target) : -1;

    if (fd < 0 || conn_open(&far->conn, all->conns, &pump_proto, fd, CONN_CONNECTING) < 0) {
        const char *why = strerror(errno);
        free(far);
        all->on_failed(near, why);
        return;
    }
    far->pumps = all;
    far->is_far = true;
    far->peer = near;
    near->peer = far;
    far->conn.greets = all->target.kind == ADDRESS_HYBRID ? all->target.port : 0;
    conn_after(&near->conn, limits.send_ms);
}

/* Takes an accepted connection; pump_connect follows. NULL: no memory, it is closed. */
static struct pump *pump_accept(struct pumps *all, int fd)
{
    struct pump *near = calloc(1, sizeof *near);

    if (!near || conn_open(&near->conn, all->conns, &pump_proto, fd, CONN_OPEN) < 0) {
        log_info("%s: no memory for a connection", all->target.text);
        if (!near)
            fd_close(&fd);
        free(near);
        return NULL;
    }
    near->pumps = all;
    near->up = true;
    near->conn.in_max = 1;
    near->since_ms = now_ms();
    return near;
}

/* ==== bridge: the guest API, PATH_API_SOCKET to the host's vsock 53 ==============
 * The host may begin to listen long after the program has begun to ask: a connection is taken
 * at once and its first bytes are kept while the host's end is tried again and again. */
struct bridge {
    struct conns    conns;          /* its own: a flood here takes no place from requests */
    struct pumps    pumps;          /* target.text NULL: a sandbox that has no guest API */
    struct listener listener;
    struct stat     made;           /* the socket's file */
    int64_t         open;           /* near ends */
};

static void bridge_on_failed(struct pump *near, const char *why)
{
    struct bridge *b = CONTAINER(near->pumps, struct bridge, pumps);

    if (now_ms() - near->since_ms < limits.api_wait_ms) {
        log_debug("guest API: %s", why);
        conn_after(&near->conn, API_RETRY_MS * (1 + b->open / 4));     /* few tries in all, however many wait */
        return;
    }
    log_info("guest API: the host has taken no connection for %" PRId64 " ms: %s", limits.api_wait_ms, why);
    conn_close(&near->conn);
}

static void bridge_on_end(struct pump *near)
{
    struct bridge *b = CONTAINER(near->pumps, struct bridge, pumps);

    b->open--;
    listener_start(&b->listener);
}

static void bridge_on_accept(struct listener *l, int fd)
{
    struct bridge *b = l->arg;
    struct pump *near = pump_accept(&b->pumps, fd);

    if (!near)
        return;
    if (++b->open >= limits.api_conns) {
        log_info("guest API: %" PRId64 " connections, the next one waits", b->open);
        loop_want(b->conns.loop, &l->watch, 0);
    }
    pump_connect(near);
}

static void bridge_init(struct bridge *b, struct loop *loop)
{
    b->conns.loop = loop;
    b->pumps.conns = b->listener.all = &b->conns;
    b->pumps.idle_ms = limits.api_idle_ms;
    b->pumps.on_failed = bridge_on_failed;
    b->pumps.on_end = bridge_on_end;
    b->listener.on_accept = bridge_on_accept;
    b->listener.arg = b;
    b->listener.watch.fd = -1;
}

/* Makes the socket, also again when the program has taken it away or changed it. Whenever a
 * program is about to start: what covers /tmp, a volume for one, is there by then. */
static void bridge_offer(struct bridge *b)
{
    struct stat st, *made = &b->made;

    if (!b->pumps.target.text)
        return;
    bool there = lstat(PATH_API_SOCKET, &st) == 0;
    if (b->listener.watch.fd >= 0) {
        if (there && st.st_dev == made->st_dev && st.st_ino == made->st_ino
            && st.st_ctim.tv_sec == made->st_ctim.tv_sec && st.st_ctim.tv_nsec == made->st_ctim.tv_nsec)
            return;
        log_info("guest API: " PATH_API_SOCKET " was %s: it is made again", there ? "changed" : "removed");
        listener_close(&b->listener);
    }
    if (mkdir("/tmp", 0777) == 0)
        chmod("/tmp", 01777);           /* whatever the umask */
    if (!address_parse(&b->listener.address, "unix:" PATH_API_SOCKET) || listener_open(&b->listener) < 0
        || lstat(PATH_API_SOCKET, made) < 0)
        log_errno("guest API: " PATH_API_SOCKET);
    else if (b->open < limits.api_conns)
        listener_start(&b->listener);
}

/* ==== call: the host's side of port 52, for people and tests =====================
 * A command, not the init: it may block, within its time, and ends the process. It speaks
 * to a guest through a Unix socket in Firecracker's manner, or to an agent that listens on
 * a Unix socket itself; it never opens a vsock. */
#define CALL_REPLY_MAX  (1 << 30)

struct call;

struct call_verb {
    const char *name;
    int         words_min, words_max;
    int       (*run)(struct call *);
};

struct call {
    const struct call_verb *verb;
    struct address address;
    const char    *words[2];        /* borrowed from argv: what is no option */
    int            words_len;
    int            argc;            /* of what follows the verb */
    char         **argv;
    int64_t        deadline_ms;
    int            fd;
    bool           eof;
    struct buf     in, why;
};

static const char call_usage[] =
    "usage: agent call SOCKET ready                               wait until a guest says that it is ready\n"
    "       agent call SOCKET configure DIR|FILE ENTRYPOINT       send it a program: wait until it runs\n"
    "       agent call SOCKET request [OPTION]... PATH[?QUERY]    send the program a request\n"
    "       agent call SOCKET event JSON                          send the program an event\n"
    "       agent call SOCKET shell COMMAND                       run a command in the guest\n"
    "       agent call SOCKET halt                                stop the guest\n"
    "\n"
    "SOCKET is the host's end of the guest's vsock, a Unix socket in Firecracker's manner; unix:PATH is an\n"
    "agent that listens on PATH itself, hybrid:PATH:PORT another port than 52. `ready` listens, on SOCKET_52\n"
    "or on PATH: start it before the guest.\n"
    "\n"
    "  --timeout SECONDS    give up after this long (120)\n"
    "\n"
    "configure: a folder is packed, __pycache__ and .git left out; a file is the program's only source, or\n"
    "an archive if it ends with .zip; - is code that is squashfs on the guest's disk " CODE_DEVICE ".\n"
    "  --env NAME=VALUE     a variable of the program; may be repeated\n"
    "  --encoding NAME      plain or zip, if the name of the file does not tell\n"
    "  --interface NAME     asgi (the default) or executable\n"
    "  --input DIR|FILE     data for /data, packed like a program\n"
    "  --volume DEVICE:DIR[:rw][:trusted]   a disk of the guest and where it goes; read-only, no setuid and\n"
    "                       no device nodes, unless it says so; may be repeated\n"
    "  --hash HEX           the program's hash, which names the guest\n"
    "  --ip, --route, --ipv6, --ipv6-gateway ADDRESS, --dns ADDRESS, --key KEY\n"
    "\n"
    "request: prints the body of the answer, whatever its status.\n"
    "  -X METHOD            instead of GET, or of POST with a body\n"
    "  -H 'NAME: VALUE'     a header; may be repeated\n"
    "  -d TEXT|@FILE|@-     the body: a text, a file, or what stands on standard input\n"
    "  -i                   print status and headers too\n"
    "\n"
    "event: prints the answer as JSON. --text sends an argument that is no JSON.\n"
    "\n"
    "  agent call v.sock ready & start-the-guest; wait\n"
    "  agent call v.sock configure examples/hello main:app --env GREETING=hi\n"
    "  agent call v.sock request -i '/path?name=value'\n"
    "  agent call v.sock request -H 'Content-Type: application/json' -d @order.json /orders\n"
    "  agent call v.sock shell 'uname -a; df -h'\n";

static const struct call_option {
    const char *verb, *name;        /* verb NULL: of all */
    bool        has_value;
} call_options[] = {
    { NULL, "--timeout", true },
    { "configure", "--env", true },   { "configure", "--encoding", true },
    { "configure", "--input", true }, { "configure", "--interface", true },
    { "configure", "--hash", true },  { "configure", "--ip", true },
    { "configure", "--route", true }, { "configure", "--ipv6", true },
    { "configure", "--dns", true },   { "configure", "--ipv6-gateway", true },
    { "configure", "--key", true },   { "configure", "--volume", true },
    { "request", "-X", true }, { "request", "-H", true }, { "request", "-d", true },
    { "request", "-i", false },
    { "event", "--text", false },
};

PRINTF(3, 4) static int call_complain(const struct call *c, int code, const char *format, ...)
{
    va_list ap;

    fprintf(stderr, "agent call %s: ", c->verb->name);
    va_start(ap, format);
    vfprintf(stderr, format, ap);
    va_end(ap);
    fputc('\n', stderr);
    return code;
}

#define call_failed(c, ...) call_complain(c, EXIT_FAILED, __VA_ARGS__)
#define call_misused(c, ...) call_complain(c, EXIT_USAGE, __VA_ARGS__)

/* NULL: the verb has no such option. */
static const struct call_option *call_option(const struct call *c, const char *name)
{
    for (size_t i = 0; i < COUNT(call_options); i++) {
        const struct call_option *o = &call_options[i];
        if (strcmp(o->name, name) == 0 && (!o->verb || strcmp(o->verb, c->verb->name) == 0))
            return o;
    }
    return NULL;
}

/* The value of the next option of this name from argv[*at] on, "" if it takes none; NULL:
 * no more. The command line has been checked. */
static const char *call_next(const struct call *c, const char *name, int *at)
{
    while (*at < c->argc) {
        const char *word = c->argv[*at];
        const struct call_option *o = word[0] == '-' ? call_option(c, word) : NULL;
        *at += 1 + (o && o->has_value);
        if (o && strcmp(word, name) == 0)
            return o->has_value ? c->argv[*at - 1] : "";
    }
    return NULL;
}

static const char *call_value(const struct call *c, const char *name, const char *otherwise)
{
    int at = 0;
    const char *value = NULL;

    for (const char *next; (next = call_next(c, name, &at)); value = next)
        ;                           /* the last one counts */
    return value ? value : otherwise;
}

/* ---- bytes to and from the guest ---- */

/* 0: ready for one of the events; -1 and errno: ETIMEDOUT when the time is over. */
static int call_poll(const struct call *c, int fd, short events, short *got)
{
    struct pollfd p = { .fd = fd, .events = events };

    for (;;) {
        int64_t left = c->deadline_ms - now_ms();
        int n = left > 0 ? poll(&p, 1, left < INT_MAX ? (int)left : INT_MAX) : 0;
        if (n > 0) {
            *got = p.revents;
            return 0;
        }
        if (n < 0 && errno != EINTR)
            return -1;
        if (left <= 0) {
            errno = ETIMEDOUT;
            return -1;
        }
    }
}

/* Reads what is there into c->in, or waits for it. The end of the stream sets eof. */
static int call_read(struct call *c)
{
    short got;
    char *to = buf_room(&c->in, CONN_READ_BYTES);

    if (!to || c->in.len > CALL_REPLY_MAX) {
        errno = to ? EFBIG : ENOMEM;
        return -1;
    }
    if (call_poll(c, c->fd, POLLIN, &got) < 0)
        return -1;
    ssize_t n = read(c->fd, to, CONN_READ_BYTES);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -1;
    buf_added(&c->in, (size_t)n);
    c->eof = n == 0;
    return 0;
}

/* Sends all of it, unless the guest answers or hangs up first: then its answer matters more. */
static int call_send(struct call *c, struct span s)
{
    short got;

    while (s.n > 0 && !c->eof) {
        if (call_poll(c, c->fd, POLLIN | POLLOUT, &got) < 0)
            return -1;
        if ((got & POLLIN) && call_read(c) < 0)
            return -1;
        if (got & POLLIN)
            continue;
        ssize_t n = write(c->fd, s.p, s.n);
        if (n < 0 && (errno == EPIPE || errno == ECONNRESET))
            return 0;
        if (n < 0 && errno != EAGAIN && errno != EINTR)
            return -1;
        s.p += n > 0 ? n : 0;
        s.n -= n > 0 ? (size_t)n : 0;
    }
    return 0;
}

/* CONNECT PORT, and the line that answers it byte by byte: what follows it is not ours. */
static int call_handshake(struct call *c)
{
    char line[32];
    size_t len = 0;
    short got;
    int n = snprintf(line, sizeof line, "CONNECT %u\n", c->address.port);

    if (call_send(c, (struct span){ line, (size_t)n }) < 0)
        return call_failed(c, "%s: %s", c->address.text, strerror(errno));
    for (;;) {
        if (call_poll(c, c->fd, POLLIN, &got) < 0)
            return call_failed(c, "%s: no answer to CONNECT: %s", c->address.text, strerror(errno));
        if (read(c->fd, line + len, 1) <= 0)
            return call_failed(c, "%s: nothing in the guest listens on port %u", c->address.text,
                               c->address.port);
        if (line[len] == '\n')
            break;
        if (++len == sizeof line)
            return call_failed(c, "%s: answers CONNECT with something else than OK", c->address.text);
    }
    line[len] = '\0';
    if (strncmp(line, "OK ", 3) != 0)
        return call_failed(c, "%s: answers CONNECT with \"%s\"", c->address.text, line);
    return 0;
}

/* 0, or an exit code. */
static int call_connect(struct call *c)
{
    while ((c->fd = address_connect(&c->address)) < 0 && errno == EAGAIN && now_ms() < c->deadline_ms)
        poll(NULL, 0, 10);          /* its queue is full; there is no event for room in it */
    if (c->fd < 0)
        return call_failed(c, "%s: %s", c->address.text, strerror(errno));
    return c->address.kind == ADDRESS_HYBRID ? call_handshake(c) : 0;
}

/* Reads on until c->in starts with a whole msgpack value. 0, or an exit code. */
static int call_read_value(struct call *c)
{
    struct mp_scan scan;
    const char *why;

    mp_scan_init(&scan);
    for (;;) {
        enum scan s = mp_scan(&scan, buf_span(&c->in).p, c->in.len, CALL_REPLY_MAX, &why);
        if (s == SCAN_DONE)
            return 0;
        if (s == SCAN_BAD)
            return call_failed(c, "the reply is no msgpack: %s", why);
        if (c->eof && c->in.len == 0)
            return call_failed(c, "the guest hung up without a reply");
        if (c->eof)
            return call_failed(c, "the guest hung up after %zu bytes of its reply", c->in.len);
        if (call_read(c) < 0)
            return call_failed(c, "no reply: %s", strerror(errno));
    }
}

/* Sends a message and reads the reply to it. Takes the message's bytes. */
static int call_ask(struct call *c, struct buf *message)
{
    int rc = message->failed ? call_failed(c, "no memory") : call_connect(c);

    if (rc == 0 && call_send(c, buf_span(message)) < 0)
        rc = call_failed(c, "%s: %s", c->address.text, strerror(errno));
    buf_fini(message);
    return rc ? rc : call_read_value(c);
}

/* ---- replies ---- */

/* Goes to the value of a key. False: `map` is none, or has no such key. */
static bool call_field(struct mp_in map, const char *key, struct mp_in *value)
{
    uint64_t pairs;
    struct span name;

    if (!mp_read_count(&map, MP_MAP, &pairs))
        return false;
    for (; pairs > 0; pairs--) {
        bool wanted = mp_peek(&map) == MP_STR ? mp_read_bytes(&map, MP_STR, &name) && span_eq(name, key)
                                              : (mp_skip(&map), false);
        *value = map;
        if (wanted)
            return true;
        if (!mp_skip(&map))
            return false;
    }
    return false;
}

static bool call_text(struct mp_in value, struct span *out)
{
    return mp_read_bytes(&value, MP_BIN, out) || mp_read_bytes(&value, MP_STR, out);
}

static struct mp_in call_reply(const struct call *c)
{
    return (struct mp_in){ buf_at(&c->in), c->in.len };
}

static int call_print(const struct call *c, struct span s)
{
    if (fwrite(s.p, 1, s.n, stdout) == s.n && fflush(stdout) == 0)
        return EXIT_OK;
    return call_failed(c, "standard output: %s", strerror(errno));
}

/* Prints what a failure says, each part once and on lines of its own. */
static int call_print_error(const struct call *c)
{
    static const char *const keys[] = { "error", "traceback", "output" };
    struct span seen = SPAN(""), text;
    struct mp_in value;

    for (size_t i = 0; i < COUNT(keys); i++) {
        if (!call_field(call_reply(c), keys[i], &value) || !call_text(value, &text) || text.n == 0
            || (text.n == seen.n && memcmp(text.p, seen.p, text.n) == 0))
            continue;
        fwrite(text.p, 1, text.n, stderr);
        if (text.p[text.n - 1] != '\n')
            fputc('\n', stderr);
        seen = text;
    }
    return seen.n > 0 ? EXIT_FAILED : call_failed(c, "the reply holds neither an answer nor an error");
}

/* A msgpack value as JSON. What JSON lacks becomes the nearest that it has: bytes are text,
 * each that is no UTF-8 is U+FFFD; keys are made text; infinities and extensions are null. */
static void json_add_text(struct buf *out, struct span s)
{
    struct buf clean = { 0 };

    utf8_add(&clean, s);
    buf_add_byte(out, '"');
    for (size_t i = 0; i < clean.len; i++) {
        unsigned char c = (unsigned char)buf_at(&clean)[i];
        if (c == '"' || c == '\\')
            buf_add_byte(out, '\\');
        if (c < 0x20)
            buf_add_format(out, c == '\n' ? "\\n" : "\\u%04x", c);
        else
            buf_add_byte(out, c);
    }
    buf_add_byte(out, '"');
    out->failed |= clean.failed;
    buf_fini(&clean);
}

static void json_add_float(struct buf *out, const struct mp_head *h)
{
    float single;
    double value;
    uint32_t bits = (uint32_t)h->value;
    char text[40];

    memcpy(&single, &bits, sizeof single);
    memcpy(&value, &h->value, sizeof value);
    if (h->head == 1 + sizeof single)
        value = (double)single;
    if (!__builtin_isfinite(value)) {
        buf_add_text(out, "null");
        return;
    }
    for (int digits = 15; digits <= 17; digits++) {     /* the fewest that read back the same */
        snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value)
            break;
    }
    buf_add_text(out, text);
}

static void json_add_key(struct buf *out, struct mp_in *in);

/* The value is whole, as mp_scan() found, and so nested within limits.mp_depth. */
static void json_add(struct buf *out, struct mp_in *in)
{
    struct mp_head h = { 0 };

    mp_next(in, &h);
    struct span payload = { in->p + h.head, (size_t)h.bytes };
    mp_advance(in, h.head + (size_t)h.bytes);
    switch (h.type) {
    case MP_BOOL:
        buf_add_text(out, h.value ? "true" : "false");
        break;
    case MP_INT:
        buf_add_format(out, h.negative ? "%" PRId64 : "%" PRIu64, h.value);
        break;
    case MP_FLOAT:
        json_add_float(out, &h);
        break;
    case MP_STR:
    case MP_BIN:
        json_add_text(out, payload);
        break;
    case MP_ARRAY:
    case MP_MAP:
        buf_add_byte(out, h.type == MP_MAP ? '{' : '[');
        for (uint64_t i = 0; i < h.value; i++) {
            if (i > 0)
                buf_add_text(out, ", ");
            if (h.type == MP_MAP)
                json_add_key(out, in);
            json_add(out, in);
        }
        buf_add_byte(out, h.type == MP_MAP ? '}' : ']');
        break;
    default:
        buf_add_text(out, "null");
    }
}

static void json_add_key(struct buf *out, struct mp_in *in)
{
    struct buf key = { 0 };

    if (mp_peek(in) == MP_STR || mp_peek(in) == MP_BIN) {
        json_add(out, in);
    } else {
        json_add(&key, in);
        json_add_text(out, buf_span(&key));
    }
    buf_add_text(out, ": ");
    out->failed |= key.failed;
    buf_fini(&key);
}

/* ---- ready ---- */

/* Says where the guest will say that it is ready, as an address to listen on. */
static int call_ready_address(struct call *c, char path[sizeof(struct sockaddr_un)])
{
    const struct sockaddr_un *un = (const void *)&c->address.sa;
    struct stat st;
    int n = c->address.kind == ADDRESS_HYBRID
          ? snprintf(path, sizeof *un, "%s_%u", un->sun_path, c->address.port)
          : snprintf(path, sizeof *un, "%s", un->sun_path);

    if (c->address.sa.ss_family != AF_UNIX || n >= (int)sizeof un->sun_path)
        return call_misused(c, "%s: no Unix socket, or its path is too long", c->address.text);
    if (lstat(path, &st) == 0 && S_ISSOCK(st.st_mode))
        unlink(path);               /* what an earlier one left behind: bind(2) would refuse */
    address_unix(&c->address, span_of(path));
    return 0;
}

/* Reads the message of a guest. An empty one means version 1.0.0. */
static int call_ready_said(struct call *c)
{
    struct mp_in value;
    struct span version = SPAN("1.0.0");

    do {
        if (call_read(c) < 0)
            return call_failed(c, "%s: %s", c->address.text, strerror(errno));
    } while (c->in.len == 0 && !c->eof);
    if (c->in.len > 0) {
        int rc = call_read_value(c);
        if (rc)
            return rc;
        if (!call_field(call_reply(c), "version", &value) || !call_text(value, &version))
            return call_failed(c, "the guest says something else than its version");
    }
    printf("ready: version %.*s\n", (int)version.n, version.p);
    return call_print(c, SPAN(""));
}

static int call_ready(struct call *c)
{
    char path[sizeof(struct sockaddr_un)];
    short got;
    int rc = call_ready_address(c, path);

    if (rc)
        return rc;
    int fd = address_socket(&c->address);
    if (fd < 0 || bind(fd, (const void *)&c->address.sa, c->address.sa_len) < 0 || listen(fd, 1) < 0) {
        rc = call_failed(c, "%s: %s", path, strerror(errno));
        fd_close(&fd);
        return rc;
    }
    if (call_poll(c, fd, POLLIN, &got) < 0
        || (c->fd = SYS_ACCEPT(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) < 0)
        rc = call_failed(c, "%s: no guest came: %s", path, strerror(errno));
    else
        rc = call_ready_said(c);
    unlink(path);
    fd_close(&fd);
    return rc;
}

/* ---- configure ---- */

static bool has_suffix(const char *text, const char *suffix)
{
    size_t n = strlen(text), m = strlen(suffix);
    return n >= m && strcmp(text + n - m, suffix) == 0;
}

/* A file's bytes, or a folder as an archive. `plain` tells which it is. 0, or an exit code. */
static int call_load(struct call *c, const char *path, struct buf *out, bool *plain)
{
    struct stat st;

    if (stat(path, &st) < 0)
        return call_failed(c, "%s: %s", path, strerror(errno));
    *plain = !S_ISDIR(st.st_mode) && !has_suffix(path, ".zip");
    if (S_ISDIR(st.st_mode) && zip_pack(path, out, &c->why) < 0)
        return call_failed(c, "%s", buf_text(&c->why));
    if (!S_ISDIR(st.st_mode) && file_load(path, out, (size_t)limits.conf_bytes) < 0)
        return call_failed(c, "%s: %s", path, strerror(errno));
    return 0;
}

static void call_write_text(struct buf *out, const char *key, const char *value)
{
    mp_write_key(out, key);
    if (value)
        mp_write_text(out, span_of(value), SIZE_MAX);
    else
        mp_write_nil(out);
}

static uint32_t call_count(const struct call *c, const char *option)
{
    uint32_t count = 0;
    for (int at = 0; call_next(c, option, &at);)
        count++;
    return count;
}

static void call_write_list(struct buf *out, const struct call *c, const char *key, const char *option)
{
    const char *value;

    mp_write_key(out, key);
    mp_write_array(out, call_count(c, option));
    for (int at = 0; (value = call_next(c, option, &at));)
        mp_write_text(out, span_of(value), SIZE_MAX);
}

/* 0, or an exit code. */
static int call_write_variables(struct buf *out, const struct call *c)
{
    const char *value;

    mp_write_key(out, "variables");
    mp_write_map(out, call_count(c, "--env"));
    for (int at = 0; (value = call_next(c, "--env", &at));) {
        const char *eq = strchr(value, '=');
        if (!eq)
            return call_misused(c, "--env %s: expected NAME=VALUE", value);
        mp_write_text(out, (struct span){ value, (size_t)(eq - value) }, SIZE_MAX);
        mp_write_text(out, span_of(eq + 1), SIZE_MAX);
    }
    return 0;
}

/* DEVICE:DIR, and then what is not as usual. 0, or an exit code. */
static int call_write_volumes(struct buf *out, const struct call *c)
{
    const char *value;

    mp_write_key(out, "volumes");
    mp_write_array(out, call_count(c, "--volume"));
    for (int at = 0; (value = call_next(c, "--volume", &at));) {
        struct span rest = span_of(value), device = span_part(&rest, ':'), mount = span_part(&rest, ':');
        bool writable = false, trusted = false;
        while (rest.p) {
            struct span word = span_part(&rest, ':');
            if (!span_eq(word, "rw") && !span_eq(word, "trusted"))
                return call_misused(c, "--volume %s: \"%.*s\" is not rw or trusted", value, (int)word.n, word.p);
            writable |= span_eq(word, "rw");
            trusted |= span_eq(word, "trusted");
        }
        if (!mount.p)
            return call_misused(c, "--volume %s: expected DEVICE:DIR", value);
        mp_write_map(out, 3u + trusted);
        mp_write_key(out, "device");
        mp_write_text(out, device, SIZE_MAX);
        mp_write_key(out, "mount");
        mp_write_text(out, mount, SIZE_MAX);
        mp_write_key(out, "read_only");
        mp_write_bool(out, !writable);
        if (trusted) {
            mp_write_key(out, "trusted");
            mp_write_bool(out, true);
        }
    }
    return 0;
}

static void call_write_bytes(struct buf *out, const char *key, struct span bytes)
{
    mp_write_key(out, key);
    mp_write_bin(out, bytes);
}

/* Every key that the supervisor sends. 0, or an exit code. */
static int call_write_configuration(struct call *c, struct buf *map)
{
    struct buf code = { 0 }, input = { 0 };
    const char *input_path = call_value(c, "--input", NULL);
    bool plain = false, input_plain, on_disk = strcmp(c->words[0], "-") == 0;
    int rc = on_disk ? 0 : call_load(c, c->words[0], &code, &plain);

    if (rc == 0 && input_path)
        rc = call_load(c, input_path, &input, &input_plain);
    if (rc == 0) {
        mp_write_map(map, 14);
        call_write_bytes(map, "code", buf_span(&code));
        call_write_text(map, "encoding", call_value(c, "--encoding", on_disk ? "squashfs" : plain ? "plain" : "zip"));
        call_write_text(map, "entrypoint", c->words[1]);
        call_write_text(map, "interface", call_value(c, "--interface", "asgi"));
        call_write_text(map, "vm_hash", call_value(c, "--hash", NULL));
        call_write_text(map, "ip", call_value(c, "--ip", NULL));
        call_write_text(map, "route", call_value(c, "--route", NULL));
        call_write_text(map, "ipv6", call_value(c, "--ipv6", NULL));
        call_write_text(map, "ipv6_gateway", call_value(c, "--ipv6-gateway", NULL));
        call_write_list(map, c, "dns_servers", "--dns");
        call_write_list(map, c, "authorized_keys", "--key");
        if (input_path)
            call_write_bytes(map, "input_data", buf_span(&input));
        else
            call_write_text(map, "input_data", NULL);
        rc = call_write_volumes(map, c);
        rc = rc ? rc : call_write_variables(map, c);
    }
    buf_fini(&code);
    buf_fini(&input);
    return rc;
}

static int call_configure(struct call *c)
{
    struct buf map = { 0 }, frame = { 0 };
    struct mp_in value;
    bool ok = false;
    int rc = call_write_configuration(c, &map);

    if (rc == 0) {
        buf_add_format(&frame, "%zu\n", map.len);
        buf_add_span(&frame, buf_span(&map));
        frame.failed |= map.failed;
    }
    buf_fini(&map);
    rc = rc ? rc : call_ask(c, &frame);
    if (rc)
        return rc;
    if (!call_field(call_reply(c), "success", &value) || !mp_read_bool(&value, &ok) || !ok)
        return call_print_error(c);
    return call_print(c, SPAN("configured\n"));
}

/* ---- request and event ---- */

/* The pairs of the -H options; a program may insist on Host, as HTTP/1.1 does. */
static int call_write_headers(struct buf *out, const struct call *c)
{
    const char *value;
    bool host = false;

    for (int at = 0; (value = call_next(c, "-H", &at));)
        host |= strncasecmp(value, "host:", 5) == 0;
    mp_write_key(out, "headers");
    mp_write_array(out, call_count(c, "-H") + !host);
    if (!host) {
        mp_write_array(out, 2);
        mp_write_bin(out, SPAN("host"));
        mp_write_bin(out, SPAN("localhost"));
    }
    for (int at = 0; (value = call_next(c, "-H", &at));) {
        const char *colon = strchr(value, ':');
        if (!colon)
            return call_misused(c, "-H %s: expected NAME: VALUE", value);
        mp_write_array(out, 2);
        mp_write_bin(out, (struct span){ value, (size_t)(colon - value) });
        mp_write_bin(out, span_of(colon + 1 + strspn(colon + 1, " \t")));
    }
    return 0;
}

/* The supervisor sends the path decoded; what is no text then stays as it is written. */
static void call_write_target(struct buf *out, const char *target)
{
    const char *mark = strchr(target, '?');
    struct span raw = { target, mark ? (size_t)(mark - target) : strlen(target) };
    struct buf path = { 0 };

    percent_decode(&path, raw);
    mp_write_key(out, "path");
    mp_write_text(out, utf8_ok(buf_span(&path)) ? buf_span(&path) : raw, SIZE_MAX);
    call_write_text(out, "query_string", mark ? mark + 1 : "");
    buf_fini(&path);
}

/* The value of -d; no byte without it. 0, or an exit code. */
static int call_load_body(struct call *c, struct buf *out)
{
    const char *data = call_value(c, "-d", "");

    if (data[0] != '@') {
        buf_add_span(out, span_of(data));
        return 0;
    }
    const char *path = strcmp(data, "@-") == 0 ? "/dev/stdin" : data + 1;
    return file_load(path, out, CALL_REPLY_MAX) < 0 ? call_failed(c, "%s: %s", path, strerror(errno)) : 0;
}

static int call_print_head(const struct call *c, struct mp_in status, struct mp_in headers)
{
    struct mp_head h;
    struct buf out = { 0 };
    struct span name, value;
    uint64_t count, two;

    if (!mp_read(&status, MP_INT, &h) || !mp_read_count(&headers, MP_ARRAY, &count))
        return call_failed(c, "the reply has no status or no headers");
    buf_add_format(&out, "HTTP/1.1 %" PRIu64 "\n", h.value);
    while (count-- > 0 && mp_read_count(&headers, MP_ARRAY, &two) && two == 2
           && mp_read_bytes(&headers, MP_BIN, &name) && mp_read_bytes(&headers, MP_BIN, &value)) {
        buf_add_span(&out, name);
        buf_add_text(&out, ": ");
        buf_add_span(&out, value);
        buf_add_byte(&out, '\n');
    }
    buf_add_byte(&out, '\n');
    int rc = call_print(c, buf_span(&out));
    buf_fini(&out);
    return rc;
}

static int call_request(struct call *c)
{
    struct buf message = { 0 }, body = { 0 };
    struct mp_in head, status, headers, part, value;
    struct span text;
    const char *method = call_value(c, "-X", call_value(c, "-d", NULL) ? "POST" : "GET");
    int rc = call_load_body(c, &body);

    mp_write_map(&message, 1);
    mp_write_key(&message, "scope");
    mp_write_map(&message, 6);
    call_write_text(&message, "type", "http");
    call_write_text(&message, "method", method);
    call_write_target(&message, c->words[0]);
    call_write_bytes(&message, "body", buf_span(&body));
    rc = rc ? rc : call_write_headers(&message, c);
    message.failed |= body.failed;
    buf_fini(&body);
    if (rc == 0)
        rc = call_ask(c, &message);
    buf_fini(&message);
    if (rc)
        return rc;
    if (!call_field(call_reply(c), "headers", &head) || !call_field(call_reply(c), "body", &part)
        || !call_field(head, "status", &status) || !call_field(head, "headers", &headers)
        || !call_field(part, "body", &value) || !call_text(value, &text))
        return call_print_error(c);
    if (call_value(c, "-i", NULL))
        rc = call_print_head(c, status, headers);
    return rc ? rc : call_print(c, text);
}

static int call_event(struct call *c)
{
    struct buf message = { 0 }, json = { 0 };
    struct mp_in value;
    struct span body = span_of(c->words[0]);
    yyjson_read_err wrong;
    yyjson_doc *doc = yyjson_read_opts((char *)(uintptr_t)body.p, body.n, 0, NULL, &wrong);

    if (!doc && !call_value(c, "--text", NULL))
        return call_misused(c, "the event is no JSON: byte %zu: %s", wrong.pos, wrong.msg);
    yyjson_doc_free(doc);
    mp_write_map(&message, 1);
    mp_write_key(&message, "scope");
    mp_write_map(&message, 2);
    call_write_text(&message, "type", "aleph.message");
    call_write_text(&message, "body", c->words[0]);
    int rc = call_ask(c, &message);
    if (rc)
        return rc;
    if (!call_field(call_reply(c), "body", &value))
        return call_print_error(c);
    json_add(&json, &value);
    buf_add_byte(&json, '\n');
    rc = json.failed ? call_failed(c, "no memory") : call_print(c, buf_span(&json));
    buf_fini(&json);
    return rc;
}

/* ---- shell and halt ---- */

static int call_shell(struct call *c)
{
    struct buf line = { 0 };
    int rc = 0;

    if (strchr(c->words[0], '\n'))
        return call_misused(c, "a command ends at the first newline");
    buf_add_format(&line, "!");
    buf_add_text(&line, c->words[0]);
    buf_add_byte(&line, '\n');
    rc = call_connect(c);
    if (rc == 0 && call_send(c, buf_span(&line)) < 0)
        rc = call_failed(c, "%s: %s", c->address.text, strerror(errno));
    buf_fini(&line);
    while (rc == 0 && (c->in.len > 0 || !c->eof)) {
        if (c->in.len == 0 && call_read(c) < 0)
            return call_failed(c, "the output does not end: %s", strerror(errno));
        rc = call_print(c, buf_span(&c->in));
        buf_drop(&c->in, c->in.len);
    }
    return rc;
}

static int call_halt(struct call *c)
{
    int rc = call_connect(c);

    if (rc == 0 && call_send(c, SPAN("halt\n")) < 0)
        rc = call_failed(c, "%s: %s", c->address.text, strerror(errno));
    while (rc == 0 && !c->eof && !span_eq(buf_span(&c->in), "STOP\nSTOPZ\n"))
        if (call_read(c) < 0)
            return call_failed(c, "no STOPZ: %s", strerror(errno));
    if (rc == 0 && !span_eq(buf_span(&c->in), "STOP\nSTOPZ\n"))
        rc = call_failed(c, "the guest hung up after %zu bytes, without STOP and STOPZ", c->in.len);
    return rc;
}

/* ---- the command line ---- */

/* A path is the host's end of a vsock; anything with a scheme says what it is. */
static bool call_address(struct address *a, const char *text)
{
    if (address_parse(a, text))
        return a->kind == ADDRESS_UNIX || a->kind == ADDRESS_TCP || a->kind == ADDRESS_HYBRID;
    *a = (struct address){ .kind = ADDRESS_HYBRID, .port = PORT_ALEPH, .text = text, .fd = -1 };
    return address_unix(a, span_of(text));
}

/* 0, or an exit code. */
static int call_parse(struct call *c)
{
    int64_t seconds;

    for (int i = 0; i < c->argc; i++) {
        const char *word = c->argv[i];
        const struct call_option *o = call_option(c, word);
        if (!o && word[0] == '-' && word[1])
            return call_misused(c, "has no option %s (see agent call --help)", word);
        if (o && o->has_value && ++i == c->argc)
            return call_misused(c, "%s needs a value", word);
        if (!o && c->words_len == c->verb->words_max)
            return call_misused(c, "too many arguments, from \"%s\" on", word);
        if (!o)
            c->words[c->words_len++] = word;
    }
    if (c->words_len < c->verb->words_min)
        return call_misused(c, "needs %d argument%s (see agent call --help)", c->verb->words_min,
                            c->verb->words_min > 1 ? "s" : "");
    if (!number_read(span_of(call_value(c, "--timeout", "120")), 1, 86400, &seconds))
        return call_misused(c, "--timeout takes seconds, from 1 to 86400");
    c->deadline_ms = now_ms() + 1000 * seconds;
    return 0;
}

static int call_main(int argc, char **argv)
{
    static const struct call_verb verbs[] = {
        { "ready", 0, 0, call_ready }, { "configure", 2, 2, call_configure },
        { "request", 1, 1, call_request }, { "event", 1, 1, call_event },
        { "shell", 1, 1, call_shell }, { "halt", 0, 0, call_halt },
    };
    struct call c = { .fd = -1, .argc = argc - 3, .argv = argv + 3 };

    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--help") == 0)
            return fputs(call_usage, stdout) < 0 ? EXIT_FAILED : EXIT_OK;
    for (size_t i = 0; argc > 2 && i < COUNT(verbs); i++)
        if (strcmp(argv[2], verbs[i].name) == 0)
            c.verb = &verbs[i];
    if (!c.verb) {
        fputs(call_usage, stderr);
        return EXIT_USAGE;
    }
    signal(SIGPIPE, SIG_IGN);
    int rc = call_parse(&c);
    if (rc == 0 && !call_address(&c.address, argv[1]))
        rc = call_misused(&c, "%s: no path of a Unix socket, at most 107 bytes", argv[1]);
    if (rc == 0)
        rc = c.verb->run(&c);
    fd_close(&c.fd);
    buf_fini(&c.in);
    buf_fini(&c.why);
    return rc;
}

/* ==== forward: one listener, one target ===========================================
 * For the host: reach a guest's port from tools that know nothing of vsock. As a proxy that
 * says for whom it speaks, or by bytes that it does not look at. */
static void forward_on_failed(struct pump *near, const char *why)
{
    fprintf(stderr, "agent: %s: %s\n", near->pumps->target.text, why);
    conn_finish(&near->conn);
}

static void forward_on_accept(struct listener *l, int fd)
{
    struct pump *near = pump_accept(l->arg, fd);
    if (near)
        pump_connect(near);
}

static const char forward_usage[] =
    "usage: agent forward [--raw] LISTEN TARGET\n"
    "\n"
    "A proxy for HTTP/1.1 from LISTEN to TARGET, which tells of the client in X-Forwarded-For, -Proto and\n"
    "-Host. After LISTEN,trust=all or LISTEN,trust=NETWORK,... such fields of clients are passed on;\n"
    "those of TCP clients are not otherwise. With --raw it carries whatever bytes come.\n"
    "Both are ";

static int forward_main(int argc, char **argv)
{
    static struct upstream target;
    struct loop loop;
    struct conns conns = { .loop = &loop };
    struct pumps pumps = { .conns = &conns, .on_failed = forward_on_failed };
    struct http_server server = { .loop = &loop, .conns = &conns, .target = &target };
    bool raw = argc > 1 && strcmp(argv[1], "--raw") == 0;
    const char *listen = argc > 1 + raw ? argv[1 + raw] : "", *to = argc > 2 + raw ? argv[2 + raw] : "";
    struct listener *l = &server.listener;

    if (argc != 3 + raw) {
        fprintf(stderr, "%s%s.\n"
                "\n"
                "  agent forward tcp:127.0.0.1:8080 hybrid:v.sock:80     a guest's port 80 on this machine\n",
                forward_usage, address_forms);
        return strcmp(listen, "--help") == 0 ? EXIT_OK : EXIT_USAGE;
    }
    if (!address_parse(&l->address, listen) || l->address.kind == ADDRESS_HYBRID)
        die("cannot listen on %s: expected %s", listen, address_forms);
    if (!address_parse(&pumps.target, to) || pumps.target.kind == ADDRESS_FD || pumps.target.kind == ADDRESS_VSOCK)
        die("cannot connect to %s: expected unix:, tcp: or hybrid:", to);
    signal(SIGPIPE, SIG_IGN);
    if (loop_init(&loop) < 0)
        die("%s", strerror(errno));
    upstream_init(&target, &loop);
    target.address = pumps.target;
    if (raw)
        *l = (struct listener){ .all = &conns, .address = l->address, .on_accept = forward_on_accept, .arg = &pumps };
    if ((raw ? listener_open(l) : http_open(&server)) < 0)
        die("%s: %s", listen, strerror(errno));
    listener_start(l);
    loop_run(&loop);
    return EXIT_OK;
}

/* ==== hash: a file's item_hash ====================================================
 * Files of the aleph.im network are called by what is in them. The storage engine "storage"
 * takes the SHA-256 of the bytes; "ipfs" takes the CIDv0 that `ipfs add` gives: the SHA-256 of the
 * root of a tree, whose leaves hold 256 KiB each and whose other nodes up to 174 links. It is filled
 * from the left, all leaves equally deep; a single leaf is the root itself. A node is a protobuf
 * message (DAG-PB) around another (UnixFS). Sources: the IPFS specifications "UnixFS" and "DAG-PB",
 * and "CID" and "multihash" of multiformats. */
#define HASH_LEAF_BYTES     (256 << 10)
#define HASH_LINKS          174
#define HASH_LEVELS         8           /* 174^7 leaves are more than any file has */
#define HASH_CID_BYTES      34          /* a multihash: 0x12 for SHA-256, 32 bytes, and those */
#define HASH_TEXT_BYTES     65          /* with its NUL; hexadecimal is the longer one */

/* A node, as the one above it sees it. */
struct hash_link {
    unsigned char digest[32];
    uint64_t      file_bytes;           /* of the file, at and below it */
    uint64_t      node_bytes;           /* of all nodes, at and below it */
};

struct hash_tree {
    struct {
        struct hash_link links[HASH_LINKS];
        size_t           n;
    } levels[HASH_LEVELS];              /* what no node above has taken yet; level 0 has leaves */
    size_t depth;                       /* levels that have links */
    bool   failed;                      /* no memory */
};

static void pb_varint(struct buf *b, uint64_t value)
{
    unsigned char bytes[10];
    size_t n = 0;

    for (; value > 127; value >>= 7)
        bytes[n++] = (unsigned char)(value | 128);
    bytes[n++] = (unsigned char)value;
    buf_add(b, bytes, n);
}

static void pb_number(struct buf *b, unsigned field, uint64_t value)
{
    pb_varint(b, field << 3);
    pb_varint(b, value);
}

static void pb_bytes(struct buf *b, unsigned field, struct span s)
{
    pb_varint(b, field << 3 | 2);
    pb_varint(b, s.n);
    buf_add(b, s.p, s.n);
}

/* What a CIDv0 is before it becomes text. */
static struct span hash_cid(const struct hash_link *l, unsigned char cid[static HASH_CID_BYTES])
{
    cid[0] = 0x12;
    cid[1] = sizeof l->digest;
    memcpy(cid + 2, l->digest, sizeof l->digest);
    return (struct span){ (char *)cid, HASH_CID_BYTES };
}

/* DAG-PB's PBLink: Hash, Name, Tsize. */
static void hash_add_pblink(struct buf *node, const struct hash_link *l)
{
    unsigned char cid[HASH_CID_BYTES];
    struct buf link = { 0 };

    pb_bytes(&link, 1, hash_cid(l, cid));
    pb_bytes(&link, 2, SPAN(""));
    pb_number(&link, 3, l->node_bytes);
    pb_bytes(node, 2, buf_span(&link));
    node->failed |= link.failed;
    buf_fini(&link);
}

/* A leaf of `data`, or a node above n links. DAG-PB's PBNode has its Links before its Data, which is
 * UnixFS's Data: Type (2: File), Data, filesize, blocksizes. */
static struct hash_link hash_node(struct hash_tree *t, const struct hash_link *links, size_t n, struct span data)
{
    struct hash_link out = { .file_bytes = data.n };
    struct buf node = { 0 }, file = { 0 };

    for (size_t i = 0; i < n; i++) {
        hash_add_pblink(&node, &links[i]);
        out.file_bytes += links[i].file_bytes;
        out.node_bytes += links[i].node_bytes;
    }
    pb_number(&file, 1, 2);
    if (data.n > 0)
        pb_bytes(&file, 2, data);
    pb_number(&file, 3, out.file_bytes);
    for (size_t i = 0; i < n; i++)
        pb_number(&file, 4, links[i].file_bytes);
    pb_bytes(&node, 1, buf_span(&file));
    out.node_bytes += node.len;
    t->failed |= node.failed || file.failed ||
        mbedtls_sha256((const unsigned char *)buf_at(&node), node.len, out.digest, 0) != 0;
    buf_fini(&node);
    buf_fini(&file);
    return out;
}

/* A full level becomes a node of the next one only when there is more: the last may be the root. */
static void hash_add(struct hash_tree *t, size_t level, struct hash_link l)
{
    if (t->levels[level].n == HASH_LINKS) {
        hash_add(t, level + 1, hash_node(t, t->levels[level].links, HASH_LINKS, SPAN("")));
        t->levels[level].n = 0;
    }
    t->levels[level].links[t->levels[level].n++] = l;
    if (t->depth <= level)
        t->depth = level + 1;
}

static struct hash_link hash_root(struct hash_tree *t)
{
    size_t level = 0;

    for (; level + 1 < t->depth || t->levels[level].n > 1; level++)
        hash_add(t, level + 1, hash_node(t, t->levels[level].links, t->levels[level].n, SPAN("")));
    return t->levels[level].links[0];
}

/* Base 58 as Bitcoin writes it; the first byte is not 0 here. */
static void hash_base58(char text[static HASH_TEXT_BYTES], struct span bytes)
{
    static const char digits[] = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
    unsigned char values[HASH_TEXT_BYTES] = { 0 };    /* the least one first */
    size_t n = 0;

    for (size_t i = 0; i < bytes.n; i++) {
        unsigned carry = (unsigned char)bytes.p[i];
        for (size_t k = 0; k < n || carry > 0; k++) {
            carry += values[k] * 256u;
            values[k] = (unsigned char)(carry % 58);
            carry /= 58;
            n = k < n ? n : k + 1;
        }
    }
    for (size_t i = 0; i < n; i++)
        text[i] = digits[values[n - 1 - i]];
    text[n] = '\0';
}

struct hashes {
    uint64_t bytes;
    char     storage[HASH_TEXT_BYTES], ipfs[HASH_TEXT_BYTES];
};

/* As much of a file as `into` has room for, or -1. */
static ssize_t hash_read(int fd, char *into, size_t room)
{
    size_t n = 0;
    ssize_t got = 1;

    while (n < room && got != 0) {
        if ((got = SYS_READ(fd, into + n, room - n)) < 0 && errno != EINTR)
            return -1;
        n += got > 0 ? (size_t)got : 0;
    }
    return (ssize_t)n;
}

/* 0, or -1 with errno. */
static int hash_file(int fd, struct hashes *out)
{
    struct hash_tree *t = calloc(1, sizeof *t);
    char *leaf = malloc(HASH_LEAF_BYTES);
    unsigned char digest[32], cid[HASH_CID_BYTES];
    mbedtls_sha256_context whole;
    ssize_t n = HASH_LEAF_BYTES;

    *out = (struct hashes){ 0 };
    mbedtls_sha256_init(&whole);
    errno = ENOMEM;
    bool ok = t && leaf && mbedtls_sha256_starts(&whole, 0) == 0;
    while (ok && n == HASH_LEAF_BYTES && (ok = (n = hash_read(fd, leaf, HASH_LEAF_BYTES)) >= 0)) {
        out->bytes += (uint64_t)n;
        ok = mbedtls_sha256_update(&whole, (unsigned char *)leaf, (size_t)n) == 0;
        if (n > 0 || out->bytes == 0)
            hash_add(t, 0, hash_node(t, NULL, 0, (struct span){ leaf, (size_t)n }));
    }
    if (ok && (ok = mbedtls_sha256_finish(&whole, digest) == 0)) {
        struct hash_link root = hash_root(t);
        for (size_t i = 0; i < sizeof digest; i++)
            snprintf(out->storage + 2 * i, 3, "%02x", digest[i]);
        hash_base58(out->ipfs, hash_cid(&root, cid));
        ok = !t->failed;
    }
    mbedtls_sha256_free(&whole);
    free(leaf);
    free(t);
    return ok ? 0 : -1;
}

static const char hash_usage[] =
    "usage: agent hash FILE...                  size and item_hash of files, for both storage engines\n"
    "       agent hash --verify HASH FILE...    exit code 1 unless each has this item_hash\n";

/* Of a file, on one line each; verified against `expected` where there is one. */
static bool hash_report(const char *path, const char *expected)
{
    struct hashes h;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    int rc = fd < 0 ? -1 : hash_file(fd, &h);

    if (rc < 0)
        fprintf(stderr, "agent hash: %s: %s\n", path, strerror(errno));
    fd_close(&fd);
    if (rc < 0)
        return false;
    printf("%s: %" PRIu64 " bytes\nitem_hash (storage): %s\nitem_hash (ipfs): %s\n", path, h.bytes, h.storage, h.ipfs);
    bool is = !expected || strcmp(expected, h.storage) == 0 || strcmp(expected, h.ipfs) == 0;
    if (!is)
        fprintf(stderr, "agent hash: %s is not %s\n", path, expected);
    return is;
}

static int hash_main(int argc, char **argv)
{
    bool verifies = argc > 1 && strcmp(argv[1], "--verify") == 0, ok = true;
    const char *expected = verifies && argc > 2 ? argv[2] : NULL;
    int first = verifies ? 3 : 1;

    if (argc <= first || argv[first][0] == '-') {
        fputs(hash_usage, stderr);
        return argc == 2 && strcmp(argv[1], "--help") == 0 ? EXIT_OK : EXIT_USAGE;
    }
    if (expected && !(strlen(expected) == 64 && strspn(expected, "0123456789abcdef") == 64) &&
        !(strlen(expected) == 46 && strncmp(expected, "Qm", 2) == 0)) {
        fprintf(stderr, "agent hash: %s is no item_hash: expected a SHA-256 of 64 hexadecimal digits or a CIDv0 (Qm...)\n", expected);
        return EXIT_USAGE;
    }
    for (int i = first; i < argc; i++)
        ok &= hash_report(argv[i], expected);
    return ok ? EXIT_OK : EXIT_FAILED;
}

/* ==== init: PID 1 ================================================================ */
#define READY_PATIENCE_MS   100     /* then the rest of boot goes first */
#define BUTTON_PATIENCE_MS  1000    /* after boot: a configuration goes first */
#define BUTTONS_MAX         4
#define INPUTS_MAX          32      /* /dev/input/event0 and on */
#define HALT_MARGIN_MS      300     /* of halt_ms: what follows when a volume is still held */
#define READY_RETRY_MAX_MS  1000    /* between two tries, however long nobody has listened */

/* What a command line says wins over the file. */
struct options {
    const char     *ready, *api;    /* addresses; ready: a sandbox, no vsock, no reboot */
    const char     *config;         /* the file */
    const char     *folder, *entrypoint;
    char          **args;           /* up to the NULL */
    int64_t         workers;        /* 0: not said */
    bool            reload;
    char          **variables;      /* "NAME=VALUE" */
    size_t          variables_len;
    struct settings told;
};

struct button {
    struct watch  watch;            /* an input device with a power key; fd -1: none */
    struct agent *agent;
};

struct agent {
    struct loop         loop;
    struct conns        conns;
    struct children     children;
    struct program      program;
    struct setup        setup;
    struct aleph_server aleph;
    struct http_server  http[LISTEN_MAX];
    size_t              http_len;
    struct tls_keys    *keys;               /* NULL: no TLS */
    struct bridge       bridge;
    void               *ballast;            /* as large as a connection; never used: without it musl maps and unmaps
                                               a page for each one that comes alone */
    struct boot         boot;
    struct options      options;
    struct settings     settings;           /* as the file has them */
    struct buf          conf_text;          /* of the file; kept until its program runs */
    struct conf         conf;               /* read from it, until setup takes it */
    char                missing[512];       /* why its program does not run */
    struct watch        conf_timer;         /* until that is tried again */
    int64_t             conf_wait_ms;
    bool                is_process;         /* `agent run`: the machine is somebody else's */
    int                 exit_code;
    const char         *name;               /* by which the kernel has executed us */
    struct watch        signals;
    struct address      host;               /* where ready is said */
    struct conn         ready;              /* its connection */
    struct watch        ready_timer;
    struct watch        late_timer;         /* the rest of boot, if the host does not answer at once */
    bool                ready_said, booted;
    struct job          flush, sync;
    struct watch        halt_timer;
    int64_t             halt_end_ms;
    bool                halt_off;           /* power off, where that is possible, or else reboot */
    struct button       buttons[BUTTONS_MAX];   /* those found come first */
    struct watch        button_timer;
    struct job          button_job;
    enum { HALT_NO, HALT_PROGRAM, HALT_SETUP, HALT_SYNC, HALT_FORCED, HALT_ANSWER } halt_state;
};

static bool agent_is_sandboxed(const struct agent *a)
{
    return a->options.ready != NULL;
}

/* ---- ready ---- */

static void agent_on_ready_said(struct agent *a);
static void agent_boot_late(struct agent *a);      /* it waits for ready, ready must not wait for it */
static _Noreturn void run_end(struct agent *a);     /* how a process halts */
static void run_on_setup_failed(struct agent *a);   /* and what it does where a machine tries again */

static void ready_on_input(struct conn *c)
{
    struct agent *a = CONTAINER(c, struct agent, ready);

    if (!a->ready_said && c->out.len == 0)
        agent_on_ready_said(a);
    if (c->eof)
        conn_close(c);
}

static void ready_on_sent(struct conn *c)
{
    struct agent *a = CONTAINER(c, struct agent, ready);
    if (c->out.len == 0)
        agent_on_ready_said(a);
}

static void ready_on_deadline(struct conn *c)
{
    conn_close(c);
}

static void ready_on_close(struct conn *c)
{
    (void)c;
}

/* The longer nobody has listened the longer it waits for the next try: there may be no host
 * that wants to know. */
static void ready_again(struct agent *a)
{
    int64_t ms = (kernel_us() - a->boot.start_us) / 1000 / 100;

    loop_after(&a->loop, &a->ready_timer, ms < limits.ready_retry_ms ? limits.ready_retry_ms
                                          : ms < READY_RETRY_MAX_MS ? ms : READY_RETRY_MAX_MS);
}

/* The connection is part of struct agent: what is freed here is only its turn. */
static void ready_on_free(struct conn *c)
{
    struct agent *a = CONTAINER(c, struct agent, ready);
    if (!a->ready_said)
        ready_again(a);
    agent_boot_late(a);
}

static const struct proto ready_proto = {
    .name = "ready", .on_input = ready_on_input, .on_sent = ready_on_sent,
    .on_deadline = ready_on_deadline, .on_close = ready_on_close, .on_free = ready_on_free,
};

/* Connects and sends in one go: a connection without the message would mean version 1. The
 * host may not listen yet, as it binds its end after starting us: refusals are normal. */
static void ready_try(struct watch *timer)
{
    struct agent *a = CONTAINER(timer, struct agent, ready_timer);
    int fd = address_connect(&a->host);

    a->ready = (struct conn){ 0 };
    if (fd < 0 || conn_open(&a->ready, &a->conns, &ready_proto, fd, CONN_CONNECTING) < 0) {
        log_debug("ready: %s", strerror(errno));
        ready_again(a);
        return;
    }
    mp_write_map(&a->ready.out, 1);
    mp_write_key(&a->ready.out, "version");
    mp_write_key(&a->ready.out, ALEPH_VERSION);
    conn_after(&a->ready, 5000);
}

/* ---- halt ---- */

/* Whether the machine can be switched off from within: on x86 one without ACPI cannot, stands
 * still instead, and has no power button either. A reset ends a microVM just as well. */
static bool halt_can_power_off(const struct agent *a)
{
#ifdef __x86_64__
    return a->buttons[0].watch.fd >= 0;
#else
    (void)a;
    return true;                    /* PSCI, SBI: the firmware does it */
#endif
}

static void halt_now(struct agent *a)
{
    bool off = a->halt_off && (agent_is_sandboxed(a) || halt_can_power_off(a));

    if (a->is_process)
        run_end(a);
    log_info("halt: %s", off ? "power off" : "reboot");
    log_flush();
    if (agent_is_sandboxed(a))
        exit(EXIT_OK);
    reboot(off ? RB_POWER_OFF : RB_AUTOBOOT);
    log_errno("reboot");
    reboot(off ? RB_AUTOBOOT : RB_POWER_OFF);
}

/* Some file systems take no other end for a clean one. What was killed has still to die. */
static void halt_root(int64_t end_ms)
{
    struct statvfs fs;

    if (statvfs("/", &fs) < 0 || (fs.f_flag & ST_RDONLY))
        return;
    while (mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL) < 0 && errno == EBUSY && now_ms() < end_ms)
        usleep(VOL_POLL_US);
}

/* While the program ends: what is written already need not be waited for afterwards. */
static int halt_flush(void *arg, struct buf *why)
{
    (void)arg;
    (void)why;
    sync();
    return 0;
}

static void halt_on_flushed(struct job *j, bool ok, struct span report)
{
    (void)j;
    if (!ok)
        log_debug("halt: flush: %.*s", (int)report.n, report.p);
}

/* Nothing but PID 1 and this child keeps a file open after kill(2). */
static int halt_sync(void *arg, struct buf *why)
{
    const struct agent *a = arg;

    (void)why;
    if (boot_is_machine)
        kill(-1, SIGKILL);
    sync();
    if (!boot_is_machine)
        return 0;
    vol_umount_all(a->halt_end_ms - HALT_MARGIN_MS);
    halt_root(a->halt_end_ms - HALT_MARGIN_MS);         /* an overlay refuses; it is only memory */
    return 0;
}

/* Synced, or out of time: answers, and gives the answer a moment to leave. */
static void halt_answer(struct agent *a)
{
    if (a->halt_state == HALT_ANSWER)
        return;
    a->halt_state = HALT_ANSWER;
    bool anybody = a->aleph.halting != NULL;
    aleph_say_stopped(&a->aleph);
    loop_after(&a->loop, &a->halt_timer, anybody ? 200 : 0);
}

static void halt_on_synced(struct job *j, bool ok, struct span report)
{
    struct agent *a = CONTAINER(j, struct agent, sync);

    if (!ok)
        log_info("halt: sync: %.*s", (int)report.n, report.p);
    halt_answer(a);
}

/* Once no setup mounts anything any more. */
static void halt_files(struct agent *a)
{
    if (a->halt_state != HALT_SETUP || a->setup.job.child.pid > 0)
        return;
    a->halt_state = HALT_SYNC;
    if (a->is_process) {
        halt_answer(a);
        return;
    }
    a->sync.run = halt_sync;
    a->sync.arg = a;
    a->sync.on_done = halt_on_synced;
    if (job_start(&a->sync, &a->loop, &a->children, "sync", limits.halt_ms) < 0) {
        halt_sync(a, NULL);         /* better late than lost; nothing else is left to serve */
        halt_answer(a);
    }
}

static void halt_on_stopped(struct program *p)
{
    struct agent *a = CONTAINER(p, struct agent, program);

    if (a->halt_state != HALT_PROGRAM)
        return;
    a->halt_state = HALT_SETUP;
    child_signal(&a->setup.job.child, SIGKILL);
    halt_files(a);
}

static void halt_on_deadline(struct watch *t)
{
    struct agent *a = CONTAINER(t, struct agent, halt_timer);

    if (a->halt_state == HALT_ANSWER)
        halt_now(a);
    if (a->halt_state != HALT_FORCED)
        log_info("halt: not done within %" PRId64 " ms: goes on without", limits.halt_ms);
    if (boot_is_machine && a->halt_state != HALT_FORCED) {
        a->halt_state = HALT_FORCED;
        vol_force_read_only();
        loop_after(&a->loop, &a->halt_timer, HALT_MARGIN_MS);
        return;
    }
    halt_answer(a);
}

static void agent_halt(struct agent *a, const char *reason, bool off)
{
    if (a->halt_state == HALT_ANSWER)
        aleph_say_stopped(&a->aleph);
    if (a->halt_state != HALT_NO)
        return;
    log_info("halt: %s", reason);
    a->halt_off = off;
    a->halt_state = HALT_PROGRAM;
    int64_t ms = limits.halt_ms + (a->is_process ? 2 * limits.grace_ms : 0);     /* nobody kills a process meanwhile */
    a->halt_end_ms = now_ms() + ms;
    loop_after(&a->loop, &a->halt_timer, ms);
    a->flush = (struct job){ .run = halt_flush, .on_done = halt_on_flushed };
    if (boot_is_machine && job_start(&a->flush, &a->loop, &a->children, "flush", limits.halt_ms) < 0)
        log_errno("halt: flush");
    child_signal(&a->setup.ssh.child, SIGTERM);
    program_stop(&a->program);
}

static void agent_on_aleph_halt(struct aleph_server *s)
{
    agent_halt(s->owner, "asked by the host", false);
}

/* ---- signals ---- */

/* What other inits take for a request: ctrl-alt-del (reboot(2)), a failing power supply,
 * busybox's halt, poweroff and reboot, systemd's in that order (systemd(1); glibc's SIGRTMIN
 * is 34). A machine that is halted and not off serves nobody. */
static const struct { int sig; bool off, of_processes; } halt_signals[] = {
    { SIGINT,  false, true  }, { SIGPWR,  true, true  },
    { SIGUSR1, true,  false }, { SIGUSR2, true, false }, { SIGTERM, false, true  },
    { 34 + 3,  true,  false }, { 34 + 4,  true, false }, { 34 + 5,  false, false },
};

static bool halt_is_off(int sig)
{
    bool off = false;

    for (size_t i = 0; i < COUNT(halt_signals); i++)
        off |= halt_signals[i].sig == sig && halt_signals[i].off;
    return off;
}

static void agent_reap(struct agent *a)
{
    if (child_reap(&a->children, 1024))
        loop_soon(&a->loop, &a->signals);       /* others have their turn first */
    halt_files(a);
}

static int agent_load_tls(struct agent *a, struct buf *why);

static void agent_reload_tls(struct agent *a)
{
    struct buf why = { 0 };

    if (agent_load_tls(a, &why) < 0)
        log_info("%s: the certificate and key from before stay", buf_text(&why));
    else
        log_info("tls: new connections have the certificate and key that the files hold now");
    buf_fini(&why);
}

static void agent_on_signal(struct watch *w, uint32_t events)
{
    struct agent *a = CONTAINER(w, struct agent, signals);
    struct signalfd_siginfo info;

    while (events && read(w->fd, &info, sizeof info) == sizeof info)
        if (info.ssi_signo == SIGHUP && a->keys && info.ssi_code <= 0)
            agent_reload_tls(a);            /* from a process; above 0: the terminal has gone (sigaction(2)) */
        else if (info.ssi_signo != SIGCHLD && a->is_process && a->halt_state != HALT_NO)
            run_end(a);             /* the second time: at once */
        else if (info.ssi_signo != SIGCHLD)
            agent_halt(a, strsignal((int)info.ssi_signo), halt_is_off((int)info.ssi_signo));
    agent_reap(a);
}

/* SIGCHLD and those that mean halt. Every other that can be ignored is. A process is also
 * ended by its terminal, unless nohup(1) asked not to, and leaves what it has no use for as
 * it is. */
static int agent_signals(struct agent *a)
{
    sigset_t wanted;
    struct sigaction ignore = { .sa_handler = SIG_IGN }, hangup;

    sigemptyset(&wanted);
    sigaddset(&wanted, SIGCHLD);
    for (size_t i = 0; i < COUNT(halt_signals); i++)
        if (!a->is_process || halt_signals[i].of_processes)
            sigaddset(&wanted, halt_signals[i].sig);
    if (a->is_process) {
        sigaction(SIGPIPE, &ignore, NULL);
        sigaddset(&wanted, SIGQUIT);
        if (a->keys || (sigaction(SIGHUP, NULL, &hangup) == 0 && hangup.sa_handler != SIG_IGN))
            sigaddset(&wanted, SIGHUP);
    }
    for (int sig = 1; sig < NSIG && !a->is_process; sig++)
        if (!sigismember(&wanted, sig) && sig != SIGSEGV && sig != SIGBUS && sig != SIGFPE
            && sig != SIGILL && sig != SIGABRT)
            sigaction(sig, &ignore, NULL);
    sigprocmask(SIG_SETMASK, &wanted, NULL);
    a->signals = (struct watch){ .fd = signalfd(-1, &wanted, SFD_CLOEXEC | SFD_NONBLOCK),
                                 .on_event = agent_on_signal };
    return a->signals.fd < 0 ? -1 : loop_want(&a->loop, &a->signals, EPOLLIN);
}

/* ---- the file ---- */

/* What the command line says of the program, over what stands in the file. */
static int agent_override(const struct options *o, struct conf *c, struct buf *why)
{
    char folder[PATH_MAX];

    if (o->folder && !realpath(o->folder, folder))
        return conf_wrong(why, "%.512s: %s", o->folder, strerror(errno));
    if (o->folder) {
        free(c->folder);
        free(c->entrypoint);
        c->folder = span_dup(span_of(folder));
        c->entrypoint = span_dup(span_of(o->entrypoint));
        strings_free(c->args, c->args_len);
        c->args = NULL;
        c->args_len = 0;
    }
    c->workers = o->workers ? o->workers : c->workers;
    for (char **arg = o->args; arg && *arg; arg++)
        if (strings_add(&c->args, &c->args_len, *arg) < 0)
            return conf_wrong(why, "no memory");
    if (c->args_len > CONF_LIST_MAX)
        return conf_wrong(why, "%zu arguments, at most %d", c->args_len, CONF_LIST_MAX);
    struct conf_pair *all = realloc(c->variables, (c->variables_len + o->variables_len + 1) * sizeof *all);
    if (!all || (o->folder && (!c->folder || !c->entrypoint)))
        return conf_wrong(why, "no memory");
    c->variables = all;
    for (size_t i = 0; i < o->variables_len; i++) {
        const char *text = o->variables[i];
        size_t name = strcspn(text, "=");
        struct conf_pair v = { span_dup((struct span){ text, name }), span_dup(span_of(text + name + 1)) };
        all[c->variables_len++] = v;
        if (!v.name || !v.value)
            return conf_wrong(why, "no memory");
    }
    return 0;
}

/* Makes a->conf; -1: it stays empty, and a->missing says what is wrong. */
static int agent_parse_conf(struct agent *a)
{
    struct buf why = { 0 };
    int rc = 0;

    a->conf = (struct conf){ .source = CONF_FILE };
    if (a->options.config)
        rc = conf_read_json(&a->conf, buf_span(&a->conf_text), &why);
    if (rc == 0)
        rc = agent_override(&a->options, &a->conf, &why);
    if (rc == 0)
        rc = conf_check(&a->conf, &why);
    if (rc < 0) {
        conf_fini(&a->conf);
        snprintf(a->missing, sizeof a->missing, "%s%s%s", a->options.config ? a->options.config : "",
                 a->options.config ? ": " : "", buf_text(&why));
        for (char *p = a->missing; *p; p++)
            if ((unsigned char)*p < 0x20 || *p == 0x7f)
                *p = '?';                       /* a terminal may show it */
    }
    buf_fini(&why);
    return rc;
}

/* Before the loop runs. The command line's limits come first, as they say how much is read,
 * and last, as they win. -1: a->missing says what is wrong. */
static int agent_read_conf(struct agent *a)
{
    const char *path = a->options.config;
    int rc = 0;

    settings_apply(&a->options.told);
    if (path && file_load_regular(path, &a->conf_text, CONF_FILE_MAX) < 0) {
        snprintf(a->missing, sizeof a->missing, "%s: %s", path, errno == EFBIG ? "more than 1 MiB"
                 : errno == EINVAL ? "no regular file" : strerror(errno));
        return -1;
    }
    rc = agent_parse_conf(a);
    a->settings = a->conf.settings;
    a->conf.settings = (struct settings){ 0 };
    settings_apply(&a->settings);
    settings_apply(&a->options.told);
    return rc;
}

static int agent_listen(struct agent *a, bool late);   /* an address may be one that setup has given */

/* For a person: what the program itself says of its port need not be where it is served. */
static void agent_tell_addresses(const struct agent *a)
{
    for (const struct http_server *h = a->http; h < a->http + a->http_len; h++) {
        struct endpoint own = { 0 };
        endpoint_take_own(&own, h->listener.watch.fd);
        bool v6 = strchr(own.ip, ':');
        if (own.ip[0])
            log_info("serving http%s://%s%s%s:%u/", h->listener.address.tls ? "s" : "", v6 ? "[" : "", own.ip,
                     v6 ? "]" : "", own.port);
        else
            log_info("serving %s", h->listener.address.text);
    }
}

/* A file's program does not start: nobody but us will try again. A host may send another
 * meanwhile. */
static void agent_on_setup(struct setup *s, bool ok, struct span text, struct span traceback)
{
    struct agent *a = s->owner;

    if (ok) {
        buf_fini(&a->conf_text);
        agent_listen(a, true);
        if (a->is_process)
            agent_tell_addresses(a);
        return;
    }
    snprintf(a->missing, sizeof a->missing, "%.*s", (int)(utf8_cut(text, sizeof a->missing - 1).n), text.p);
    a->program.missing = a->missing;
    if (a->program.status >= 0)                 /* what it printed before it ended is there already */
        traceback.n = 0;
    for (size_t n; traceback.n > 0; traceback = (struct span){ traceback.p + n, traceback.n - n }) {
        const char *end = memchr(traceback.p, '\n', traceback.n);
        n = end ? (size_t)(end - traceback.p) + 1 : traceback.n;
        log_line("program", traceback.p, n - (end != NULL));
    }
    if (a->halt_state != HALT_NO)
        return;
    if (a->is_process) {
        run_on_setup_failed(a);
        return;
    }
    log_info("setup: next try in %" PRId64 " ms", a->conf_wait_ms);
    loop_after(&a->loop, &a->conf_timer, a->conf_wait_ms);
    a->conf_wait_ms = backoff_after(a->conf_wait_ms);
}

static void agent_setup(struct agent *a)
{
    a->setup.owner = a;
    a->setup.on_done = agent_on_setup;
    setup_start(&a->setup, &a->conf);
}

static void agent_on_conf_timer(struct watch *t)
{
    struct agent *a = CONTAINER(t, struct agent, conf_timer);

    if (a->setup.state != SETUP_NONE && a->setup.state != SETUP_DONE)
        loop_after(&a->loop, &a->conf_timer, a->conf_wait_ms);      /* another's, which may fail */
    else if (a->setup.state == SETUP_NONE && a->program.state == PROGRAM_NONE && agent_parse_conf(a) == 0)
        agent_setup(a);
}

/* ---- the power button: an input device (Documentation/input/input.rst) ---- */

static void button_on_event(struct watch *w, uint32_t events)
{
    struct button *b = CONTAINER(w, struct button, watch);
    struct input_event ev[16];
    ssize_t n = events ? read(w->fd, ev, sizeof ev) : 0;

    for (size_t i = 0; n > 0 && i < (size_t)n / sizeof *ev; i++)
        if (ev[i].type == EV_KEY && ev[i].code == KEY_POWER && ev[i].value == 1)
            agent_halt(b->agent, "power button", true);
    if (n < 0 && errno != EAGAIN && errno != EINTR)         /* the device has gone */
        loop_want(&b->agent->loop, w, 0);
}

/* The machine's own: a keyboard has a power key, too. Asked of sysfs first, as opening and
 * closing a device can take its driver a while. */
static int button_open_one(int number)
{
    unsigned char keys[KEY_MAX / 8 + 1] = { 0 };
    char path[64], bus[8];

    snprintf(path, sizeof path, "/sys/class/input/event%d/device/id/bustype", number);
    snprintf(bus, sizeof bus, "%04x", BUS_HOST);
    if (kernel_number(path, bus) < 0)
        return -1;
    snprintf(path, sizeof path, "/dev/input/event%d", number);
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd >= 0 && (ioctl(fd, (ioctl_request)EVIOCGBIT(EV_KEY, sizeof keys), keys) < 0
                    || !(keys[KEY_POWER / 8] >> KEY_POWER % 8 & 1)))
        fd_close(&fd);
    return fd;
}

static void button_open(struct agent *a)
{
    size_t found = 0;

    for (int i = 0; i < INPUTS_MAX && found < COUNT(a->buttons); i++) {
        struct button *b = &a->buttons[found];
        b->watch = (struct watch){ .fd = button_open_one(i), .on_event = button_on_event };
        b->agent = a;
        if (b->watch.fd >= 0 && loop_want(&a->loop, &b->watch, EPOLLIN) == 0)
            found++;
        else
            fd_close(&b->watch.fd);
    }
    log_debug("power button: %zu devices", found);
}

static int button_load(void *arg, struct buf *why)
{
    static const char *const modules[] = { "button", "evdev", NULL };

    (void)arg, (void)why;
    boot_modules(modules);
    return 0;
}

static void button_on_loaded(struct job *j, bool ok, struct span report)
{
    (void)ok, (void)report;
    button_open(CONTAINER(j, struct agent, button_job));
}

/* When the host has had its answer, most likely. */
static void button_on_time(struct watch *timer)
{
    struct agent *a = CONTAINER(timer, struct agent, button_timer);

    a->button_job.run = button_load;
    a->button_job.on_done = button_on_loaded;
    if (job_start(&a->button_job, &a->loop, &a->children, "power button", limits.start_ms) < 0)
        button_open(a);
}

/* ---- boot ---- */

/* agent.config=PATH, agent.limit.NAME=VALUE, agent.log=LEVEL; the kernel's own words are not ours. */
static void agent_option(struct options *o, const char *word)
{
    const char *wrong = NULL;

    if (strncmp(word, "agent.limit.", 12) == 0)
        wrong = settings_add_limit(&o->told, word + 12);
    else if (strncmp(word, "agent.log=", 10) == 0)
        wrong = settings_set_log(&o->told, word + 10);
    else if (strncmp(word, "agent.config=", 13) == 0 && word[13] != '/')
        wrong = "expected an absolute path";
    else if (strncmp(word, "agent.config=", 13) == 0)
        o->config = span_dup(span_of(word + 13));
    else if (strncmp(word, "agent.", 6) == 0)
        wrong = "no such option";
    if (wrong)
        log_info("kernel command line: %s: %s", word, wrong);
}

static void agent_read_command_line(struct agent *a)
{
    struct buf line = { 0 };
    char *rest;

    if (file_load("/proc/cmdline", &line, 64 << 10) == 0) {
        buf_text(&line);
        for (char *word = strtok_r(line.data + line.start, " \n", &rest); word; word = strtok_r(NULL, " \n", &rest)) {
            agent_option(&a->options, word);
            boot_root_option(&a->boot, word);
        }
    }
    buf_fini(&line);
}

/* All that listening and saying ready need. */
static void agent_boot_early(struct agent *a)
{
    static const char *const vsock[] = { "virtio_pci", "virtio_mmio", "vmw_vsock_virtio_transport", NULL };
    struct boot *b = &a->boot;

    if (!agent_is_sandboxed(a))
        boot_mount_early();
    boot_descriptors();
    boot_console(agent_is_sandboxed(a) ? "/proc/self/fd/2" : "/dev/console");
    if (!agent_is_sandboxed(a)) {
        boot_stage(b, "proc, dev, console");
        agent_read_command_line(a);
        settings_apply(&a->options.told);
        boot_stage(b, "command line");
        if (boot_is_initramfs(a->name))
            boot_root(b);
        if (!boot_has_vsock()) {
            boot_modules(vsock);
            boot_stage(b, "modules");
        }
        reboot(RB_DISABLE_CAD);     /* ctrl-alt-del becomes SIGINT */
    }
    if (!a->options.config && access(PATH_CONF, F_OK) == 0)
        a->options.config = PATH_CONF;
    if (agent_read_conf(a) < 0)
        log_info("%s", a->missing);
}

/* What a program expects. Whoever connects before is in the listeners' queues. */
static void agent_boot_late(struct agent *a)
{
    struct boot *b = &a->boot;

    if (a->booted)
        return;
    a->booted = true;
    agent_signals(a);
    loop_never(&a->loop, &a->late_timer);
    if (!agent_is_sandboxed(a)) {
        boot_overlay(b);
        boot_stage(b, "overlay");
        boot_attach_modules(b);
        if (boot_mount_early())     /* a folder for it could not be made before */
            boot_console("/dev/console");
    }
    boot_protect();
    for (size_t i = 0; i < COUNT(boot_mounts_late); i++)
        boot_mount(&boot_mounts_late[i]);
    boot_stage(b, "sys, run, pts, shm");
    a->children.has_cgroup = cgroup_mount() == 0 && access(PATH_CGROUP "/program/cgroup.procs", W_OK) == 0;
    program_watch_memory(&a->program);
    boot_stage(b, "cgroup");
    net_loopback();
    boot_stage(b, "loopback");
    if (!a->conf.entrypoint || !program_needs_cold(&a->conf)) {
        program_prewarm(&a->program);
        boot_stage(b, "prewarm");
    }
    agent_listen(a, true);
    a->ballast = malloc(sizeof(struct aleph));
    if (a->conf.entrypoint)
        agent_setup(a);
    if (!agent_is_sandboxed(a))
        loop_after(&a->loop, &a->button_timer, BUTTON_PATIENCE_MS);
}

static void agent_on_late(struct watch *timer)
{
    struct agent *a = CONTAINER(timer, struct agent, late_timer);

    if (a->booted)
        agent_listen(a, true);          /* TLS waited for the kernel's random bytes */
    else
        agent_boot_late(a);
}

/* The host has been told and is thinking: time for the rest. */
static void agent_on_ready_said(struct agent *a)
{
    if (a->ready_said)
        return;
    a->ready_said = true;
    boot_stage(&a->boot, "ready said");
    log_info("ready %.1f ms after init started", (double)(kernel_us() - a->boot.start_us) / 1e3);
    conn_finish(&a->ready);
    agent_boot_late(a);
    boot_print(&a->boot);
}

static void agent_before_launch(struct program *p)
{
    bridge_offer(&CONTAINER(p, struct agent, program)->bridge);
}

/* What hangs together in an agent of either kind. */
static void agent_init(struct agent *a)
{
    loop_init(&a->loop);
    program_init(&a->program, &a->loop, &a->children);
    a->conns.loop = a->aleph.loop = a->setup.loop = &a->loop;
    a->aleph.conns = &a->conns;
    a->aleph.children = a->setup.children = &a->children;
    a->aleph.program = a->setup.program = &a->program;
    a->aleph.setup = &a->setup;
    a->aleph.owner = a;
    a->aleph.on_halt = agent_on_aleph_halt;
    a->aleph.listener.watch.fd = -1;
    a->program.on_stopped = halt_on_stopped;
    a->program.before_launch = agent_before_launch;
    bridge_init(&a->bridge, &a->loop);
    if (a->missing[0])
        a->program.missing = a->missing;
    a->setup.is_ours = !a->is_process;
    a->halt_timer = (struct watch){ .fd = -1, .on_deadline = halt_on_deadline };
    a->conf_timer = (struct watch){ .fd = -1, .on_deadline = agent_on_conf_timer };
    a->conf_wait_ms = limits.backoff_ms;
}

/* Where to listen: as told by the command line, else by the file, else `wire` and `http`. */
static void agent_choose_addresses(struct agent *a, const char *wire, const char *http)
{
    const struct settings *told = &a->options.told, *file = &a->settings;
    const struct settings *from = told->listen_len ? told : file;

    if (told->access_log || file->access_log)
        access_log.fd = log_descriptor(1);
    wire = told->wire ? told->wire : file->wire ? file->wire : wire;
    if (wire)
        address_parse(&a->aleph.listener.address, wire);
    a->http_len = from->listen_len ? from->listen_len : http ? 1 : 0;
    for (size_t i = 0; i < a->http_len; i++) {
        struct http_server *h = &a->http[i];
        address_parse_tls(&h->listener.address, from->listen_len ? from->listen[i] : http);
        if (h->listener.address.kind == ADDRESS_VSOCK && agent_is_sandboxed(a))
            log_info("listen on %s: not in a sandbox", h->listener.address.text);
        h->listener.watch.fd = -1;
        h->loop = &a->loop;
        h->conns = &a->conns;
        h->program = &a->program;
        h->keys = &a->keys;
    }
}

static bool agent_wants_tls(const struct agent *a)
{
    bool wants = false;

    for (size_t i = 0; i < a->http_len; i++)
        wants |= a->http[i].listener.address.tls;
    return wants;
}

static const struct tls_files *agent_tls_files(const struct agent *a)
{
    return a->options.told.tls.certificate ? &a->options.told.tls : &a->settings.tls;
}

/* Reads the files of TLS; those that are no good change nothing. -1, and why says which. */
static int agent_load_tls(struct agent *a, struct buf *why)
{
    const struct tls_files *files = agent_tls_files(a);

    if (agent_wants_tls(a) == !files->certificate)
        return files->certificate ? conf_wrong(why, "tls: there is a certificate, but no address to listen on is tls+…")
                                  : conf_wrong(why, "tls: to listen on tls+… takes a certificate and its key");
    if (!files->certificate)
        return 0;
    struct tls_keys *keys = tls_keys_load(files, why);
    if (!keys)
        return -1;
    tls_keys_drop(a->keys);
    a->keys = keys;
    return 0;
}

/* Opens what is not open yet. Early in the boot of a machine only vsock can be: a path could
 * come to lie under a mount, an address be one that setup has yet to give. */
static bool agent_can_listen(const struct agent *a, const struct listener *l, bool late)
{
    bool is_vsock = l->address.kind == ADDRESS_VSOCK;

    return l->address.text && l->watch.fd < 0 && (late || !boot_is_machine || is_vsock)
        && !(is_vsock && agent_is_sandboxed(a));
}

static int agent_listen(struct agent *a, bool late)
{
    struct buf why = { 0 };
    int rc = 0;

    if (late && !a->keys && !a->is_process && agent_load_tls(a, &why) < 0) {
        log_info("%s: nobody is served by TLS", buf_text(&why));
        if (!tls_is_seeded())
            loop_after(&a->loop, &a->late_timer, TLS_SEED_MS);
    }
    buf_fini(&why);
    if (agent_can_listen(a, &a->aleph.listener, late) && aleph_open(&a->aleph) < 0)
        rc = log_errno("listen on %s", a->aleph.listener.address.text);
    if (late && a->aleph.listener.watch.fd >= 0)
        listener_start(&a->aleph.listener);
    for (struct http_server *h = a->http; h < a->http + a->http_len; h++) {
        if (agent_can_listen(a, &h->listener, late) && http_open(h) < 0)
            rc = log_errno("listen on %s", h->listener.address.text);
        if (late && h->listener.watch.fd >= 0 && (a->keys || !h->listener.address.tls))
            listener_start(&h->listener);
    }
    return rc;
}

/* Opens what can be before the rest of boot. */
static void init_listen(struct agent *a)
{
    struct address *api = &a->bridge.pumps.target;

    if (agent_is_sandboxed(a)) {
        agent_choose_addresses(a, NULL, NULL);
        address_parse(&a->host, a->options.ready);
    } else {
        agent_choose_addresses(a, "vsock:52", "vsock:80");
        a->host = (struct address){ .text = "the host", .fd = -1 };
        address_vsock(&a->host, VMADDR_CID_HOST, PORT_ALEPH);
        *api = (struct address){ .text = "guest API", .fd = -1 };
        address_vsock(api, VMADDR_CID_HOST, PORT_API);
    }
    if (a->options.api)
        address_parse(api, a->options.api);
    agent_listen(a, false);
}

static const char init_usage[] =
    "usage: agent init --listen ADDRESS --ready ADDRESS [--http ADDRESS] [--api ADDRESS] [--config FILE]\n"
    "                  [--tls-cert FILE --tls-key FILE [--tls-ca FILE]] [--limit NAME=VALUE]... [--log debug]\n"
    "\n"
    "As PID 1 of a machine the agent needs no option. These are for a sandbox (unshare(1)): vsock is\n"
    "not touched, no module is loaded, and halt exits instead of rebooting.\n"
    "\n"
    "  --listen   where the supervisor's instructions come in, instead of vsock port 52\n"
    "  --http     where HTTP requests for the program come in, instead of vsock port 80\n"
    "  --ready    where to connect to and say that the machine is ready, instead of CID 2 port 52\n"
    "  --api      what " PATH_API_SOCKET " leads to, instead of CID 2 port 53\n"
    "  --config   the configuration, instead of " PATH_CONF "\n";

/* Options that every command with a program takes. NULL: taken; "": it is none of them; else
 * what is wrong with it. */
static const char *options_take(struct options *o, const char *word, const char *value)
{
    if (strcmp(word, "--config") == 0)
        o->config = value;
    else if (strcmp(word, "--limit") == 0)
        return settings_add_limit(&o->told, value);
    else if (strcmp(word, "--log") == 0)
        return settings_set_log(&o->told, value);
    else if (strcmp(word, "--tls-cert") == 0)
        o->told.tls.certificate = span_dup(span_of(value));
    else if (strcmp(word, "--tls-key") == 0)
        o->told.tls.key = span_dup(span_of(value));
    else if (strcmp(word, "--tls-ca") == 0)
        o->told.tls.client_ca = span_dup(span_of(value));
    else
        return "";
    return NULL;
}

/* 0, -1: it was told how it is used, or the exit code of a command line that makes no sense. */
static int init_options(struct options *o, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        struct address parsed;
        bool is_address = strcmp(argv[i], "--listen") == 0 || strcmp(argv[i], "--http") == 0
                       || strcmp(argv[i], "--ready") == 0 || strcmp(argv[i], "--api") == 0;
        const char *wrong = NULL;

        if (strcmp(argv[i], "--help") == 0)
            return fputs(init_usage, stdout), -1;
        bool is_http = strcmp(argv[i], "--http") == 0;
        if (is_address && (!(is_http ? address_parse_tls : address_parse)(&parsed, value) || parsed.kind == ADDRESS_VSOCK))
            wrong = "expected unix:PATH, tcp:HOST:PORT or fd:N";
        else if (strcmp(argv[i], "--listen") == 0)
            o->told.wire = span_dup(span_of(value));
        else if (strcmp(argv[i], "--http") == 0)
            strings_add(&o->told.listen, &o->told.listen_len, value);
        else if (strcmp(argv[i], "--ready") == 0)
            o->ready = value;
        else if (strcmp(argv[i], "--api") == 0)
            o->api = value;
        else
            wrong = options_take(o, argv[i], value);
        if (wrong) {
            fprintf(stderr, "agent init: %s %s: %s\n\n%s", argv[i], value, *wrong ? wrong : "no such option", init_usage);
            return EXIT_USAGE;
        }
        i++;
    }
    if (!o->ready != !o->told.wire || ((o->told.listen_len > 0 || o->api) && !o->ready)) {
        fputs(init_usage, stderr);
        return EXIT_USAGE;
    }
    return 0;
}

/* As the machine's init, argv[0] alone counts: the kernel passes on words that it does not know. */
static int init_main(int argc, char **argv, bool is_machine)
{
    static struct agent a;          /* for the life of the machine */
    sigset_t every;

    a.boot.start_us = kernel_us();
    a.boot.modules_fd = -1;
    a.name = argc > 0 ? argv[0] : "";
    boot_is_machine = is_machine;
    if (!is_machine) {
        int wrong = init_options(&a.options, argc, argv);
        if (wrong || !a.options.ready)
            return wrong < 0 ? EXIT_OK : wrong ? wrong : (fputs(init_usage, stderr), EXIT_USAGE);
    }
    if (getpid() != 1)
        die("init must be process 1: of a machine, or of a namespace (unshare --pid --fork)");
    sigfillset(&every);
    sigprocmask(SIG_BLOCK, &every, NULL);   /* whatever comes before agent_signals waits */
    umask(022);
    agent_boot_early(&a);
    agent_init(&a);
    a.ready_timer = (struct watch){ .fd = -1, .on_deadline = ready_try };
    a.late_timer = (struct watch){ .fd = -1, .on_deadline = agent_on_late };
    a.button_timer = (struct watch){ .fd = -1, .on_deadline = button_on_time };
    for (size_t i = 0; i < COUNT(a.buttons); i++)
        a.buttons[i].watch.fd = -1;
    init_listen(&a);
    boot_stage(&a.boot, "listen");
    ready_try(&a.ready_timer);
    loop_after(&a.loop, &a.late_timer, READY_PATIENCE_MS);
    loop_run(&a.loop);
    halt_now(&a);
    return EXIT_OK;
}

/* ==== run: the same server as a process ==========================================
 * Under another init, or as the first process of a container: a program and the fronts, and
 * nothing of the machine. What the program leaves behind is adopted, reaped and ended. */
static const char run_usage[] =
    "usage: agent run [OPTION]... [DIR ENTRYPOINT [ARGUMENT]...]\n"
    "\n"
    "Serves a program by HTTP as an ordinary process or as the first of a container. Mounts, network and\n"
    "hostname stay as they are; vsock is not touched unless an address says so.\n"
    "\n"
    "  --config FILE        a configuration in JSON, as a machine has it in " PATH_CONF "; options win\n"
    "  --listen ADDRESS     where HTTP comes in: tcp:HOST:PORT, unix:PATH, vsock:PORT or fd:N, by TLS with tls+\n"
    "                       before it; may be repeated; tcp:127.0.0.1:8080 if there is none, with a certificate\n"
    "                       tls+tcp:127.0.0.1:8443\n"
    "  --tls-cert FILE      certificate and those between it and the authority, in PEM\n"
    "  --tls-key FILE       its private key; SIGHUP reads all these files anew\n"
    "  --tls-ca FILE        clients must have a certificate of these authorities\n"
    "  --wire ADDRESS       where a supervisor's instructions come in: vsock:PORT, unix:PATH or fd:N\n"
    "  --workers N|auto     so many processes, or as many as CPUs; for Python's module:attribute and Node\n"
    "  --reload             start anew when a file below DIR changes\n"
    "  --access-log         a line on standard output for each request\n"
    "  --env NAME=VALUE     a variable for the program; may be repeated\n"
    "  --limit NAME=VALUE   README.md has the names; may be repeated\n"
    "  --log debug\n"
    "\n"
    "SIGTERM and ctrl-C stop the program, requests in flight first; then it exits with 0. The second one does not\n"
    "wait. A program that does not start ends it with its exit code (128 and the number of a signal), or 1.\n";

/* Options without a value. */
static bool run_take_flag(struct options *o, const char *word)
{
    if (strcmp(word, "--reload") == 0)
        o->reload = true;
    else if (strcmp(word, "--access-log") == 0)
        o->told.access_log = true;
    else
        return false;
    return true;
}

static int run_options(struct options *o, int argc, char **argv)
{
    int i = 1;

    for (; i < argc && argv[i][0] == '-'; i += 2) {
        const char *value = i + 1 < argc ? argv[i + 1] : "", *wrong = NULL;

        if (strcmp(argv[i], "--help") == 0)
            return fputs(run_usage, stdout), -1;
        if (run_take_flag(o, argv[i])) {
            i--;
            continue;
        }
        if (strcmp(argv[i], "--listen") == 0)
            wrong = strings_add(&o->told.listen, &o->told.listen_len, value) < 0 ? "no memory" : NULL;
        else if (strcmp(argv[i], "--wire") == 0)
            o->told.wire = span_dup(span_of(value));
        else if (strcmp(argv[i], "--workers") == 0)
            wrong = workers_read(span_of(value), &o->workers) ? NULL : "expected auto or a number that is not 0 or too large";
        else if (strcmp(argv[i], "--env") == 0 && (value[0] == '=' || !strchr(value, '=')))
            wrong = "expected NAME=VALUE";
        else if (strcmp(argv[i], "--env") == 0)
            wrong = strings_add(&o->variables, &o->variables_len, value) < 0 ? "no memory" : NULL;
        else
            wrong = options_take(o, argv[i], value);
        if (wrong) {
            fprintf(stderr, "agent run: %s %s: %s\n\n%s", argv[i], value, *wrong ? wrong : "no such option", run_usage);
            return EXIT_USAGE;
        }
    }
    if (argc == i + 1) {
        fputs(run_usage, stderr);
        return EXIT_USAGE;
    }
    if (argc > i) {
        o->folder = argv[i];
        o->entrypoint = argv[i + 1];
        o->args = argv + i + 2;
    }
    return 0;
}

/* NULL, or what is wrong with the configuration. */
static const char *run_check(struct agent *a)
{
    const char *machine;
    struct buf why = { 0 };

    if (conf_check_settings(&a->options.told, &why) < 0)
        snprintf(a->missing, sizeof a->missing, "%s", buf_text(&why));
    buf_fini(&why);
    if (a->missing[0] || agent_read_conf(a) < 0)
        return a->missing;
    if ((machine = conf_first(&a->conf, CONF_MACHINE, true)))
        snprintf(a->missing, sizeof a->missing, "%s: %s: only for a machine of its own, `agent run` has none",
                 a->options.config, machine);
    else if (!a->conf.entrypoint)
        snprintf(a->missing, sizeof a->missing, "there is no program: neither DIR ENTRYPOINT nor an entrypoint in a file");
    return a->missing[0] ? a->missing : NULL;
}

static void run_descriptors(void)
{
    struct rlimit files;

    boot_descriptors();
    agent_log.fd = log_descriptor(2);
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < (rlim_t)limits.conns + 1024) {
        files.rlim_cur = files.rlim_max < (rlim_t)limits.conns + 1024 ? files.rlim_max : (rlim_t)limits.conns + 1024;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}

/* A folder of its own for the shims, which run_end removes. */
static const char *run_folder(void)
{
    static char path[PATH_MAX];
    const char *where = getenv("TMPDIR");

    snprintf(path, sizeof path, "%.*s/agent-XXXXXX", PATH_MAX - 16, where && where[0] == '/' ? where : "/tmp");
    return mkdtemp(path);
}

static void run_remove_folder(const char *path)
{
    DIR *d = opendir(path);

    for (struct dirent *e; d && (e = readdir(d));)
        unlinkat(dirfd(d), e->d_name, 0);
    if (d)
        closedir(d);
    rmdir(path);
}

static void run_unlink(const struct listener *l)
{
    if (l->watch.fd >= 0 && l->address.kind == ADDRESS_UNIX)
        unlink(((const struct sockaddr_un *)(const void *)&l->address.sa)->sun_path);
}

static _Noreturn void run_end(struct agent *a)
{
    child_kill_all();
    run_unlink(&a->aleph.listener);
    for (size_t i = 0; i < a->http_len; i++)
        run_unlink(&a->http[i].listener);
    run_remove_folder(a->program.folder);
    log_flush();
    exit(a->exit_code);
}

static void run_on_setup_failed(struct agent *a)
{
    int status = a->program.status;

    a->exit_code = status < 0 ? EXIT_FAILED : WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    agent_halt(a, "the program does not start", false);
}

/* ---- --reload: inotify(7) on each folder of the code ---- */

#define RELOAD_EVENTS   (IN_CLOSE_WRITE | IN_CREATE | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF | IN_MOVED_FROM | IN_MOVED_TO)
#define RELOAD_AGAIN_MS 1000        /* until a folder that has gone is looked for again */

struct reload {
    struct watch    watch;          /* of inotify; its deadline comes when all has been silent */
    struct program *program;
    char           *folder;
    int64_t         folders;        /* watched */
};

/* What no program is made of: written while it runs, or by editors while they save. */
static bool reload_ignores(const char *name)
{
    static const char *const patterns[] = { ".", "..", ".git", ".venv", "__pycache__", "node_modules", ".*.sw?", "*~",
                                            "4913", "*.pyc", "*.log", "*.pid", "*.db", "*.db-*", "*.sqlite*" };
    size_t i = 0;

    while (i < COUNT(patterns) && fnmatch(patterns[i], name, 0) != 0)
        i++;
    return i < COUNT(patterns);
}

/* Watches the folder, n bytes of `path`, and those in it, as many as the limit lets. */
static void reload_add(struct reload *r, char *path, size_t n)
{
    if (r->folders >= limits.reload_folders) {
        if (r->folders++ == limits.reload_folders)
            log_info("reload: more than %" PRId64 " folders, the others are not watched", limits.reload_folders);
        return;
    }
    if (inotify_add_watch(r->watch.fd, path, RELOAD_EVENTS | IN_ONLYDIR) < 0) {
        if (errno != ENOENT && errno != ENOTDIR)
            log_errno("reload: watch %s", path);
        return;
    }
    r->folders++;
    DIR *d = opendir(path);
    for (struct dirent *e; d && (e = readdir(d));) {
        if ((e->d_type != DT_DIR && e->d_type != DT_UNKNOWN) || reload_ignores(e->d_name))
            continue;
        int more = snprintf(path + n, PATH_MAX - n, "/%s", e->d_name);
        if (more < (int)(PATH_MAX - n))
            reload_add(r, path, n + (size_t)more);
        path[n] = '\0';
    }
    if (d)
        closedir(d);
}

/* All anew: folders have come, gone and moved. */
static void reload_scan(struct reload *r)
{
    char path[PATH_MAX];

    if (r->watch.fd >= 0)
        loop_want(r->program->loop, &r->watch, 0);
    fd_close(&r->watch.fd);
    r->watch.fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    if (r->watch.fd < 0 || loop_want(r->program->loop, &r->watch, EPOLLIN) < 0) {
        log_errno("reload");
        return;
    }
    r->folders = 0;
    reload_add(r, path, (size_t)snprintf(path, sizeof path, "%s", r->folder));
}

/* Whether there is a change among the events that were read. */
static bool reload_is_change(const char *bytes, size_t n)
{
    struct inotify_event e;
    bool is = false;

    for (size_t at = 0; !is && at + sizeof e <= n; at += sizeof e + e.len) {
        memcpy(&e, bytes + at, sizeof e);
        is = e.mask & IN_Q_OVERFLOW || (e.mask & RELOAD_EVENTS && (e.len == 0 || !reload_ignores(bytes + at + sizeof e)));
    }
    return is;
}

static void reload_on_event(struct watch *w, uint32_t events)
{
    struct reload *r = CONTAINER(w, struct reload, watch);
    char bytes[16 << 10];
    ssize_t n = SYS_READ(w->fd, bytes, sizeof bytes);

    (void)events;
    if (n > 0 && reload_is_change(bytes, (size_t)n))
        loop_after(r->program->loop, w, limits.reload_ms);
}

static void reload_on_deadline(struct watch *w)
{
    struct reload *r = CONTAINER(w, struct reload, watch);

    reload_scan(r);                 /* first: what changes from here on counts again */
    if (r->folders > 0)
        program_reload(r->program);
    else
        loop_after(r->program->loop, w, RELOAD_AGAIN_MS);
}

static int run_main(int argc, char **argv)
{
    static struct reload reload = { .watch = { .fd = -1, .on_event = reload_on_event, .on_deadline = reload_on_deadline } };
    static struct agent a;
    const char *wrong;
    int usage = run_options(&a.options, argc, argv);

    if (usage)
        return usage < 0 ? EXIT_OK : usage;
    a.is_process = true;
    a.boot.start_us = kernel_us();
    if ((wrong = run_check(&a))) {
        fprintf(stderr, "agent run: %s\n", wrong);
        return EXIT_USAGE;
    }
    agent_choose_addresses(&a, NULL, agent_tls_files(&a)->certificate ? "tls+tcp:127.0.0.1:8443" : "tcp:127.0.0.1:8080");
    struct buf why = { 0 };
    if (agent_load_tls(&a, &why) < 0) {
        fprintf(stderr, "agent run: %s\n", buf_text(&why));
        buf_fini(&why);
        return EXIT_USAGE;
    }
    run_descriptors();
    agent_init(&a);
    a.program.env = environ;
    a.program.optimize = "";
    a.program.picks_port = true;
    a.program.reloads = a.options.reload;
    a.program.drain_ms = limits.grace_ms;
    if (!(a.program.folder = run_folder()))
        die("no temporary folder can be made: %s", strerror(errno));
    prctl(PR_SET_DUMPABLE, 0);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    agent_signals(&a);
    if (agent_listen(&a, true) < 0) {
        a.exit_code = EXIT_FAILED;
        run_end(&a);
    }
    if (a.options.reload && (reload.folder = span_dup(span_of(conf_code_folder(&a.conf))))) {
        reload.program = &a.program;
        reload_scan(&reload);
    }
    agent_setup(&a);
    loop_run(&a.loop);
    run_end(&a);
}

/* ==== main ======================================================================= */
static const char usage[] =
    "agent " AGENT_VERSION " - the init and application server of a microVM\n"
    "\n"
    "As /sbin/init of a guest it needs no arguments: it mounts, says ready to the host on vsock port 52,\n"
    "takes a configuration there and serves the program there and by HTTP on vsock port 80.\n"
    "\n"
    "As a process or in a container:\n"
    "  agent run [OPTION]... [DIR ENTRYPOINT [ARG]...]  serve a program, leave the machine alone\n"
    "\n"
    "On the host:\n"
    "  agent call SOCKET ready                          wait until a guest says that it is ready\n"
    "  agent call SOCKET configure DIR ENTRYPOINT       send it a program\n"
    "  agent call SOCKET request [OPTION]... PATH       send the program a request\n"
    "  agent call SOCKET event JSON                     send it an event\n"
    "  agent call SOCKET shell COMMAND                  run a command in the guest\n"
    "  agent call SOCKET halt                           stop the guest\n"
    "  agent forward [--raw] LISTEN TARGET              reach a guest's HTTP, or any port, by TCP\n"
    "  agent hash FILE...                               the item_hash of an image\n"
    "\n"
    "  agent init --listen ADDRESS --ready ADDRESS      init in a sandbox, for tests\n"
    "\n"
    "SOCKET is the guest's vsock as a Unix socket in Firecracker's manner. Each command has --help.\n"
    "\n"
    "Kernel command line: agent.config=PATH instead of " PATH_CONF ", agent.log=debug,\n"
    "agent.limit.NAME=VALUE (README.md has the names).\n"
    "Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.\n";

int main(int argc, char **argv)
{
    static const struct { const char *word; int (*run)(int argc, char **argv); } commands[] = {
        { "run", run_main }, { "call", call_main }, { "forward", forward_main }, { "hash", hash_main },
    };
    const char *word = argc > 1 ? argv[1] : "";

    for (size_t i = 0; i < COUNT(commands); i++)
        if (strcmp(word, commands[i].word) == 0)
            return commands[i].run(argc - 1, argv + 1);
    if (strcmp(word, "init") == 0)
        return init_main(argc - 1, argv + 1, false);
    if (strcmp(word, "--help") == 0 || strcmp(word, "--version") == 0) {
        fputs(usage, stdout);
        return EXIT_OK;
    }
    if (getpid() == 1)
        return init_main(argc, argv, true);
    fputs(usage, stderr);
    return EXIT_USAGE;
}

/* ---- archives: for tests/unit.c. Needs check(bool ok, const char *format, ...), which counts
 * and prints. Call test_zip(). Archives come from zip_pack() and are then bent by hand;
 * tests/zip_make.py has those that no packer makes. ---- */

#include <ftw.h>

static void test_zip_names(void)
{
    static const struct { const char *name; size_t n; const char *fault; } table[] = {
        { "a", 1, NULL }, { "a/b.c", 5, NULL }, { "a/", 2, NULL }, { "./", 2, NULL },
        { "./a", 3, NULL }, { "...", 3, NULL }, { "..a/b..", 7, NULL }, { "a b\n", 4, NULL },
        { "\xc3\xa9", 2, NULL }, { "ab:", 3, NULL },
        { "", 0, "is empty" },
        { "/", 1, "is an absolute path" }, { "/a", 2, "is an absolute path" },
        { "C:", 2, "is an absolute path" }, { "c:/a", 4, "is an absolute path" },
        { "..", 2, "leads out of its folder" }, { "../", 3, "leads out of its folder" },
        { "a/..", 4, "leads out of its folder" }, { "./../a", 6, "leads out of its folder" },
        { ".", 1, "holds an empty part" }, { "a//b", 4, "holds an empty part" },
        { "a//", 3, "holds an empty part" }, { ".//a", 4, "holds an empty part" },
        { "a/./b", 5, "holds an empty part" }, { "././a", 5, "holds an empty part" },
        { "a\\b", 3, "holds a NUL or a backslash" }, { "a\0b", 3, "holds a NUL or a backslash" },
        { "\xff", 1, "is not UTF-8" }, { "\xc0\xaf", 2, "is not UTF-8" },
    };
    char name[PATH_MAX + 1];

    for (size_t i = 0; i < COUNT(table); i++) {
        const char *fault = zip_name_fault((struct span){ table[i].name, table[i].n });
        check(fault == table[i].fault || (fault && table[i].fault && strcmp(fault, table[i].fault) == 0),
              "zip name \"%s\": %s, expected %s", table[i].name, fault ? fault : "fine",
              table[i].fault ? table[i].fault : "fine");
    }
    memset(name, 'n', sizeof name);
    check(!zip_name_fault((struct span){ name, NAME_MAX }), "zip name: 255 bytes are fine");
    check(zip_name_fault((struct span){ name, NAME_MAX + 1 }), "zip name: 256 bytes are too many");
    for (size_t i = 1; i < sizeof name; i += 2)
        name[i] = '/';
    size_t most = 2 * (size_t)limits.zip_depth;
    check(!zip_name_fault((struct span){ name, most }), "zip name: the deepest folder");
    check(!zip_name_fault((struct span){ name, most + 1 }), "zip name: a file in the deepest folder");
    check(zip_name_fault((struct span){ name, most + 2 }), "zip name: a folder too deep");
    check(zip_name_fault((struct span){ name, PATH_MAX }), "zip name: too long");
}

static void test_zip_links(void)
{
    static const struct { const char *name, *target; bool fits; } table[] = {
        { "a", "b", true }, { "a", "./b/./c", true }, { "a", ".", true }, { "a", "a", true },
        { "a/b", "..", true }, { "a/b", "../c", true }, { "a/b/c", "../../d", true },
        { "a", "..b/c..", true }, { "a", "b/", true }, { "d/a", ".././b", true },
        { "a", "", false }, { "a", "/", false }, { "a", "/etc/passwd", false },
        { "a", "..", false }, { "a", "../b", false }, { "a", "./../b", false },
        { "a/b", "../..", false }, { "a/b", "../../a/c", false },
        { "a", "b/..", false }, { "a/b", "c/../..", false }, { "a/b", "../c/../d", false },
    };

    for (size_t i = 0; i < COUNT(table); i++) {
        const char *fault = zip_link_fault(span_of(table[i].name), span_of(table[i].target));
        check(!fault == table[i].fits, "zip link %s -> \"%s\": %s", table[i].name, table[i].target,
              fault ? fault : "fine");
    }
}

static int zip_test_remove(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)st;
    (void)type;
    (void)at;
    return remove(path);
}

static size_t zip_test_count;

static int zip_test_tally(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)path;
    (void)st;
    (void)type;
    zip_test_count += at->level > 0;
    return 0;
}

static size_t zip_test_things_in(const char *path)
{
    zip_test_count = 0;
    nftw(path, zip_test_tally, 16, FTW_PHYS);
    return zip_test_count;
}

/* A tree with each kind of thing, packed. */
static void zip_test_tree(const char *root, struct buf *archive)
{
    struct buf why = { 0 };
    char path[256];

    snprintf(path, sizeof path, "%s/d/e", root);
    check(mkdir_all(path, 0755) == 0, "zip: a tree to pack");
    snprintf(path, sizeof path, "%s/d/run", root);
    file_write(path, "#!/bin/sh\n", 10, 0755);
    chmod(path, 0750);
    snprintf(path, sizeof path, "%s/d/e/text", root);
    file_write(path, "some text some text some text", 29, 0644);
    snprintf(path, sizeof path, "%s/d/link", root);
    check(symlink("e/text", path) == 0, "zip: a link to pack");
    check(zip_pack(root, archive, &why) == 0, "zip_pack: %s", buf_text(&why));
    buf_fini(&why);
}

static void test_zip_round(const char *out, struct span archive)
{
    struct buf why = { 0 };
    struct stat st;
    char path[256], target[16] = "";

    check(zip_extract(archive, out, &why) == 0, "zip_extract: %s", buf_text(&why));
    check(zip_test_things_in(out) == 5, "zip_extract: five things, not %zu", zip_test_count);
    snprintf(path, sizeof path, "%s/d/run", out);
    check(stat(path, &st) == 0 && (st.st_mode & 07777) == 0750, "zip_extract: the mode is kept");
    snprintf(path, sizeof path, "%s/d/link", out);
    check(readlink(path, target, sizeof target - 1) == 6 && strcmp(target, "e/text") == 0,
          "zip_extract: a link stays a link");
    check(zip_extract(archive, out, &why) == 0, "zip_extract over itself: %s", buf_text(&why));
    snprintf(path, sizeof path, "%s/d/other", out);
    file_write(path, "x", 1, 0644);
    zip_remove(archive, out);
    check(zip_test_things_in(out) == 2 && access(path, F_OK) == 0, "zip_remove: keeps what is not its own");
    unlink(path);
    zip_remove(archive, out);
    check(zip_test_things_in(out) == 0, "zip_remove: a folder goes when it is empty, not before");
    buf_fini(&why);
}

/* Cut at every byte, and with every byte changed: nothing but the whole is taken, and what a
 * change leaves a valid archive (a date, a mode, a name) stays in the folder. */
static void test_zip_bent(const char *out, struct span archive)
{
    struct buf why = { 0 };

    for (size_t n = 0; n < archive.n; n++) {
        char *cut = span_dup((struct span){ archive.p, n });
        check(zip_extract((struct span){ cut, n }, out, &why) < 0 && zip_test_things_in(out) == 0,
              "zip_extract: the first %zu of %zu bytes", n, archive.n);
        free(cut);
    }
    for (size_t i = 0; i < archive.n; i++) {
        char *bent = span_dup(archive);
        bent[i] = (char)(bent[i] ^ 0x20);
        if (zip_extract((struct span){ bent, archive.n }, out, &why) == 0)
            zip_remove((struct span){ bent, archive.n }, out);
        check(zip_test_things_in(out) == 0, "zip_extract: byte %zu changed leaves something", i);
        free(bent);
    }
    buf_fini(&why);
}

/* RLIMIT_FSIZE ends a write in the second pass, as a full disk does. */
static void test_zip_full(const char *out, struct span archive)
{
    struct rlimit old, few;
    struct buf why = { 0 };
    char path[256];

    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    few = (struct rlimit){ .rlim_cur = 20, .rlim_max = old.rlim_max };
    setrlimit(RLIMIT_FSIZE, &few);
    int rc = zip_extract(archive, out, &why);
    setrlimit(RLIMIT_FSIZE, &old);
    check(rc < 0 && strstr(buf_text(&why), "d/e/text") && zip_test_things_in(out) == 0,
          "zip_extract: a write fails and nothing stays: %s", buf_text(&why));
    buf_fini(&why);
    snprintf(path, sizeof path, "%s/d", out);
    check(symlink("/", path) == 0 && zip_extract(archive, out, &why) < 0 && zip_test_things_in(out) == 1,
          "zip_extract: a link on the disk is not followed: %s", buf_text(&why));
    zip_remove(archive, out);
    check(zip_test_things_in(out) == 1, "zip_remove: follows no link");
    unlink(path);
    buf_fini(&why);
}

static void test_zip_limits(const char *out, struct span archive)
{
    static const struct { int64_t *limit, value; const char *says; } table[] = {
        { &limits.zip_entries, 4, "entries, at most 4" },
        { &limits.zip_bytes, 40, "more than 40 bytes" },
        { &limits.zip_depth, 1, "too deep" },
    };

    for (size_t i = 0; i < COUNT(table); i++) {
        struct buf why = { 0 };
        int64_t old = *table[i].limit;
        *table[i].limit = table[i].value;
        check(zip_extract(archive, out, &why) < 0 && strstr(buf_text(&why), table[i].says)
              && zip_test_things_in(out) == 0, "zip limit: %s: %s", table[i].says, buf_text(&why));
        *table[i].limit = old;
        buf_fini(&why);
    }
}

static void test_zip(void)
{
    char root[] = "/tmp/unit-zip.XXXXXX", in[64], out[64];
    struct buf archive = { 0 };

    test_zip_names();
    test_zip_links();
    check(mkdtemp(root) != NULL, "zip: a folder for tests");
    snprintf(in, sizeof in, "%s/in", root);
    snprintf(out, sizeof out, "%s/out", root);
    zip_test_tree(in, &archive);
    test_zip_round(out, buf_span(&archive));
    test_zip_bent(out, buf_span(&archive));
    test_zip_full(out, buf_span(&archive));
    test_zip_limits(out, buf_span(&archive));
    buf_fini(&archive);
    nftw(root, zip_test_remove, 16, FTW_DEPTH | FTW_PHYS);
}

/* fuzz_zip.c - archives: any bytes are refused or unpacked, and then taken back, without a
 * trace outside their folder. ./build.sh fuzz zip; archives of zip_make.py are good seeds:
 *
 *     for name in $(tests/zip_make.py list | grep -v 5[57]- | cut -d' ' -f2); do
 *         tests/zip_make.py $name > out/fuzz/corpus-zip/$name
 *     done
 */
#define main agent_main
#include "../agent.c"
#undef main

#include <ftw.h>

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);

static char folder[64], inside[80];         /* what an archive is unpacked to is `inside` */

static void demand(bool ok, const char *what)
{
    if (ok)
        return;
    fprintf(stderr, "fuzz_zip: %s\n", what);
    abort();
}

static size_t count_in(const char *path)
{
    size_t n = 0;
    DIR *d = opendir(path);

    while (d && readdir(d))
        n++;
    if (d)
        closedir(d);
    return n - (n > 0 ? 2 : 0);     /* . and .. */
}

/* A link may dangle or go in circles; if it leads somewhere, then to what is unpacked. */
static int check_one(const char *path, const struct stat *st, int type, struct FTW *at)
{
    char real[PATH_MAX];

    (void)at;
    demand(type == FTW_SL || (st->st_mode & 07000) == 0, "a setuid, setgid or sticky bit came through");
    if (type == FTW_SL && realpath(path, real))
        demand(strncmp(real, inside, strlen(inside)) == 0
               && (real[strlen(inside)] == '/' || real[strlen(inside)] == '\0'), "a link leads out");
    return 0;
}

static void remove_folder(void)
{
    rmdir(inside);
    rmdir(folder);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    agent_log.fd = -1;
    limits.zip_bytes = 1 << 20;     /* a fuzzer learns nothing from large ones */
    limits.zip_entries = 1000;
    snprintf(folder, sizeof folder, "/tmp/fuzz-zip.XXXXXX");
    demand(mkdtemp(folder) != NULL, "no folder in /tmp");
    snprintf(inside, sizeof inside, "%s/inside", folder);
    atexit(remove_folder);
    return 0;
}

static void put(uint8_t *to, uint64_t value, size_t n)
{
    for (; n > 0; n--, value >>= 8)
        *to++ = (uint8_t)value;
}

/* Makes sizes and checksums of an entry true in both of its headers. */
static void repair_entry(struct zip *z, const struct zip_entry *e, uint8_t *local, uint8_t *central)
{
    static unsigned char text[1 << 16];
    uint64_t size = e->data.n;
    const void *p = e->data.p;

    if (e->deflated) {
        inflateReset(&z->stream);
        z->stream.next_in = (Bytef *)(uintptr_t)e->data.p;
        z->stream.avail_in = (uInt)e->data.n;
        z->stream.next_out = text;
        z->stream.avail_out = sizeof text;
        inflate(&z->stream, Z_FINISH);
        size = sizeof text - z->stream.avail_out;
        p = text;
    }
    uLong crc = crc32_z(0, p, size);
    put(local + 14, crc, 4);
    put(local + 22, size, 4);
    put(central + 16, crc, 4);
    put(central + 24, size, 4);
}

/* Blind changes would all end at a checksum: what still is a directory is made true. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed)
{
    struct buf why = { 0 };
    struct zip z;

    size = LLVMFuzzerMutate(data, size, most);
    if (seed % 4 > 0 && zip_open(&z, (struct span){ (const char *)data, size }, &why) == 0) {
        size_t at = z.start;
        for (size_t order = 0; order < z.len; order++) {
            const struct zip_entry *e = z.entries;
            while (e->order != order)
                e++;
            repair_entry(&z, e, data + e->at, data + at);
            const char *central = (const char *)data + at;
            at += ZIP_CENTRAL_BYTES + little_endian(central + 28, 2) + little_endian(central + 30, 2)
                + little_endian(central + 32, 2);
        }
    }
    if (seed % 4 > 0)
        zip_close(&z);
    buf_fini(&why);
    return size;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct span archive = { (const char *)data, size };
    struct buf why = { 0 };
    int rc = zip_extract(archive, inside, &why);

    demand((rc == 0) == (why.len == 0), "a refusal without a reason, or a reason without one");
    demand(count_in(folder) == (access(inside, F_OK) == 0 ? 1 : 0), "something stands beside the folder");
    if (rc == 0) {
        nftw(inside, check_one, 16, FTW_PHYS);
        zip_remove(archive, inside);
    }
    demand(count_in(inside) == 0, "something was left behind");
    rmdir(inside);
    buf_fini(&why);
    return 0;
}

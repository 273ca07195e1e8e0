/* What a guest's figures are compared with. As its init: says that it is ready, in the bytes
 * of the supervisor's wire, and nothing else. Started by another init: sends back what it
 * gets on port 7000, a connection at a time. It opens AF_VSOCK, so it refuses to run but in
 * a guest that was booted with bench.guest on its kernel's command line. */
#define _GNU_SOURCE
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PORT_READY = 52, PORT_ECHO = 7000 };

static int is_guest(void)
{
    char line[4096] = "";
    FILE *f = fopen("/proc/cmdline", "r");

    return f && fgets(line, sizeof line, f) && strstr(line, " bench.guest");
}

static int vsock(unsigned cid, unsigned port, int (*action)(int, const struct sockaddr *, socklen_t))
{
    struct sockaddr_vm to = { .svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port };
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd >= 0 && action(fd, (struct sockaddr *)&to, sizeof to) == 0)
        return fd;
    close(fd);
    return -1;
}

static void say_ready(void)
{
    static const char ready[] = "\x81\xa7" "version" "\xa5" "2.0.0";
    int fd;

    while ((fd = vsock(VMADDR_CID_HOST, PORT_READY, connect)) < 0)
        usleep(20000);                  /* nobody listens yet */
    if (write(fd, ready, sizeof ready - 1) != sizeof ready - 1)
        perror("ready");
    close(fd);
    for (;;)
        pause();
}

static int echo(void)
{
    char bytes[65536];
    ssize_t n;
    int fd, server = vsock(VMADDR_CID_ANY, PORT_ECHO, bind);

    if (server < 0 || listen(server, 128) < 0)
        return 1;
    if (fork() != 0)            /* who started it goes on when it listens */
        return 0;
    for (;;) {
        if ((fd = accept(server, NULL, NULL)) < 0)
            continue;
        while ((n = read(fd, bytes, sizeof bytes)) > 0 && write(fd, bytes, (size_t)n) == n)
            ;
        close(fd);
    }
}

int main(void)
{
    int is_init = getpid() == 1;

    if (is_init)
        mount("proc", "/proc", "proc", 0, NULL);
    if (!is_guest())
        return 2;
    if (is_init)
        say_ready();
    return echo();
}

/* The executable behind the proxies: one thread, epoll, keep-alive. It answers every head
 * with hello; proxies send no more than one request at a time on a connection. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static const char answer[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 13\r\n\r\nhello, world\n";

int main(void)
{
    struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    const char *port = getenv("PORT");
    int on = 1, epoll = epoll_create1(0), server = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct epoll_event e = { .events = EPOLLIN, .data.fd = server }, ready[64];
    static char bytes[65536];

    in.sin_port = htons((uint16_t)atoi(port ? port : ""));
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(server, (void *)&in, sizeof in) < 0 || listen(server, 1024) < 0
        || epoll_ctl(epoll, EPOLL_CTL_ADD, server, &e) < 0)
        return 1;
    for (;;) {
        int n = epoll_wait(epoll, ready, 64, -1);
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd == server) {
                while ((fd = accept4(server, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                    e.data.fd = fd;
                    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &e);
                }
                continue;
            }
            ssize_t got = read(fd, bytes, sizeof bytes);
            if (got <= 0)
                close(fd);
            else if (got >= 4 && memcmp(bytes + got - 4, "\r\n\r\n", 4) == 0
                     && write(fd, answer, sizeof answer - 1) < 0)
                close(fd);
        }
    }
}

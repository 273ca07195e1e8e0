/* The smallest program that serves HTTP: linked static, it needs nothing of the runtime. */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Reads a head and answers it with its first line. */
static void serve(int fd)
{
    char head[8192], body[8192 + 32];
    size_t len = 0;

    while (len < sizeof head - 1) {
        ssize_t n = read(fd, head + len, sizeof head - 1 - len);
        if (n <= 0)
            return;
        len += (size_t)n;
        head[len] = '\0';
        if (strstr(head, "\r\n\r\n"))
            break;
    }
    int n = snprintf(body, sizeof body, "static C: %.*s\n", (int)strcspn(head, "\r"), head);
    dprintf(fd, "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s", n, body);
}

int main(void)
{
    struct sockaddr_in at = { .sin_family = AF_INET };
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;

    at.sin_port = htons((unsigned short)atoi(getenv("PORT")));
    inet_pton(AF_INET, getenv("HOST"), &at.sin_addr);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) < 0 || listen(fd, 128) < 0) {
        perror("listen");
        return 1;
    }
    for (;;) {
        int client = accept(fd, NULL, NULL);
        if (client < 0)
            continue;
        serve(client);
        close(client);
    }
}

/* What a static executable can show of the machine that it runs in: GET /file/PATH answers with
 * that file or 404, POST /file/PATH writes the body there, everything else gets its first line back. */
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 65536

static void answer(int fd, const char *status, const char *body, size_t n)
{
    dprintf(fd, "HTTP/1.1 %s\r\nContent-Length: %zu\r\nConnection: close\r\n\r\n", status, n);
    if (write(fd, body, n) < 0)
        perror("write");
}

static void read_file(int fd, const char *path)
{
    static char body[MOST];
    int file = open(path, O_RDONLY);
    ssize_t n = file < 0 ? -1 : read(file, body, sizeof body);

    if (n < 0)
        answer(fd, "404 Not Found", "no such file", 12);
    else
        answer(fd, "200 OK", body, (size_t)n);
    if (file >= 0)
        close(file);
}

static void write_file(int fd, const char *path, const char *body, size_t n)
{
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    int ok = file >= 0 && write(file, body, n) == (ssize_t)n;

    if (file >= 0)
        close(file);
    answer(fd, ok ? "200 OK" : "500 Internal Server Error", ok ? "written" : "failed", ok ? 7 : 6);
}

/* Where a field's value starts, or NULL. */
static char *field(char *head, const char *name)
{
    for (char *line = strstr(head, "\r\n"); line; line = strstr(line + 2, "\r\n"))
        if (strncasecmp(line + 2, name, strlen(name)) == 0)
            return line + 2 + strlen(name);
    return NULL;
}

static void serve(int fd)
{
    static char head[MOST], text[MOST + 16];
    size_t n = 0, length = 0;
    char *end = NULL, *path, *value;

    while (!end || (size_t)(head + n - end) < length) {
        ssize_t got = n < sizeof head - 1 ? read(fd, head + n, sizeof head - 1 - n) : 0;
        if (got <= 0)
            return;
        n += (size_t)got;
        head[n] = '\0';
        if (!end && (end = strstr(head, "\r\n\r\n"))) {
            end[2] = '\0';
            value = field(head, "Content-Length:");
            length = value ? (size_t)atol(value) : 0;
            end += 4;
        }
    }
    int len = snprintf(text, sizeof text, "static C: %.*s\n", (int)strcspn(head, "\r"), head);
    if (!(path = strchr(head, ' ')) || !(value = strpbrk(path + 1, " ?")))
        return;
    *value = '\0';
    if (strncmp(path, " /file/", 7) != 0)
        answer(fd, "200 OK", text, (size_t)len);
    else if (strncmp(head, "POST", 4) == 0)
        write_file(fd, path + 6, end, length);
    else
        read_file(fd, path + 6);
}

int main(void)
{
    const char *port = getenv("PORT"), *host = getenv("HOST");
    struct sockaddr_in at = { .sin_family = AF_INET };
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;

    at.sin_port = htons((unsigned short)atoi(port ? port : "8080"));
    if (inet_pton(AF_INET, host ? host : "127.0.0.1", &at.sin_addr) != 1)
        at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) < 0 || listen(fd, 128) < 0) {
        perror("listen");
        return 1;
    }
    for (;;) {
        int client = accept(fd, NULL, NULL);
        if (client >= 0) {
            serve(client);
            close(client);
        }
    }
}

/* orphans COUNT - makes that many processes whose parent has ended before them, as a double
 * fork does. They share memory, so that an emulated machine makes thousands in seconds. */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    STACKS = 4096, STACK_BYTES = 4096,      /* one is used again when its process is long gone */
    WAITS = 2000, WAIT_US = 10000,
};

static char stacks[STACKS][STACK_BYTES] __attribute__((aligned(16)));
static char parent_stack[STACK_BYTES] __attribute__((aligned(16)));

static int orphan(void *arg)
{
    (void)arg;
    return 0;
}

static int parent(void *stack)
{
    return clone(orphan, (char *)stack + STACK_BYTES, CLONE_VM | SIGCHLD, NULL) < 0;
}

static int make_orphan(void *stack)
{
    int status;
    pid_t pid = clone(parent, parent_stack + STACK_BYTES, CLONE_VM | SIGCHLD, stack);

    return pid > 0 && waitpid(pid, &status, 0) == pid && status == 0;
}

int main(int argc, char **argv)
{
    int count = argc > 1 ? atoi(argv[1]) : 0;

    for (int i = 0, waits = 0; i < count; i++)
        while (!make_orphan(stacks[i % STACKS])) {
            /* The machine has a limit: those before must be reaped first. */
            if (++waits == WAITS) {
                fprintf(stderr, "orphan %d of %d could not be made\n", i, count);
                return 1;
            }
            usleep(WAIT_US);
        }
    return 0;
}

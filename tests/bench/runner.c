// Runs a program again and again in the prepared mount namespace and measures the program alone.
//
// usage: runner RUNS [NAME=VALUE...] PROGRAM [ARGUMENT...], several programs separated by "--": they take turns.
// For each run a child takes a copy of the mount namespace, gives it a fresh /run with the udev database, and
// starts the program; so nothing that a run mounted or wrote to /run is there for the next one.
// Prints for each run: the number of the program, microseconds from fork to exit, microseconds of CPU, KiB at the
// most, exit status.
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static long microseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static void prepare(void) {
    if (unshare(CLONE_NEWNS) < 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0) fail("unshare");
    if (mount("run", "/run", "tmpfs", 0, "mode=0755") < 0 || mkdir("/run/udev", 0755) < 0) fail("/run");
    if (mount("/machine/udev", "/run/udev", NULL, MS_BIND, NULL) < 0) fail("/run/udev");
}

static void run(int number, char **program) {
    long started = microseconds();
    pid_t child = fork();
    if (child < 0) fail("fork");
    if (child == 0) {
        int null = open("/dev/null", O_RDWR);
        for (int descriptor = 0; descriptor < 3; descriptor++) dup2(null, descriptor);
        while (strchr(program[0], '=')) putenv(*program++);
        execv(program[0], program);
        _exit(127);
    }
    int status;
    struct rusage usage;
    if (wait4(child, &status, 0, &usage) < 0) fail("wait4");
    long ended = microseconds();
    long cpu = (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000 + usage.ru_utime.tv_usec + usage.ru_stime.tv_usec;
    printf("%d %ld %ld %ld %d\n", number, ended - started, cpu, usage.ru_maxrss,
           WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    fflush(stdout);
}

int main(int count, char **words) {
    char **programs[64];
    int many = 0;
    if (count < 3) return 2;
    programs[many++] = words + 2;
    for (int i = 2; i < count; i++) {
        if (strcmp(words[i], "--") == 0 && many < 64) {
            words[i] = NULL;
            programs[many++] = words + i + 1;
        }
    }
    for (int turn = 0; turn < atoi(words[1]); turn++) {
        for (int number = 0; number < many; number++) {
            pid_t child = fork();
            if (child < 0) fail("fork");
            if (child == 0) {
                prepare();
                run(number, programs[number]);
                _exit(0);
            }
            int status;
            if (waitpid(child, &status, 0) < 0 || status != 0) return 1;
            usleep(5000);  // until the kernel has unmounted and detached what the run left
        }
    }
    return 0;
}

// mesh-llm-leash FD PROGRAM ARGS...: runs PROGRAM so that it ends when its parent ends, even if the parent is killed.
//
// FD is the read end of a pipe whose write end only the parent holds: it reports end of file when the parent has ended.
// Then, and on SIGTERM and SIGINT, the program's process group gets SIGTERM and after 5 s SIGKILL. The exit status is
// the program's, or 128 + signal when it was killed.
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <initializer_list>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

namespace {

int signal_pipe[2];

void on_signal(int number) {
    const int saved = errno;
    const char c = number == SIGCHLD ? 'c' : 'e'; // a child's end only wakes the loop
    (void)!::write(signal_pipe[1], &c, 1);
    errno = saved;
}

void catch_signal(int number) {
    struct sigaction action{};
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESTART | SA_NOCLDSTOP;
    ::sigaction(number, &action, nullptr);
}

[[noreturn]] void become(char ** argv) {
    ::setpgid(0, 0);
#ifdef __linux__
    ::prctl(PR_SET_PDEATHSIG, SIGKILL); // if the leash itself is killed
#endif
    for (const int number : {SIGTERM, SIGINT, SIGCHLD}) {
        ::signal(number, SIG_DFL);
    }
    ::execvp(argv[0], argv);
    std::fprintf(stderr, "mesh-llm-leash: cannot run %s: %s\n", argv[0], std::strerror(errno));
    ::_exit(127);
}

bool ended(pid_t child, int & status) {
    return ::waitpid(child, &status, WNOHANG) == child;
}

/// Waits until a signal arrives, the parent has ended or the timeout has expired. True when the child should end.
bool wait_for_reason(int parent_fd, int timeout_ms) {
    pollfd fds[2] = {{parent_fd, POLLIN, 0}, {signal_pipe[0], POLLIN, 0}};
    ::poll(fds, 2, timeout_ms);
    char c;
    const bool parent_gone = (fds[0].revents != 0) && ::read(parent_fd, &c, 1) <= 0;
    bool signalled = false;
    while (::read(signal_pipe[0], &c, 1) == 1) {
        signalled = signalled || c == 'e';
    }
    return parent_gone || signalled;
}

int run(int parent_fd, pid_t child) {
    constexpr int patience_ms = 5000, step_ms = 50;
    int status = 0, left_ms = -1; // of the patience; -1 while the child may live
    for (;;) {
        const bool reason = wait_for_reason(left_ms < 0 ? parent_fd : -1, left_ms < 0 ? -1 : step_ms);
        if (ended(child, status)) {
            ::kill(-child, SIGKILL); // what it may have started
            return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
        }
        if (left_ms < 0 && reason) {
            ::kill(-child, SIGTERM);
            left_ms = patience_ms;
        } else if (left_ms >= 0 && (left_ms -= step_ms) < 0) {
            ::kill(-child, SIGKILL);
            left_ms = patience_ms;
        }
    }
}

} // namespace

int main(int argc, char ** argv) {
    char * end = nullptr;
    const long fd = argc < 3 ? -1 : std::strtol(argv[1], &end, 10);
    if (fd < 0 || *end != '\0') {
        std::fprintf(stderr, "usage: mesh-llm-leash FD PROGRAM ARGS...\n");
        return 2;
    }
    const int parent_fd = static_cast<int>(fd);
    ::fcntl(parent_fd, F_SETFD, FD_CLOEXEC);
    if (::pipe(signal_pipe) != 0) {
        std::perror("mesh-llm-leash: pipe");
        return 2;
    }
    for (const int f : signal_pipe) {
        ::fcntl(f, F_SETFD, FD_CLOEXEC);
        ::fcntl(f, F_SETFL, O_NONBLOCK);
    }
    catch_signal(SIGTERM);
    catch_signal(SIGINT);
    catch_signal(SIGCHLD);
    const pid_t child = ::fork();
    if (child < 0) {
        std::perror("mesh-llm-leash: fork");
        return 2;
    }
    if (child == 0) {
        become(argv + 2);
    }
    return run(parent_fd, child);
}

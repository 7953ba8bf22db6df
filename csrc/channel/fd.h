// A file descriptor that is closed exactly once.
#pragma once

#include <unistd.h>
#include <utility>

namespace meshllm::channel {

class Fd {
  public:
    explicit Fd(int fd = -1) : fd_(fd) {}
    Fd(Fd && other) noexcept : fd_(other.release()) {}
    Fd & operator=(Fd && other) noexcept {
        Fd old(std::exchange(fd_, other.release()));
        return *this;
    }
    ~Fd() {
        if (fd_ >= 0) {
            ::close(fd_);
        }
    }

    int get() const { return fd_; }
    int release() { return std::exchange(fd_, -1); }

  private:
    int fd_;
};

} // namespace meshllm::channel

// Wakes a thread that polls: a pipe to itself.
#pragma once

#include "channel/fd.h"

#include <cerrno>
#include <cstdint>
#include <fcntl.h>
#include <system_error>

namespace meshllm::channel {

class Wakeup {
  public:
    /// Throws std::system_error.
    Wakeup() {
        int ends[2];
        if (::pipe(ends) != 0) {
            throw std::system_error(errno, std::generic_category(), "cannot open a pipe");
        }
        read_end_ = Fd(ends[0]);
        write_end_ = Fd(ends[1]);
        for (const int end : ends) {
            ::fcntl(end, F_SETFL, O_NONBLOCK);
            ::fcntl(end, F_SETFD, FD_CLOEXEC);
        }
    }

    /// Readable from notify() to drain().
    int fd() const { return read_end_.get(); }

    /// From any thread.
    void notify() {
        const uint8_t byte = 0;
        (void)!::write(write_end_.get(), &byte, 1); // a full pipe is readable already
    }

    /// By the thread that polls.
    void drain() {
        uint8_t bytes[256];
        while (::read(read_end_.get(), bytes, sizeof(bytes)) == sizeof(bytes)) {
        }
    }

  private:
    Fd read_end_, write_end_;
};

} // namespace meshllm::channel

// Wakes who polls: rung from any thread, silenced by the one that listens.
#pragma once

#include "channel/stream.h"

#include <cerrno>
#include <cstdint>
#include <fcntl.h>
#include <system_error>
#include <unistd.h>

namespace meshllm::quic {

class Bell {
  public:
    Bell() {
        int ends[2];
        if (pipe(ends) != 0) {
            throw std::system_error(errno, std::generic_category(), "pipe");
        }
        out_ = channel::Fd(ends[0]);
        in_ = channel::Fd(ends[1]);
        for (int end : ends) {
            fcntl(end, F_SETFL, O_NONBLOCK);
            fcntl(end, F_SETFD, FD_CLOEXEC);
        }
    }

    /// Readable while it rings.
    int fd() const { return out_.get(); }

    void ring() {
        uint8_t byte = 0;
        [[maybe_unused]] ssize_t n = ::write(in_.get(), &byte, 1); // full: it rings already
    }

    void silence() {
        uint8_t bytes[256];
        while (::read(out_.get(), bytes, sizeof(bytes)) == sizeof(bytes)) {
        }
    }

  private:
    channel::Fd out_, in_;
};

} // namespace meshllm::quic

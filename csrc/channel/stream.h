// Byte streams over TCP and Unix sockets, and the buffered reads and writes of one end. Nothing of ggml.
//
// An address is `unix:/path` or `HOST:PORT` (`[::1]:50052` for IPv6).
#pragma once

#include "channel/wakeup.h"

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace meshllm::channel {

/// The connection to a peer is closed, refused or too slow. The message is one line for a person.
class TransportError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// An address that cannot be used at all: the user's mistake.
class AddressError : public TransportError {
    using TransportError::TransportError;
};

/// A connected stream. Reads and writes may run in two threads; shutdown() may be called from a third.
class Stream {
  public:
    explicit Stream(Fd fd) : fd_(std::move(fd)) {}

    /// Throws TransportError that names the address when nothing answers within `timeout_s`.
    static Stream connect(const std::string & address, double timeout_s);

    int fd() const { return fd_.get(); }

    /// Blocks until `out` is full. False when the peer closed before the first byte; throws when it closed later.
    bool read_exactly(std::span<uint8_t> out);

    /// Blocks until all of `head` and `body` are handed to the kernel.
    void write_all(std::span<const uint8_t> head, std::span<const uint8_t> body = {});

    /// Ends all reads and writes, at both ends, at once.
    void shutdown();

    /// Without waiting: the number of bytes transferred, 0 when none can be now; throws when the peer has closed.
    size_t read_some(std::span<uint8_t> out);
    size_t write_some(std::span<const uint8_t> data);

    /// A read that takes longer throws; 0 for no limit.
    void set_read_timeout(double timeout_s);

  private:
    Fd fd_;
    std::vector<uint8_t> buffer_; // bytes received but not read yet
    size_t begin_ = 0;
};

class Listener {
  public:
    /// Throws TransportError with one line for the user (port in use, no such address). Port 0 takes a free one.
    explicit Listener(const std::string & address);
    ~Listener();

    /// The address to connect to, with the actual port.
    const std::string & address() const { return address_; }

    /// Blocks for the next connection; throws TransportError after close().
    Stream accept();
    void close();

  private:
    Fd fd_;
    Wakeup closing_; // closing a socket does not wake accept() everywhere
    std::string address_, unix_path_;
};

/// Whether only programs on this machine can reach `address`.
bool is_local(const std::string & address);

} // namespace meshllm::channel

// One QUIC stream: bytes between the packets and either a reader in Python or a file descriptor.
//
// Received bytes are held until the reader consumes them, and only consumed bytes open the flow-control window again
// (RFC 9000 section 4): a slow reader costs its own window and delays no other stream. A spliced stream has no reader:
// its bytes go from the decrypted packets to the descriptor, and from the descriptor into the packet being built.
#pragma once

#include "channel/fd.h"

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace meshllm::quic {

using Bytes = std::vector<uint8_t>;

/// The stream or its link is closed. The message is one line for a person.
class StreamError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// Bytes, first in, first out.
class Queue {
  public:
    size_t size() const { return size_; }
    void push(std::span<const uint8_t> bytes);
    /// The first bytes, as many as are contiguous in memory.
    std::span<const uint8_t> front() const;
    void pop(size_t n);
    /// Fills `out`, which is no longer than the queue, and removes what it copied.
    void read(std::span<uint8_t> out);
    void clear();

  private:
    std::deque<Bytes> chunks_;
    size_t begin_ = 0; // in the first chunk
    size_t size_ = 0;
};

/// The flow-control window: how far ahead of its reader the peer may send. It grows for a reader that keeps up with a
/// long or fast path.
class Window {
  public:
    static constexpr uint64_t initial = 256 << 10, largest = 16 << 20;

    void received(uint64_t n_bytes) { received_ += n_bytes; }
    /// The reader has consumed `n_bytes` more. True when a new limit should be advertised to the peer.
    bool consumed(uint64_t n_bytes, uint64_t now_us, uint64_t rtt_us);
    /// Bytes beyond those received that the peer may send.
    uint64_t ahead() const { return size_ - (received_ - consumed_); }
    void advertised(uint64_t now_us);

  private:
    uint64_t size_ = initial, received_ = 0, consumed_ = 0;
    uint64_t advertised_ = 0, advertised_us_ = 0; // consumed_ and the time when the last limit was advertised
};

/// The descriptor's side of a spliced stream. Used by the I/O thread only.
///
/// Bytes go to and from it in runs of many packets' worth. One copy within the process costs less than a system call
/// for each packet: 1.1 against 2.1 ms of CPU per MB and side (docs/performance.md).
class Splice {
  public:
    explicit Splice(int fd) : fd_(fd), ahead_(read_ahead) {}
    int fd() const { return fd_.get(); }

    /// Queues bytes for the descriptor; flush() writes them. The window bounds how much the peer may send.
    void push(std::span<const uint8_t> bytes, bool end);
    /// The number of bytes written now. Call it again when the descriptor is writable, while wants_to_write().
    size_t flush();
    bool wants_to_write() const { return backlog_.size() > 0; }

    /// The number of bytes that can be read now: at least `wanted`, unless the descriptor has fewer.
    size_t available(size_t wanted);
    void read(std::span<uint8_t> out);      // no more than available() returned
    bool at_end() const { return at_end_; } // nothing follows what is available

    bool broken() const { return broken_; }

  private:
    static constexpr size_t read_ahead = 128 << 10;

    channel::Fd fd_;
    Queue backlog_;
    Bytes ahead_;
    size_t begin_ = 0, end_ = 0; // what is available, in ahead_
    bool finish_ = false, at_end_ = false, broken_ = false;
};

class Link;

struct Stream : std::enable_shared_from_this<Stream> {
    const uint64_t handle;
    const uint64_t link_handle;

    // Shared by all threads, guarded by Shared::mutex.
    Queue in, out;
    bool ended = false;    // the peer has finished sending
    bool finished = false; // we have
    bool released = false; // it has no reader any more
    bool reader_waits = true, writer_waits = false;
    bool pending = false;  // the I/O thread has been asked to send
    size_t unreported = 0; // bytes consumed that the I/O thread does not know about yet
    std::string error;

    // The I/O thread's.
    Link * link = nullptr; // null before the stream is part of it, and after
    uint64_t id = 0;       // QUIC's
    Window window;
    std::optional<Splice> splice;
    bool undelivered = false;  // bytes were received that its reader or its splice has not been given yet
    bool splice_sends = false; // picoquic asks the splice for bytes; otherwise the descriptor is polled

    Stream(uint64_t handle, uint64_t link_handle) : handle(handle), link_handle(link_handle) {}
};

} // namespace meshllm::quic

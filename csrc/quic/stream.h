// One QUIC stream: bytes between the packets and either a reader in Python or a file descriptor.
//
// Received bytes are held until the reader takes them, and only what it takes opens the flow-control window again (RFC
// 9000 section 4): a slow reader costs its own window and delays no other stream. A spliced stream has no reader: its
// bytes go from the decrypted packets to the descriptor, and from the descriptor into the packet that is being built.
#pragma once

#include "channel/fd.h"

#include <chrono>
#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <vector>

namespace meshllm::quic {

using Bytes = std::vector<uint8_t>;

/// First in, first out.
class Queue {
  public:
    size_t size() const { return size_; }
    void push(std::span<const uint8_t> bytes);
    /// The first bytes of it that lie together.
    std::span<const uint8_t> front() const;
    void pop(size_t n);
    /// Fills `out`, which is no longer than the queue.
    void take(std::span<uint8_t> out);
    void clear();

  private:
    std::deque<Bytes> chunks_;
    size_t begin_ = 0; // in the first chunk
    size_t size_ = 0;
};

/// How far ahead of its reader the peer may send: more for a reader that keeps up with a long or fast path.
class Window {
  public:
    static constexpr uint64_t initial = 256 << 10, largest = 16 << 20;

    /// The reader has taken so much more. True when the peer should hear of it.
    bool take(uint64_t n_bytes, uint64_t now_us, uint64_t rtt_us);
    void arrived(uint64_t n_bytes) { arrived_ += n_bytes; }
    /// Bytes after what has arrived that the peer may send.
    uint64_t ahead() const { return size_ - (arrived_ - taken_); }
    void told(uint64_t now_us);

  private:
    uint64_t size_ = initial, arrived_ = 0, taken_ = 0, told_ = 0, told_us_ = 0;
};

/// The descriptor's side of a spliced stream. The I/O thread's alone.
///
/// Bytes go to and from it in runs of many packets' worth. One copy within the process costs less than a system call
/// for each packet: 1.1 against 2.1 ms of CPU per MB and side (docs/performance.md).
class Splice {
  public:
    explicit Splice(int fd) : fd_(fd), ahead_(read_ahead) {}
    int fd() const { return fd_.get(); }

    /// Towards the descriptor, with the next flush(); no more than the window lets the peer send.
    void hold(std::span<const uint8_t> bytes, bool end);
    /// Bytes that the descriptor took; it is to be called again when it takes more, if bytes are left.
    size_t flush();
    bool wants_to_write() const { return backlog_.size() > 0; }

    /// From it: bytes that can be taken now, at least `wanted` unless there are fewer.
    size_t available(size_t wanted);
    void take(std::span<uint8_t> out);      // no more than available() said
    bool at_end() const { return at_end_; } // nothing comes after what is available

    bool broken() const { return broken_; }

  private:
    static constexpr size_t read_ahead = 128 << 10;

    channel::Fd fd_;
    Queue backlog_;
    Bytes ahead_;
    size_t begin_ = 0, end_ = 0; // what is available, in ahead_
    bool finish_ = false, at_end_ = false, broken_ = false;
};

} // namespace meshllm::quic

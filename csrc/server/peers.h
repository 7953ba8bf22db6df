// Direct transfers between stages: links to those we push to, and the mailbox for what others push to us.
#pragma once

#include "channel/stream.h"
#include "server/counters.h"
#include "server/executor.h"
#include "wire/frames.h"

#include <condition_variable>
#include <functional>
#include <mutex>
#include <unordered_map>

namespace meshllm::server {

/// What a stage pushes: a tensor, or the reason why it has not computed it.
struct Pushed {
    wire::Bytes data;
    bool refused = false;
};

/// What other stages have pushed to one session, until its command stream takes it by transfer id.
class Mailbox {
  public:
    /// Waits while the box is full, unless `transfer` is the one being waited for. False once the session has ended.
    bool put(uint64_t transfer, Pushed pushed);

    /// Waits for `transfer`; throws std::runtime_error after fail(). Calls `alive` twice a second, which may throw.
    Pushed take(uint64_t transfer, const std::function<void()> & alive);

    /// The stage that pushes is lost: take() throws `why` from now on.
    void fail(const std::string & why);
    void close();

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::unordered_map<uint64_t, Pushed> arrived_;
    uint64_t bytes_ = 0;
    uint64_t awaited_ = 0;
    bool waiting_ = false, closed_ = false;
    std::string failure_;
};

/// A connection to another stage, over which one session pushes. Its own thread writes, so that the device can go on.
class PeerLink {
  public:
    /// Throws TransportError or ProtocolError, for the user, when the peer cannot be reached or refuses the key.
    PeerLink(const std::string & address, const wire::Key & session_key, Counters & counters);
    ~PeerLink();

    /// Queues; waits while too much is queued. Throws TransportError when the link is lost.
    void push(uint64_t transfer, Pushed pushed);

    /// Sends the peer the reason why no more pushes follow.
    void fail(const std::string & why);

  private:
    struct Item {
        wire::Command command;
        uint64_t transfer;
        wire::Bytes data;
    };
    void enqueue(Item item, bool wait_for_room);
    void run(const Item & item);
    void write(const Item & item);

    channel::Stream stream_;
    Counters & counters_;
    std::mutex mutex_;
    std::condition_variable changed_;
    size_t n_queued_ = 0;
    uint64_t queued_bytes_ = 0;
    std::string failure_;
    Executor executor_; // last: its thread uses the rest
};

} // namespace meshllm::server

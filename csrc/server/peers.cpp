#include "server/peers.h"

#include "channel/handshake.h"

#include <chrono>
#include <thread>

namespace meshllm::server {

namespace {

// Limits on what one stage queues for another; a ubatch of 512 tokens of a 16k-wide model is 32 MiB.
constexpr uint64_t max_waiting_bytes = 256 << 20;
constexpr size_t max_waiting_transfers = 4096;
constexpr double connect_timeout_s = 5;
constexpr std::chrono::seconds linger(2);
constexpr std::chrono::milliseconds retry(50);

/// Our node makes a Unix socket for each stage that it has heard of, which may be moments after the host has.
channel::Stream connect_to_peer(const std::string & address) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(connect_timeout_s);
    for (;;) {
        try {
            return channel::Stream::connect(address, connect_timeout_s);
        } catch (const channel::TransportError &) {
            if (address.rfind("unix:", 0) != 0 || std::chrono::steady_clock::now() > deadline) {
                throw;
            }
        }
        std::this_thread::sleep_for(retry);
    }
}

} // namespace

bool Mailbox::put(uint64_t transfer, Pushed pushed) {
    const uint64_t size = pushed.data.size();
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] {
        const bool room = bytes_ + size <= max_waiting_bytes && arrived_.size() < max_waiting_transfers;
        return closed_ || room || (waiting_ && awaited_ == transfer);
    });
    if (closed_) {
        return false;
    }
    bytes_ += size;
    if (!arrived_.try_emplace(transfer, std::move(pushed)).second) {
        throw ProtocolError("a peer pushes the same transfer twice");
    }
    changed_.notify_all();
    return true;
}

Pushed Mailbox::take(uint64_t transfer, const std::function<void()> & alive) {
    std::unique_lock lock(mutex_);
    awaited_ = transfer;
    waiting_ = true;
    changed_.notify_all();
    while (!arrived_.contains(transfer)) {
        if (!failure_.empty() || closed_) {
            waiting_ = false;
            throw std::runtime_error(closed_ ? "the session is closed" : failure_);
        }
        if (changed_.wait_for(lock, std::chrono::milliseconds(500)) == std::cv_status::timeout) {
            alive();
        }
    }
    waiting_ = false;
    Pushed pushed = std::move(arrived_.extract(transfer).mapped());
    bytes_ -= pushed.data.size();
    changed_.notify_all();
    return pushed;
}

void Mailbox::fail(const std::string & why) {
    std::lock_guard lock(mutex_);
    if (failure_.empty()) {
        failure_ = why;
    }
    changed_.notify_all();
}

void Mailbox::close() {
    std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
}

PeerLink::PeerLink(const std::string & address, const wire::Key & session_key, Counters & counters)
    : stream_(connect_to_peer(address)), counters_(counters) {
    stream_.set_read_timeout(connect_timeout_s);
    if (!channel::stock_hello(stream_)) {
        throw ProtocolError("the peer " + address + " has no mesh extensions");
    }
    channel::call(stream_, wire::Command::peer_attach, session_key);
}

PeerLink::~PeerLink() {
    {
        // What is queued is still sent, unless the peer does not take it.
        std::unique_lock lock(mutex_);
        changed_.wait_for(lock, linger, [this] { return !failure_.empty() || n_queued_ == 0; });
    }
    stream_.shutdown();
}

void PeerLink::push(uint64_t transfer, Pushed pushed) {
    const auto command = pushed.refused ? wire::Command::peer_refused : wire::Command::peer_tensor_data;
    enqueue({command, transfer, std::move(pushed.data)}, true);
}

void PeerLink::fail(const std::string & why) {
    enqueue({wire::Command::peer_error, 0, wire::Bytes(why.begin(), why.end())}, false);
}

void PeerLink::enqueue(Item item, bool wait_for_room) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !wait_for_room || !failure_.empty() || queued_bytes_ < max_waiting_bytes; });
    if (!failure_.empty() && wait_for_room) {
        throw channel::TransportError("the link to the next stage is lost: " + failure_);
    }
    n_queued_++;
    queued_bytes_ += item.data.size();
    lock.unlock();
    executor_.post([this, item = std::move(item)] { run(item); });
}

void PeerLink::write(const Item & item) {
    wire::Bytes head;
    wire::Writer w(head);
    const bool transfer = item.command != wire::Command::peer_error;
    w.put(item.command);
    w.put(uint64_t((transfer ? sizeof(wire::PeerDataHead) : 0) + item.data.size()));
    if (transfer) {
        w.put(item.transfer);
        counters_.pushes_sent++;
        counters_.push_bytes_sent += item.data.size();
    }
    stream_.write_all(head, item.data);
}

void PeerLink::run(const Item & item) {
    std::unique_lock lock(mutex_);
    const bool skip = !failure_.empty();
    lock.unlock();
    std::string failure;
    try {
        if (!skip) {
            write(item);
        }
    } catch (const std::exception & e) {
        failure = e.what();
    }
    lock.lock();
    if (failure_.empty()) {
        failure_ = failure;
    }
    n_queued_--;
    queued_bytes_ -= item.data.size();
    changed_.notify_all();
}

} // namespace meshllm::server

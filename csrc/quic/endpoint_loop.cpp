// The endpoint's I/O thread: see endpoint.h. Everything here runs in it.
#include "quic/endpoint.h"
#include "quic/picoquic_internals.h"

#include <algorithm>
#include <chrono>
#include <utility>

#ifdef __linux__
#include <sys/prctl.h>
#endif

namespace meshllm::quic {

namespace {

constexpr int batches_per_turn = 4; // of datagrams, before other work gets its turn
constexpr int64_t max_sleep_us = 10'000'000;
constexpr uint64_t close_grace_us = 50'000;
constexpr int64_t retry_send_us = 1000;
constexpr int max_pieces_waiting = 24 << 10; // 40 MB of memory
constexpr size_t first_splice = 2;           // in polled_, after the wakeup and the socket

} // namespace

void Endpoint::run() {
#ifdef __linux__
    prctl(PR_SET_TIMERSLACK, 1000); // ns: timers of pacing and loss need microseconds
    prctl(PR_SET_NAME, "mesh-quic");
#endif
    uint64_t until = 0; // the time to end, once stopping
    while (until == 0 || shared_.now_us < until) {
        update_clock();
        run_work();
        deliver(); // to splices that have just begun
        if (stopping_ && until == 0) {
            until = shared_.now_us + close_grace_us;
            close_all();
        }
        bool more = receive();
        shed();
        serve_splices();
        more = send() || more;
        deliver(); // packets that arrived before their keys are read by send()
        reap();
        int64_t delay = more ? 0 : retry_send_us;
        if (!more && socket_.nothing_queued()) {
            delay = picoquic_get_next_wake_delay(quic_.get(), shared_.now_us, max_sleep_us);
        }
        if (until != 0) {
            const bool all_sent = !more && socket_.nothing_queued() && delay > 0;
            until = all_sent ? shared_.now_us : until;
            delay = std::min<int64_t>(delay, 1000);
        }
        wait(delay);
    }
}

void Endpoint::run_work() {
    std::vector<std::function<void()>> work;
    {
        std::lock_guard lock(shared_.mutex);
        work.swap(work_);
    }
    for (const auto & each : work) {
        each();
    }
}

void Endpoint::close_all() {
    for (const auto & [handle, link] : live_) {
        link->close("leaving");
    }
}

void Endpoint::update_clock() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    shared_.now_us = static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(now).count());
}

void Endpoint::wait(int64_t delay_us) {
    polled_.clear();
    polled_.push_back({wakeup_.fd(), POLLIN, 0});
    polled_.push_back({socket_.fd(), static_cast<short>(socket_.full() ? POLLIN | POLLOUT : POLLIN), 0});
    for (const auto & stream : spliced_) {
        short events = 0;
        if (stream->link != nullptr && !stream->splice_sends && !stream->splice->at_end()) {
            events |= POLLIN;
        }
        if (stream->splice->wants_to_write()) {
            events |= POLLOUT;
        }
        polled_.push_back({events != 0 ? stream->splice->fd() : -1, events, 0});
    }
    if (delay_us > 0) {
        sleeping_ = true;
        std::lock_guard lock(shared_.mutex);
        if (!work_.empty()) {
            delay_us = 0;
        }
    }
#ifdef __linux__
    const timespec timeout{delay_us / 1'000'000, delay_us % 1'000'000 * 1000};
    ppoll(polled_.data(), polled_.size(), &timeout, nullptr);
#else
    poll(polled_.data(), static_cast<nfds_t>(polled_.size()), static_cast<int>((delay_us + 999) / 1000));
#endif
    sleeping_ = false;
    if (polled_[0].revents != 0) {
        wakeup_.drain();
    }
}

// --- datagrams in ---

bool Endpoint::receive() {
    for (int batch = 0; batch < batches_per_turn; batch++) {
        const std::span<Datagrams> received = socket_.receive();
        update_clock();
        for (Datagrams & datagrams : received) {
            read_datagrams(datagrams);
        }
        if (!socket_.more()) {
            return false;
        }
    }
    return true;
}

void Endpoint::read_datagrams(Datagrams & datagrams) {
    picoquic_cnx_t * cnx = nullptr;
    for (std::span<uint8_t> bytes = datagrams.bytes; !bytes.empty();) {
        const size_t n = std::min(bytes.size(), datagrams.segment_size);
        picoquic_incoming_packet_ex(quic_.get(), bytes.data(), n, reinterpret_cast<sockaddr *>(&datagrams.peer),
                                    reinterpret_cast<sockaddr *>(&datagrams.local),
                                    static_cast<int>(datagrams.interface), 0, &cnx, shared_.now_us);
        bytes = bytes.subspan(n);
    }
    deliver();
    if (Link * link = link_of(cnx)) {
        link->on_datagrams(datagrams.bytes.size());
    }
}

// Once for all packets that arrived together: a reader woken by the first of them would find little.
void Endpoint::deliver() {
    for (const auto & stream : shared_.undelivered) {
        stream->undelivered = false;
        if (stream->splice) {
            flush(*stream);
            continue;
        }
        std::lock_guard lock(shared_.mutex);
        if (std::exchange(stream->reader_waits, false)) {
            shared_.emit_locked({.type = Event::Type::readable, .link = stream->link_handle, .stream = stream->handle});
        }
    }
    shared_.undelivered.clear();
}

// When the links together occupy too much memory, close the one that exceeds its fair use most; when it is far too
// much, also one that is within its windows.
void Endpoint::shed() {
    while (pieces_waiting(quic_.get()) > max_pieces_waiting) {
        picoquic_cnx_t * worst = nullptr;
        int64_t most = pieces_waiting(quic_.get()) > 4 * max_pieces_waiting ? INT64_MIN : 0;
        for (auto * cnx = picoquic_get_first_cnx(quic_.get()); cnx != nullptr; cnx = picoquic_get_next_cnx(cnx)) {
            if (const int64_t n = excess_pieces(cnx); n > most) {
                most = n;
                worst = cnx;
            }
        }
        if (worst == nullptr) {
            return;
        }
        if (Link * link = link_of(worst)) {
            link->fail("too much data arrived out of order");
            link->on_deleted();
        }
        picoquic_set_callback(worst, on_event, nullptr);
        picoquic_delete_cnx(worst);
    }
}

// --- datagrams out ---

bool Endpoint::send() {
    for (int batch = 0; batch < batches_per_turn; batch++) {
        for (std::span<uint8_t> space = socket_.space(); !space.empty() && prepare(space);) {
            space = socket_.space();
        }
        if (socket_.nothing_queued()) {
            return false;
        }
        if (!socket_.send()) {
            return false; // wait() returns when there is room
        }
    }
    return true;
}

/// Queues the next datagrams of any link. False when there are none.
bool Endpoint::prepare(std::span<uint8_t> space) {
    Datagrams next;
    size_t length = 0;
    int interface = 0;
    picoquic_cnx_t * cnx = nullptr;
    update_clock();
    const int result =
        picoquic_prepare_next_packet_ex(quic_.get(), shared_.now_us, space.data(), space.size(), &length, &next.peer,
                                        &next.local, &interface, nullptr, &cnx, &next.segment_size);
    if (result != 0 || length == 0) {
        return false;
    }
    if (cnx != nullptr) {
        restore_loss_timer(quic_.get(), cnx, shared_.now_us);
    }
    length += pad_initial(cnx, space, length);
    next.bytes = space.first(length);
    next.segment_size = next.segment_size == 0 ? length : next.segment_size;
    if (Link * link = link_of(cnx)) {
        link->bytes_sent += length;
        if (link->dialled()) {
            next.local = {}; // the system chooses: the address used at first may no longer exist
        }
    }
    socket_.queue(next);
    return true;
}

// --- splices ---

void Endpoint::flush(Stream & stream) {
    const size_t n = stream.splice->flush();
    if (stream.link != nullptr) {
        stream.link->consumed(stream, n);
    }
}

void Endpoint::serve_splices() {
    for (size_t i = 0; i < spliced_.size(); i++) {
        Stream & stream = *spliced_[i];
        const size_t at = i + first_splice; // a splice that began after wait() was not polled
        const bool polled = at < polled_.size() && polled_[at].fd == stream.splice->fd();
        serve_splice(stream, polled ? polled_[at].revents : 0);
    }
    std::erase_if(spliced_, [this](const std::shared_ptr<Stream> & stream) { return splice_ended(*stream); });
}

void Endpoint::serve_splice(Stream & stream, short revents) {
    if ((revents & ~POLLIN) != 0) {
        flush(stream);
    }
    if (revents != 0 && stream.link != nullptr && !stream.splice_sends) {
        stream.splice_sends = true;
        stream.link->activate(stream);
    }
    if (stream.splice->broken() && stream.link != nullptr) {
        stream.link->drop(stream, "the other end of the splice is closed");
    }
}

bool Endpoint::splice_ended(Stream & stream) {
    if (stream.link != nullptr) {
        return false;
    }
    std::lock_guard lock(shared_.mutex); // abort() sets the error in another thread
    if (stream.error.empty() && !stream.splice->broken() && stream.splice->wants_to_write()) {
        return false; // both sides have finished, but the descriptor has not taken all of it yet
    }
    stream.splice.reset();
    shared_.emit_locked({.type = Event::Type::spliced, .link = stream.link_handle, .stream = stream.handle});
    return true;
}

// --- connections ---

void Endpoint::reap() {
    std::erase_if(live_, [this](const auto & entry) {
        Link & link = *entry.second;
        bool deleted = link.cnx() == nullptr;
        if (!deleted && link.dialled() && picoquic_get_cnx_state(link.cnx()) == picoquic_state_disconnected) {
            picoquic_delete_cnx(link.cnx()); // picoquic itself deletes only those that peers have dialled
            deleted = true;
        }
        if (link.closed()) {
            std::lock_guard lock(shared_.mutex);
            links_.erase(entry.first);
        }
        return deleted;
    });
}

Link & Endpoint::add(uint64_t handle, picoquic_cnx_t * cnx, const sockaddr * peer, bool dialled) {
    const auto link = std::make_shared<Link>(shared_, handle, cnx, peer, dialled);
    picoquic_set_callback(cnx, on_event, link.get());
    live_[handle] = link;
    std::lock_guard lock(shared_.mutex);
    links_[handle] = link;
    return *link;
}

Link & Endpoint::accept(picoquic_cnx_t * cnx) {
    sockaddr * peer = nullptr;
    picoquic_get_peer_addr(cnx, &peer);
    return add(shared_.new_handle(), cnx, peer, false);
}

/// Null for a stranger that has not proved its key, and for a connection whose link is closed.
Link * Endpoint::link_of(picoquic_cnx_t * cnx) {
    void * context = cnx == nullptr ? nullptr : picoquic_get_callback_context(cnx);
    return context == this ? nullptr : static_cast<Link *>(context);
}

int Endpoint::on_event(picoquic_cnx_t * cnx, uint64_t stream_id, uint8_t * bytes, size_t length,
                       picoquic_call_back_event_t event, void * context, void * stream) {
    const void * endpoint = picoquic_get_default_callback_context(picoquic_get_quic_ctx(cnx));
    if (context == nullptr) {
        return 0; // its link is closed
    }
    if (context == endpoint) { // a stranger that has proved no key: -1 ends its connection, should it become ready
        return event == picoquic_callback_ready ? -1 : 0;
    }
    auto * link = static_cast<Link *>(context);
    const int result = link->on_event(stream_id, bytes, length, event, static_cast<Stream *>(stream));
    if (picoquic_get_cnx_state(cnx) == picoquic_state_disconnected && !link->dialled()) {
        link->on_deleted();
        picoquic_set_callback(cnx, on_event, nullptr);
    }
    return result;
}

} // namespace meshllm::quic

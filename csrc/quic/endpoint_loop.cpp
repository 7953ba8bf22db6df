// The engine's I/O thread: see endpoint.h. Everything here runs in it.
#include "quic/endpoint.h"

#include <algorithm>
#include <chrono>
#include <picoquic_internal.h>
#include <poll.h>

#ifdef __linux__
#include <sys/prctl.h>
#endif

namespace meshllm::quic {

namespace {

constexpr int batches_between_looks = 4;
constexpr int64_t longest_sleep_us = 10'000'000;
constexpr uint64_t goodbye_us = 50'000;
constexpr int64_t retry_send_us = 1000;
constexpr int max_waiting = 24 << 10;  // pieces of data before which something is missing: 40 MB of memory
constexpr int64_t honest_piece = 1000; // bytes

// Pieces that wait, beyond those that the data would have come in from an honest peer: each costs a packet's worth of
// memory, however small it is.
int64_t excess(picoquic_cnx_t * cnx) {
    int64_t n = 0;
    for (auto & stream : cnx->tls_stream) {
        n += stream.stream_data_tree.size;
    }
    for (auto * stream = picoquic_first_stream(cnx); stream != nullptr; stream = picoquic_next_stream(stream)) {
        auto missing = static_cast<int64_t>(stream->fin_offset - stream->consumed_offset);
        n += stream->stream_data_tree.size - missing / honest_piece;
    }
    return n;
}

// picoquic does not pad what it repeats of an Initial packet, although a client of it drops a short one that asks for
// an acknowledgement (RFC 9000 section 14.1): one lost datagram and the handshake never ends. How many bytes have been
// added.
size_t padding(picoquic_cnx_t * cnx, std::span<uint8_t> datagram, size_t length) {
    bool initial = (datagram[0] & 0xf0) == 0xc0; // RFC 9000 section 17.2.2
    if (cnx == nullptr || !initial || length >= PICOQUIC_ENFORCED_INITIAL_MTU) {
        return 0;
    }
    size_t n = PICOQUIC_ENFORCED_INITIAL_MTU - length;
    if (!cnx->client_mode && !cnx->initial_validated) {
        // at most three times what came (RFC 9000 section 8.1)
        if (cnx->initial_data_sent + n > 3 * cnx->initial_data_received) {
            return 0;
        }
        cnx->initial_data_sent += n;
    }
    std::fill_n(datagram.begin() + static_cast<ptrdiff_t>(length), n, uint8_t{0});
    return n;
}

} // namespace

void Engine::run() {
#ifdef __linux__
    prctl(PR_SET_TIMERSLACK, 1000); // ns: pacing and loss timers are of microseconds
    prctl(PR_SET_NAME, "mesh-quic");
#endif
    uint64_t until = 0;
    while (until == 0 || now_us_ < until) {
        advance();
        std::vector<std::function<void()>> work;
        {
            std::lock_guard guard(lock_);
            work.swap(work_);
        }
        for (auto & each : work) {
            each();
        }
        deliver(); // to splices that have just begun
        if (stopping_ && until == 0) {
            until = now_us_ + goodbye_us;
            for (auto & [handle, link] : live_) {
                link->close("leaving");
            }
        }
        bool more = receive();
        shed();
        serve_splices();
        more = send() || more;
        deliver(); // what came before its keys did, and was read just now
        reap();
        int64_t delay = more ? 0 : retry_send_us;
        if (!more && socket_.nothing_queued()) {
            delay = picoquic_get_next_wake_delay(quic_.get(), now_us_, longest_sleep_us);
        }
        if (until != 0) {
            bool quiet = !more && socket_.nothing_queued();
            until = quiet && delay > 0 ? now_us_ : until; // all good-byes are out
            delay = std::min<int64_t>(delay, 1000);
        }
        wait(delay);
    }
}

void Engine::advance() {
    auto now = std::chrono::steady_clock::now().time_since_epoch();
    now_us_ = static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(now).count());
}

void Engine::wait(int64_t delay_us) {
    polled_.clear();
    polled_.push_back({wake_.fd(), POLLIN, 0});
    polled_.push_back({socket_.fd(), static_cast<short>(socket_.full() ? POLLIN | POLLOUT : POLLIN), 0});
    for (auto & stream : spliced_) {
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
        std::lock_guard guard(lock_);
        if (!work_.empty()) {
            delay_us = 0;
        }
    }
#ifdef __linux__
    timespec timeout{delay_us / 1'000'000, delay_us % 1'000'000 * 1000};
    ppoll(polled_.data(), polled_.size(), &timeout, nullptr);
#else
    poll(polled_.data(), static_cast<nfds_t>(polled_.size()), static_cast<int>((delay_us + 999) / 1000));
#endif
    sleeping_ = false;
    if (polled_[0].revents != 0) {
        wake_.drain();
    }
}

bool Engine::receive() {
    for (int batch = 0; batch < batches_between_looks; ++batch) {
        auto received = socket_.receive();
        advance();
        for (Datagrams & each : received) {
            picoquic_cnx_t * cnx = nullptr;
            auto bytes = each.bytes;
            while (!bytes.empty()) {
                size_t n = std::min(bytes.size(), each.segment_size);
                picoquic_incoming_packet_ex(quic_.get(), bytes.data(), n, reinterpret_cast<sockaddr *>(&each.peer),
                                            reinterpret_cast<sockaddr *>(&each.local), static_cast<int>(each.interface),
                                            0, &cnx, now_us_);
                bytes = bytes.subspan(n);
            }
            deliver();
            if (auto * link = link_of(cnx)) {
                link->datagrams_received(each.bytes.size());
            }
        }
        if (!socket_.more()) {
            return false;
        }
    }
    return true;
}

// When all together is too much, who makes us hold most for least goes; when it is far too much, also one of those
// whose windows allow it.
void Engine::shed() {
    auto waiting = [this] { return quic_->nb_data_nodes_allocated - quic_->nb_data_nodes_in_pool; };
    while (waiting() > max_waiting) {
        picoquic_cnx_t * worst = nullptr;
        int64_t most = waiting() > 4 * max_waiting ? INT64_MIN : 0;
        for (auto * cnx = picoquic_get_first_cnx(quic_.get()); cnx != nullptr; cnx = picoquic_get_next_cnx(cnx)) {
            if (int64_t n = excess(cnx); n > most) {
                most = n;
                worst = cnx;
            }
        }
        if (worst == nullptr) {
            return;
        }
        if (auto * link = link_of(worst)) {
            link->failed("too much came out of order");
            link->gone();
        }
        picoquic_set_callback(worst, called, nullptr);
        picoquic_delete_cnx(worst);
    }
}

bool Engine::send() {
    for (int batch = 0; batch < batches_between_looks; ++batch) {
        for (auto space = socket_.space(); !space.empty(); space = socket_.space()) {
            Datagrams next;
            size_t length = 0;
            int interface = 0;
            picoquic_cnx_t * cnx = nullptr;
            advance();
            int result =
                picoquic_prepare_next_packet_ex(quic_.get(), now_us_, space.data(), space.size(), &length, &next.peer,
                                                &next.local, &interface, nullptr, &cnx, &next.segment_size);
            if (result != 0 || length == 0) {
                break;
            }
            if (cnx != nullptr) {
                // picoquic's short cut for the later packets of a batch forgets the loss timer when the last one is
                // full (sender.c, picoquic_prepare_packet_ready_fast): so it is asked once more, from the beginning.
                picoquic_reinsert_by_wake_time(quic_.get(), cnx, now_us_);
            }
            length += padding(cnx, space, length);
            next.bytes = space.first(length);
            next.segment_size = next.segment_size == 0 ? length : next.segment_size;
            if (auto * link = link_of(cnx)) {
                link->bytes_sent += length;
                if (link->dialled()) {
                    next.local = {}; // as the system routes it: the address that it once had may be gone
                }
            }
            socket_.queue(next);
        }
        if (socket_.nothing_queued()) {
            return false;
        }
        if (!socket_.send()) {
            return false; // poll says when there is room
        }
    }
    return true;
}

void Engine::touch(Stream & stream) {
    if (!stream.touched) {
        stream.touched = true;
        touched_.push_back(stream.shared_from_this());
    }
}

// Once for all packets that came together: a reader that is woken by the first of them finds little.
void Engine::deliver() {
    for (auto & stream : touched_) {
        stream->touched = false;
        if (stream->splice) {
            flush(*stream);
            continue;
        }
        std::lock_guard guard(lock_);
        if (stream->reader_waits) {
            stream->reader_waits = false;
            tell_locked({Event::What::readable, stream->link_handle, stream->handle, 0, ""});
        }
    }
    touched_.clear();
}

void Engine::flush(Stream & stream) {
    size_t n = stream.splice->flush();
    if (stream.link != nullptr) {
        stream.link->taken(stream, n);
    }
}

void Engine::serve_splices() {
    for (size_t i = 0; i < spliced_.size(); ++i) {
        Stream & stream = *spliced_[i];
        Splice & splice = *stream.splice;
        short happened = i + 2 < polled_.size() && polled_[i + 2].fd == splice.fd() ? polled_[i + 2].revents : 0;
        if ((happened & ~POLLIN) != 0) {
            flush(stream);
        }
        if (happened != 0 && stream.link != nullptr && !stream.splice_sends) {
            stream.splice_sends = true;
            stream.link->activate(stream);
        }
        if (splice.broken() && stream.link != nullptr) {
            stream.link->drop(stream, "the other end of the splice is gone");
        }
    }
    std::erase_if(spliced_, [this](const std::shared_ptr<Stream> & stream) {
        if (stream->link != nullptr) {
            return false;
        }
        Splice & splice = *stream->splice;
        if (stream->error.empty() && !splice.broken() && splice.wants_to_write()) {
            return false; // both sides have said all, and this one has not yet heard it
        }
        stream->splice.reset();
        tell({Event::What::spliced, stream->link_handle, stream->handle, 0, ""});
        return true;
    });
}

void Engine::reap() {
    std::erase_if(live_, [this](auto & entry) {
        auto & link = entry.second;
        bool over = link->cnx() == nullptr;
        if (!over && link->dialled() && picoquic_get_cnx_state(link->cnx()) == picoquic_state_disconnected) {
            picoquic_delete_cnx(link->cnx()); // those that others have dialled picoquic deletes itself
            over = true;
        }
        if (link->closed()) {
            std::lock_guard guard(lock_);
            links_.erase(entry.first);
        }
        return over;
    });
}

// --- picoquic's callbacks ---

Link * Engine::accepted(picoquic_cnx_t * cnx) {
    uint64_t handle;
    {
        std::lock_guard guard(lock_);
        handle = next_++;
    }
    auto link = std::make_shared<Link>(*this, handle, cnx, false);
    sockaddr * peer = nullptr;
    picoquic_get_peer_addr(cnx, &peer);
    link->peer_address = Link::readable(peer);
    picoquic_set_callback(cnx, called, link.get());
    live_[handle] = link;
    std::lock_guard guard(lock_);
    links_[handle] = link;
    return link.get();
}

// None until a stranger has shown its key, and none once it is gone.
Link * Engine::link_of(picoquic_cnx_t * cnx) {
    void * context = cnx == nullptr ? nullptr : picoquic_get_callback_context(cnx);
    return context == this ? nullptr : static_cast<Link *>(context);
}

int Engine::called(picoquic_cnx_t * cnx, uint64_t stream_id, uint8_t * bytes, size_t length,
                   picoquic_call_back_event_t event, void * context, void * stream) {
    auto * engine = picoquic_get_default_callback_context(picoquic_get_quic_ctx(cnx));
    if (context == nullptr) {
        return 0; // nobody to tell
    }
    if (context == engine) { // of a stranger that has proved no key; if it comes so far, -1 ends it
        return event == picoquic_callback_ready ? -1 : 0;
    }
    auto * link = static_cast<Link *>(context);
    int result = link->called(stream_id, bytes, length, event, static_cast<Stream *>(stream));
    if (picoquic_get_cnx_state(cnx) == picoquic_state_disconnected && !link->dialled()) {
        link->gone();
        picoquic_set_callback(cnx, called, nullptr);
    }
    return result;
}

} // namespace meshllm::quic

#include "quic/engine.h"

#include "quic/congestion.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <fcntl.h>
#include <picoquic_internal.h>
#include <picoquic_utils.h>
#include <system_error>
#include <unistd.h>
#include <utility>

#ifdef __linux__
#include <sys/prctl.h>
#endif

namespace meshllm::quic {

namespace {

constexpr uint32_t max_connections = 512, half_open_before_retry = 32;
constexpr uint64_t max_streams = 256;   // that a peer may have open at once
constexpr uint64_t max_data = 32 << 20; // of all streams of a link, ahead of what has come in order
constexpr uint32_t max_mtu = 1500;
constexpr int batches_between_looks = 4;
constexpr int64_t longest_sleep_us = 10'000'000;
constexpr uint64_t goodbye_us = 50'000;
constexpr uint8_t round_robin = 8; // a priority of picoquic.h: streams of one link take turns

uint64_t steady_us() {
    auto now = std::chrono::steady_clock::now().time_since_epoch();
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(now).count());
}

void make_pipe(channel::Fd & out, channel::Fd & in) {
    int ends[2];
    if (pipe(ends) != 0) {
        throw std::system_error(errno, std::generic_category(), "pipe");
    }
    out = channel::Fd(ends[0]);
    in = channel::Fd(ends[1]);
    for (int end : ends) {
        fcntl(end, F_SETFL, O_NONBLOCK);
        fcntl(end, F_SETFD, FD_CLOEXEC);
    }
}

void ring(const channel::Fd & pipe) {
    uint8_t byte = 0;
    [[maybe_unused]] ssize_t n = ::write(pipe.get(), &byte, 1); // full: it rings already
}

void drain(const channel::Fd & pipe) {
    uint8_t bytes[256];
    while (::read(pipe.get(), bytes, sizeof(bytes)) == sizeof(bytes)) {
    }
}

} // namespace

Engine::Engine(const Config & config) : config_(config), socket_(config.port), now_us_(steady_us()) {
    make_pipe(event_out_, event_in_);
    make_pipe(wake_out_, wake_in_);
    auto * control = with_room_for_messages(config.congestion_control);
    auto seed = reset_seed(config.identity);
    quic_.reset(picoquic_create(max_connections, nullptr, nullptr, nullptr, config_.alpn.c_str(), called,
                                this, nullptr, nullptr, seed.data(), now_us_, &now_us_, nullptr, nullptr, 0));
    if (!quic_) {
        throw std::runtime_error("picoquic cannot start");
    }
    tls_ = std::make_unique<Tls>(
        quic_.get(), config.identity, [this](picoquic_cnx_t * cnx, const PublicKey & key) {
            void * context = picoquic_get_callback_context(cnx);
            auto * link = context == this ? accepted(cnx) : static_cast<Link *>(context);
            link->key_shown(key);
        });
    picoquic_enforce_client_only(quic_.get(), 0);
    picoquic_set_default_congestion_algorithm(quic_.get(), control);
    picoquic_set_default_idle_timeout(quic_.get(), config.idle_timeout_us / 1000);
    picoquic_set_default_handshake_timeout(quic_.get(), config.handshake_timeout_us);
    picoquic_set_max_half_open_retry_threshold(quic_.get(), half_open_before_retry);
    picoquic_set_packet_train_mode(quic_.get(),
                                   1); // pacing waits for some packets' worth: a wake-up for each costs more
    picoquic_set_mtu_max(quic_.get(), max_mtu);
    picoquic_set_default_pmtud_policy(quic_.get(), picoquic_pmtud_required);
    picoquic_set_default_priority(quic_.get(), round_robin);
    picoquic_set_max_data_control(quic_.get(), max_data);
    picoquic_disable_port_blocking(quic_.get(), 1); // nodes choose their ports themselves
    for (auto parameter :
         {picoquic_tp_initial_max_stream_data_bidi_local, picoquic_tp_initial_max_stream_data_bidi_remote}) {
        picoquic_set_default_tp_value(quic_.get(), parameter, Window::initial);
    }
    picoquic_set_default_tp_value(quic_.get(), picoquic_tp_initial_max_streams_bidi, max_streams);
    picoquic_set_default_tp_value(quic_.get(), picoquic_tp_initial_max_streams_uni, 0);
    thread_ = std::thread([this] { run(); });
}

// --- what other threads call ---

void Engine::post(std::function<void()> work) {
    {
        std::lock_guard guard(lock_);
        work_.push_back(std::move(work));
    }
    if (sleeping_.exchange(false)) {
        ring(wake_in_);
    }
}

std::vector<Event> Engine::take_events() {
    std::lock_guard guard(lock_);
    drain(event_out_);
    return std::exchange(events_, {});
}

void Engine::tell_locked(Event event) {
    if (events_.empty()) {
        ring(event_in_);
    }
    events_.push_back(std::move(event));
}

void Engine::tell(Event event) {
    std::lock_guard guard(lock_);
    tell_locked(std::move(event));
}

std::shared_ptr<Stream> Engine::find(uint64_t stream) {
    auto found = streams_.find(stream);
    return found == streams_.end() ? nullptr : found->second;
}

uint64_t Engine::dial(const sockaddr_storage & address) {
    uint64_t handle;
    {
        std::lock_guard guard(lock_);
        handle = next_++;
    }
    post([this, handle, address] {
        auto * to = reinterpret_cast<const sockaddr *>(&address);
        auto * cnx =
            picoquic_create_cnx(quic_.get(), picoquic_null_connection_id, picoquic_null_connection_id, to,
                                now_us_, 0, nullptr, config_.alpn.c_str(), 1);
        if (cnx == nullptr) {
            tell({Event::What::closed, handle, 0, 0, "too many connections"});
            return;
        }
        auto link = std::make_shared<Link>(*this, handle, cnx, true);
        link->peer_address = Link::readable(to);
        picoquic_set_callback(cnx, called, link.get());
        live_[handle] = link;
        {
            std::lock_guard guard(lock_);
            links_[handle] = link;
        }
        if (picoquic_start_client_cnx(cnx) != 0) {
            link->failed("the connection cannot be started");
        }
    });
    return handle;
}

void Engine::close(uint64_t link, const std::string & reason, bool at_once) {
    post([this, link, reason, at_once] {
        auto found = live_.find(link);
        if (found == live_.end()) {
            return;
        }
        if (!at_once) {
            found->second->close(reason);
            return;
        }
        found->second->failed(reason);
        if (found->second->cnx() != nullptr) {
            picoquic_close_immediate(found->second->cnx());
        }
    });
}

LinkState Engine::state(uint64_t link) {
    std::lock_guard guard(lock_);
    auto found = links_.find(link);
    if (found == links_.end()) {
        return {};
    }
    Link & it = *found->second;
    return {it.rtt_us, it.bytes_sent, it.bytes_received, it.n_streams, it.peer_address};
}

uint64_t Engine::open(uint64_t link, uint8_t kind) {
    std::shared_ptr<Stream> stream;
    {
        std::lock_guard guard(lock_);
        if (!links_.contains(link)) {
            return 0;
        }
        stream = std::make_shared<Stream>(next_++, link);
        streams_[stream->handle] = stream;
        stream->out.push({&kind, 1});
        stream->pending = true;
    }
    post([this, link, stream] {
        auto found = live_.find(link);
        if (found != live_.end()) {
            found->second->start(stream);
            found->second->activate(*stream);
        }
        if (stream->link == nullptr) {
            std::lock_guard guard(lock_);
            stream->error = "the link is closed";
            tell_locked({Event::What::readable, link, stream->handle, 0, ""});
        }
    });
    return stream->handle;
}

bool Engine::write(uint64_t handle, std::span<const uint8_t> bytes) {
    constexpr size_t many = 1 << 20;
    std::unique_lock guard(lock_);
    auto stream = find(handle);
    if (!stream || !stream->error.empty() || stream->finished) {
        throw StreamError(!stream || stream->error.empty() ? "written after its end" : stream->error);
    }
    if (bytes.empty()) {
        return false;
    }
    stream->out.push(bytes);
    bool full = stream->writer_waits = stream->out.size() > many;
    if (!stream->pending) {
        stream->pending = true;
        guard.unlock();
        post([stream] {
            if (stream->link != nullptr) {
                stream->link->activate(*stream);
            }
        });
    }
    return full;
}

Bytes Engine::read(uint64_t handle, size_t limit, bool & ended) {
    constexpr size_t worth_saying = 64 << 10;
    std::unique_lock guard(lock_);
    auto stream = find(handle);
    if (!stream) {
        throw StreamError("the stream is gone");
    }
    Bytes out(std::min(limit, stream->in.size()));
    stream->in.take(out);
    ended = out.empty() && stream->ended;
    stream->reader_waits = out.empty() && !ended;
    if (stream->reader_waits && !stream->error.empty()) {
        throw StreamError(stream->error);
    }
    stream->unreported += out.size();
    if (stream->unreported >= worth_saying) {
        size_t n = std::exchange(stream->unreported, 0);
        guard.unlock();
        post([stream, n] {
            if (stream->link != nullptr) {
                stream->link->taken(*stream, n);
            }
        });
    }
    return out;
}

void Engine::finish(uint64_t handle) {
    std::unique_lock guard(lock_);
    auto stream = find(handle);
    if (!stream || stream->finished || !stream->error.empty()) {
        return;
    }
    stream->finished = stream->pending = true;
    guard.unlock();
    post([stream] {
        if (stream->link != nullptr) {
            stream->link->activate(*stream);
        }
    });
}

void Engine::abort(uint64_t handle) {
    std::unique_lock guard(lock_);
    auto stream = find(handle);
    if (!stream || (stream->finished && stream->ended)) {
        return;
    }
    stream->error = stream->error.empty() ? "the stream was dropped" : stream->error;
    guard.unlock();
    post([stream] {
        if (stream->link != nullptr) {
            stream->link->drop(*stream, "the stream was dropped");
        }
    });
}

void Engine::splice(uint64_t handle, int fd) {
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    auto owned = std::make_shared<channel::Fd>(fd);
    std::unique_lock guard(lock_);
    auto stream = find(handle);
    guard.unlock();
    post([this, stream, handle, owned] {
        if (!stream || stream->link == nullptr) {
            tell({Event::What::spliced, 0, handle, 0, ""});
            return;
        }
        stream->splice.emplace(owned->release());
        spliced_.push_back(stream);
        stream->link->begin_splice(*stream);
    });
}

void Engine::release(uint64_t handle) {
    std::unique_lock guard(lock_);
    auto stream = find(handle);
    if (!stream) {
        return;
    }
    streams_.erase(handle);
    stream->released = true;
    stream->in.clear();
    if (!stream->finished && stream->error.empty()) {
        guard.unlock();
        post([stream] {
            if (stream->link != nullptr) {
                stream->link->drop(*stream, "the stream was dropped");
            }
        });
    }
}

void Engine::stop() {
    if (!thread_.joinable()) {
        return;
    }
    post([this] { stopping_ = true; });
    thread_.join();
    for (auto & [handle, link] : live_) {
        if (link->cnx() != nullptr) {
            picoquic_set_callback(link->cnx(), called, nullptr);
        }
    }
    quic_.reset();
    live_.clear();
    spliced_.clear();
}

// --- the I/O thread ---

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
        serve_splices();
        more = send() || more;
        reap();
        int64_t delay = more ? 0 : picoquic_get_next_wake_delay(quic_.get(), now_us_, longest_sleep_us);
        if (until != 0) {
            bool quiet = !more && socket_.nothing_queued();
            until = quiet && delay > 0 ? now_us_ : until; // all good-byes are out
            delay = std::min<int64_t>(delay, 1000);
        }
        wait(delay);
    }
}

void Engine::advance() {
    now_us_ = std::max(now_us_, steady_us());
}

void Engine::wait(int64_t delay_us) {
    polled_.clear();
    polled_.push_back({wake_out_.get(), POLLIN, 0});
    short socket_events = socket_.nothing_queued() ? POLLIN : POLLIN | POLLOUT;
    polled_.push_back({socket_.fd(), socket_events, 0});
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
        drain(wake_out_);
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
                picoquic_incoming_packet_ex(quic_.get(), bytes.data(), n,
                                            reinterpret_cast<sockaddr *>(&each.peer),
                                            reinterpret_cast<sockaddr *>(&each.local),
                                            static_cast<int>(each.interface), 0, &cnx, now_us_);
                bytes = bytes.subspan(n);
            }
            deliver();
            if (cnx != nullptr && picoquic_get_callback_context(cnx) != this) {
                auto * link = static_cast<Link *>(picoquic_get_callback_context(cnx));
                link->bytes_received += each.bytes.size();
                link->rtt_us = picoquic_get_rtt(cnx);
            }
        }
        if (!socket_.more()) {
            return false;
        }
    }
    return true;
}

bool Engine::send() {
    for (int batch = 0; batch < batches_between_looks; ++batch) {
        for (auto space = socket_.space(); !space.empty(); space = socket_.space()) {
            Datagrams next;
            size_t length = 0;
            int interface = 0;
            picoquic_cnx_t * cnx = nullptr;
            advance();
            int result = picoquic_prepare_next_packet_ex(quic_.get(), now_us_, space.data(), space.size(),
                                                         &length, &next.peer, &next.local, &interface,
                                                         nullptr, &cnx, &next.segment_size);
            if (result != 0 || length == 0) {
                break;
            }
            if (cnx != nullptr) {
                // picoquic's short cut for the later packets of a batch forgets the loss timer when the last
                // one is full (sender.c, picoquic_prepare_packet_ready_fast): so it is asked once more, from
                // the beginning.
                picoquic_reinsert_by_wake_time(quic_.get(), cnx, now_us_);
            }
            next.bytes = space.first(length);
            next.segment_size = next.segment_size == 0 ? length : next.segment_size;
            socket_.queue(next);
            if (cnx != nullptr && picoquic_get_callback_context(cnx) != this) {
                static_cast<Link *>(picoquic_get_callback_context(cnx))->bytes_sent += length;
            }
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
        short happened =
            i + 2 < polled_.size() && polled_[i + 2].fd == splice.fd() ? polled_[i + 2].revents : 0;
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

int Engine::called(picoquic_cnx_t * cnx, uint64_t stream_id, uint8_t * bytes, size_t length,
                   picoquic_call_back_event_t event, void * context, void * stream) {
    if (context == nullptr) {
        return 0;
    }
    // Until a stranger has shown its key there is no link of it, and nothing to tell.
    auto * engine = picoquic_get_default_callback_context(picoquic_get_quic_ctx(cnx));
    if (context == engine) {
        return 0;
    }
    auto * link = static_cast<Link *>(context);
    int result = link->called(stream_id, bytes, length, event, static_cast<Stream *>(stream));
    if (event == picoquic_callback_close && picoquic_get_cnx_state(cnx) == picoquic_state_disconnected &&
        !link->dialled()) {
        link->gone();
        picoquic_set_callback(cnx, called, nullptr);
    }
    return result;
}

} // namespace meshllm::quic

#include "quic/endpoint.h"

#include "quic/congestion.h"

#include <algorithm>
#include <fcntl.h>
#include <picoquic_utils.h>
#include <utility>

namespace meshllm::quic {

namespace {

constexpr uint32_t max_connections = 512, half_open_before_retry = 32;
constexpr uint64_t max_streams = 512;   // that a peer may have open at once, until half of them have ended
constexpr uint64_t max_data = 32 << 20; // of all streams of a link, beyond what has arrived in order
constexpr uint32_t max_mtu = 1500;
constexpr uint8_t round_robin = 8;            // a priority of picoquic.h: the streams of a link take turns
constexpr size_t high_watermark = 1 << 20;    // of a stream's unsent bytes: its writer should wait
constexpr size_t report_threshold = 64 << 10; // consumed bytes that are worth waking the I/O thread for
constexpr const char * dropped = "the stream was reset here";

} // namespace

Endpoint::Endpoint(const Config & config)
    : config_(config), shared_(config.max_kinds, config.keep_alive_us), socket_(config.port) {
    update_clock();
    configure();
    thread_ = std::thread([this] { run(); });
}

void Endpoint::configure() {
    const auto * control = with_room_for_messages(config_.congestion_control);
    auto seed = reset_seed(config_.identity);
    quic_.reset(picoquic_create(max_connections, nullptr, nullptr, nullptr, config_.alpn.c_str(), on_event, this,
                                nullptr, nullptr, seed.data(), shared_.now_us, &shared_.now_us, nullptr, nullptr, 0));
    if (!quic_) {
        throw std::runtime_error("picoquic cannot start");
    }
    tls_ = std::make_unique<Tls>(quic_.get(), config_.identity, [this](picoquic_cnx_t * cnx, const PublicKey & key) {
        Link * known = link_of(cnx);
        (known != nullptr ? *known : accept(cnx)).on_key_proved(key);
    });
    picoquic_enforce_client_only(quic_.get(), 0);
    picoquic_set_default_congestion_algorithm(quic_.get(), control);
    picoquic_set_default_idle_timeout(quic_.get(), config_.idle_timeout_us / 1000);
    picoquic_set_default_handshake_timeout(quic_.get(), config_.handshake_timeout_us);
    picoquic_set_max_half_open_retry_threshold(quic_.get(), half_open_before_retry);
    // Pacing waits for several packets' worth of time: waking up for each packet costs more.
    picoquic_set_packet_train_mode(quic_.get(), 1);
    picoquic_set_mtu_max(quic_.get(), max_mtu);
    picoquic_set_default_pmtud_policy(quic_.get(), picoquic_pmtud_required);
    picoquic_set_default_priority(quic_.get(), round_robin);
    picoquic_set_max_data_control(quic_.get(), max_data);
    picoquic_disable_port_blocking(quic_.get(), 1); // nodes choose their ports themselves
    for (const auto parameter :
         {picoquic_tp_initial_max_stream_data_bidi_local, picoquic_tp_initial_max_stream_data_bidi_remote}) {
        picoquic_set_default_tp_value(quic_.get(), parameter, Window::initial);
    }
    picoquic_set_default_tp_value(quic_.get(), picoquic_tp_initial_max_streams_bidi, max_streams);
    picoquic_set_default_tp_value(quic_.get(), picoquic_tp_initial_max_streams_uni, 0);
}

// --- work for the I/O thread ---

void Endpoint::post(std::function<void()> work) {
    {
        std::lock_guard lock(shared_.mutex);
        work_.push_back(std::move(work));
    }
    if (sleeping_.exchange(false)) {
        wakeup_.notify();
    }
}

void Endpoint::post_activate(const std::shared_ptr<Stream> & stream) {
    post([stream] {
        if (stream->link != nullptr) {
            stream->link->activate(*stream);
        }
    });
}

void Endpoint::post_drop(const std::shared_ptr<Stream> & stream) {
    post([stream] {
        if (stream->link != nullptr) {
            stream->link->drop(*stream, dropped);
        }
    });
}

// --- links, from any thread ---

uint64_t Endpoint::dial(const sockaddr_storage & address) {
    const uint64_t handle = shared_.new_handle();
    post([this, handle, address] {
        const auto * peer = reinterpret_cast<const sockaddr *>(&address);
        auto * cnx = picoquic_create_cnx(quic_.get(), picoquic_null_connection_id, picoquic_null_connection_id, peer,
                                         shared_.now_us, 0, nullptr, config_.alpn.c_str(), 1);
        if (cnx == nullptr) {
            shared_.emit({.type = Event::Type::closed, .link = handle, .reason = "too many connections"});
            return;
        }
        Link & link = add(handle, cnx, peer, true);
        if (picoquic_start_client_cnx(cnx) != 0) {
            link.fail("the connection cannot be started");
        }
    });
    return handle;
}

void Endpoint::close(uint64_t link, const std::string & reason, bool at_once) {
    post([this, link, reason, at_once] {
        const auto found = live_.find(link);
        if (found == live_.end()) {
            return;
        }
        if (!at_once) {
            found->second->close(reason);
            return;
        }
        found->second->fail(reason);
        if (found->second->cnx() != nullptr) {
            picoquic_close_immediate(found->second->cnx());
        }
    });
}

LinkState Endpoint::state(uint64_t link) {
    std::lock_guard lock(shared_.mutex);
    const auto found = links_.find(link);
    if (found == links_.end()) {
        return {};
    }
    const Link & it = *found->second;
    return {it.rtt_us, it.bytes_sent, it.bytes_received, it.n_streams, it.peer_address};
}

// --- streams, from any thread ---

uint64_t Endpoint::open(uint64_t link, uint8_t kind) {
    std::shared_ptr<Stream> stream;
    {
        std::lock_guard lock(shared_.mutex);
        if (!links_.contains(link)) {
            return 0;
        }
        stream = std::make_shared<Stream>(shared_.new_handle_locked(), link);
        shared_.streams[stream->handle] = stream;
        stream->out.push({&kind, sizeof(kind)});
        stream->pending = true;
    }
    post([this, link, stream] {
        const auto found = live_.find(link);
        if (found != live_.end()) {
            found->second->start(stream);
            found->second->activate(*stream);
        }
        if (stream->link == nullptr) {
            std::lock_guard lock(shared_.mutex);
            shared_.fail_locked(*stream, "the link is closed");
        }
    });
    return stream->handle;
}

bool Endpoint::write(uint64_t handle, std::span<const uint8_t> bytes) {
    std::unique_lock lock(shared_.mutex);
    const auto stream = shared_.find_locked(handle);
    if (!stream || !stream->error.empty() || stream->finished) {
        throw StreamError(!stream || stream->error.empty() ? "the stream is already finished" : stream->error);
    }
    if (bytes.empty()) {
        return false;
    }
    stream->out.push(bytes);
    const bool full = stream->writer_waits = stream->out.size() > high_watermark;
    if (!std::exchange(stream->pending, true)) {
        lock.unlock();
        post_activate(stream);
    }
    return full;
}

Bytes Endpoint::read(uint64_t handle, size_t limit, bool & ended) {
    std::unique_lock lock(shared_.mutex);
    const auto stream = shared_.find_locked(handle);
    if (!stream) {
        throw StreamError("the stream was released");
    }
    Bytes out(std::min(limit, stream->in.size()));
    stream->in.read(out);
    ended = out.empty() && stream->ended;
    stream->reader_waits = out.empty() && !ended;
    if (stream->reader_waits && !stream->error.empty()) {
        throw StreamError(stream->error);
    }
    stream->unreported += out.size();
    if (stream->unreported >= report_threshold) {
        const size_t n = std::exchange(stream->unreported, 0);
        lock.unlock();
        post([stream, n] {
            if (stream->link != nullptr) {
                stream->link->consumed(*stream, n);
            }
        });
    }
    return out;
}

void Endpoint::finish(uint64_t handle) {
    std::unique_lock lock(shared_.mutex);
    const auto stream = shared_.find_locked(handle);
    if (!stream || stream->finished || !stream->error.empty()) {
        return;
    }
    stream->finished = stream->pending = true;
    lock.unlock();
    post_activate(stream);
}

void Endpoint::abort(uint64_t handle) {
    std::unique_lock lock(shared_.mutex);
    const auto stream = shared_.find_locked(handle);
    if (!stream || (stream->finished && stream->ended)) {
        return;
    }
    stream->error = stream->error.empty() ? dropped : stream->error;
    lock.unlock();
    post_drop(stream);
}

void Endpoint::splice(uint64_t handle, int fd) {
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    const auto owned = std::make_shared<channel::Fd>(fd);
    std::unique_lock lock(shared_.mutex);
    const auto stream = shared_.find_locked(handle);
    lock.unlock();
    post([this, stream, handle, owned] {
        if (!stream || stream->link == nullptr) {
            shared_.emit({.type = Event::Type::spliced, .stream = handle});
            return;
        }
        stream->splice.emplace(owned->release());
        spliced_.push_back(stream);
        stream->link->begin_splice(*stream);
    });
}

void Endpoint::release(uint64_t handle) {
    std::unique_lock lock(shared_.mutex);
    const auto stream = shared_.find_locked(handle);
    if (!stream) {
        return;
    }
    shared_.streams.erase(handle);
    stream->released = true;
    stream->in.clear();
    if (!stream->finished && stream->error.empty()) {
        lock.unlock();
        post_drop(stream);
    }
}

void Endpoint::stop() {
    if (!thread_.joinable()) {
        return;
    }
    post([this] { stopping_ = true; });
    thread_.join();
    for (const auto & [handle, link] : live_) {
        if (link->cnx() != nullptr) {
            picoquic_set_callback(link->cnx(), on_event, nullptr);
        }
    }
    quic_.reset();
    live_.clear();
    spliced_.clear();
}

} // namespace meshllm::quic

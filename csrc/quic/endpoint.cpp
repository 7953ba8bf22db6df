#include "quic/endpoint.h"

#include "quic/congestion.h"

#include <algorithm>
#include <fcntl.h>
#include <picoquic_internal.h>
#include <picoquic_utils.h>
#include <utility>

namespace meshllm::quic {

namespace {

constexpr uint32_t max_connections = 512, half_open_before_retry = 32;
constexpr uint64_t max_streams = 512;   // that a peer may have open at once, until half of them have ended
constexpr uint64_t max_data = 32 << 20; // of all streams of a link, ahead of what has come in order
constexpr uint32_t max_mtu = 1500;
constexpr uint8_t round_robin = 8; // a priority of picoquic.h: streams of one link take turns

} // namespace

Engine::Engine(const Config & config) : config_(config), socket_(config.port) {
    advance();
    auto * control = with_room_for_messages(config.congestion_control);
    auto seed = reset_seed(config.identity);
    quic_.reset(picoquic_create(max_connections, nullptr, nullptr, nullptr, config_.alpn.c_str(), called, this, nullptr,
                                nullptr, seed.data(), now_us_, &now_us_, nullptr, nullptr, 0));
    if (!quic_) {
        throw std::runtime_error("picoquic cannot start");
    }
    tls_ = std::make_unique<Tls>(quic_.get(), config.identity, [this](picoquic_cnx_t * cnx, const PublicKey & key) {
        auto * known = link_of(cnx);
        auto * link = known != nullptr ? known : accepted(cnx);
        link->key_proved(key);
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
        wake_.notify();
    }
}

std::vector<Event> Engine::take_events() {
    std::lock_guard guard(lock_);
    told_.drain();
    return std::exchange(events_, {});
}

void Engine::tell_locked(Event event) {
    if (events_.empty()) {
        told_.notify();
    }
    events_.push_back(std::move(event));
}

void Engine::tell(Event event) {
    std::lock_guard guard(lock_);
    tell_locked(std::move(event));
}

void Engine::fail_locked(Stream & stream, const std::string & reason) {
    stream.error = stream.error.empty() ? reason : stream.error;
    stream.out.clear();
    for (auto [waits, what] : {std::pair(&stream.reader_waits, Event::What::readable),
                               std::pair(&stream.writer_waits, Event::What::writable)}) {
        if (std::exchange(*waits, false)) {
            tell_locked({what, stream.link_handle, stream.handle, 0, ""});
        }
    }
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
        auto * cnx = picoquic_create_cnx(quic_.get(), picoquic_null_connection_id, picoquic_null_connection_id, to,
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
            fail_locked(*stream, "the link is closed");
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

} // namespace meshllm::quic

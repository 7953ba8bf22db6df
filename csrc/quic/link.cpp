#include "quic/link.h"

#include "quic/endpoint.h"

#include <algorithm>
#include <arpa/inet.h>
#include <cstdio>
#include <cstring>
#include <picoquic_internal.h>

namespace meshllm::quic {

namespace {

constexpr uint64_t close_code = 0x100;
constexpr size_t few_left = 512 << 10; // of a writer's bytes: it may go on
constexpr size_t longest_reason = 200;

std::string hexadecimal(const PublicKey & key) {
    std::string out;
    for (uint8_t byte : key) {
        char digits[3];
        std::snprintf(digits, sizeof(digits), "%02x", byte);
        out += digits;
    }
    return out;
}

} // namespace

Link::Link(Engine & engine, uint64_t handle, picoquic_cnx_t * cnx, bool dialled)
    : handle(handle), engine_(engine), cnx_(cnx), dialled_(dialled) {}

std::string Link::readable(const sockaddr * address) {
    char host[INET6_ADDRSTRLEN] = "", text[INET6_ADDRSTRLEN + 16];
    if (address->sa_family == AF_INET) {
        auto * v4 = reinterpret_cast<const sockaddr_in *>(address);
        inet_ntop(AF_INET, &v4->sin_addr, host, sizeof(host));
        std::snprintf(text, sizeof(text), "%s:%u", host, ntohs(v4->sin_port));
        return text;
    }
    auto * v6 = reinterpret_cast<const sockaddr_in6 *>(address);
    bool mapped = IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr);
    inet_ntop(mapped ? AF_INET : AF_INET6, v6->sin6_addr.s6_addr + (mapped ? 12 : 0), host, sizeof(host));
    std::snprintf(text, sizeof(text), mapped ? "%s:%u" : "[%s]:%u", host, ntohs(v6->sin6_port));
    return text;
}

int Link::called(uint64_t stream_id, uint8_t * bytes, size_t length, picoquic_call_back_event_t event,
                 Stream * stream) {
    if (closed_ && event != picoquic_callback_close) {
        return 0; // the streams are gone, whatever picoquic remembers of them
    }
    switch (event) {
    case picoquic_callback_almost_ready:
        if (dialled_) {
            linked(); // the other side's proof has been checked; it checks ours as it reads on
        }
        break;
    case picoquic_callback_ready:
        linked();
        for (auto & [id, each] : streams_) {
            grant(*each);
        }
        break;
    case picoquic_callback_stream_data:
    case picoquic_callback_stream_fin: {
        linked(); // 1-RTT data can be read, so the handshake is complete (RFC 9001 section 5.7)
        std::span<const uint8_t> data(bytes, length);
        if (stream == nullptr) {
            stream = accept(stream_id, data);
        }
        if (stream != nullptr) {
            received(*stream, data, event == picoquic_callback_stream_fin);
        }
        break;
    }
    case picoquic_callback_prepare_to_send:
        return stream == nullptr ? -1 : provide(*stream, bytes, length);
    case picoquic_callback_stream_reset:
        if (auto * it = picoquic_find_stream(cnx_, stream_id)) {
            // What never came counts as come (RFC 9000 section 4.5). picoquic does not count it, and the windows of the
            // connection, of bytes and of streams, would close bit by bit.
            cnx_->data_received += it->fin_offset - it->consumed_offset;
            it->consumed_offset = it->fin_offset;
            it->is_discarded = 1; // nothing that a peer sends behind its reset begins the stream anew
        }
        [[fallthrough]];
    case picoquic_callback_stop_sending:
        if (stream != nullptr) {
            drop(*stream, "the peer dropped the stream");
        } else {
            discard(stream_id); // before it has said what it is; our direction ends too
        }
        break;
    case picoquic_callback_stream_released:
        if (stream != nullptr) {
            forget(*stream);
        }
        break;
    case picoquic_callback_stateless_reset:
    case picoquic_callback_close:
    case picoquic_callback_application_close:
        failed(why_closed(event));
        break;
    default:
        break;
    }
    return 0;
}

std::string Link::why_closed(picoquic_call_back_event_t event) const {
    if (event == picoquic_callback_stateless_reset) {
        return "the peer was started anew";
    }
    if (cnx_->remote_error_reason != nullptr && cnx_->remote_error_reason[0] != 0) {
        return std::string(cnx_->remote_error_reason).substr(0, longest_reason);
    }
    uint64_t local = picoquic_get_local_error(cnx_), remote = picoquic_get_remote_error(cnx_);
    uint64_t code = remote != 0 ? remote : local;
    if (code == 0 || local == PICOQUIC_ERROR_IDLE_TIMEOUT) {
        return "no answer";
    }
    char text[64];
    std::snprintf(text, sizeof(text), "the connection ended (code %#llx)", static_cast<unsigned long long>(code));
    return text;
}

void Link::key_proved(const PublicKey & key) {
    key_ = key;
}

void Link::datagrams_received(size_t n_bytes) {
    bytes_received += n_bytes;
    rtt_us = picoquic_get_rtt(cnx_);
    if (!cnx_->is_ack_frequency_negotiated) {
        // A peer that cannot say how often it wants to hear (aioquic, quic-go). picoquic then waits up to 10 ms, by the
        // rate of its own sending, and a sender whose window is small waits with it.
        cnx_->ack_delay_remote = std::min<uint64_t>(cnx_->ack_delay_remote, PICOQUIC_ACK_DELAY_MIN);
    }
}

void Link::linked() {
    if (linked_ || closed_) {
        return;
    }
    linked_ = true;
    picoquic_enable_keep_alive(cnx_, engine_.config_.keep_alive_us);
    engine_.tell({Event::What::linked, handle, 0, dialled_, key_ ? hexadecimal(*key_) : ""});
}

// --- streams ---

Stream * Link::accept(uint64_t stream_id, std::span<const uint8_t> & bytes) {
    bool ours = PICOQUIC_IS_CLIENT_STREAM_ID(stream_id) == dialled_;
    if (ours || streams_.contains(stream_id)) {
        return nullptr; // already dropped
    }
    if (bytes.empty() || bytes[0] >= engine_.config_.max_kinds) {
        discard(stream_id);
        return nullptr;
    }
    uint8_t kind = bytes[0];
    bytes = bytes.subspan(1);
    std::shared_ptr<Stream> stream;
    {
        std::lock_guard guard(engine_.lock_);
        stream = std::make_shared<Stream>(engine_.next_++, handle);
        stream->reader_waits = false; // it learns of the stream, and then reads
        engine_.streams_[stream->handle] = stream;
        engine_.tell_locked({Event::What::opened, handle, stream->handle, kind, ""});
    }
    stream->link = this;
    stream->id = stream_id;
    streams_[stream_id] = stream;
    n_streams = static_cast<uint32_t>(streams_.size());
    picoquic_set_app_flow_control(cnx_, stream_id, 1);
    picoquic_set_app_stream_ctx(cnx_, stream_id, stream.get());
    stream->window.arrived(1);
    taken(*stream, 1);
    return stream.get();
}

void Link::start(const std::shared_ptr<Stream> & stream) {
    if (closed_) {
        return;
    }
    stream->id = picoquic_get_next_local_stream_id(cnx_, 0);
    if (picoquic_set_app_stream_ctx(cnx_, stream->id, stream.get()) != 0) {
        return;
    }
    picoquic_set_app_flow_control(cnx_, stream->id, 1);
    stream->link = this;
    streams_[stream->id] = stream;
    n_streams = static_cast<uint32_t>(streams_.size());
}

void Link::received(Stream & stream, std::span<const uint8_t> bytes, bool end) {
    stream.window.arrived(bytes.size());
    engine_.touch(stream); // which delivers it when all that came together has been read
    if (stream.splice) {
        stream.splice->hold(bytes, end);
        return;
    }
    std::lock_guard guard(engine_.lock_);
    if (!stream.released) {
        stream.in.push(bytes);
    }
    stream.ended = stream.ended || end;
}

void Link::taken(Stream & stream, size_t n_bytes) {
    if (stream.window.take(n_bytes, engine_.now_us_, rtt_us)) {
        grant(stream);
    }
}

void Link::grant(Stream & stream) {
    if (!closed_ && picoquic_open_flow_control(cnx_, stream.id, stream.window.ahead()) == 0) {
        stream.window.told(engine_.now_us_);
    }
}

void Link::activate(Stream & stream) {
    if (!closed_ && stream.link == this) {
        picoquic_mark_active_stream(cnx_, stream.id, 1, &stream);
    }
}

int Link::provide(Stream & stream, void * context, size_t space) {
    std::unique_lock guard(engine_.lock_);
    size_t waiting = stream.out.size();
    if (waiting > 0 || !stream.splice) {
        size_t n = std::min(waiting, space);
        bool rest = waiting > n;
        bool end = stream.finished && !rest;
        stream.pending = rest;
        uint8_t * out = picoquic_provide_stream_data_buffer(context, n, end, rest || stream.splice.has_value());
        if (out == nullptr) {
            return -1;
        }
        stream.out.take({out, n});
        if (stream.writer_waits && stream.out.size() <= few_left) {
            stream.writer_waits = false;
            engine_.tell_locked({Event::What::writable, handle, stream.handle, 0, ""});
        }
        return 0;
    }
    guard.unlock();
    Splice & splice = *stream.splice;
    size_t available = splice.available(space), n = std::min(available, space);
    bool end = splice.at_end() && n == available;
    stream.splice_sends = available > 0 && !end; // when nothing is there the engine polls
    uint8_t * out = picoquic_provide_stream_data_buffer(context, n, end, stream.splice_sends);
    if (out == nullptr) {
        return -1;
    }
    splice.take({out, n});
    if (end) {
        std::lock_guard again(engine_.lock_);
        stream.finished = true;
    }
    return 0;
}

void Link::drop(Stream & stream, const std::string & reason) {
    if (stream.link != this) {
        return;
    }
    if (!closed_ && cnx_ != nullptr) {
        discard(stream.id);
    }
    {
        std::lock_guard guard(engine_.lock_);
        engine_.fail_locked(stream, reason);
    }
    forget(stream);
}

// picoquic_discard_stream would not tell of the peer's reset, of which the windows must know, and would ask to stop a
// stream of ours that the peer does not yet allow, which ends the connection.
void Link::discard(uint64_t stream_id) {
    bool ours = PICOQUIC_IS_CLIENT_STREAM_ID(stream_id) == dialled_;
    if (!ours || stream_id / 4 < cnx_->max_streams_bidir_remote) {
        picoquic_stop_sending(cnx_, stream_id, 0);
    }
    picoquic_reset_stream(cnx_, stream_id, 0); // which waits until it may be said
}

void Link::forget(Stream & stream) {
    auto kept = streams_.find(stream.id);
    if (stream.link != this || kept == streams_.end()) {
        return;
    }
    stream.link = nullptr; // a splice that has still to write does so without
    streams_.erase(kept);  // `stream` may end here
    n_streams = static_cast<uint32_t>(streams_.size());
}

// --- splices ---

void Link::begin_splice(Stream & stream) {
    Bytes waiting;
    bool ended;
    {
        std::lock_guard guard(engine_.lock_);
        waiting.resize(stream.in.size());
        stream.in.take(waiting);
        ended = stream.ended;
    }
    stream.splice->hold(waiting, ended);
    engine_.touch(stream);
    stream.splice_sends = true;
    activate(stream);
}

// --- the end ---

void Link::close(const std::string & reason) {
    if (closed_) {
        return;
    }
    reason_ = reason.substr(0, longest_reason);
    picoquic_close_ex(cnx_, close_code, reason_.c_str());
    failed(reason);
}

void Link::failed(const std::string & reason) {
    if (closed_) {
        return;
    }
    closed_ = true;
    while (!streams_.empty()) {
        auto stream = streams_.begin()->second;
        drop(*stream, reason);
    }
    engine_.tell({Event::What::closed, handle, 0, 0, reason});
}

} // namespace meshllm::quic

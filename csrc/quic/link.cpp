#include "quic/link.h"

#include "quic/picoquic_internals.h"

#include <algorithm>
#include <arpa/inet.h>
#include <cstdio>
#include <cstring>

namespace meshllm::quic {

namespace {

constexpr uint64_t close_code = 0x100;
constexpr size_t low_watermark = 512 << 10; // of a stream's unsent bytes: its writer may go on
constexpr size_t max_reason = 200;

std::string hexadecimal(const PublicKey & key) {
    std::string out;
    for (const uint8_t byte : key) {
        char digits[3];
        std::snprintf(digits, sizeof(digits), "%02x", byte);
        out += digits;
    }
    return out;
}

/// "host:port", an IPv4 address in IPv6 form as plain IPv4.
std::string readable(const sockaddr * address) {
    char host[INET6_ADDRSTRLEN] = "", text[INET6_ADDRSTRLEN + 16];
    if (address->sa_family == AF_INET) {
        const auto * v4 = reinterpret_cast<const sockaddr_in *>(address);
        inet_ntop(AF_INET, &v4->sin_addr, host, sizeof(host));
        std::snprintf(text, sizeof(text), "%s:%u", host, ntohs(v4->sin_port));
        return text;
    }
    const auto * v6 = reinterpret_cast<const sockaddr_in6 *>(address);
    const bool mapped = IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr);
    inet_ntop(mapped ? AF_INET : AF_INET6, v6->sin6_addr.s6_addr + (mapped ? 12 : 0), host, sizeof(host));
    std::snprintf(text, sizeof(text), mapped ? "%s:%u" : "[%s]:%u", host, ntohs(v6->sin6_port));
    return text;
}

} // namespace

Link::Link(Shared & shared, uint64_t handle, picoquic_cnx_t * cnx, const sockaddr * peer, bool dialled)
    : handle(handle), peer_address(readable(peer)), shared_(shared), cnx_(cnx), dialled_(dialled) {}

// --- picoquic's callbacks ---

int Link::on_event(uint64_t stream_id, uint8_t * bytes, size_t length, picoquic_call_back_event_t event,
                   Stream * stream) {
    if (closed_ && event != picoquic_callback_close) {
        return 0; // our streams have ended, even if picoquic still knows some
    }
    switch (event) {
    case picoquic_callback_almost_ready:
        if (dialled_) {
            on_linked(); // the peer's proof has been verified; it verifies ours when it reads on
        }
        break;
    case picoquic_callback_ready:
        on_ready();
        break;
    case picoquic_callback_stream_data:
    case picoquic_callback_stream_fin:
        on_stream_data(stream_id, stream, {bytes, length}, event == picoquic_callback_stream_fin);
        break;
    case picoquic_callback_prepare_to_send:
        return stream == nullptr ? -1 : provide(*stream, bytes, length);
    case picoquic_callback_stream_reset:
        count_reset_as_received(cnx_, stream_id);
        on_stream_closed_by_peer(stream_id, stream);
        break;
    case picoquic_callback_stop_sending:
        on_stream_closed_by_peer(stream_id, stream);
        break;
    case picoquic_callback_stream_released:
        if (stream != nullptr) {
            forget(*stream);
        }
        break;
    case picoquic_callback_stateless_reset:
    case picoquic_callback_close:
    case picoquic_callback_application_close:
        fail(close_reason(event));
        break;
    default:
        break;
    }
    return 0;
}

void Link::on_ready() {
    on_linked();
    for (const auto & [id, stream] : streams_) {
        advertise(*stream);
    }
}

void Link::on_linked() {
    if (linked_ || closed_) {
        return;
    }
    linked_ = true;
    picoquic_enable_keep_alive(cnx_, shared_.keep_alive_us);
    shared_.emit(
        {.type = Event::Type::linked, .link = handle, .dialled = dialled_, .peer_id = key_ ? hexadecimal(*key_) : ""});
}

void Link::on_stream_data(uint64_t stream_id, Stream * stream, std::span<const uint8_t> bytes, bool end) {
    on_linked(); // 1-RTT data can be read, so the handshake is complete (RFC 9001 section 5.7)
    if (stream == nullptr) {
        if (opened_here(stream_id) || streams_.contains(stream_id)) {
            return; // already dropped
        }
        if (bytes.empty() || bytes[0] >= shared_.max_kinds) {
            return discard(stream_id);
        }
        stream = accept(stream_id, bytes[0]);
        bytes = bytes.subspan(1);
    }
    stream->window.received(bytes.size());
    shared_.mark_undelivered(*stream);
    if (stream->splice) {
        stream->splice->push(bytes, end);
        return;
    }
    std::lock_guard lock(shared_.mutex);
    if (!stream->released) {
        stream->in.push(bytes);
    }
    stream->ended = stream->ended || end;
}

void Link::on_stream_closed_by_peer(uint64_t stream_id, Stream * stream) {
    if (stream != nullptr) {
        drop(*stream, "the peer reset the stream");
    } else {
        discard(stream_id); // its first byte never arrived; our direction ends too
    }
}

void Link::on_datagrams(size_t n_bytes) {
    bytes_received += n_bytes;
    rtt_us = picoquic_get_rtt(cnx_);
    limit_ack_delay(cnx_);
}

// --- streams ---

bool Link::opened_here(uint64_t stream_id) const {
    return PICOQUIC_IS_CLIENT_STREAM_ID(stream_id) == dialled_;
}

Stream * Link::accept(uint64_t stream_id, uint8_t kind) {
    std::shared_ptr<Stream> stream;
    {
        std::lock_guard lock(shared_.mutex);
        stream = std::make_shared<Stream>(shared_.new_handle_locked(), handle);
        stream->reader_waits = false; // the opened event makes it read
        shared_.streams[stream->handle] = stream;
        shared_.emit_locked({.type = Event::Type::opened, .link = handle, .stream = stream->handle, .kind = kind});
    }
    add(stream, stream_id);
    picoquic_set_app_flow_control(cnx_, stream_id, 1);
    picoquic_set_app_stream_ctx(cnx_, stream_id, stream.get());
    stream->window.received(sizeof(kind));
    consumed(*stream, sizeof(kind));
    return stream.get();
}

void Link::start(const std::shared_ptr<Stream> & stream) {
    if (closed_) {
        return;
    }
    const uint64_t stream_id = picoquic_get_next_local_stream_id(cnx_, 0);
    if (picoquic_set_app_stream_ctx(cnx_, stream_id, stream.get()) != 0) {
        return;
    }
    picoquic_set_app_flow_control(cnx_, stream_id, 1);
    add(stream, stream_id);
}

void Link::add(const std::shared_ptr<Stream> & stream, uint64_t stream_id) {
    stream->link = this;
    stream->id = stream_id;
    streams_[stream_id] = stream;
    n_streams = static_cast<uint32_t>(streams_.size());
}

void Link::consumed(Stream & stream, size_t n_bytes) {
    if (stream.window.consumed(n_bytes, shared_.now_us, rtt_us)) {
        advertise(stream);
    }
}

void Link::advertise(Stream & stream) {
    if (!closed_ && picoquic_open_flow_control(cnx_, stream.id, stream.window.ahead()) == 0) {
        stream.window.advertised(shared_.now_us);
    }
}

void Link::activate(Stream & stream) {
    if (!closed_ && stream.link == this) {
        picoquic_mark_active_stream(cnx_, stream.id, 1, &stream);
    }
}

int Link::provide(Stream & stream, void * context, size_t space) {
    std::unique_lock lock(shared_.mutex);
    const size_t waiting = stream.out.size();
    if (waiting == 0 && stream.splice) {
        lock.unlock();
        return provide_from_splice(stream, context, space);
    }
    const size_t n = std::min(waiting, space);
    const bool rest = waiting > n, end = stream.finished && !rest;
    stream.pending = rest;
    uint8_t * out = picoquic_provide_stream_data_buffer(context, n, end, rest || stream.splice.has_value());
    if (out == nullptr) {
        return -1;
    }
    stream.out.read({out, n});
    if (stream.writer_waits && stream.out.size() <= low_watermark) {
        stream.writer_waits = false;
        shared_.emit_locked({.type = Event::Type::writable, .link = handle, .stream = stream.handle});
    }
    return 0;
}

int Link::provide_from_splice(Stream & stream, void * context, size_t space) {
    Splice & splice = *stream.splice;
    const size_t available = splice.available(space), n = std::min(available, space);
    const bool end = splice.at_end() && n == available;
    stream.splice_sends = available > 0 && !end; // when nothing is available the endpoint polls the descriptor
    uint8_t * out = picoquic_provide_stream_data_buffer(context, n, end, stream.splice_sends);
    if (out == nullptr) {
        return -1;
    }
    splice.read({out, n});
    if (end) {
        std::lock_guard lock(shared_.mutex);
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
        std::lock_guard lock(shared_.mutex);
        shared_.fail_locked(stream, reason);
    }
    forget(stream);
}

// Not by picoquic_discard_stream: it would hide the peer's reset, which the windows have to count, and it would send
// STOP_SENDING for a stream of ours that the peer does not allow yet, which ends the connection.
void Link::discard(uint64_t stream_id) {
    if (!opened_here(stream_id) || peer_allows_stream(cnx_, stream_id)) {
        picoquic_stop_sending(cnx_, stream_id, 0);
    }
    picoquic_reset_stream(cnx_, stream_id, 0); // picoquic delays it until the peer allows the stream
}

void Link::forget(Stream & stream) {
    const auto kept = streams_.find(stream.id);
    if (stream.link != this || kept == streams_.end()) {
        return;
    }
    stream.link = nullptr; // a splice goes on writing what it has
    streams_.erase(kept);  // which may destroy `stream`
    n_streams = static_cast<uint32_t>(streams_.size());
}

void Link::begin_splice(Stream & stream) {
    Bytes waiting;
    bool ended;
    {
        std::lock_guard lock(shared_.mutex);
        waiting.resize(stream.in.size());
        stream.in.read(waiting);
        ended = stream.ended;
    }
    stream.splice->push(waiting, ended);
    shared_.mark_undelivered(stream);
    stream.splice_sends = true;
    activate(stream);
}

// --- the end ---

std::string Link::close_reason(picoquic_call_back_event_t event) const {
    if (event == picoquic_callback_stateless_reset) {
        return "the peer was restarted";
    }
    if (const std::string reason = peer_close_reason(cnx_); !reason.empty()) {
        return reason.substr(0, max_reason);
    }
    const uint64_t local = picoquic_get_local_error(cnx_), remote = picoquic_get_remote_error(cnx_);
    const uint64_t code = remote != 0 ? remote : local;
    if (code == 0 || local == PICOQUIC_ERROR_IDLE_TIMEOUT) {
        return "no answer";
    }
    char text[64];
    std::snprintf(text, sizeof(text), "the connection ended (code %#llx)", static_cast<unsigned long long>(code));
    return text;
}

void Link::close(const std::string & reason) {
    if (closed_) {
        return;
    }
    reason_ = reason.substr(0, max_reason);
    picoquic_close_ex(cnx_, close_code, reason_.c_str());
    fail(reason);
}

void Link::fail(const std::string & reason) {
    if (closed_) {
        return;
    }
    closed_ = true;
    while (!streams_.empty()) {
        const std::shared_ptr<Stream> stream = streams_.begin()->second;
        drop(*stream, reason);
    }
    shared_.emit({.type = Event::Type::closed, .link = handle, .reason = reason});
}

} // namespace meshllm::quic

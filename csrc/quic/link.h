// One QUIC connection and its streams, driven by picoquic's callbacks. Used by the I/O thread only, except for what is
// marked as shared.
#pragma once

#include "quic/shared.h"
#include "quic/tls.h"

#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <picoquic.h>
#include <string>

namespace meshllm::quic {

struct LinkState {
    uint64_t rtt_us = 0; // 0 before the first sample
    uint64_t bytes_sent = 0, bytes_received = 0;
    uint32_t n_streams = 0;
    std::string peer_address; // "host:port", empty for an unknown link
};

class Link {
  public:
    Link(Shared & shared, uint64_t handle, picoquic_cnx_t * cnx, const sockaddr * peer, bool dialled);

    const uint64_t handle;
    const std::string peer_address;                                       // "host:port"; shared
    std::atomic<uint64_t> rtt_us = 0, bytes_sent = 0, bytes_received = 0; // shared
    std::atomic<uint32_t> n_streams = 0;                                  // shared

    picoquic_cnx_t * cnx() const { return cnx_; } // null once picoquic has deleted it
    bool dialled() const { return dialled_; }
    bool closed() const { return closed_; }

    /// A callback of picoquic's, with its arguments and its result.
    int on_event(uint64_t stream_id, uint8_t * bytes, size_t length, picoquic_call_back_event_t event, Stream * stream);
    void on_key_proved(const PublicKey & key) { key_ = key; }
    void on_datagrams(size_t n_bytes); // after picoquic has read them
    void on_deleted() { cnx_ = nullptr; }

    void start(const std::shared_ptr<Stream> & stream);
    void activate(Stream & stream); // it has something to send
    void drop(Stream & stream, const std::string & reason);
    void consumed(Stream & stream, size_t n_bytes);
    void begin_splice(Stream & stream); // with the bytes that were received before

    /// Sends CONNECTION_CLOSE, then fails.
    void close(const std::string & reason);
    /// Fails all streams and emits the closed event; the peer is not informed.
    void fail(const std::string & reason);

  private:
    void on_linked();
    void on_ready();
    void on_stream_data(uint64_t stream_id, Stream * stream, std::span<const uint8_t> bytes, bool end);
    void on_stream_closed_by_peer(uint64_t stream_id, Stream * stream);
    Stream * accept(uint64_t stream_id, uint8_t kind);
    int provide(Stream & stream, void * context, size_t space);
    int provide_from_splice(Stream & stream, void * context, size_t space);
    void add(const std::shared_ptr<Stream> & stream, uint64_t stream_id);
    void discard(uint64_t stream_id);
    void forget(Stream & stream);
    void advertise(Stream & stream);
    bool opened_here(uint64_t stream_id) const;
    std::string close_reason(picoquic_call_back_event_t event) const;

    Shared & shared_;
    picoquic_cnx_t * cnx_;
    const bool dialled_;
    bool linked_ = false, closed_ = false;
    std::optional<PublicKey> key_;
    std::string reason_;                                  // picoquic keeps a pointer to it
    std::map<uint64_t, std::shared_ptr<Stream>> streams_; // by QUIC's number
};

} // namespace meshllm::quic

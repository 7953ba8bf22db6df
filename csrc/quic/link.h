// One QUIC connection and its streams, as picoquic's callbacks drive them. The I/O thread's, but for what is said to be
// shared.
#pragma once

#include "quic/stream.h"
#include "quic/tls.h"

#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <picoquic.h>
#include <stdexcept>
#include <string>

namespace meshllm::quic {

class Engine;
class Link;

/// The stream or its link is gone. One line for a person.
class StreamError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Event {
    enum class What { linked, closed, opened, readable, writable, spliced };
    What what;
    uint64_t link = 0, stream = 0;
    int kind = 0;     // opened: the stream's first byte; linked: 1 when this side has dialled
    std::string text; // linked: the peer's key in hexadecimal, or nothing for who showed none; closed: why
};

struct LinkState {
    uint64_t rtt_us = 0; // 0 before the first sample
    uint64_t bytes_sent = 0, bytes_received = 0;
    uint32_t n_streams = 0;
    std::string peer_address; // "host:port", empty for an unknown link
};

struct Stream : std::enable_shared_from_this<Stream> {
    const uint64_t handle;
    const uint64_t link_handle;

    // Shared, under the engine's lock.
    Queue in, out;
    bool ended = false;    // the peer has finished
    bool finished = false; // so have we
    bool released = false; // nobody reads
    bool reader_waits = true, writer_waits = false;
    bool pending = false;  // the I/O thread has been asked to send
    size_t unreported = 0; // taken by the reader since the I/O thread last heard of it
    std::string error;

    // The I/O thread's.
    Link * link = nullptr; // while the stream lives in it
    uint64_t id = 0;
    Window window;
    std::optional<Splice> splice;
    bool touched = false;      // something has come that its reader or its splice has not yet been given
    bool splice_sends = false; // picoquic asks the splice for bytes; else the descriptor is polled

    Stream(uint64_t handle, uint64_t link_handle) : handle(handle), link_handle(link_handle) {}
};

class Link {
  public:
    Link(Engine & engine, uint64_t handle, picoquic_cnx_t * cnx, bool dialled);

    const uint64_t handle;
    std::atomic<uint64_t> rtt_us = 0, bytes_sent = 0, bytes_received = 0; // shared
    std::atomic<uint32_t> n_streams = 0;                                  // shared
    std::string peer_address;                                             // set once, before the link is shared

    picoquic_cnx_t * cnx() const { return cnx_; }
    bool dialled() const { return dialled_; }
    bool closed() const { return closed_; }

    int called(uint64_t stream_id, uint8_t * bytes, size_t length, picoquic_call_back_event_t event, Stream * stream);
    void key_proved(const PublicKey & key);
    void datagrams_received(size_t n_bytes); // which picoquic has read

    void start(const std::shared_ptr<Stream> & stream);
    void activate(Stream & stream);
    void drop(Stream & stream, const std::string & reason);
    void taken(Stream & stream, size_t n_bytes);
    void begin_splice(Stream & stream); // what came before goes to it

    void close(const std::string & reason);
    void gone() { cnx_ = nullptr; }
    void failed(const std::string & reason);

    /// "host:port" of a peer, IPv4 without its disguise as IPv6.
    static std::string readable(const sockaddr * address);

  private:
    void linked();
    void received(Stream & stream, std::span<const uint8_t> bytes, bool end);
    Stream * accept(uint64_t stream_id, std::span<const uint8_t> & bytes);
    int provide(Stream & stream, void * context, size_t space);
    void discard(uint64_t stream_id);
    void forget(Stream & stream);
    void grant(Stream & stream);
    std::string why_closed(picoquic_call_back_event_t event) const;

    Engine & engine_;
    picoquic_cnx_t * cnx_;
    const bool dialled_;
    bool linked_ = false, closed_ = false;
    std::optional<PublicKey> key_;
    std::string reason_;                                  // picoquic keeps a pointer to it
    std::map<uint64_t, std::shared_ptr<Stream>> streams_; // by QUIC's number
};

} // namespace meshllm::quic

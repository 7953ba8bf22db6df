// A node's QUIC endpoint, in one thread of its own: links over one UDP port, their streams, and the events for Python.
//
// picoquic does the protocol. It belongs to the I/O thread; other threads give that thread work with post(), and share
// with it, under one mutex, only the bytes that wait in streams and the events. Links and streams are named by handles
// that are never used again, so that a caller may name one that no longer exists.
#pragma once

#include "quic/link.h"
#include "quic/udp.h"

#include <functional>
#include <poll.h>
#include <thread>

namespace meshllm::quic {

struct Config {
    uint16_t port = 0;
    std::string alpn;
    Identity identity;
    std::string congestion_control = "bbr";
    uint32_t max_kinds = 0; // a stream's first byte is less, or the stream is refused
    uint64_t idle_timeout_us = 0, handshake_timeout_us = 0, keep_alive_us = 0;
};

class Endpoint {
  public:
    /// Binds and starts. Throws std::system_error of the socket, std::runtime_error.
    explicit Endpoint(const Config & config);
    ~Endpoint() { stop(); }
    Endpoint(const Endpoint &) = delete;

    uint16_t port() const { return socket_.port(); }
    bool v6() const { return socket_.v6(); }

    /// Readable when there are events.
    int event_fd() const { return shared_.events_ready.fd(); }
    std::vector<Event> take_events() { return shared_.take_events(); }

    /// A new link to `address`, of the socket's family. A linked or a closed event follows.
    uint64_t dial(const sockaddr_storage & address);
    /// `at_once`: without informing the peer, which may never have answered. Emits a closed event unless there was one.
    void close(uint64_t link, const std::string & reason, bool at_once);
    LinkState state(uint64_t link);

    /// 0 when the link is closed.
    uint64_t open(uint64_t link, uint8_t kind);
    /// True when many bytes wait to be sent: a writable event follows when few do. Throws StreamError.
    bool write(uint64_t stream, std::span<const uint8_t> bytes);
    /// Empty: no bytes yet, and a readable event follows; or, when `ended` is set, none any more. Throws StreamError.
    Bytes read(uint64_t stream, size_t limit, bool & ended);
    void finish(uint64_t stream);
    void abort(uint64_t stream);
    /// Takes the descriptor of a connected socket; it replaces the reader and the writer. A spliced event follows when
    /// both directions have ended or the stream has failed.
    void splice(uint64_t stream, int fd);
    /// The stream has no reader and no writer any more. Dropped unless finished; then it sends what is left.
    void release(uint64_t stream);

    /// Closes all links and ends the thread. May be called again.
    void stop();

  private:
    friend struct EndpointTesting; // tests/native/fuzz_quic.cpp

    void configure();
    void post(std::function<void()> work);
    void post_activate(const std::shared_ptr<Stream> & stream);
    void post_drop(const std::shared_ptr<Stream> & stream);

    // The I/O thread's.
    void run();
    void run_work();
    void close_all();
    void wait(int64_t delay_us);
    bool receive();
    void read_datagrams(Datagrams & datagrams);
    bool send();
    bool prepare(std::span<uint8_t> space);
    void deliver();
    void flush(Stream & stream);
    void serve_splices();
    void serve_splice(Stream & stream, short revents);
    bool splice_ended(Stream & stream);
    void shed();
    void reap();
    void update_clock();

    static int on_event(picoquic_cnx_t * cnx, uint64_t stream_id, uint8_t * bytes, size_t length,
                        picoquic_call_back_event_t event, void * context, void * stream);
    Link & accept(picoquic_cnx_t * cnx);
    Link & add(uint64_t handle, picoquic_cnx_t * cnx, const sockaddr * peer, bool dialled);
    Link * link_of(picoquic_cnx_t * cnx);

    const Config config_;
    Shared shared_;
    UdpSocket socket_;
    std::unique_ptr<Tls> tls_; // outlives quic_
    std::unique_ptr<picoquic_quic_t, void (*)(picoquic_quic_t *)> quic_{nullptr, picoquic_free};

    // The I/O thread's.
    std::vector<pollfd> polled_;
    std::vector<std::shared_ptr<Stream>> spliced_;
    std::unordered_map<uint64_t, std::shared_ptr<Link>> live_; // until picoquic has deleted the connection

    // Guarded by shared_.mutex.
    std::vector<std::function<void()>> work_;
    std::unordered_map<uint64_t, std::shared_ptr<Link>> links_; // until closed

    channel::Wakeup wakeup_; // of the I/O thread
    std::atomic<bool> sleeping_ = false, stopping_ = false;
    std::thread thread_;
};

} // namespace meshllm::quic

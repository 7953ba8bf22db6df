// QUIC for a node, in one thread of its own: links over one UDP port, their streams, and the events that Python hears
// of.
//
// picoquic does the protocol. It belongs to the I/O thread; any other thread leaves work for that thread with post(),
// and shares with it, under one lock, only the bytes that wait in streams and the events. Links and streams are named
// by numbers that are never used again, so that whoever holds one may ask after it is gone.
#pragma once

#include "channel/wakeup.h"
#include "quic/link.h"
#include "quic/tls.h"
#include "quic/udp.h"

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <poll.h>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace meshllm::quic {

struct Config {
    uint16_t port = 0;
    std::string alpn;
    Identity identity;
    std::string congestion_control = "bbr";
    uint32_t max_kinds = 0; // a stream's first byte is less, or the stream is refused
    uint64_t idle_timeout_us = 0, handshake_timeout_us = 0, keep_alive_us = 0;
};

class Engine {
  public:
    /// Binds and starts. Throws std::system_error of the socket, std::runtime_error.
    explicit Engine(const Config & config);
    ~Engine() { stop(); }
    Engine(const Engine &) = delete;

    uint16_t port() const { return socket_.port(); }
    bool v6() const { return socket_.v6(); }

    /// Readable when there are events.
    int event_fd() const { return told_.fd(); }
    std::vector<Event> take_events();

    /// A new link to `address`, of the socket's family. A linked or a closed event follows.
    uint64_t dial(const sockaddr_storage & address);
    /// `at_once`: nothing is said to the peer, which may never have answered. A closed event follows, unless there was
    /// one.
    void close(uint64_t link, const std::string & reason, bool at_once);
    LinkState state(uint64_t link);

    /// 0 when the link is closed.
    uint64_t open(uint64_t link, uint8_t kind);
    /// True when much waits to be sent: a writable event follows when little does. Throws StreamError.
    bool write(uint64_t stream, std::span<const uint8_t> bytes);
    /// Empty: none now, and a readable event follows; or, when `ended` is set, no more. Throws StreamError.
    Bytes read(uint64_t stream, size_t limit, bool & ended);
    void finish(uint64_t stream);
    void abort(uint64_t stream);
    /// Takes the descriptor of a connected socket, and the reader's and the writer's place. A spliced event follows
    /// when both directions have ended or the stream has failed.
    void splice(uint64_t stream, int fd);
    /// Nobody reads or writes it any more: dropped, unless it is finished; then what it has still to send is sent.
    void release(uint64_t stream);

    /// Says good-bye on all links and ends the thread. May be called again.
    void stop();

  private:
    friend class Link;
    friend struct EngineTesting; // tests/native/fuzz_quic.cpp

    void post(std::function<void()> work);
    void run();
    void wait(int64_t delay_us);
    bool receive();
    bool send();
    void touch(Stream & stream);
    void deliver();
    void flush(Stream & stream);
    void serve_splices();
    void shed();
    void reap();
    void advance();

    std::shared_ptr<Stream> find(uint64_t stream); // under the lock
    void tell(Event event);                        // takes the lock
    void tell_locked(Event event);
    void fail_locked(Stream & stream, const std::string & reason); // and wakes who waits for it
    static int called(picoquic_cnx_t * cnx, uint64_t stream_id, uint8_t * bytes, size_t length,
                      picoquic_call_back_event_t event, void * context, void * stream);
    Link * accepted(picoquic_cnx_t * cnx);
    Link * link_of(picoquic_cnx_t * cnx);

    Config config_;
    UdpSocket socket_;
    uint64_t now_us_ = 0; // of a steady clock; picoquic reads it as its time
    std::unique_ptr<picoquic_quic_t, void (*)(picoquic_quic_t *)> quic_{nullptr, picoquic_free};
    std::unique_ptr<Tls> tls_;
    channel::Wakeup told_, wake_; // for Python, for the I/O thread
    std::vector<pollfd> polled_;
    std::vector<std::shared_ptr<Stream>> spliced_; // the I/O thread's, as those beside it
    std::vector<std::shared_ptr<Stream>> touched_;
    std::unordered_map<uint64_t, std::shared_ptr<Link>> live_;

    std::mutex lock_;
    std::vector<std::function<void()>> work_;
    std::vector<Event> events_;
    std::unordered_map<uint64_t, std::shared_ptr<Link>> links_;
    std::unordered_map<uint64_t, std::shared_ptr<Stream>> streams_;
    uint64_t next_ = 1;

    std::atomic<bool> sleeping_ = false, stopping_ = false;
    std::thread thread_;
};

} // namespace meshllm::quic

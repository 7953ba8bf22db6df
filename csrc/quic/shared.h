// What an endpoint shares with its links and with the threads that call it.
#pragma once

#include "channel/wakeup.h"
#include "quic/stream.h"

#include <mutex>
#include <unordered_map>

namespace meshllm::quic {

struct Event {
    enum class Type { linked, closed, opened, readable, writable, spliced };
    Type type;
    uint64_t link = 0, stream = 0; // handles
    uint8_t kind = 0;              // opened: the stream's first byte
    bool dialled = false;          // linked: by this side
    std::string peer_id{};         // linked: the peer's key in hexadecimal, empty for a peer that proved none
    std::string reason{};          // closed: one line for a person
};

struct Shared {
    Shared(uint32_t max_kinds, uint64_t keep_alive_us) : max_kinds(max_kinds), keep_alive_us(keep_alive_us) {}

    const uint32_t max_kinds; // a stream's first byte is less, or the stream is refused
    const uint64_t keep_alive_us;

    // The I/O thread's.
    uint64_t now_us = 0;                              // of a steady clock; picoquic reads it as its time
    std::vector<std::shared_ptr<Stream>> undelivered; // with bytes that deliver() hands on

    /// Guards what follows, and in each stream what is marked so.
    std::mutex mutex;
    std::unordered_map<uint64_t, std::shared_ptr<Stream>> streams; // by handle, until released
    channel::Wakeup events_ready;

    uint64_t new_handle();
    std::vector<Event> take_events();
    void emit(Event event);

    // With the mutex locked.
    uint64_t new_handle_locked() { return next_handle_++; }
    std::shared_ptr<Stream> find_locked(uint64_t stream) const; // null for one that was released
    void emit_locked(Event event);
    void fail_locked(Stream & stream, const std::string & reason); // and wakes its reader and its writer

    // In the I/O thread.
    void mark_undelivered(Stream & stream);

  private:
    std::vector<Event> events_;
    uint64_t next_handle_ = 1; // never reused: a stale handle names nothing
};

} // namespace meshllm::quic

// The host's end of one stage: frames out, replies in, and the only place that waits for the network.
//
// Nothing here starts a thread. Frames are gathered and handed to the kernel when a graph has to run; while the kernel
// accepts no more, replies are read, so two full sockets cannot block each other. Only wait() blocks for a reply; these
// are the blocking waits that the counters count.
#pragma once

#include "backend/config.h"
#include "backend/counters.h"
#include "channel/handshake.h"
#include "wire/graph.h"

#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <unordered_map>

namespace meshllm::backend {

class StageLink : public wire::AddressMap {
  public:
    StageLink(std::string label, StageConfig config, CountersFile & file, size_t index);

    /// Throws, with one line for the user, when the server cannot be reached or is incompatible.
    void connect(double timeout_s);

    const std::string & label() const { return label_; } // "STAGE0"
    const StageConfig & config() const { return config_; }
    bool mesh() const { return server_.mesh; }           // else a stock ggml-rpc-server
    uint16_t version() const { return server_.version; } // of the extensions
    const wire::DeviceInfo & device() const { return server_.devices[config_.device]; }
    const wire::Key & session_key() const { return server_.session_key; }
    uint32_t graph_slots() const { return server_.graph_slots; }
    bool has_model(const wire::Fingerprint & fingerprint) const;
    bool lost() const { return lost_; }
    /// A reply was refused since the last recover(): it has arrived as zeros.
    bool refused() const { return refused_; }
    StageCounters & counters() { return counters_; }
    std::recursive_mutex & mutex() { return mutex_; }

    /// Runs `work` with the mutex locked. When it throws, the stage is lost: this is logged once, and this call and all
    /// later ones return false.
    bool guarded(const std::function<void()> & work);

    // All below throw TransportError or ProtocolError; call them inside guarded().

    /// A command without a reply; `body` is copied or sent before this returns.
    void send(wire::Command command, wire::ByteView head, wire::ByteView body = {});
    /// Hands all gathered frames to the kernel.
    void flush();
    /// The stage computes again: what it has refused, or would have computed from that, has failed.
    void recover();
    /// A command whose reply of exactly `size` bytes goes to `out` by the next wait().
    void request_into(wire::Command command, wire::ByteView payload, void * out, size_t size);
    /// Waits for all replies that were requested.
    void wait();
    /// Waits for the replies requested before `ticket()` had this value.
    void wait_for(uint64_t ticket);
    uint64_t ticket() const { return requested_; }

    /// request_into and wait, for a reply that is one packed structure.
    template <class Reply>
    Reply call(wire::Command command, wire::ByteView payload) {
        Reply reply;
        request_into(command, payload, &reply, sizeof(reply));
        wait();
        return reply;
    }

    /// The stock base address of `buffer`; asked once.
    uint64_t base_of(uint64_t buffer) const override;
    void forget_base(uint64_t buffer) { bases_.erase(buffer); }

  private:
    struct Pending {
        uint8_t * out;
        size_t size;
    };
    void mark_lost(const std::string & why);
    void exchange(wire::ByteView & out, bool until_replied, uint64_t ticket);
    void read_replies();
    void begin_reply();
    void end_error();

    const std::string label_;
    const StageConfig config_;
    CountersFile & file_;
    StageCounters & counters_;
    std::recursive_mutex mutex_;
    std::optional<channel::Stream> stream_;
    bool lost_ = false, refused_ = false;
    channel::ServerInfo server_;

    wire::Bytes out_; // gathered frames
    std::deque<Pending> pending_;
    uint64_t requested_ = 0, completed_ = 0;
    uint64_t waited_for_ = 0; // requested before the last wait began: no reply to that costs a round trip of its own
    uint8_t head_[sizeof(uint64_t)]; // of the reply being read
    size_t head_have_ = 0, body_have_ = 0;
    std::optional<wire::Bytes> error_; // text of an error reply being read
    bool error_refuses_ = false;       // it is a refusal
    mutable std::unordered_map<uint64_t, uint64_t> bases_;
};

} // namespace meshllm::backend

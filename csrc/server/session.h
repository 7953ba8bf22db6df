// One client of the device server: its buffers, graphs, peers, and the loop that serves its frames in order.
#pragma once

#include "server/graph_builder.h"
#include "server/loader.h"
#include "server/peers.h"

#include <functional>
#include <memory>
#include <optional>

namespace meshllm::server {

/// What all sessions share. Outlives them.
struct Shared {
    std::vector<std::unique_ptr<Device>> devices;
    Models models;
    Counters counters;
    std::unique_ptr<Loader> loader;
    /// The real address for a peer address that a client names; nullopt when this server must not connect to it.
    std::function<std::optional<std::string>(const std::string &)> peer_address;
    std::function<void(const std::string &)> log; // one line per event; called from any thread

    std::shared_ptr<Mailbox> find_mailbox(const wire::Key & key);
    void add_mailbox(const wire::Key & key, std::shared_ptr<Mailbox> mailbox);
    void remove_mailbox(const wire::Key & key);

  private:
    std::mutex mutex_;
    std::map<wire::Key, std::shared_ptr<Mailbox>> mailboxes_;
};

class Session {
  public:
    Session(Shared & shared, channel::Stream & stream, const wire::Key & key);
    ~Session();

    /// Serves until the client disconnects. Never throws.
    void run();

  private:
    using Command = wire::Command;

    void hello();
    void serve();
    void dispatch(Command command);
    void dispatch_stock(Command command);
    void dispatch_stock_data(Command command);
    void dispatch_mesh(Command command);
    void fail(const std::string & why);
    bool refuse(Command command, const std::string & why);

    // the frame being served
    bool read_header(Command & command);
    wire::Bytes payload();
    template <class T>
    T head(); // the first bytes of the payload
    template <class T>
    T request_as() { // the whole payload
        return wire::exactly<T>(payload());
    }
    void discard_rest();
    void reply(wire::ByteView data);
    template <class T>
    void reply_with(const T & value) {
        reply(wire::view_of(value));
    }
    void reply_error(const std::string & text, uint64_t bits = wire::reply_error_bit);

    /// A range of a tensor as a range of its buffer.
    wire::ByteRange range_of(const wire::StockTensor & tensor, uint64_t offset, uint64_t size) const;

    // commands, in the order of wire::Command
    void set_data(const wire::ByteRange & range);
    void send_data(const wire::ByteRange & range);
    void copy_tensor(const wire::CopyTensor & request);
    bool copy(const wire::ByteRange & from, const wire::ByteRange & to);
    void fill(const wire::ByteRange & range, uint8_t value);
    void init_tensor(const wire::StockTensor & tensor);
    uint64_t alloc_size(const wire::AllocSizeRequest & request);
    void mesh_hello(const wire::MeshHello & hello);
    bool supports_op(const wire::GraphDesc & desc);
    void put_graph(std::optional<BuiltGraph> & slot, const wire::GraphDesc & desc);
    void run_graph(const std::optional<BuiltGraph> & slot, uint32_t device);
    void load_gguf(const wire::SetTensorGguf & request);
    void free_buffer(uint64_t handle);
    void register_peer(const wire::RegisterPeer & request);
    void push(const wire::PushTensor & request);
    void await(const wire::AwaitTensor & request);
    void serve_peer(const wire::Key & key);

    Device & device(uint32_t index);
    std::optional<BuiltGraph> & slot(uint32_t device, uint32_t slot);

    Shared & shared_;
    channel::Stream & stream_;
    const wire::Key key_;
    std::shared_ptr<Mailbox> mailbox_ = std::make_shared<Mailbox>();
    uint64_t remaining_ = 0; // bytes of the current frame that are not read yet
    uint16_t version_ = 0;   // of the extensions, which both sides have announced; 0: none, a stock client
    bool done_ = false;
    std::string failure_; // in an extended session: reported by the next command with a reply
    std::string refusal_; // of a graph: none is computed, and no result leaves this stage, until RECOVER
    bool computed_ = false;

    Buffers buffers_;
    Loader::Batch loads_; // after buffers_: its reads end before the memory is freed
    // [device][slot]; the last slot of each device is GRAPH_COMPUTE's
    std::vector<std::vector<std::optional<BuiltGraph>>> graphs_;
    size_t graph_tensors_ = 0;
    std::unordered_map<uint32_t, std::unique_ptr<PeerLink>> peers_;
};

template <class T>
T Session::head() {
    if (remaining_ < sizeof(T)) {
        throw ProtocolError("a payload ends before its last field");
    }
    T value;
    stream_.read_exactly({reinterpret_cast<uint8_t *>(&value), sizeof(T)});
    remaining_ -= sizeof(T);
    return value;
}

} // namespace meshllm::server

#include "server/session.h"

#include <ggml.h>

#include <algorithm>

namespace meshllm::server {

namespace {

constexpr size_t chunk = 1 << 20;
constexpr double hello_timeout_s = 10; // a stranger that sends nothing must not occupy a connection

} // namespace

std::shared_ptr<Mailbox> Shared::find_mailbox(const wire::Key & key) {
    std::lock_guard lock(mutex_);
    const auto it = mailboxes_.find(key);
    return it == mailboxes_.end() ? nullptr : it->second;
}

void Shared::add_mailbox(const wire::Key & key, std::shared_ptr<Mailbox> mailbox) {
    std::lock_guard lock(mutex_);
    mailboxes_[key] = std::move(mailbox);
}

void Shared::remove_mailbox(const wire::Key & key) {
    std::lock_guard lock(mutex_);
    mailboxes_.erase(key);
}

Session::Session(Shared & shared, channel::Stream & stream, const wire::Key & key)
    : shared_(shared), stream_(stream), key_(key), buffers_(shared.devices), loads_(*shared.loader),
      graphs_(shared.devices.size()) {
    for (auto & slots : graphs_) {
        slots.resize(wire::max_graph_slots + 1);
    }
}

Session::~Session() {
    shared_.remove_mailbox(key_);
    mailbox_->close();
}

void Session::run() {
    try {
        stream_.set_read_timeout(hello_timeout_s);
        hello();
        stream_.set_read_timeout(0);
        serve();
    } catch (const channel::TransportError & e) {
        shared_.log(std::string("client lost: ") + e.what());
        fail("the host has disconnected");
    } catch (const std::exception & e) {
        shared_.counters.errors++;
        shared_.log(std::string("client refused: ") + e.what());
        fail(e.what());
    }
}

// --- frames ---

bool Session::read_header(Command & command) {
    uint8_t raw[wire::header_size];
    if (!stream_.read_exactly(raw)) {
        return false;
    }
    command = static_cast<Command>(raw[0]);
    std::memcpy(&remaining_, raw + 1, sizeof(remaining_));
    const auto limit = wire::max_payload(command);
    if (!limit) {
        throw ProtocolError("unknown command " + std::to_string(raw[0]));
    }
    if (remaining_ > *limit) {
        throw ProtocolError("a payload of " + std::to_string(remaining_) + " bytes for command " +
                            std::to_string(raw[0]) + ", which takes at most " + std::to_string(*limit));
    }
    shared_.counters.frames_received++;
    shared_.counters.bytes_received += wire::header_size + remaining_;
    return true;
}

wire::Bytes Session::payload() {
    wire::Bytes out;
    while (remaining_ > 0) { // memory grows with what arrives, not with the announced size
        const size_t n = std::min<uint64_t>(remaining_, chunk);
        out.resize(out.size() + n);
        if (!stream_.read_exactly(std::span(out).last(n))) {
            throw channel::TransportError("the client closed the connection in the middle of a frame");
        }
        remaining_ -= n;
    }
    return out;
}

void Session::discard_rest() {
    uint8_t waste[4096];
    while (remaining_ > 0) {
        const size_t n = std::min<uint64_t>(remaining_, sizeof(waste));
        if (!stream_.read_exactly(std::span(waste).first(n))) {
            throw channel::TransportError("the client closed the connection in the middle of a frame");
        }
        remaining_ -= n;
    }
}

void Session::reply(wire::ByteView data) {
    const uint64_t size = data.size();
    stream_.write_all(wire::view_of(size), data);
    shared_.counters.replies_sent++;
    shared_.counters.bytes_sent += sizeof(size) + size;
}

wire::ByteRange Session::range_of(const wire::StockTensor & tensor, uint64_t offset, uint64_t size) const {
    const wire::TensorDesc t = wire::from_stock(tensor, buffers_);
    return {t.buffer, t.offset + offset, size};
}

void Session::reply_error(const std::string & text, uint64_t bits) {
    const std::string line = text.substr(0, wire::max_error_text);
    const uint64_t size = line.size() | bits;
    stream_.write_all(wire::view_of(size), {reinterpret_cast<const uint8_t *>(line.data()), line.size()});
}

// --- the loop ---

void Session::hello() {
    Command command;
    if (!read_header(command)) {
        done_ = true;
        return;
    }
    if (command != Command::hello || remaining_ != wire::stock_caps_size) {
        throw ProtocolError("the first frame is not the HELLO of ggml-rpc 7");
    }
    const wire::Bytes caps = payload();
    const bool no_rdma = std::all_of(caps.begin(), caps.end(), [](uint8_t b) { return b == 0; });
    reply_with(wire::make_hello_reply(no_rdma));
}

void Session::serve() {
    Command command;
    while (!done_ && read_header(command)) {
        if (failure_.empty()) {
            try {
                dispatch(command);
                discard_rest();
                continue;
            } catch (const channel::TransportError &) {
                throw;
            } catch (const std::exception & e) {
                if (version_ == 0) {
                    throw; // stock has no error replies
                }
                shared_.counters.errors++;
                if (dynamic_cast<const ProtocolError *>(&e) == nullptr || !refuse(command, e.what())) {
                    shared_.log(std::string("client failed: ") + e.what());
                    fail(e.what());
                }
            }
        }
        discard_rest();
        if (!failure_.empty() && wire::has_reply(command)) {
            reply_error(failure_);
        }
    }
    fail("the host has closed its session");
}

void Session::fail(const std::string & why) {
    failure_ = why;
    for (auto & [index, peer] : peers_) {
        peer->fail(why);
    }
    peers_.clear();
}

/// Whether a fault in this command concerns one graph only. A session whose first graph is refused fails: on such a
/// stage nothing works.
bool Session::refuse(Command command, const std::string & why) {
    if (version_ < 2 || !computed_ || (command != Command::graph_put && command != Command::graph_run)) {
        return false;
    }
    shared_.log("graph refused: " + why);
    refusal_ = why;
    return true;
}

void Session::dispatch(Command command) {
    if (command != Command::set_tensor_gguf) {
        loads_.wait();
    }
    if (static_cast<uint8_t>(command) < static_cast<uint8_t>(Command::mesh_hello)) {
        dispatch_stock(command);
    } else if (version_ != 0 || command == Command::mesh_hello || command == Command::peer_attach) {
        dispatch_mesh(command);
    } else {
        throw ProtocolError("an extension is used before MESH_HELLO");
    }
}

void Session::dispatch_stock(Command command) {
    switch (command) {
    case Command::device_count:
        return reply_with(static_cast<uint32_t>(shared_.devices.size()));
    case Command::alloc_buffer: {
        const auto request = request_as<wire::AllocRequest>();
        return reply_with(buffers_.allocate(request.device, request.size));
    }
    case Command::get_alignment:
        return reply_with(device(request_as<uint32_t>()).info().alignment);
    case Command::get_max_size:
        return reply_with(device(request_as<uint32_t>()).info().max_size);
    case Command::get_device_memory:
        return reply_with(device(request_as<uint32_t>()).memory());
    case Command::buffer_get_base:
        return reply_with(buffers_.base_of(request_as<uint64_t>()));
    case Command::free_buffer:
        return free_buffer(request_as<uint64_t>());
    case Command::get_alloc_size:
        return reply_with(alloc_size(request_as<wire::AllocSizeRequest>()));
    case Command::graph_compute: {
        const wire::GraphDesc desc = wire::decode_stock_graph(payload(), buffers_);
        put_graph(slot(desc.device, wire::max_graph_slots), desc);
        return run_graph(slot(desc.device, wire::max_graph_slots), desc.device);
    }
    case Command::graph_recompute: {
        const auto index = request_as<uint32_t>();
        return run_graph(slot(index, wire::max_graph_slots), index);
    }
    default:
        return dispatch_stock_data(command);
    }
}

/// Commands about the bytes of a buffer or a tensor.
void Session::dispatch_stock_data(Command command) {
    switch (command) {
    case Command::buffer_clear: {
        const auto request = request_as<wire::BufferClear>();
        return ggml_backend_buffer_clear(buffers_.at(request.buffer).buffer, request.value);
    }
    case Command::memset_tensor: {
        const auto request = request_as<wire::MemsetTensor>();
        return fill(range_of(request.tensor, request.offset, request.size), request.value);
    }
    case Command::set_tensor: {
        const auto h = head<wire::SetTensorHead>();
        return set_data(range_of(h.tensor, h.offset, remaining_));
    }
    case Command::set_tensor_hash: // we have no cache of weights; SET_TENSOR_GGUF replaces it
        request_as<wire::SetTensorHash>();
        return reply_with(uint8_t(0));
    case Command::get_tensor: {
        const auto request = request_as<wire::GetTensor>();
        return send_data(range_of(request.tensor, request.offset, request.size));
    }
    case Command::copy_tensor:
        return copy_tensor(request_as<wire::CopyTensor>());
    case Command::init_tensor:
        return init_tensor(request_as<wire::StockTensor>());
    default:
        throw ProtocolError("a second HELLO, or a command of another version");
    }
}

void Session::dispatch_mesh(Command command) {
    switch (command) {
    case Command::mesh_hello:
        return mesh_hello(wire::decode_mesh_hello(payload()));
    case Command::supports_op:
        return reply_with(static_cast<uint8_t>(supports_op(wire::decode_graph(payload()))));
    case Command::graph_put: {
        if (!refusal_.empty()) {
            return;
        }
        const wire::Bytes data = payload();
        const wire::GraphPut put = wire::decode_graph_put(data);
        shared_.counters.graphs_received++;
        shared_.counters.graph_bytes_received += data.size();
        return put_graph(slot(put.graph.device, put.slot), put.graph);
    }
    case Command::graph_run: {
        if (!refusal_.empty()) {
            return;
        }
        const auto r = request_as<wire::GraphRun>();
        if (r.slot >= wire::max_graph_slots) {
            throw ProtocolError("the graph to run is in a slot that does not exist");
        }
        return run_graph(slot(r.device, r.slot), r.device);
    }
    case Command::set_tensor_gguf:
        return load_gguf(wire::decode_set_tensor_gguf(payload()));
    case Command::set_bytes: {
        const auto h = head<wire::SetBytesHead>();
        return set_data({h.buffer, h.offset, remaining_});
    }
    case Command::copy_bytes: {
        const auto r = request_as<wire::CopyBytes>();
        if (!copy(r.from, {r.to_buffer, r.to_offset, r.from.size})) {
            throw ProtocolError("a range is copied onto itself");
        }
        return;
    }
    case Command::get_bytes:
        return send_data(request_as<wire::ByteRange>());
    case Command::register_peer:
        return register_peer(wire::decode_register_peer(payload()));
    case Command::push_tensor_to_peer:
        return push(request_as<wire::PushTensor>());
    case Command::await_tensor:
        return await(request_as<wire::AwaitTensor>());
    case Command::recover:
        return refusal_.clear();
    case Command::peer_attach:
        return serve_peer(request_as<wire::Key>());
    default:
        throw ProtocolError("a frame between stages arrived from a host");
    }
}

} // namespace meshllm::server

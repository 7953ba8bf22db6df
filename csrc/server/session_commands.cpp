// The commands of a session; session.cpp has the frames and the loop.
#include "server/session.h"

#include <ggml.h>

#include <algorithm>
#include <chrono>
#include <poll.h>

namespace meshllm::server {

namespace {

constexpr size_t chunk = 4 << 20;               // bytes staged for a device whose memory we cannot address
constexpr size_t max_graph_tensors = 512 << 10; // in all slots of a session: about 200 MB
constexpr size_t max_peers = 64;

#ifdef POLLRDHUP
constexpr short hangup_events = POLLRDHUP;
#else
constexpr short hangup_events = 0;
#endif

ggml_context_ptr one_tensor_context() {
    return ggml_context_ptr(ggml_init({ggml_tensor_overhead(), nullptr, true}));
}

} // namespace

Device & Session::device(uint32_t index) {
    if (index >= shared_.devices.size()) {
        throw ProtocolError("the client names a device that does not exist");
    }
    return *shared_.devices[index];
}

std::optional<BuiltGraph> & Session::slot(uint32_t index, uint32_t slot) {
    device(index);
    return graphs_[index][slot];
}

void Session::set_data(const wire::ByteRange & range) {
    const Buffers::Entry & entry = buffers_.checked(range);
    shared_.counters.data_bytes_received += range.size;
    if (entry.host) { // straight from the socket to its destination
        remaining_ = 0;
        if (range.size != 0 && !stream_.read_exactly({entry.base + range.offset, range.size})) {
            throw channel::TransportError("the client closed the connection in the middle of a tensor");
        }
        return;
    }
    wire::Bytes bytes(std::min<uint64_t>(range.size, chunk));
    for (uint64_t done = 0; done < range.size;) {
        const size_t n = std::min<uint64_t>(bytes.size(), range.size - done);
        if (!stream_.read_exactly(std::span(bytes).first(n))) {
            throw channel::TransportError("the client closed the connection in the middle of a tensor");
        }
        remaining_ -= n;
        write_bytes(entry, range.offset + done, bytes.data(), n);
        done += n;
    }
}

void Session::send_data(const wire::ByteRange & range) {
    if (!refusal_.empty()) {
        return reply_error(refusal_, wire::reply_error_bit | wire::reply_refused_bit);
    }
    const Buffers::Entry & entry = buffers_.checked(range);
    if (entry.host) {
        return reply({entry.base + range.offset, range.size});
    }
    shared_.counters.replies_sent++;
    shared_.counters.bytes_sent += sizeof(range.size) + range.size;
    wire::Bytes bytes(std::min<uint64_t>(range.size, chunk));
    wire::ByteView head = wire::view_of(range.size);
    for (uint64_t done = 0; done < range.size || !head.empty();) {
        const size_t n = std::min<uint64_t>(bytes.size(), range.size - done);
        read_bytes(entry, range.offset + done, bytes.data(), n);
        stream_.write_all(head, std::span(bytes).first(n));
        head = {};
        done += n;
    }
}

void Session::fill(const wire::ByteRange & range, uint8_t value) {
    const Buffers::Entry & entry = buffers_.checked(range);
    const wire::Bytes bytes(std::min<uint64_t>(range.size, chunk), value);
    for (uint64_t done = 0; done < range.size;) {
        const size_t n = std::min<uint64_t>(bytes.size(), range.size - done);
        write_bytes(entry, range.offset + done, bytes.data(), n);
        done += n;
    }
}

void Session::copy_tensor(const wire::CopyTensor & request) {
    const wire::TensorDesc src = wire::from_stock(request.src, buffers_), dst = wire::from_stock(request.dst, buffers_);
    const ggml_context_ptr a = one_tensor_context(), b = one_tensor_context();
    const ggml_tensor * s = place_leaf(a.get(), src, buffers_);
    const ggml_tensor * d = place_leaf(b.get(), dst, buffers_);
    const size_t size = ggml_nbytes(s);
    // The client itself copies anything but two contiguous tensors of equal size.
    const bool plain = ggml_is_contiguous(s) && ggml_is_contiguous(d) && ggml_nbytes(d) == size;
    const bool copied = plain && copy({src.buffer, src.offset, size}, {dst.buffer, dst.offset, size});
    reply_with(static_cast<uint8_t>(copied));
}

/// False when the ranges overlap.
bool Session::copy(const wire::ByteRange & from, const wire::ByteRange & to) {
    const Buffers::Entry & source = buffers_.checked(from);
    const Buffers::Entry & target = buffers_.checked(to);
    if (from.buffer == to.buffer && from.offset < to.offset + to.size && to.offset < from.offset + from.size) {
        return false;
    }
    copy_bytes(source, from.offset, target, to.offset, from.size);
    return true;
}

void Session::init_tensor(const wire::StockTensor & stock) {
    const wire::TensorDesc desc = wire::from_stock(stock, buffers_);
    const ggml_context_ptr context = one_tensor_context();
    ggml_tensor * t = place_leaf(context.get(), desc, buffers_);
    if (ggml_backend_buffer_init_tensor(t->buffer, t) != GGML_STATUS_SUCCESS || t->extra != nullptr) {
        throw ProtocolError("the device cannot keep the tensor '" + desc.name + "' for a remote client");
    }
}

uint64_t Session::alloc_size(const wire::AllocSizeRequest & request) {
    Device & on = device(request.device);
    std::vector<wire::TensorDesc> desc;
    wire::TensorDesc op = wire::from_stock(request.tensor, buffers_);
    for (int i = 0; i < wire::n_srcs; i++) {
        if (request.srcs[i].id != 0) {
            op.src[i] = static_cast<uint32_t>(desc.size());
            desc.push_back(wire::from_stock(request.srcs[i], buffers_));
            desc.back().op = GGML_OP_NONE;
        }
    }
    desc.push_back(op);
    BuiltOp built = build_op(desc);
    if (built.op == nullptr) { // an operator that we would not compute: the size of a plain tensor, then
        desc.back().op = GGML_OP_NONE;
        built = build_op(desc);
    }
    if (built.op == nullptr) {
        throw ProtocolError("the size of an impossible tensor is requested");
    }
    return ggml_backend_buft_get_alloc_size(on.buffer_type(), built.op);
}

void Session::mesh_hello(const wire::MeshHello & hello) {
    if (hello.version == 0 || hello.ggml_version != ggml_version()) {
        done_ = true;
        return reply_error("the client has ggml " + hello.ggml_version + ", this server has " + ggml_version() +
                           ": install the same version of mesh-llm on both machines");
    }
    version_ = std::min(hello.version, wire::mesh_version);
    shared_.add_mailbox(key_, mailbox_);
    wire::MeshHelloReply answer;
    answer.ggml_version = ggml_version();
    answer.session_key = key_;
    for (const auto & d : shared_.devices) {
        answer.devices.push_back(d->info());
    }
    answer.models = shared_.models.fingerprints();
    reply(wire::encode(answer));
}

bool Session::supports_op(const wire::GraphDesc & desc) {
    Device & on = device(desc.device);
    try {
        const BuiltOp built = build_op(desc.tensors);
        return built.op != nullptr && ggml_backend_dev_supports_op(on.ggml(), built.op);
    } catch (const ProtocolError &) { // a layout that we would not compute
        return false;
    }
}

void Session::put_graph(std::optional<BuiltGraph> & slot, const wire::GraphDesc & desc) {
    graph_tensors_ -= slot ? slot->n_tensors : 0;
    slot.reset();
    if (graph_tensors_ + desc.tensors.size() > max_graph_tensors) {
        throw ProtocolError("the graphs of this client are too large in total");
    }
    slot = build_graph(desc, buffers_, device(desc.device));
    graph_tensors_ += slot->n_tensors;
}

void Session::run_graph(const std::optional<BuiltGraph> & slot, uint32_t index) {
    if (!slot) {
        throw ProtocolError("the graph to run was never sent, or its buffers were freed");
    }
    const auto begin = std::chrono::steady_clock::now();
    run_checked(*slot, device(index));
    shared_.counters.compute_ns +=
        static_cast<uint64_t>(std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin).count());
    shared_.counters.graphs_computed++;
    computed_ = true;
}

void Session::load_gguf(const wire::SetTensorGguf & request) {
    const Buffers::Entry & entry = buffers_.checked(request.range);
    loads_.add(shared_.models.find(request), entry, request.range);
}

void Session::free_buffer(uint64_t handle) {
    buffers_.at(handle);
    for (auto & slots : graphs_) {
        for (std::optional<BuiltGraph> & graph : slots) {
            if (graph && std::ranges::find(graph->buffers, handle) != graph->buffers.end()) {
                graph_tensors_ -= graph->n_tensors;
                graph.reset();
            }
        }
    }
    buffers_.free(handle);
}

void Session::register_peer(const wire::RegisterPeer & request) {
    const std::optional<std::string> address = shared_.peer_address(request.address);
    if (peers_.size() >= max_peers || !address) {
        return reply_with(uint8_t(0));
    }
    try {
        peers_[request.peer] = std::make_unique<PeerLink>(*address, request.session_key, shared_.counters);
        reply_with(uint8_t(1));
    } catch (const std::exception & e) { // not an error of the session: the host relays instead
        shared_.log("cannot connect to the stage at " + request.address +
                    ", so the host relays between them: " + e.what());
        reply_with(uint8_t(0));
    }
}

void Session::push(const wire::PushTensor & request) {
    const auto peer = peers_.find(request.peer);
    if (peer == peers_.end()) {
        throw ProtocolError("a tensor is pushed to a peer that was not registered");
    }
    if (request.range.size > wire::max_data_payload - sizeof(wire::PeerDataHead)) {
        throw ProtocolError("a tensor is too large to be pushed at once");
    }
    const Buffers::Entry & entry = buffers_.checked(request.range);
    if (!refusal_.empty()) {
        return peer->second->push(request.transfer, {wire::Bytes(refusal_.begin(), refusal_.end()), true});
    }
    wire::Bytes data(request.range.size);
    read_bytes(entry, request.range.offset, data.data(), data.size());
    peer->second->push(request.transfer, {std::move(data)});
}

void Session::await(const wire::AwaitTensor & request) {
    const Buffers::Entry & entry = buffers_.checked(request.range);
    const auto [data, refused] = mailbox_->take(request.transfer, [this] {
        pollfd p{stream_.fd(), hangup_events, 0};
        if (::poll(&p, 1, 0) > 0) {
            throw channel::TransportError("the host disconnected while a transfer was awaited");
        }
    });
    if (refused) {
        const std::string why(data.begin(), data.end());
        if (version_ < 2) {
            throw ProtocolError(why);
        }
        refusal_ = "the previous stage: " + why;
        return;
    }
    if (data.size() != request.range.size) {
        throw ProtocolError("a pushed tensor has a different size from the one awaited");
    }
    write_bytes(entry, request.range.offset, data.data(), data.size());
}

void Session::serve_peer(const wire::Key & key) {
    const std::shared_ptr<Mailbox> mailbox = shared_.find_mailbox(key);
    done_ = true;
    if (mailbox == nullptr) {
        return reply_error("no session has this key");
    }
    reply_with(uint8_t(1));
    std::string why = "the stage that pushes to this one closed its link";
    try {
        Command command;
        while (read_header(command)) {
            if (command == Command::peer_error) {
                const wire::Bytes text = payload();
                why = "the previous stage: " + std::string(text.begin(), text.end());
                break;
            }
            if (command != Command::peer_tensor_data && command != Command::peer_refused) {
                throw ProtocolError("a peer sends something other than tensors");
            }
            const auto h = head<wire::PeerDataHead>();
            const bool refused = command == Command::peer_refused;
            wire::Bytes data = payload();
            shared_.counters.pushes_received++;
            shared_.counters.push_bytes_received += data.size();
            if (!mailbox->put(h.transfer, {std::move(data), refused})) {
                return;
            }
        }
    } catch (const std::exception & e) {
        why = std::string("the link from the previous stage: ") + e.what();
    }
    mailbox->fail(why);
}

} // namespace meshllm::server

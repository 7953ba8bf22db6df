#include "channel/handshake.h"

#include <chrono>

namespace meshllm::channel {

void send(Stream & stream, wire::Command command, wire::ByteView head, wire::ByteView body) {
    wire::Bytes frame;
    wire::Writer w(frame);
    w.put(command);
    w.put(uint64_t(head.size() + body.size()));
    w.bytes(head);
    stream.write_all(frame, body);
}

wire::Bytes receive(Stream & stream, uint64_t limit) {
    uint8_t head[sizeof(uint64_t)];
    if (!stream.read_exactly(head)) {
        throw TransportError("the peer closed the connection without a reply");
    }
    const auto size = wire::Reader(head).get<uint64_t>();
    const bool error = (size & wire::reply_error_bit) != 0;
    const uint64_t length = size & ~wire::reply_error_bit;
    if (length > (error ? wire::max_error_text : limit)) {
        throw ProtocolError("the peer's reply is too long");
    }
    wire::Bytes payload(length);
    if (length != 0 && !stream.read_exactly(payload)) {
        throw TransportError("the peer closed the connection in the middle of a reply");
    }
    if (error) {
        throw ProtocolError(std::string(payload.begin(), payload.end()));
    }
    return payload;
}

wire::Bytes call(Stream & stream, wire::Command command, wire::ByteView payload) {
    send(stream, command, payload);
    return receive(stream, wire::max_small_payload);
}

bool stock_hello(Stream & stream) {
    const uint8_t no_rdma[wire::stock_caps_size] = {};
    const wire::Bytes payload = call(stream, wire::Command::hello, no_rdma);
    const auto reply = wire::exactly<wire::StockHelloReply>(payload);
    if (reply.major != wire::stock_major || reply.minor > wire::stock_minor) {
        throw ProtocolError("the server speaks ggml-rpc " + std::to_string(reply.major) + "." +
                            std::to_string(reply.minor) +
                            ", this machine ggml-rpc 7.0: install the same version on both machines");
    }
    return wire::announces_mesh(reply);
}

namespace {

template <class T>
T stock_call(Stream & stream, wire::Command command, wire::ByteView payload) {
    return wire::exactly<T>(call(stream, command, payload));
}

wire::DeviceInfo stock_device(Stream & stream, uint32_t index) {
    wire::DeviceInfo info;
    info.name = "RPC" + std::to_string(index);
    info.description = "stock ggml-rpc-server";
    info.alloc_rule = wire::AllocRule::ask;
    info.alignment = stock_call<uint64_t>(stream, wire::Command::get_alignment, wire::view_of(index));
    info.max_size = stock_call<uint64_t>(stream, wire::Command::get_max_size, wire::view_of(index));
    const auto memory = stock_call<wire::DeviceMemory>(stream, wire::Command::get_device_memory, wire::view_of(index));
    info.memory_free = memory.free;
    info.memory_total = memory.total;
    return info;
}

ServerInfo introduce_stock(Stream & stream) {
    ServerInfo info;
    const auto n = stock_call<uint32_t>(stream, wire::Command::device_count, {});
    for (uint32_t i = 0; i < std::min(n, wire::max_devices); i++) {
        info.devices.push_back(stock_device(stream, i));
    }
    return info;
}

} // namespace

ServerInfo introduce(Stream & stream, const std::string & ggml_version) {
    if (!stock_hello(stream)) {
        return introduce_stock(stream);
    }
    wire::MeshHello hello;
    hello.ggml_version = ggml_version;
    const auto asked = std::chrono::steady_clock::now();
    const wire::Bytes payload = call(stream, wire::Command::mesh_hello, wire::encode(hello));
    const std::chrono::duration<double> rtt = std::chrono::steady_clock::now() - asked;
    wire::MeshHelloReply reply = wire::decode_mesh_hello_reply(payload);
    if (reply.ggml_version != ggml_version) {
        throw ProtocolError("the server has ggml " + reply.ggml_version + ", this machine ggml " + ggml_version +
                            ": install the same version of mesh-llm on both machines");
    }
    return {true,
            reply.version,
            rtt.count(),
            reply.session_key,
            std::min(reply.graph_slots, wire::max_graph_slots),
            std::move(reply.devices),
            std::move(reply.models)};
}

} // namespace meshllm::channel

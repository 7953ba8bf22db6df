// Every decoder on arbitrary bytes: no crash, and what was decoded comes back the same after encoding.
#include "wire/graph.h"

#include <cstdlib>

using namespace meshllm;

namespace {

struct OneBase : wire::AddressMap {
    uint64_t base_of(uint64_t buffer) const override {
        if (buffer > 3) {
            throw ProtocolError("foreign");
        }
        return buffer << 43;
    }
};

template <class F>
void attempt(F decode) {
    try {
        decode();
    } catch (const ProtocolError &) {
    }
}

void same(const wire::Bytes & a, const wire::Bytes & b) {
    if (a != b) {
        std::abort();
    }
}

wire::Bytes encoded(const wire::GraphDesc & graph) {
    wire::Bytes out;
    wire::encode_graph(graph, out);
    return out;
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const wire::ByteView bytes(data, size);
    attempt([&] {
        const wire::Bytes once = encoded(wire::decode_graph(bytes));
        same(once, encoded(wire::decode_graph(once)));
    });
    attempt([&] { wire::decode_graph_put(bytes); });
    attempt([&] {
        const wire::GraphDesc graph = wire::decode_stock_graph(bytes, OneBase());
        const wire::GraphDesc again = wire::decode_stock_graph(wire::encode_stock_graph(graph, OneBase()), OneBase());
        if (again.nodes.size() != graph.nodes.size()) {
            std::abort();
        }
    });
    attempt([&] {
        const wire::Bytes once = wire::encode(wire::decode_mesh_hello_reply(bytes));
        same(once, wire::encode(wire::decode_mesh_hello_reply(once)));
    });
    attempt([&] {
        const wire::Bytes once = wire::encode(wire::decode_set_tensor_gguf(bytes));
        same(once, wire::encode(wire::decode_set_tensor_gguf(once)));
    });
    attempt([&] { wire::decode_register_peer(bytes); });
    attempt([&] { wire::decode_mesh_hello(bytes); });
    attempt([&] { wire::exactly<wire::AllocSizeRequest>(bytes); });
    return 0;
}

// Every codec of csrc/wire: what is encoded decodes to the same, and what is truncated, oversized or malformed is
// refused. Without a framework: prints each check that fails, and exits with 1 when one did.
#include "wire/graph.h"

#include <algorithm>
#include <cstdio>
#include <source_location>

using namespace meshllm;

namespace {

int n_checks = 0, n_failed = 0;

void check(bool ok, const std::string & what, std::source_location at = std::source_location::current()) {
    n_checks++;
    if (!ok) {
        n_failed++;
        std::printf("%s:%u: %s\n", at.file_name(), at.line(), what.c_str());
    }
}

template <class F>
bool refuses(F decode) {
    try {
        decode();
        return false;
    } catch (const ProtocolError &) {
        return true;
    }
}

template <class F>
void check_refused(const std::string & what, F decode, std::source_location at = std::source_location::current()) {
    check(refuses(decode), "is not refused: " + what, at);
}

/// `decode` refuses every payload that ends before its last byte.
template <class F>
void check_truncated(const std::string & what, const wire::Bytes & payload, F decode,
                     std::source_location at = std::source_location::current()) {
    for (size_t n = 0; n < payload.size(); n++) {
        const wire::Bytes part(payload.begin(), payload.begin() + static_cast<ptrdiff_t>(n)); // ASan sees its end
        check(refuses([&] { decode(part); }),
              what + " is not refused when cut at " + std::to_string(n) + " of " + std::to_string(payload.size()), at);
    }
}

wire::Bytes longer(wire::Bytes payload) {
    payload.push_back(0);
    return payload;
}

template <class F>
wire::Bytes written(F write) {
    wire::Bytes out;
    wire::Writer w(out);
    write(w);
    return out;
}

// --- bytes ---

void test_varints() {
    for (const uint64_t value : {uint64_t(0), uint64_t(1), uint64_t(127), uint64_t(128), uint64_t(16383),
                                 uint64_t(16384), uint64_t(1) << 63, UINT64_MAX}) {
        const wire::Bytes bytes = written([&](wire::Writer & w) { w.varint(value); });
        wire::Reader reader(bytes);
        check(reader.varint() == value && reader.remaining() == 0, "varint " + std::to_string(value));
        check_truncated("a varint", bytes, [](wire::ByteView part) { wire::Reader(part).varint(); });
    }
    for (const int64_t value : {int64_t(0), int64_t(-1), int64_t(1), int64_t(-64), int64_t(64), INT64_MIN, INT64_MAX}) {
        const wire::Bytes bytes = written([&](wire::Writer & w) { w.zigzag(value); });
        check(wire::Reader(bytes).zigzag() == value, "zigzag " + std::to_string(value));
    }
    check(written([](wire::Writer & w) { w.varint(300); }) == wire::Bytes({0xac, 0x02}), "a varint is LEB128");
    check(written([](wire::Writer & w) { w.zigzag(-1); }) == wire::Bytes({0x01}), "-1 takes one byte");
    check_refused("a varint of 11 bytes", [] { wire::Reader(wire::Bytes(11, 0x80)).varint(); });
}

void test_fields() {
    const wire::Bytes bytes = written([](wire::Writer & w) {
        w.put(uint16_t(0x0102));
        w.text("two");
        w.text("");
        w.put(1.5f);
    });
    check(bytes[0] == 2 && bytes[1] == 1, "integers are little-endian");
    const auto decode = [](wire::ByteView part) {
        wire::Reader r(part);
        const bool same =
            r.get<uint16_t>() == 0x0102 && r.text() == "two" && r.text().empty() && r.get<float>() == 1.5f;
        r.expect_end();
        return same;
    };
    check(decode(bytes), "fields come back in order");
    check_truncated("fields", bytes, decode);
    check_refused("bytes behind the last field", [&] { decode(longer(bytes)); });
    const wire::Bytes lie = written([](wire::Writer & w) { w.varint(UINT64_MAX); });
    check_refused("a text of 2^64 - 1 bytes", [&] { wire::Reader(lie).text(); });
    check(wire::Reader(bytes).rest().size() == bytes.size(), "rest() is all that remains");
}

// --- frames ---

template <class T>
void test_structure(const char * name) {
    wire::Bytes bytes(sizeof(T));
    for (size_t i = 0; i < bytes.size(); i++) {
        bytes[i] = static_cast<uint8_t>(i * 7 + 1);
    }
    const T value = wire::exactly<T>(bytes);
    const wire::ByteView again = wire::view_of(value);
    check(std::equal(again.begin(), again.end(), bytes.begin(), bytes.end()), std::string(name) + " round trip");
    check_truncated(name, bytes, [](wire::ByteView part) { wire::exactly<T>(part); });
    check_refused(std::string("a longer ") + name, [&] { wire::exactly<T>(longer(bytes)); });
}

void test_structures() {
    test_structure<wire::StockTensor>("StockTensor");
    test_structure<wire::StockHelloReply>("StockHelloReply");
    test_structure<wire::AllocRequest>("AllocRequest");
    test_structure<wire::AllocReply>("AllocReply");
    test_structure<wire::BufferClear>("BufferClear");
    test_structure<wire::MemsetTensor>("MemsetTensor");
    test_structure<wire::SetTensorHead>("SetTensorHead");
    test_structure<wire::SetTensorHash>("SetTensorHash");
    test_structure<wire::GetTensor>("GetTensor");
    test_structure<wire::CopyTensor>("CopyTensor");
    test_structure<wire::AllocSizeRequest>("AllocSizeRequest");
    test_structure<wire::DeviceMemory>("DeviceMemory");
    test_structure<wire::GraphRun>("GraphRun");
    test_structure<wire::ByteRange>("ByteRange");
    test_structure<wire::CopyBytes>("CopyBytes");
    test_structure<wire::SetBytesHead>("SetBytesHead");
    test_structure<wire::PushTensor>("PushTensor");
    test_structure<wire::AwaitTensor>("AwaitTensor");
    test_structure<wire::PeerDataHead>("PeerDataHead");
}

void test_commands() {
    for (int number = 0; number < 256; number++) {
        const auto command = static_cast<wire::Command>(number);
        const bool exists = number <= 17 || (number >= 64 && number <= 79);
        const std::string name = "command " + std::to_string(number);
        check(wire::max_payload(command).has_value() == exists, name + " exists, or does not");
        check(exists || !wire::has_reply(command), name + " does not exist and has no reply");
        check(wire::max_payload(command).value_or(0) <= wire::max_data_payload, name + " is limited");
    }
    check(wire::max_payload(wire::Command::set_bytes) == wire::max_data_payload, "set_bytes carries data");
    check(wire::max_payload(wire::Command::graph_put) == wire::max_graph_payload, "graph_put carries a graph");
    check(wire::max_payload(wire::Command::hello) == wire::max_small_payload, "hello is small");
    check(wire::has_reply(wire::Command::get_bytes) && !wire::has_reply(wire::Command::set_bytes),
          "reads have a reply, writes have none");
}

void test_hello_reply() {
    const wire::StockHelloReply ours = wire::make_hello_reply(true), stock = wire::make_hello_reply(false);
    check(wire::announces_mesh(ours) && !wire::announces_mesh(stock), "only our hello announces the extensions");
    check(ours.major == wire::stock_major && ours.minor == wire::stock_minor, "the hello names the stock version");
    check(std::all_of(stock.caps, stock.caps + wire::stock_caps_size, [](uint8_t b) { return b == 0; }),
          "a stock hello has no capabilities");
}

template <class Message, class F>
void check_message(const char * name, const Message & message, F decode) {
    const wire::Bytes bytes = wire::encode(message);
    check(wire::encode(decode(bytes)) == bytes, std::string(name) + " round trip");
    check_truncated(name, bytes, decode);
}

void test_mesh_hello() {
    wire::MeshHello hello;
    hello.ggml_version = "0.25.3";
    check_message("MeshHello", hello, wire::decode_mesh_hello);
    const wire::Bytes later = longer(wire::encode(hello));
    check(wire::decode_mesh_hello(later).ggml_version == "0.25.3", "fields of a later MeshHello are ignored");
    hello.ggml_version = std::string(wire::max_text, 'x');
    check(wire::decode_mesh_hello(wire::encode(hello)).ggml_version.size() == wire::max_text, "the longest version");
    hello.ggml_version += 'x';
    check_refused("a version of 4097 bytes", [&] { wire::decode_mesh_hello(wire::encode(hello)); });
}

wire::MeshHelloReply hello_reply() {
    wire::MeshHelloReply reply;
    reply.ggml_version = "0.25.3";
    reply.session_key = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
    reply.graph_slots = 7;
    reply.devices = {{"CPU", "a processor", 0, wire::AllocRule::nbytes, 32, SIZE_MAX, 1 << 20, 1 << 21},
                     {"CUDA0", "a card", 1, wire::AllocRule::ask, 1 << 20, 1 << 30, 0, 1}};
    reply.models = {wire::Fingerprint{1}, wire::Fingerprint{2}};
    return reply;
}

template <class F>
void check_reply_refused(const std::string & what, F spoil) {
    wire::MeshHelloReply reply = hello_reply();
    spoil(reply);
    check_refused(what, [&] { wire::decode_mesh_hello_reply(wire::encode(reply)); });
}

void test_mesh_hello_reply() {
    check_message("MeshHelloReply", hello_reply(), wire::decode_mesh_hello_reply);
    const wire::MeshHelloReply again = wire::decode_mesh_hello_reply(wire::encode(hello_reply()));
    check(again.session_key == hello_reply().session_key && again.graph_slots == 7, "key and slots come back");
    check(again.devices.size() == 2 && again.devices[1].name == "CUDA0" && again.devices[1].alignment == 1 << 20 &&
              again.devices[1].alloc_rule == wire::AllocRule::ask && again.devices[1].memory_total == 1,
          "devices come back");
    check(again.models == hello_reply().models, "models come back");
    for (const uint64_t alignment : {0, 3, 1 << 21}) {
        check_reply_refused("alignment " + std::to_string(alignment),
                            [&](auto & r) { r.devices[0].alignment = alignment; });
    }
    check_reply_refused("no graph slots", [](auto & r) { r.graph_slots = 0; });
    check_reply_refused("65 devices", [](auto & r) { r.devices.resize(wire::max_devices + 1, r.devices[0]); });
    check_reply_refused("an unknown allocation rule",
                        [](auto & r) { r.devices[0].alloc_rule = static_cast<wire::AllocRule>(2); });
    check_reply_refused("a long device name", [](auto & r) { r.devices[0].name.resize(wire::max_text + 1, 'x'); });
    wire::MeshHelloReply none = hello_reply();
    none.models.clear();
    wire::Bytes lie = wire::encode(none);
    lie.back() = 100; // models, of which none follows
    check_refused("more models than follow", [&] { wire::decode_mesh_hello_reply(lie); });
}

void test_requests() {
    wire::SetTensorGguf load;
    load.model = {9, 8, 7};
    load.name = "blk.0.attn_q.weight";
    load.type = 12;
    load.ne = {4096, 1024, 1, -1};
    load.data_offset = UINT64_MAX;
    load.range = {1, 2, 3};
    check_message("SetTensorGguf", load, wire::decode_set_tensor_gguf);
    const wire::SetTensorGguf again = wire::decode_set_tensor_gguf(wire::encode(load));
    check(again.name == load.name && again.ne == load.ne && again.range.size == 3, "SetTensorGguf keeps its fields");
    check_refused("a longer SetTensorGguf", [&] { wire::decode_set_tensor_gguf(longer(wire::encode(load))); });
    load.name.resize(wire::max_text + 1, 'x');
    check_refused("a long tensor name", [&] { wire::decode_set_tensor_gguf(wire::encode(load)); });

    wire::RegisterPeer peer{3, {1, 2, 3}, "unix:peer-abc.sock"};
    check_message("RegisterPeer", peer, wire::decode_register_peer);
    check(wire::decode_register_peer(wire::encode(peer)).address == peer.address, "RegisterPeer keeps its address");
    check_refused("a longer RegisterPeer", [&] { wire::decode_register_peer(longer(wire::encode(peer))); });
    peer.address.resize(wire::max_text + 1, 'x');
    check_refused("a long address", [&] { wire::decode_register_peer(wire::encode(peer)); });
}

// --- graphs ---

/// Buffers 1 to 3; all others belong to somebody else.
struct ThreeBuffers : wire::AddressMap {
    uint64_t base_of(uint64_t buffer) const override {
        if (buffer == 0 || buffer > 3) {
            throw ProtocolError("foreign");
        }
        return buffer << 43;
    }
};

/// A leaf, what is computed from it, and what is computed from that and is a view of it.
wire::GraphDesc chain() {
    wire::GraphDesc graph;
    graph.device = 2;
    graph.tensors.resize(3);
    for (size_t i = 0; i < graph.tensors.size(); i++) {
        wire::TensorDesc & t = graph.tensors[i];
        t.type = static_cast<uint32_t>(i);
        t.op = static_cast<uint32_t>(10 * i);
        t.flags = i == 1 ? -3 : 4;
        t.ne = {64, 3, 1, 1};
        t.nb = {4, 256, 768, 768};
        t.op_params[i] = -1 - static_cast<int32_t>(i);
        t.op_params[15] = INT32_MIN;
        t.buffer = i + 1;
        t.offset = 4096 * i;
        t.use_count = static_cast<int32_t>(i);
        t.name = std::string({'t', static_cast<char>('0' + i)});
    }
    graph.tensors[1].src[0] = 0;
    graph.tensors[1].src[9] = 0;
    graph.tensors[2].src[1] = 1;
    graph.tensors[2].view_src = 1;
    graph.tensors[2].view_offs = 128;
    graph.nodes = {1, 2};
    return graph;
}

wire::Bytes encoded(const wire::GraphDesc & graph) {
    wire::Bytes out;
    wire::encode_graph(graph, out);
    return out;
}

void check_graph_refused(const std::string & what, const wire::GraphDesc & graph,
                         std::source_location at = std::source_location::current()) {
    check_refused(what, [&] { wire::decode_graph(encoded(graph)); }, at);
}

void test_graph() {
    const wire::Bytes bytes = encoded(chain());
    const wire::GraphDesc again = wire::decode_graph(bytes);
    check(encoded(again) == bytes, "graph round trip");
    const wire::TensorDesc & t = again.tensors[2];
    check(again.device == 2 && again.nodes == std::vector<uint32_t>({1, 2}), "device and nodes come back");
    check(t.src == chain().tensors[2].src && t.view_src == 1 && t.view_offs == 128, "sources come back");
    check(t.ne == chain().tensors[2].ne && t.nb == chain().tensors[2].nb && t.op == 20 && t.type == 2,
          "shapes come back");
    check(t.buffer == 3 && t.offset == 8192 && t.name == "t2" && t.use_count == 2, "memory and name come back");
    check(t.op_params == chain().tensors[2].op_params && again.tensors[1].flags == -3, "parameters come back");
    check(encoded(wire::decode_graph(encoded({}))) == encoded({}), "the empty graph round trip");
    wire::GraphDesc cast = chain(); // ggml_cast: the copy names itself as its destination
    cast.tensors[2].src[1] = 2;
    check(wire::decode_graph(encoded(cast)).tensors[2].src[1] == 2, "a tensor that reads itself comes back");
    check_truncated("a graph", bytes, [](wire::ByteView part) { wire::decode_graph(part); });
    check_refused("bytes behind a graph", [&] { wire::decode_graph(longer(bytes)); });
}

void test_malformed_graphs() {
    const auto spoilt = [](auto spoil) {
        wire::GraphDesc graph = chain();
        spoil(graph);
        return graph;
    };
    check_graph_refused("a node that is no tensor", spoilt([](auto & g) { g.nodes[0] = 3; }));
    check_graph_refused("more nodes than tensors", spoilt([](auto & g) { g.nodes = {0, 1, 2, 0}; }));
    check_graph_refused("a tensor that reads a later one", spoilt([](auto & g) { g.tensors[1].src[0] = 2; }));
    check_graph_refused("a view of a later tensor", spoilt([](auto & g) { g.tensors[1].view_src = 2; }));
    check_graph_refused("a name of 64 bytes", spoilt([](auto & g) { g.tensors[0].name = std::string(64, 'x'); }));
    check(!refuses(
              [&] { wire::decode_graph(encoded(spoilt([](auto & g) { g.tensors[0].name = std::string(63, 'x'); }))); }),
          "a name of 63 bytes is accepted");

    const auto counts = [](uint64_t device, uint64_t n_tensors, size_t n_bytes) {
        return written([&](wire::Writer & w) {
            w.varint(device);
            w.varint(n_tensors);
            w.bytes(wire::Bytes(n_bytes));
        });
    };
    check_refused("a device beyond 32 bits", [&] { wire::decode_graph(counts(uint64_t(1) << 32, 0, 1)); });
    check_refused("tensors that do not follow", [&] { wire::decode_graph(counts(0, 1000, 100)); });
    check_refused("2^64 - 1 tensors", [&] { wire::decode_graph(counts(0, UINT64_MAX, 100)); });
    check_refused("more tensors than are allowed", [&] {
        wire::decode_graph(counts(0, wire::max_graph_tensors + 1, 20 * (wire::max_graph_tensors + 2)));
    });

    const auto tensor = [](uint64_t type, uint64_t op, uint16_t sources) {
        return written([&](wire::Writer & w) {
            w.varint(0); // device
            w.varint(1); // tensors
            w.varint(type);
            w.varint(op);
            w.bytes(wire::Bytes(1 + 4 + 4)); // flags, ne, nb
            w.put(uint16_t(0));              // parameters
            w.varint(0);                     // buffer
            w.put(sources);
            w.bytes(wire::Bytes(64)); // enough zeros for the rest
        });
    };
    check_refused("a type beyond 32 bits", [&] { wire::decode_graph(tensor(uint64_t(1) << 32, 0, 0)); });
    check_refused("an operator beyond 32 bits", [&] { wire::decode_graph(tensor(0, uint64_t(1) << 32, 0)); });
    check_refused("an 11th source", [&] { wire::decode_graph(tensor(0, 0, 1 << 10)); });
    check_refused("a source of the first tensor", [&] { wire::decode_graph(tensor(0, 0, 1)); });
}

void test_graph_put() {
    const auto payload = [](uint32_t slot) {
        wire::Bytes out = written([&](wire::Writer & w) { w.put(slot); });
        wire::encode_graph(chain(), out);
        return out;
    };
    const wire::GraphPut put = wire::decode_graph_put(payload(wire::max_graph_slots - 1));
    check(put.slot == wire::max_graph_slots - 1 && encoded(put.graph) == encoded(chain()), "graph_put round trip");
    check_truncated("graph_put", payload(0), [](wire::ByteView part) { wire::decode_graph_put(part); });
    check_refused("a slot that does not exist", [&] { wire::decode_graph_put(payload(wire::max_graph_slots)); });
    check_refused("bytes behind graph_put", [&] { wire::decode_graph_put(longer(payload(0))); });
}

// --- stock graphs ---

void test_stock_tensor() {
    const ThreeBuffers addresses;
    const wire::TensorDesc t = chain().tensors[2];
    const wire::StockTensor stock = wire::to_stock(t, 42, addresses);
    check(stock.id == 42 && stock.data == (uint64_t(3) << 43) + 8192 && stock.src[1] == 2,
          "a tensor as stock sends it");
    wire::TensorDesc again = wire::from_stock(stock, addresses);
    again.src = t.src; // which are a graph's, as is the view
    again.view_src = t.view_src;
    wire::GraphDesc a = chain(), b = chain();
    b.tensors[2] = again;
    check(encoded(a) == encoded(b), "stock tensor round trip");

    wire::StockTensor spoilt = stock;
    spoilt.data = 5;
    check_refused("a tensor before its buffer", [&] { wire::from_stock(spoilt, addresses); });
    spoilt = stock;
    spoilt.buffer = 4;
    check_refused("a foreign buffer", [&] { wire::from_stock(spoilt, addresses); });
    spoilt.buffer = 0;
    check_refused("an address without a buffer", [&] { wire::from_stock(spoilt, addresses); });
    spoilt = stock;
    std::fill(std::begin(spoilt.name), std::end(spoilt.name), 'x');
    check(wire::from_stock(spoilt, addresses).name.size() == 63, "a name without its zero is cut");
}

wire::Bytes stock_payload(uint32_t n_nodes, const std::vector<uint64_t> & nodes, uint32_t n_tensors,
                          const std::vector<wire::StockTensor> & tensors) {
    return written([&](wire::Writer & w) {
        w.put(uint32_t(2));
        w.put(n_nodes);
        for (const uint64_t node : nodes) {
            w.put(node);
        }
        w.put(n_tensors);
        for (const wire::StockTensor & tensor : tensors) {
            w.put(tensor);
        }
    });
}

void test_stock_graph() {
    const ThreeBuffers addresses;
    const auto decode = [&](wire::ByteView part) { return wire::decode_stock_graph(part, addresses); };
    const wire::Bytes bytes = wire::encode_stock_graph(chain(), addresses);
    check(encoded(decode(bytes)) == encoded(chain()), "stock graph round trip");
    check_truncated("a stock graph", bytes, decode);

    std::vector<wire::StockTensor> tensors;
    for (size_t i = 0; i < 3; i++) {
        tensors.push_back(wire::to_stock(chain().tensors[i], i + 1, addresses));
    }
    std::vector<wire::StockTensor> reversed(tensors.rbegin(), tensors.rend());
    check(encoded(decode(stock_payload(2, {2, 3}, 3, reversed))) == encoded(chain()), "tensors are put in order");

    check_refused("an unknown node", [&] { decode(stock_payload(1, {9}, 3, tensors)); });
    check_refused("more nodes than tensors", [&] { decode(stock_payload(4, {1, 2, 3, 3}, 3, tensors)); });
    check_refused("2^32 - 1 nodes", [&] { decode(stock_payload(UINT32_MAX, {1}, 3, tensors)); });
    check_refused("2^32 - 1 tensors", [&] { decode(stock_payload(1, {1}, UINT32_MAX, tensors)); });
    std::vector<wire::StockTensor> spoilt = tensors;
    spoilt[1].src[3] = 9;
    check_refused("an unknown source", [&] { decode(stock_payload(1, {3}, 3, spoilt)); });
    spoilt = tensors;
    spoilt[0].src[0] = 3;
    check_refused("a cycle", [&] { decode(stock_payload(1, {3}, 3, spoilt)); });
    spoilt[0].src[0] = 1;
    check(decode(stock_payload(1, {3}, 3, spoilt)).tensors[0].src[0] == 0, "a tensor that reads itself comes back");
    spoilt = tensors;
    spoilt[0].view_src = 1;
    check_refused("a view of itself", [&] { decode(stock_payload(1, {3}, 3, spoilt)); });
}

/// Each tensor reads the next: a decoder that recursed would overflow its stack.
void test_deep_stock_graph() {
    std::vector<wire::StockTensor> tensors(wire::max_graph_tensors);
    for (size_t i = 0; i < tensors.size(); i++) {
        tensors[i].id = i + 1;
        tensors[i].src[0] = i + 1 < tensors.size() ? i + 2 : 0;
    }
    const auto n = static_cast<uint32_t>(tensors.size());
    const wire::GraphDesc graph = wire::decode_stock_graph(stock_payload(1, {1}, n, tensors), ThreeBuffers());
    check(graph.tensors.size() == n && graph.nodes[0] == n - 1, "a chain of the largest size is put in order");
    tensors.push_back({});
    check_refused("one tensor too many",
                  [&] { wire::decode_stock_graph(stock_payload(1, {1}, n + 1, tensors), ThreeBuffers()); });
}

} // namespace

int main() {
    test_varints();
    test_fields();
    test_structures();
    test_commands();
    test_hello_reply();
    test_mesh_hello();
    test_mesh_hello_reply();
    test_requests();
    test_graph();
    test_malformed_graphs();
    test_graph_put();
    test_stock_tensor();
    test_stock_graph();
    test_deep_stock_graph();
    std::printf("%d checks, %d failed\n", n_checks, n_failed);
    return n_failed == 0 ? 0 : 1;
}

#include "wire/frames.h"

#include <algorithm>

namespace meshllm::wire {

namespace {

constexpr uint8_t mesh_magic[4] = {'M', 'E', 'S', 'H'};

std::string checked_text(Reader & reader) {
    const std::string_view text = reader.text();
    if (text.size() > max_text) {
        throw ProtocolError("a text is longer than 4096 bytes");
    }
    return std::string(text);
}

template <size_t N>
std::array<uint8_t, N> array_of(Reader & reader) {
    std::array<uint8_t, N> out;
    const ByteView b = reader.bytes(N);
    std::copy(b.begin(), b.end(), out.begin());
    return out;
}

void encode_device(Writer & w, const DeviceInfo & d) {
    w.text(d.name);
    w.text(d.description);
    w.put(d.type);
    w.put(static_cast<uint8_t>(d.alloc_rule));
    w.put(d.alignment);
    w.put(d.max_size);
    w.put(d.memory_free);
    w.put(d.memory_total);
}

DeviceInfo decode_device(Reader & r) {
    DeviceInfo d;
    d.name = checked_text(r);
    d.description = checked_text(r);
    d.type = r.get<uint32_t>();
    const auto rule = r.get<uint8_t>();
    if (rule > static_cast<uint8_t>(AllocRule::ask)) {
        throw ProtocolError("a device announces an unknown allocation rule");
    }
    d.alloc_rule = static_cast<AllocRule>(rule);
    d.alignment = r.get<uint64_t>();
    d.max_size = r.get<uint64_t>();
    d.memory_free = r.get<uint64_t>();
    d.memory_total = r.get<uint64_t>();
    if (d.alignment == 0 || d.alignment > (1 << 20) || (d.alignment & (d.alignment - 1)) != 0) {
        throw ProtocolError("a device announces an alignment that is not a power of two");
    }
    return d;
}

} // namespace

std::optional<uint64_t> max_payload(Command command) {
    switch (command) {
    case Command::set_tensor:
    case Command::set_bytes:
    case Command::peer_tensor_data:
        return max_data_payload;
    case Command::graph_compute:
    case Command::graph_put:
    case Command::supports_op:
        return max_graph_payload;
    case Command::alloc_buffer:
    case Command::get_alignment:
    case Command::get_max_size:
    case Command::buffer_get_base:
    case Command::free_buffer:
    case Command::buffer_clear:
    case Command::set_tensor_hash:
    case Command::get_tensor:
    case Command::copy_tensor:
    case Command::get_device_memory:
    case Command::init_tensor:
    case Command::get_alloc_size:
    case Command::hello:
    case Command::device_count:
    case Command::graph_recompute:
    case Command::memset_tensor:
    case Command::mesh_hello:
    case Command::graph_run:
    case Command::set_tensor_gguf:
    case Command::get_bytes:
    case Command::register_peer:
    case Command::push_tensor_to_peer:
    case Command::await_tensor:
    case Command::peer_attach:
    case Command::peer_error:
    case Command::recover:
    case Command::peer_refused:
    case Command::copy_bytes:
        return max_small_payload;
    }
    return std::nullopt;
}

bool has_reply(Command command) {
    switch (command) {
    case Command::alloc_buffer:
    case Command::get_alignment:
    case Command::get_max_size:
    case Command::buffer_get_base:
    case Command::set_tensor_hash:
    case Command::get_tensor:
    case Command::copy_tensor:
    case Command::get_device_memory:
    case Command::get_alloc_size:
    case Command::hello:
    case Command::device_count:
    case Command::mesh_hello:
    case Command::supports_op:
    case Command::get_bytes:
    case Command::register_peer:
    case Command::peer_attach:
        return true;
    default:
        return false;
    }
}

bool announces_mesh(const StockHelloReply & reply) {
    return std::equal(std::begin(mesh_magic), std::end(mesh_magic), reply.caps);
}

// The magic is in the field for RDMA capabilities. A stock client without RDMA ignores it; a client that sends
// capabilities of its own (an RDMA build) must get zeros, or it would try RDMA.
StockHelloReply make_hello_reply(bool mesh) {
    StockHelloReply reply{stock_major, stock_minor, stock_patch, 0, {}};
    if (mesh) {
        std::copy(std::begin(mesh_magic), std::end(mesh_magic), reply.caps);
    }
    return reply;
}

Bytes encode(const MeshHello & m) {
    Bytes out;
    Writer w(out);
    w.put(m.version);
    w.text(m.ggml_version);
    return out;
}

MeshHello decode_mesh_hello(ByteView payload) {
    Reader r(payload);
    MeshHello m;
    m.version = r.get<uint16_t>();
    m.ggml_version = checked_text(r);
    return m; // what follows are fields of later versions
}

Bytes encode(const MeshHelloReply & m) {
    Bytes out;
    Writer w(out);
    w.put(m.version);
    w.text(m.ggml_version);
    w.bytes(m.session_key);
    w.put(m.graph_slots);
    w.varint(m.devices.size());
    for (const DeviceInfo & d : m.devices) {
        encode_device(w, d);
    }
    w.varint(m.models.size());
    for (const Fingerprint & f : m.models) {
        w.bytes(f);
    }
    return out;
}

MeshHelloReply decode_mesh_hello_reply(ByteView payload) {
    Reader r(payload);
    MeshHelloReply m;
    m.version = r.get<uint16_t>();
    m.ggml_version = checked_text(r);
    m.session_key = array_of<16>(r);
    m.graph_slots = r.get<uint32_t>();
    const uint64_t n_devices = r.varint();
    if (n_devices > max_devices || m.graph_slots == 0) {
        throw ProtocolError("a server announces impossible numbers of devices or graphs");
    }
    for (uint64_t i = 0; i < n_devices; i++) {
        m.devices.push_back(decode_device(r));
    }
    const uint64_t n_models = r.varint();
    if (n_models > r.remaining() / sizeof(Fingerprint)) {
        throw ProtocolError("a server announces more models than it lists");
    }
    for (uint64_t i = 0; i < n_models; i++) {
        m.models.push_back(array_of<32>(r));
    }
    return m;
}

Bytes encode(const SetTensorGguf & m) {
    Bytes out;
    Writer w(out);
    w.bytes(m.model);
    w.text(m.name);
    w.put(m.type);
    w.put(m.ne);
    w.put(m.data_offset);
    w.put(m.range);
    return out;
}

SetTensorGguf decode_set_tensor_gguf(ByteView payload) {
    Reader r(payload);
    SetTensorGguf m;
    m.model = array_of<32>(r);
    m.name = checked_text(r);
    m.type = r.get<uint32_t>();
    m.ne = r.get<std::array<int64_t, 4>>();
    m.data_offset = r.get<uint64_t>();
    m.range = r.get<ByteRange>();
    r.expect_end();
    return m;
}

Bytes encode(const RegisterPeer & m) {
    Bytes out;
    Writer w(out);
    w.put(m.peer);
    w.bytes(m.session_key);
    w.text(m.address);
    return out;
}

RegisterPeer decode_register_peer(ByteView payload) {
    Reader r(payload);
    RegisterPeer m;
    m.peer = r.get<uint32_t>();
    m.session_key = array_of<16>(r);
    m.address = checked_text(r);
    r.expect_end();
    return m;
}

} // namespace meshllm::wire

// The frames of ggml-rpc 7.0 (ggml/src/ggml-rpc/ggml-rpc.cpp) and of our extensions, as pure codecs.
//
// A request is   | command (1 byte) | size (8 bytes) | payload |
// and a reply is                    | size (8 bytes) | payload |
// in little-endian order. In an extended session the top bit of a reply's size marks an error, and the next one that it
// is a refusal, which leaves the session alive: the payload is then one line of text. docs/protocol.md has the table of
// all commands.
#pragma once

#include "wire/bytes.h"

#include <array>
#include <optional>

namespace meshllm::wire {

enum class Command : uint8_t {
    // stock ggml-rpc 7.0
    alloc_buffer = 0,
    get_alignment = 1,
    get_max_size = 2,
    buffer_get_base = 3,
    free_buffer = 4,
    buffer_clear = 5,
    set_tensor = 6,
    set_tensor_hash = 7,
    get_tensor = 8,
    copy_tensor = 9,
    graph_compute = 10,
    get_device_memory = 11,
    init_tensor = 12,
    get_alloc_size = 13,
    hello = 14,
    device_count = 15,
    graph_recompute = 16,
    memset_tensor = 17,
    // ours, used only after both hellos announced them
    mesh_hello = 64,
    supports_op = 65,
    graph_put = 66,
    graph_run = 67,
    set_tensor_gguf = 68,
    set_bytes = 69,
    get_bytes = 70,
    register_peer = 71,
    push_tensor_to_peer = 72,
    await_tensor = 73,
    peer_attach = 74,
    peer_tensor_data = 75,
    peer_error = 76,
    recover = 77,      // since version 2
    peer_refused = 78, // since version 2
    copy_bytes = 79,   // since version 2
};

constexpr uint8_t stock_major = 7, stock_minor = 0, stock_patch = 0; // RPC_PROTO_*_VERSION in ggml-rpc.h
constexpr size_t stock_caps_size = 24;                               // RPC_CONN_CAPS_SIZE in transport.h
constexpr uint16_t mesh_version = 2;

constexpr size_t header_size = 9;
constexpr uint64_t reply_error_bit = uint64_t(1) << 63;
constexpr uint64_t reply_refused_bit = uint64_t(1) << 62; // beside reply_error_bit

// Limits on the memory that a peer may make us use. Each is far above what a real model needs.
constexpr uint64_t max_small_payload = 64 << 10;         // every command that carries no data and no graph
constexpr uint64_t max_data_payload = uint64_t(1) << 30; // one tensor's data; clients send larger ones in pieces
constexpr uint64_t max_graph_payload = 64 << 20;         // 8192 nodes of stock's 296 bytes are 5 MB
constexpr uint32_t max_graph_tensors = 1 << 17;
constexpr uint32_t max_graph_slots = 64; // graphs kept for one device of one session
constexpr uint32_t max_devices = 64;
constexpr size_t max_text = 4096;
constexpr uint64_t max_error_text = 4096;

/// The largest payload that `command` may carry; nullopt for a command that does not exist.
std::optional<uint64_t> max_payload(Command command);

/// Whether the server replies. An error in a command without a reply is reported by the next one that has one.
bool has_reply(Command command);

using Key = std::array<uint8_t, 16>;         // identifies a session to the stages that push to it
using Fingerprint = std::array<uint8_t, 32>; // of a model; see docs/protocol.md

// --- stock structures, packed as on the wire ---

#pragma pack(push, 1)
struct StockTensor {
    uint64_t id;
    uint32_t type;
    uint64_t buffer;
    uint32_t ne[4];
    uint32_t nb[4];
    uint32_t op;
    int32_t op_params[16];
    int32_t flags;
    uint64_t src[10];
    uint64_t view_src;
    uint64_t view_offs;
    uint64_t data;
    char name[64];
    int32_t use_count;
};
static_assert(sizeof(StockTensor) == 296);

struct StockHelloReply {
    uint8_t major, minor, patch, padding;
    uint8_t caps[stock_caps_size];
};
static_assert(sizeof(StockHelloReply) == 28);

struct AllocRequest {
    uint32_t device;
    uint64_t size;
};
static_assert(sizeof(AllocRequest) == 12);

struct AllocReply {
    uint64_t buffer; // 0 when the memory could not be allocated
    uint64_t size;
};
static_assert(sizeof(AllocReply) == 16);

struct BufferClear {
    uint64_t buffer;
    uint8_t value;
};
static_assert(sizeof(BufferClear) == 9);

struct MemsetTensor {
    StockTensor tensor;
    uint64_t offset, size;
    uint8_t value;
};
static_assert(sizeof(MemsetTensor) == 313);

struct SetTensorHead { // data follows
    StockTensor tensor;
    uint8_t cache_flag;
    uint64_t offset;
};
static_assert(sizeof(SetTensorHead) == 305);

struct SetTensorHash {
    StockTensor tensor;
    uint64_t offset, hash;
};
static_assert(sizeof(SetTensorHash) == 312);

struct GetTensor {
    StockTensor tensor;
    uint64_t offset, size;
};
static_assert(sizeof(GetTensor) == 312);

struct CopyTensor {
    StockTensor src, dst;
};
static_assert(sizeof(CopyTensor) == 592);

struct AllocSizeRequest {
    uint32_t device;
    StockTensor tensor;
    StockTensor srcs[10];
};
static_assert(sizeof(AllocSizeRequest) == 3260);

struct DeviceMemory {
    uint64_t free, total;
};
static_assert(sizeof(DeviceMemory) == 16);

// --- ours ---

struct GraphRun {
    uint32_t device, slot;
};
static_assert(sizeof(GraphRun) == 8);

struct ByteRange { // of a buffer; the payload of get_bytes, and the head of set_bytes
    uint64_t buffer, offset, size;
};
static_assert(sizeof(ByteRange) == 24);

struct CopyBytes {
    ByteRange from;
    uint64_t to_buffer, to_offset;
};
static_assert(sizeof(CopyBytes) == 40);

struct SetBytesHead { // data follows
    uint64_t buffer, offset;
};
static_assert(sizeof(SetBytesHead) == 16);

struct PushTensor {
    uint32_t peer;
    uint64_t transfer;
    ByteRange range;
};
static_assert(sizeof(PushTensor) == 36);

struct AwaitTensor {
    uint64_t transfer;
    ByteRange range;
};
static_assert(sizeof(AwaitTensor) == 32);

struct PeerDataHead { // data follows; in peer_refused, the reason
    uint64_t transfer;
};
static_assert(sizeof(PeerDataHead) == 8);
#pragma pack(pop)

template <class T>
ByteView view_of(const T & value) {
    return {reinterpret_cast<const uint8_t *>(&value), sizeof(T)};
}

/// A payload that is exactly one packed structure.
template <class T>
T exactly(ByteView payload) {
    Reader reader(payload);
    const T value = reader.get<T>();
    reader.expect_end();
    return value;
}

/// How much memory a device needs for a tensor (ggml_backend_buft_get_alloc_size).
enum class AllocRule : uint8_t {
    nbytes = 0, // always ggml_nbytes: no query needed
    ask = 1,    // may be more for padded types and some operators: query, and cache the reply
};

struct DeviceInfo {
    std::string name, description;
    uint32_t type = 0; // enum ggml_backend_dev_type
    AllocRule alloc_rule = AllocRule::nbytes;
    uint64_t alignment = 0, max_size = 0; // bytes
    uint64_t memory_free = 0, memory_total = 0;
};

struct MeshHello {
    uint16_t version = mesh_version;
    std::string ggml_version;
};

struct MeshHelloReply {
    uint16_t version = mesh_version;
    std::string ggml_version;
    Key session_key{};
    uint32_t graph_slots = max_graph_slots;
    std::vector<DeviceInfo> devices;
    std::vector<Fingerprint> models;
};

struct SetTensorGguf {
    Fingerprint model{};
    std::string name;
    uint32_t type = 0;
    std::array<int64_t, 4> ne{};
    uint64_t data_offset = 0; // first byte, counted from the start of the tensor's data in the file
    ByteRange range{};        // its destination
};

struct RegisterPeer {
    uint32_t peer = 0;
    Key session_key{};
    std::string address;
};

bool announces_mesh(const StockHelloReply & reply);
StockHelloReply make_hello_reply(bool mesh);

Bytes encode(const MeshHello &);
Bytes encode(const MeshHelloReply &);
Bytes encode(const SetTensorGguf &);
Bytes encode(const RegisterPeer &);

MeshHello decode_mesh_hello(ByteView);
MeshHelloReply decode_mesh_hello_reply(ByteView);
SetTensorGguf decode_set_tensor_gguf(ByteView);
RegisterPeer decode_register_peer(ByteView);

} // namespace meshllm::wire

#include "server/buffers.h"

namespace meshllm::server {

namespace {

constexpr size_t max_buffers = 4096; // a model of 200 layers takes fewer than 100
constexpr uint64_t stock_base_bits = 43;

/// A byte range of a buffer as a tensor: ggml copies to and from a device only by tensors.
ggml_tensor byte_tensor(const Buffers::Entry & entry, uint64_t offset, uint64_t size) {
    ggml_tensor t{};
    t.type = GGML_TYPE_I8;
    t.buffer = entry.buffer;
    t.ne[0] = static_cast<int64_t>(size);
    t.ne[1] = t.ne[2] = t.ne[3] = 1;
    t.nb[0] = 1;
    t.nb[1] = t.nb[2] = t.nb[3] = size;
    t.data = entry.base + offset;
    return t;
}

} // namespace

Buffers::~Buffers() {
    for (auto & [handle, entry] : entries_) {
        devices_[entry.device]->free(entry.buffer);
    }
}

wire::AllocReply Buffers::allocate(uint32_t device, uint64_t size) {
    if (device >= devices_.size()) {
        throw ProtocolError("memory is requested from a device that does not exist");
    }
    if (size == 0 || entries_.size() >= max_buffers) {
        return {0, 0};
    }
    ggml_backend_buffer_t buffer = devices_[device]->allocate(size);
    if (buffer == nullptr) {
        return {0, 0};
    }
    const uint64_t handle = next_handle_++;
    const uint64_t got = ggml_backend_buffer_get_size(buffer);
    entries_[handle] = {buffer, device, static_cast<uint8_t *>(ggml_backend_buffer_get_base(buffer)), got,
                        ggml_backend_buffer_is_host(buffer)};
    return {handle, got};
}

void Buffers::free(uint64_t handle) {
    const Entry entry = at(handle);
    entries_.erase(handle);
    devices_[entry.device]->free(entry.buffer);
}

const Buffers::Entry & Buffers::at(uint64_t handle) const {
    const auto it = entries_.find(handle);
    if (it == entries_.end()) {
        throw ProtocolError("the client names a buffer that it does not own");
    }
    return it->second;
}

const Buffers::Entry & Buffers::checked(const wire::ByteRange & range) const {
    const Entry & entry = at(range.buffer);
    if (range.offset > entry.size || range.size > entry.size - range.offset) {
        throw ProtocolError("a range lies outside its buffer");
    }
    return entry;
}

uint64_t Buffers::base_of(uint64_t handle) const {
    at(handle);
    return ((handle % (1 << 20)) + 1) << stock_base_bits;
}

void write_bytes(const Buffers::Entry & entry, uint64_t offset, const uint8_t * data, uint64_t size) {
    ggml_tensor t = byte_tensor(entry, offset, size);
    ggml_backend_tensor_set(&t, data, 0, size);
}

void read_bytes(const Buffers::Entry & entry, uint64_t offset, uint8_t * out, uint64_t size) {
    const ggml_tensor t = byte_tensor(entry, offset, size);
    ggml_backend_tensor_get(&t, out, 0, size);
}

void copy_bytes(const Buffers::Entry & from, uint64_t from_offset, const Buffers::Entry & to, uint64_t to_offset,
                uint64_t size) {
    const ggml_tensor source = byte_tensor(from, from_offset, size);
    ggml_tensor target = byte_tensor(to, to_offset, size);
    ggml_backend_tensor_copy(&source, &target);
}

} // namespace meshllm::server

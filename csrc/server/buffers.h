// The buffers of one session: handles on the wire, ggml buffers here.
#pragma once

#include "server/device.h"
#include "wire/graph.h"

#include <unordered_map>

namespace meshllm::server {

/// Frees what is left when the session ends.
class Buffers : public wire::AddressMap {
  public:
    struct Entry {
        ggml_backend_buffer_t buffer = nullptr;
        uint32_t device = 0;
        uint8_t * base = nullptr;
        uint64_t size = 0;
        bool host = false; // the memory can be read and written through `base`
    };

    explicit Buffers(std::vector<std::unique_ptr<Device>> & devices) : devices_(devices) {}
    ~Buffers() override;
    Buffers(const Buffers &) = delete;
    Buffers & operator=(const Buffers &) = delete;

    wire::AllocReply allocate(uint32_t device, uint64_t size);
    void free(uint64_t handle);

    /// Throws ProtocolError for a handle that this session does not own.
    const Entry & at(uint64_t handle) const;

    /// Throws ProtocolError unless the range lies inside its buffer.
    const Entry & checked(const wire::ByteRange & range) const;

    /// The base address of a buffer as stock clients see it; no pointer of ours leaves the process.
    uint64_t base_of(uint64_t handle) const override;

  private:
    std::vector<std::unique_ptr<Device>> & devices_;
    std::unordered_map<uint64_t, Entry> entries_;
    uint64_t next_handle_ = 1;
};

/// Copies to and from a range that has passed `checked`.
void write_bytes(const Buffers::Entry & entry, uint64_t offset, const uint8_t * data, uint64_t size);
void read_bytes(const Buffers::Entry & entry, uint64_t offset, uint8_t * out, uint64_t size);
/// The ranges must not overlap.
void copy_bytes(const Buffers::Entry & from, uint64_t from_offset, const Buffers::Entry & to, uint64_t to_offset,
                uint64_t size);

} // namespace meshllm::server

// Counters of each stage, in a file that mesh-llm maps too; docs/architecture.md has its layout.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace meshllm::backend {

/// One block of 32 little-endian 64-bit numbers.
struct StageCounters {
    std::atomic<uint64_t> frames_sent, frames_received, bytes_sent, bytes_received, blocking_waits, graph_hits,
        graph_sends, graph_bytes, weight_bytes_sent, weight_bytes_local, pushes, push_bytes, relays, relay_bytes,
        supports_op_queries, alloc_size_queries, wait_ns, lost, refusals, reserved[13];
};
static_assert(sizeof(StageCounters) == 256);

enum class State : uint32_t { starting = 0, connected = 1, lost = 2 };

class CountersFile {
  public:
    /// Maps `path`, or plain memory when it is empty or cannot be mapped.
    CountersFile(const std::string & path, uint32_t n_stages);
    ~CountersFile();
    CountersFile(const CountersFile &) = delete;
    CountersFile & operator=(const CountersFile &) = delete;

    StageCounters & stage(size_t index);
    void set_state(State state);
    /// Keeps the first error: later ones are its consequences.
    void set_error(const std::string & text);

  private:
    uint8_t * data_ = nullptr;
    bool mapped_ = false;
};

} // namespace meshllm::backend

// A local ggml device as the server offers it, and the memory that its clients use.
#pragma once

#include "compute/cpu_threads.h"
#include "server/executor.h"
#include "wire/frames.h"

#include <ggml-cpp.h>

#include <atomic>
#include <memory>

namespace meshllm::server {

class Device {
  public:
    /// `memory_limit` in bytes; 0 for all that the device has.
    Device(ggml_backend_dev_t device, int n_threads, uint64_t memory_limit);

    ggml_backend_dev_t ggml() const { return device_; }
    ggml_backend_buffer_type_t buffer_type() const { return buffer_type_; }
    wire::DeviceInfo info() const;
    wire::DeviceMemory memory() const;
    uint64_t used() const { return used_; }

    /// Null when the limit or the device does not allow it.
    ggml_backend_buffer_t allocate(uint64_t size);
    void free(ggml_backend_buffer_t buffer);

    /// Scratch memory that ggml allocates beside the tensors while it computes the graph on a CPU; 0 for others.
    uint64_t scratch_size(const ggml_cgraph * graph) const;

    /// Computes on the device's thread. Throws std::runtime_error, with ggml's reason, when that fails; the next graph
    /// then meets a new backend.
    void compute(ggml_cgraph * graph);

  private:
    void start();

    ggml_backend_dev_t device_;
    ggml_backend_buffer_type_t buffer_type_;
    int n_threads_;
    uint64_t memory_limit_;
    std::atomic<uint64_t> used_{0};
    std::mutex allocating_;
    Executor executor_; // declared before the backend, so that it outlives it
    ggml_backend_ptr backend_;
    std::unique_ptr<compute::CpuThreads> threads_;
};

} // namespace meshllm::server

#include "server/device.h"

#include "server/ggml_log.h"

#include <ggml-backend-impl.h>
#include <ggml-cpu.h>

#include <algorithm>

namespace meshllm::server {

namespace {

// The C library may recycle smaller allocations, with another client's data in them; larger ones come zeroed from the
// kernel (glibc's largest M_MMAP_THRESHOLD is 32 MiB).
constexpr uint64_t always_fresh = 64 << 20;

std::string reason() {
    const std::string error = take_ggml_error();
    return error.empty() ? "" : ": " + error;
}

} // namespace

Device::Device(ggml_backend_dev_t device, int n_threads, uint64_t memory_limit)
    : device_(device), buffer_type_(ggml_backend_dev_buffer_type(device)), n_threads_(n_threads),
      memory_limit_(memory_limit) {
    start();
}

void Device::start() {
    threads_.reset();
    backend_.reset();
    backend_.reset(ggml_backend_dev_init(device_, nullptr));
    if (!backend_) {
        throw std::runtime_error(std::string("ggml cannot start the device ") + ggml_backend_dev_name(device_) +
                                 reason());
    }
    threads_ = std::make_unique<compute::CpuThreads>(backend_.get(), n_threads_);
}

wire::DeviceMemory Device::memory() const {
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(device_, &free, &total);
    if (memory_limit_ != 0) {
        total = std::min<size_t>(total, memory_limit_);
    }
    // ggml's CPU device reports all memory as free: subtract what our clients use.
    const uint64_t left = total > used_ ? total - used_ : 0;
    return {std::min<uint64_t>(free, left), total};
}

wire::DeviceInfo Device::info() const {
    wire::DeviceInfo info;
    info.name = ggml_backend_dev_name(device_);
    info.description = ggml_backend_dev_description(device_);
    info.type = ggml_backend_dev_type(device_);
    info.alloc_rule = buffer_type_->iface.get_alloc_size == nullptr ? wire::AllocRule::nbytes : wire::AllocRule::ask;
    info.alignment = ggml_backend_buft_get_alignment(buffer_type_);
    info.max_size = ggml_backend_buft_get_max_size(buffer_type_);
    const wire::DeviceMemory m = memory();
    info.memory_free = m.free;
    info.memory_total = m.total;
    return info;
}

ggml_backend_buffer_t Device::allocate(uint64_t size) {
    std::lock_guard lock(allocating_); // or two clients together could exceed the limit
    if (size > memory().free || size > ggml_backend_buft_get_max_size(buffer_type_)) {
        return nullptr;
    }
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(buffer_type_, size);
    if (buffer == nullptr) {
        return nullptr;
    }
    used_ += ggml_backend_buffer_get_size(buffer);
    if (size <= always_fresh || !ggml_backend_buft_is_host(buffer_type_)) {
        ggml_backend_buffer_clear(buffer, 0);
    }
    return buffer;
}

void Device::free(ggml_backend_buffer_t buffer) {
    used_ -= ggml_backend_buffer_get_size(buffer);
    ggml_backend_buffer_free(buffer);
}

uint64_t Device::scratch_size(const ggml_cgraph * graph) const {
    return ggml_backend_dev_type(device_) == GGML_BACKEND_DEVICE_TYPE_CPU
               ? ggml_graph_plan(graph, n_threads_, nullptr).work_size
               : 0;
}

void Device::compute(ggml_cgraph * graph) {
    executor_.run([&] {
        if (!backend_) {
            start();
        }
        take_ggml_error(); // an earlier one
        std::string why;
        try {
            if (ggml_backend_graph_compute(backend_.get(), graph) == GGML_STATUS_SUCCESS) {
                return;
            }
            why = reason();
        } catch (const std::exception & e) { // a GPU's driver, when its memory runs out
            why = std::string(": ") + e.what();
        }
        // What it has begun is undone by nobody: another client's graph would meet it.
        threads_.reset();
        backend_.reset();
        throw std::runtime_error(std::string("the device ") + ggml_backend_dev_name(device_) +
                                 " could not compute a graph" + why);
    });
}

} // namespace meshllm::server

#include "compute/cpu_threads.h"

#include <ggml-cpu.h>

#include <thread>

namespace meshllm::compute {

namespace {

template <class F>
F * function(ggml_backend_reg_t reg, const char * name) {
    return reg == nullptr ? nullptr : reinterpret_cast<F *>(ggml_backend_reg_get_proc_address(reg, name));
}

} // namespace

CpuThreads::CpuThreads(ggml_backend_t backend, int n_threads) : backend_(backend) {
    ggml_backend_dev_t device = ggml_backend_get_device(backend);
    if (device != nullptr && ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        reg_ = ggml_backend_dev_backend_reg(device);
    }
    resize(n_threads);
}

CpuThreads::~CpuThreads() {
    release();
}

void CpuThreads::release() {
    auto * set_pool = function<decltype(ggml_backend_cpu_set_threadpool)>(reg_, "ggml_backend_cpu_set_threadpool");
    auto * free_pool = function<decltype(ggml_threadpool_free)>(reg_, "ggml_threadpool_free");
    if (pool_ != nullptr && set_pool != nullptr && free_pool != nullptr) {
        set_pool(backend_, nullptr);
        free_pool(pool_);
    }
    pool_ = nullptr;
}

void CpuThreads::resize(int n_threads) {
    if (n_threads == n_threads_) {
        return;
    }
    n_threads_ = n_threads;
    auto * set_n = function<decltype(ggml_backend_cpu_set_n_threads)>(reg_, "ggml_backend_set_n_threads");
    auto * set_pool = function<decltype(ggml_backend_cpu_set_threadpool)>(reg_, "ggml_backend_cpu_set_threadpool");
    auto * new_pool = function<decltype(ggml_threadpool_new)>(reg_, "ggml_threadpool_new");
    if (set_n == nullptr || set_pool == nullptr || new_pool == nullptr) {
        return;
    }
    release();
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    params.poll = 0;
    pool_ = new_pool(&params);
    set_n(backend_, n_threads);
    set_pool(backend_, pool_);
}

int default_threads() {
    const int n = static_cast<int>(std::thread::hardware_concurrency());
    return n <= 4 ? std::max(n, 1) : n / 2;
}

} // namespace meshllm::compute

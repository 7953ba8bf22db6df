// Threads of a ggml CPU device, set through ggml's registry so that nothing here links to a device's library.
#pragma once

#include <ggml-backend.h>

namespace meshllm::compute {

/// Gives a CPU backend threads of its own that sleep between graphs; does nothing for other devices.
///
/// By default ggml starts threads for every graph, or spins until the next one; an idle stage on somebody's spare
/// machine must not use the CPU.
class CpuThreads {
  public:
    CpuThreads(ggml_backend_t backend, int n_threads);
    ~CpuThreads();
    CpuThreads(const CpuThreads &) = delete;
    CpuThreads & operator=(const CpuThreads &) = delete;

    /// Replaces the threads when the number differs.
    void resize(int n_threads);

  private:
    void release();

    ggml_backend_t backend_;
    ggml_backend_reg_t reg_ = nullptr;
    struct ggml_threadpool * pool_ = nullptr;
    int n_threads_ = 0;
};

/// Physical cores as ggml's own programs estimate them: half of the hardware threads when there are more than four.
int default_threads();

} // namespace meshllm::compute

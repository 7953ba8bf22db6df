// HOST: a thin wrapper around the host's own device, last in order, so that the logits are computed here.
//
// ggml copies the last stage's result to a plain device with a function that cannot fail. The wrapper receives it
// asynchronously and waits inside graph_compute, which can report a lost stage (docs/architecture.md).
#pragma once

#include "backend/stage.h"

namespace meshllm::backend {

struct Host {
    ggml_backend_dev_t inner = nullptr; // the wrapped device
    ggml_backend_device device{};
    Ring ring;
};

/// Throws std::runtime_error when ggml has no device of that name.
void make_host_device(Host & host, const std::string & inner_name, ggml_backend_reg_t reg);

/// ggml_backend_set_n_threads and ggml_backend_dev_get_extra_bufts for our devices.
void set_n_threads(ggml_backend_t backend, int n_threads);
ggml_backend_buffer_type_t * extra_buffer_types(ggml_backend_dev_t device);

} // namespace meshllm::backend

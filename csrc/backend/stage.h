// A remote stage as a ggml device and backend.
#pragma once

#include "backend/buffer.h"

namespace meshllm::backend {

/// Fills in `stage`'s device and buffer type. `reg` is the registry that owns it.
void make_stage_device(Stage & stage, ggml_backend_reg_t reg);

/// The stage behind a backend, null for others.
Stage * stage_of(ggml_backend_t backend);

} // namespace meshllm::backend

// Devices that are only figures: llama.cpp plans a model on them as it would on stages, and nothing is allocated.
//
// llama.cpp asks a buffer type for the size of each tensor that it places there, and tensors have names: so one plan
// tells what each layer takes, of weights and of KV cache or state.
#pragma once

#include <ggml-backend.h>

#include <cstddef>
#include <map>
#include <string>
#include <vector>

namespace meshllm::measure {

/// Bytes by the names of the tensors that were placed on the figure devices since `forget`.
const std::map<std::string, size_t> & placed();
void forget();

/// Devices 0 and 1 have memory of their own, like stages; device 2 has the CPU's memory, like HOST.
ggml_backend_dev_t figure_device(int index);

/// How many layers each device gets, in their order.
void share(std::vector<int> of_each);

} // namespace meshllm::measure

// How the rules about graphs refuse one.
#pragma once

#include <ggml.h>

#include <string>

namespace meshllm::server {

using Tensor = const ggml_tensor *;

/// Thrown by a rule; check_op and check_graph return its text.
struct UnmetRequirement {
    std::string text;
};

inline void require(bool met, const char * text) {
    if (!met) {
        throw UnmetRequirement{text};
    }
}

} // namespace meshllm::server

// How the rules about graphs say no.
#pragma once

#include <ggml.h>

#include <string>

namespace meshllm {

using Tensor = const ggml_tensor *;

/// What a rule throws; check_op and check_graph turn it into its text.
struct Refused {
    std::string why;
};

inline void need(bool ok, const char * what) {
    if (!ok) {
        throw Refused{what};
    }
}

} // namespace meshllm

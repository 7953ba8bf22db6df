// What each operator needs of its tensors. ggml's kernels assert, which ends the process, or read past their memory
// when that does not hold; a graph from a peer is checked before it is accepted.
//
// The rules are those of ggml 0.25.3: the constructors in ggml.c and the CPU kernels in ggml-cpu/ops.cpp, the strictest
// of all devices. What is not in the table is refused; such an operator then runs on the host.
#pragma once

#include <ggml.h>

#include <string>
#include <vector>

namespace meshllm {

/// Empty when ggml can compute `node` without an assertion or an access outside its tensors, else one line why not.
/// Looks at types, shapes, strides and parameters, and at addresses only where there are some.
std::string check_op(const ggml_tensor * node);

/// Indices that are known only at run time; every value must lie in [0, limit).
struct IndexCheck {
    const ggml_tensor * ids; // I32 or I64
    int64_t limit;
};

/// For a graph whose nodes have all passed check_op: finds where indices come from and that nothing overwrites them
/// before they are used. Those to be read before each run are added to `checks`.
std::string check_graph(const ggml_cgraph * graph, std::vector<IndexCheck> & checks);

/// Reads the indices from their device. Empty when all are in range.
std::string check_indices(const std::vector<IndexCheck> & checks);

} // namespace meshllm

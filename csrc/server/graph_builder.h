// From a decoded graph to one that ggml may compute: every size, address and operator is checked here, once.
#pragma once

#include "server/buffers.h"
#include "server/index_check.h"

namespace meshllm::server {

struct BuiltGraph {
    ggml_context_ptr context; // owns the tensors and the graph
    ggml_cgraph * graph = nullptr;
    std::vector<IndexCheck> indices; // to be checked in each run, in order of `after`
    std::vector<uint64_t> buffers;   // handles that the graph points into
    size_t n_tensors = 0;
};

/// Throws ProtocolError, with one line for a person, when the graph cannot be computed safely on `device`.
BuiltGraph build_graph(const wire::GraphDesc & desc, const Buffers & buffers, const Device & device);

/// Computes the graph, in parts where it computes indices that have to be checked before they are used. Throws
/// ProtocolError when one is out of range, std::runtime_error when ggml reports a failure.
void run_checked(const BuiltGraph & built, Device & device);

/// A single tensor in its buffer, without operator or sources. Throws ProtocolError when it is outside the buffer.
ggml_tensor * place_leaf(ggml_context * context, const wire::TensorDesc & desc, const Buffers & buffers);

/// A single operator without memory, for supports_op and get_alloc_size. The last tensor of `desc` is the operator,
/// those before it are its sources. Null when the operator is malformed.
struct BuiltOp {
    ggml_context_ptr context;
    ggml_tensor * op = nullptr;
};
BuiltOp build_op(const std::vector<wire::TensorDesc> & desc);

} // namespace meshllm::server

// From a decoded graph to one that ggml may compute: every size, address and operator is checked here, once.
#pragma once

#include "server/buffers.h"
#include "server/index_check.h"

namespace meshllm::server {

struct BuiltGraph {
    ggml_context_ptr context; // owns the tensors and the graph
    ggml_cgraph * graph = nullptr;
    std::vector<IndexCheck> indices; // to be checked before each run
    std::vector<uint64_t> buffers;   // handles that the graph points into
    size_t n_tensors = 0;
};

/// Throws ProtocolError in words when the graph cannot be computed safely on `device`.
BuiltGraph build_graph(const wire::GraphDesc & desc, const Buffers & buffers, const Device & device);

/// A tensor alone, without operator or sources, at its place. Throws ProtocolError when it lies outside a buffer.
ggml_tensor * place_leaf(ggml_context * context, const wire::TensorDesc & desc, const Buffers & buffers);

/// A single operator without memory, as supports_op and get_alloc_size ask about it. The last tensor of `desc` is the
/// operator, those before are what it reads. Null when the operator is malformed.
struct BuiltOp {
    ggml_context_ptr context;
    ggml_tensor * op = nullptr;
};
BuiltOp build_op(const std::vector<wire::TensorDesc> & desc);

} // namespace meshllm::server

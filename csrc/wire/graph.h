// Tensors and graphs as they cross the wire: a flat list in which every tensor follows the others that it reads.
#pragma once

#include "wire/frames.h"

namespace meshllm::wire {

// GGML_MAX_DIMS, GGML_MAX_SRC, GGML_MAX_OP_PARAMS / 4
constexpr int n_dims = 4, n_srcs = 10, n_op_params = 16;
constexpr uint32_t none = UINT32_MAX;

/// One tensor. `buffer` is the server's handle, 0 for a tensor without memory; `offset` counts from its start.
struct TensorDesc {
    uint32_t type = 0, op = 0;
    int32_t flags = 0;
    std::array<int64_t, n_dims> ne{};  // elements
    std::array<uint64_t, n_dims> nb{}; // strides in bytes
    std::array<int32_t, n_op_params> op_params{};
    std::array<uint32_t, n_srcs> src; // indices of earlier tensors or its own (ggml_cast), or `none`
    uint32_t view_src = none;
    uint64_t view_offs = 0;
    uint64_t buffer = 0, offset = 0;
    int32_t use_count = 0;
    std::string name; // some backends choose kernels by name

    TensorDesc() { src.fill(none); }
};

struct GraphDesc {
    uint32_t device = 0;
    std::vector<TensorDesc> tensors;
    std::vector<uint32_t> nodes; // indices of the tensors to compute, in order
};

/// The compact form (docs/protocol.md, "Graphs"): about 70 bytes per tensor, where stock takes 296.
void encode_graph(const GraphDesc & graph, Bytes & out);
GraphDesc decode_graph(ByteView payload);

struct GraphPut {
    uint32_t slot = 0;
    GraphDesc graph;
};
GraphPut decode_graph_put(ByteView payload);

/// The addresses that stock clients see: StockTensor::data is `base + offset`.
class AddressMap {
  public:
    virtual ~AddressMap() = default;
    virtual uint64_t base_of(uint64_t buffer) const = 0; // throws ProtocolError for a foreign handle
};

/// One tensor without its sources.
TensorDesc from_stock(const StockTensor & tensor, const AddressMap & addresses);

/// Payload of GRAPH_COMPUTE: | device | n_nodes | node ids | n_tensors | tensors |. Refuses cycles and unknown ids.
GraphDesc decode_stock_graph(ByteView payload, const AddressMap & addresses);

/// The same payload for a stock server; ids are 1 + the index of a tensor.
Bytes encode_stock_graph(const GraphDesc & graph, const AddressMap & addresses);
StockTensor to_stock(const TensorDesc & tensor, uint64_t id, const AddressMap & addresses);

} // namespace meshllm::wire

#include "server/graph_builder.h"

#include "server/op_check.h"

#include <ggml-backend-impl.h>
#include <ggml-impl.h>

#include <algorithm>
#include <atomic>
#include <unordered_set>

namespace meshllm::server {

static_assert(wire::n_dims == GGML_MAX_DIMS && wire::n_srcs == GGML_MAX_SRC &&
              wire::n_op_params * sizeof(int32_t) == GGML_MAX_OP_PARAMS &&
              sizeof(wire::StockTensor::name) == GGML_MAX_NAME);

namespace {

using Wide = unsigned __int128;

ggml_context_ptr make_context(size_t n_tensors, size_t graph_size) {
    const ggml_init_params params{ggml_tensor_overhead() * (n_tensors + 1) +
                                      (graph_size == 0 ? 0 : ggml_graph_overhead_custom(graph_size, false)),
                                  nullptr, true};
    ggml_context_ptr context{ggml_init(params)};
    if (!context) {
        throw std::bad_alloc();
    }
    return context;
}

// Kernels load elements with the alignment of their type: on a misaligned one a GPU faults, a CPU is only slow.
uint64_t element_alignment(ggml_type type) {
    if (ggml_is_quantized(type)) {
        return ggml_type_size(type) % 2 == 0 ? 2 : 1; // blocks of MXFP4 have 17 bytes
    }
    return std::min<uint64_t>(ggml_type_size(type), 8);
}

void check_layout(const wire::TensorDesc & d) {
    if (d.type >= GGML_TYPE_COUNT || ggml_blck_size(static_cast<ggml_type>(d.type)) == 0) {
        throw ProtocolError("a tensor has a type that ggml does not know");
    }
    if (d.op >= GGML_OP_COUNT) {
        throw ProtocolError("a tensor has an operator that ggml does not know");
    }
    const auto type = static_cast<ggml_type>(d.type);
    Wide elements = 1;
    for (int i = 0; i < wire::n_dims; i++) {
        if (d.ne[i] < 0 || d.ne[i] > INT32_MAX || d.nb[i] > (uint64_t(1) << 48)) {
            throw ProtocolError("a tensor has impossible dimensions");
        }
        elements *= static_cast<Wide>(std::max<int64_t>(d.ne[i], 1));
        if (elements > (Wide(1) << 48) || d.nb[i] % element_alignment(type) != 0) {
            throw ProtocolError("a tensor is too large or misaligned");
        }
    }
    const bool blocks = ggml_blck_size(type) > 1;
    if (blocks && (d.ne[0] % ggml_blck_size(type) != 0 || d.nb[0] != ggml_type_size(type))) {
        throw ProtocolError("a quantised tensor has rows of incomplete blocks");
    }
}

/// Bytes from the first to the last element, as ggml_nbytes computes them, without overflow.
Wide extent(const wire::TensorDesc & d) {
    const auto type = static_cast<ggml_type>(d.type);
    if (std::any_of(d.ne.begin(), d.ne.end(), [](int64_t n) { return n == 0; })) {
        return 0;
    }
    const bool blocks = ggml_blck_size(type) > 1;
    Wide bytes = blocks ? Wide(d.ne[0]) * d.nb[0] / Wide(ggml_blck_size(type)) : Wide(ggml_type_size(type));
    for (int i = blocks ? 1 : 0; i < wire::n_dims; i++) {
        bytes += Wide(d.ne[i] - 1) * d.nb[i];
    }
    return bytes;
}

/// The strides of dimensions of one element say nothing, yet kernels use them: a tensor without gaps gets those that it
/// has without gaps. See `dense` in op_rules.h.
void tidy_strides(ggml_tensor * t) {
    if (ggml_is_empty(t) || !ggml_is_contiguous(t)) {
        return;
    }
    t->nb[0] = ggml_type_size(t->type);
    t->nb[1] = ggml_row_size(t->type, t->ne[0]);
    t->nb[2] = t->nb[1] * static_cast<size_t>(t->ne[1]);
    t->nb[3] = t->nb[2] * static_cast<size_t>(t->ne[2]);
}

ggml_tensor * new_tensor(ggml_context * context, const wire::TensorDesc & d) {
    check_layout(d);
    const auto type = static_cast<ggml_type>(d.type);
    ggml_tensor * t = ggml_new_tensor_1d(context, type, ggml_blck_size(type));
    std::copy(d.ne.begin(), d.ne.end(), t->ne);
    std::copy(d.nb.begin(), d.nb.end(), t->nb);
    tidy_strides(t);
    t->op = static_cast<ggml_op>(d.op);
    std::copy(d.op_params.begin(), d.op_params.end(), t->op_params);
    t->flags = d.flags & (GGML_TENSOR_FLAG_INPUT | GGML_TENSOR_FLAG_OUTPUT | GGML_TENSOR_FLAG_COMPUTE);
    t->view_offs = d.view_offs;
    ggml_set_name(t, d.name.c_str());
    return t;
}

void link_sources(ggml_tensor * t, const wire::TensorDesc & d, const std::vector<ggml_tensor *> & earlier) {
    for (int i = 0; i < wire::n_srcs; i++) {
        if (d.src[i] == wire::none) {
            t->src[i] = nullptr;
        } else if (d.src[i] < earlier.size()) {
            t->src[i] = earlier[d.src[i]];
        } else if (t->op == GGML_OP_CPY && i == 1) { // ggml_cast names the destination of a copy so
            t->src[i] = t;
        } else {
            throw ProtocolError("the tensor '" + d.name + "' reads itself");
        }
    }
    t->view_src = d.view_src == wire::none ? nullptr : earlier.at(d.view_src);
}

/// Some devices find the memory of a view by its offset, so what the client says of that must not count.
size_t offset_in(const ggml_tensor * view, const ggml_tensor & viewed) {
    const auto *begin = static_cast<const uint8_t *>(viewed.data), *at = static_cast<const uint8_t *>(view->data);
    if (at < begin) {
        throw ProtocolError(std::string("the view '") + view->name + "' begins before the tensor it views");
    }
    return static_cast<size_t>(at - begin);
}

void place(ggml_tensor * t, const wire::TensorDesc & d, uint32_t device, const Buffers & buffers) {
    if (d.buffer == 0) {
        return;
    }
    const Buffers::Entry & entry = buffers.at(d.buffer);
    if (entry.device != device) {
        throw ProtocolError("a graph uses a buffer of another device");
    }
    // No two elements share memory: otherwise a few bytes could claim to be a tensor that takes hours to compute.
    const Wide packed = Wide(ggml_nelements(t)) * ggml_type_size(t->type) / Wide(ggml_blck_size(t->type));
    const bool empty_view = t->view_src != nullptr && extent(d) == 0; // may begin past the end
    const uint64_t offset = empty_view ? std::min(d.offset, entry.size) : d.offset;
    if (packed > extent(d) || offset > entry.size || extent(d) > entry.size - offset ||
        d.offset % element_alignment(t->type) != 0) {
        throw ProtocolError("the tensor '" + d.name + "' lies outside its buffer");
    }
    if (t->view_src != nullptr && t->view_src->buffer != entry.buffer) { // ggml accesses a view's memory through it
        throw ProtocolError("the view '" + d.name + "' lies in a different buffer from the tensor it views");
    }
    t->buffer = entry.buffer;
    t->data = entry.base + offset;
    t->view_offs = t->view_src == nullptr || empty_view ? 0 : offset_in(t, *t->view_src);
}

/// Some devices keep padding or scratch space behind a tensor: it must be inside the buffer too.
void check_alloc_size(const ggml_tensor * t, const wire::TensorDesc & d, const Buffers & buffers) {
    if (t->buffer == nullptr || t->view_src != nullptr || t->buffer->buft->iface.get_alloc_size == nullptr) {
        return;
    }
    const uint64_t size = buffers.at(d.buffer).size;
    if (ggml_backend_buft_get_alloc_size(t->buffer->buft, t) > size - d.offset) {
        throw ProtocolError("the tensor '" + d.name + "' leaves no room for the padding that its device needs");
    }
}

/// Whether a backend has nothing to do for the node. Without memory it is a view of a tensor on another device, which
/// ggml's scheduler leaves in this part of the graph; without elements it belongs to a batch of which nothing is
/// output; without the flag it works on an empty slice of a tensor that is split over devices, and its result is
/// filled in by another node.
bool idle(const ggml_tensor * node) {
    const bool computed = (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0;
    return !computed || ggml_is_empty(node) || (node->data == nullptr && does_no_work(node));
}

void check_node(const ggml_tensor * node, const Device & device) {
    const std::string what = std::string(ggml_op_name(node->op)) + " '" + node->name + "'";
    if (const std::string why = check_op(node); !why.empty()) {
        throw ProtocolError(what + ": " + why);
    }
    if (node->op == GGML_OP_NONE) {
        return;
    }
    const auto needs_memory = [](const ggml_tensor * t) {
        return t != nullptr && t->data == nullptr && ggml_nelements(t) > 0;
    };
    if (needs_memory(node) || std::any_of(std::begin(node->src), std::end(node->src), needs_memory)) {
        throw ProtocolError(what + " works on a tensor without memory");
    }
    if (!ggml_backend_dev_supports_op(device.ggml(), node)) {
        throw ProtocolError(what + " is not supported by " + ggml_backend_dev_name(device.ggml()));
    }
}

uint64_t next_uid() {
    static std::atomic<uint64_t> uid{uint64_t(1) << 62}; // distinct from those that ggml itself assigns
    return ++uid;
}

void add_nodes(BuiltGraph & built, const wire::GraphDesc & desc, const std::vector<ggml_tensor *> & tensors,
               const Device & device) {
    built.graph = ggml_new_graph_custom(built.context.get(), std::max<size_t>(desc.nodes.size(), 1), false);
    std::unordered_set<uint32_t> seen;
    for (const uint32_t i : desc.nodes) {
        if (!seen.insert(i).second) {
            throw ProtocolError("a graph computes the same node twice");
        }
        if (idle(tensors[i])) {
            continue; // also not checked: the backend does not see it
        }
        check_node(tensors[i], device);
        built.graph->nodes[built.graph->n_nodes++] = tensors[i];
        const size_t slot = ggml_hash_insert(&built.graph->visited_hash_set, tensors[i]);
        built.graph->use_counts[slot] = std::max(desc.tensors[i].use_count, 0);
    }
    built.graph->uid = next_uid();
}

} // namespace

BuiltGraph build_graph(const wire::GraphDesc & desc, const Buffers & buffers, const Device & device) {
    BuiltGraph built;
    built.n_tensors = desc.tensors.size();
    built.context = make_context(desc.tensors.size(), std::max<size_t>(desc.nodes.size(), 1));
    std::vector<ggml_tensor *> tensors;
    tensors.reserve(desc.tensors.size());
    for (const wire::TensorDesc & d : desc.tensors) {
        ggml_tensor * t = new_tensor(built.context.get(), d);
        link_sources(t, d, tensors);
        place(t, d, desc.device, buffers);
        if (d.buffer != 0 && (built.buffers.empty() || built.buffers.back() != d.buffer)) {
            built.buffers.push_back(d.buffer);
        }
        tensors.push_back(t);
    }
    add_nodes(built, desc, tensors, device);
    for (size_t i = 0; i < tensors.size(); i++) {
        check_alloc_size(tensors[i], desc.tensors[i], buffers);
    }
    // When the allocation fails, ggml's CPU device keeps a pointer to memory that it has freed.
    if (device.scratch_size(built.graph) > device.memory().free) {
        throw ProtocolError("a graph needs more scratch memory than the device has");
    }
    if (const std::string why = check_graph(built.graph, built.indices); !why.empty()) {
        throw ProtocolError("a graph is refused: " + why);
    }
    return built;
}

void run_checked(const BuiltGraph & built, Device & device) {
    ggml_cgraph part = *built.graph;
    int begin = 0;
    auto check = built.indices.begin();
    while (begin < built.graph->n_nodes || check != built.indices.end()) {
        std::vector<IndexCheck> due;
        for (; check != built.indices.end() && check->after <= begin; check++) {
            due.push_back(*check);
        }
        if (const std::string why = check_indices(due); !why.empty()) {
            throw ProtocolError(why);
        }
        const int end = check != built.indices.end() ? check->after : built.graph->n_nodes;
        part.nodes = built.graph->nodes + begin;
        part.n_nodes = end - begin;
        part.uid = begin == 0 && end == built.graph->n_nodes ? built.graph->uid : 0;
        device.compute(&part);
        begin = end;
    }
}

ggml_tensor * place_leaf(ggml_context * context, const wire::TensorDesc & desc, const Buffers & buffers) {
    if (desc.buffer == 0) {
        throw ProtocolError("the tensor '" + desc.name + "' has no memory");
    }
    wire::TensorDesc leaf = desc;
    leaf.op = GGML_OP_NONE;
    ggml_tensor * t = new_tensor(context, leaf);
    place(t, leaf, buffers.at(desc.buffer).device, buffers);
    check_alloc_size(t, leaf, buffers);
    return t;
}

BuiltOp build_op(const std::vector<wire::TensorDesc> & desc) {
    BuiltOp built;
    built.context = make_context(desc.size(), 0);
    std::vector<ggml_tensor *> tensors;
    for (const wire::TensorDesc & d : desc) {
        tensors.push_back(new_tensor(built.context.get(), d));
        link_sources(tensors.back(), d, tensors);
    }
    if (!tensors.empty() && check_op(tensors.back()).empty()) {
        built.op = tensors.back();
    }
    return built;
}

} // namespace meshllm::server

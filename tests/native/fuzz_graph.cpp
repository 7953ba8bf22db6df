// Graphs whose shapes nearly fit: what the checks let pass is computed, so a check that is missing shows as an abort.
#include "server/graph_builder.h"
#include "server/op_check.h"

#include <ggml-backend-impl.h>
#include <ggml-impl.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fuzz_recipes.h"

using namespace meshllm;
using recipes::Choices;
using recipes::sizes;

namespace {

constexpr uint64_t buffer_size = 1 << 18;

/// How many graphs with each operator were accepted and computed. scripts/fuzz shows it.
struct Computed {
    std::array<size_t, GGML_OP_COUNT> graphs{};

    void add(const server::BuiltGraph & built) {
        for (int i = 0; i < built.graph->n_nodes; i++) {
            graphs[built.graph->nodes[i]->op]++;
        }
    }
    ~Computed() {
        for (int op = 0; op < GGML_OP_COUNT; op++) {
            if (server::has_rule(static_cast<ggml_op>(op))) {
                std::fprintf(stderr, "computed: %s %zu\n", ggml_op_name(static_cast<ggml_op>(op)), graphs[op]);
            }
        }
    }
};

struct Lab {
    std::vector<std::unique_ptr<server::Device>> devices;
    std::unique_ptr<server::Buffers> buffers;
    uint64_t handle = 0;

    Lab() {
        ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        devices.push_back(std::make_unique<server::Device>(cpu, 2, uint64_t(1) << 26));
        buffers = std::make_unique<server::Buffers>(devices);
        handle = buffers->allocate(0, buffer_size).buffer;
        ggml_backend_buffer_clear(buffers->at(handle).buffer, 0); // indices of 0 are valid
    }
};

constexpr std::array<uint32_t, 10> types = {GGML_TYPE_F32,  GGML_TYPE_F32, GGML_TYPE_F32,  GGML_TYPE_F16,
                                            GGML_TYPE_I32,  GGML_TYPE_I64, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
                                            GGML_TYPE_Q4_K, GGML_TYPE_BF16};

void contiguous(wire::TensorDesc & t) {
    const auto type = static_cast<ggml_type>(t.type);
    t.nb[0] = ggml_type_size(type);
    t.nb[1] = ggml_row_size(type, t.ne[0] - t.ne[0] % ggml_blck_size(type));
    t.nb[2] = t.nb[1] * static_cast<uint64_t>(t.ne[1]);
    t.nb[3] = t.nb[2] * static_cast<uint64_t>(t.ne[2]);
}

wire::TensorDesc tensor(Choices & c, const std::vector<wire::TensorDesc> & earlier, uint64_t handle) {
    wire::TensorDesc t;
    if (!earlier.empty() && !c.one_in(3)) { // most operators want shapes that are alike
        const wire::TensorDesc & like = earlier[c.next() % earlier.size()];
        t.type = like.type;
        t.ne = like.ne;
    } else {
        t.type = c.of(types);
        for (int64_t & n : t.ne) {
            n = c.of(sizes);
        }
        if (c.one_in(2)) {
            t.ne[2] = t.ne[3] = 1;
        }
    }
    if (c.one_in(4)) {
        t.type = c.of(types);
    }
    if (c.one_in(4)) {
        std::swap(t.ne[c.next() % 4], t.ne[c.next() % 4]);
    }
    if (c.one_in(4)) {
        t.ne[c.next() % 4] = c.of(sizes);
    }
    contiguous(t);
    if (c.one_in(8)) {
        std::swap(t.nb[c.next() % 4], t.nb[c.next() % 4]);
    }
    if (c.one_in(16)) {
        t.nb[c.next() % 4] = c.next();
    }
    t.buffer = c.one_in(32) ? 0 : handle;
    t.offset = uint64_t(c.next()) * 32;
    return t;
}

void make_node(Choices & c, wire::TensorDesc & t, size_t n_earlier) {
    t.op = c.next() % GGML_OP_COUNT;
    t.flags = GGML_TENSOR_FLAG_COMPUTE;
    for (int i = 0; i < 5 && n_earlier > 0; i++) {
        if (i < 2 || c.one_in(3)) {
            t.src[i] = static_cast<uint32_t>(c.next() % n_earlier);
        }
    }
    for (int & p : t.op_params) {
        p = c.one_in(2) ? 0 : static_cast<int8_t>(c.next());
    }
}

/// Memory for one tensor, without a byte more: ASan sees what is read or written behind it. Values are small integers,
/// which are also indices, or any floats.
uint64_t own_memory(Choices & c, Lab & lab, wire::TensorDesc & t) {
    int64_t bytes = 1; // as ggml_nbytes
    for (int i = 0; i < 4; i++) {
        bytes = t.ne[i] <= 0 || bytes == 0 ? 0 : bytes + static_cast<int64_t>(t.nb[i]) * (t.ne[i] - 1);
    }
    const auto type = static_cast<ggml_type>(t.type);
    bytes = bytes == 0 ? 1 : bytes - 1 + static_cast<int64_t>(ggml_type_size(type));
    if (ggml_blck_size(type) > 1) {
        bytes = static_cast<int64_t>(t.nb[3]) * std::max<int64_t>(t.ne[3], 1);
    }
    if (bytes <= 0 || bytes > 1 << 24) {
        return 0;
    }
    const uint64_t handle = lab.buffers->allocate(0, static_cast<uint64_t>(bytes)).buffer;
    if (handle != 0) {
        const uint8_t seed = c.next(), mask = c.one_in(2) ? 255 : 3;
        uint8_t * data = lab.buffers->at(handle).base;
        const size_t step = mask == 3 ? ggml_type_size(type) : 1;
        for (size_t i = 0; i < static_cast<size_t>(bytes); i += step) {
            data[i] = static_cast<uint8_t>((seed + i * 37) & mask);
        }
    }
    return handle;
}

void add_operand(Choices & c, Lab & lab, wire::GraphDesc & desc, const recipes::Operand & operand, bool own) {
    wire::TensorDesc t;
    t.type = c.one_in(64) ? c.of(types) : operand.type;
    t.ne = operand.ne;
    if (c.one_in(32)) {
        t.ne[c.next() % 4] = c.of(sizes);
    }
    contiguous(t);
    if (c.one_in(16)) { // as a transposed tensor has them
        std::swap(t.nb[0], t.nb[1]);
    }
    if (c.one_in(32)) {
        t.nb[c.next() % 4] = 4 * c.next();
    }
    for (int i = 0; i < 4; i++) { // says nothing, but kernels use it
        if (t.ne[i] == 1 && c.one_in(16)) {
            t.nb[i] = uint64_t(4) << c.next() % 44;
        }
    }
    t.buffer = own ? own_memory(c, lab, t) : lab.handle;
    t.offset = own ? 0 : uint64_t(c.next()) * 32;
    desc.tensors.push_back(t);
}

/// The graph of one recipe, with something changed now and then.
wire::GraphDesc prepared(Choices & c, Lab & lab) {
    const recipes::Recipe r = recipes::any(c);
    wire::GraphDesc desc;
    const bool own = !c.one_in(4);
    for (const recipes::Operand & operand : r.sources) {
        add_operand(c, lab, desc, operand, own);
    }
    add_operand(c, lab, desc, r.result, own);
    wire::TensorDesc & node = desc.tensors.back();
    node.op = r.op;
    node.flags = GGML_TENSOR_FLAG_COMPUTE;
    std::copy(r.params.begin(), r.params.end(), node.op_params.begin());
    if (c.one_in(16)) {
        node.op_params[c.next() % 16] = c.one_in(2) ? INT32_MAX - c.next() : static_cast<int8_t>(c.next());
    }
    const size_t n = r.sources.size();
    for (size_t i = 0; i < n; i++) {
        node.src[i] = static_cast<uint32_t>(c.one_in(32) ? c.next() % n : i);
    }
    if (r.to_itself && node.op == GGML_OP_CPY) {
        node.src[1] = static_cast<uint32_t>(n);
    }
    desc.nodes = {static_cast<uint32_t>(n)};
    return desc;
}

/// Indices that were floats are known only once they are computed: rows of `table`, chosen by numbers of the client.
wire::GraphDesc computed_indices(Choices & c, Lab & lab) {
    wire::GraphDesc desc;
    const int64_t n = c.of(recipes::few), rows = c.of(recipes::few);
    const auto add = [&](recipes::Shape ne, uint32_t type, uint32_t op, std::initializer_list<uint32_t> sources) {
        add_operand(c, lab, desc, {ne, type}, true);
        wire::TensorDesc & t = desc.tensors.back();
        t.op = op;
        t.flags = GGML_TENSOR_FLAG_COMPUTE;
        std::copy(sources.begin(), sources.end(), t.src.begin());
        if (op != GGML_OP_NONE) {
            desc.nodes.push_back(static_cast<uint32_t>(desc.tensors.size() - 1));
        }
    };
    add({8, rows, 1, 1}, GGML_TYPE_F32, GGML_OP_NONE, {});
    add({n, 1, 1, 1}, GGML_TYPE_F32, GGML_OP_NONE, {});
    add({n, 1, 1, 1}, GGML_TYPE_F32, c.one_in(2) ? GGML_OP_SQR : GGML_OP_CONT, {1});
    add({n, 1, 1, 1}, GGML_TYPE_I32, GGML_OP_CPY, {2, 3});
    add({8, n, 1, 1}, GGML_TYPE_F32, GGML_OP_GET_ROWS, {0, 3});
    add({n, 1, 1, 1}, GGML_TYPE_I32, GGML_OP_ARGMAX, {4});
    add({8, n, 1, 1}, GGML_TYPE_F32, GGML_OP_GET_ROWS, {0, 5});
    return desc;
}

wire::GraphDesc random_graph(Choices & c, uint64_t handle) {
    wire::GraphDesc desc;
    const size_t n = 2 + c.next() % 6;
    for (size_t i = 0; i < n; i++) {
        wire::TensorDesc t = tensor(c, desc.tensors, handle);
        if (i >= 2) {
            make_node(c, t, desc.tensors.size());
            desc.nodes.push_back(static_cast<uint32_t>(i));
        }
        desc.tensors.push_back(t);
    }
    return desc;
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static Computed computed;
    static std::unique_ptr<Lab> lab;
    Choices c(data, size);
    if (lab == nullptr || c.one_in(16)) { // a device keeps the largest scratch memory that it ever needed
        lab.reset();
        lab = std::make_unique<Lab>();
    }
    wire::GraphDesc desc;
    switch (c.next() % 8) {
    case 0:
    case 1:
        desc = random_graph(c, lab->handle);
        break;
    case 2:
        desc = computed_indices(c, *lab);
        break;
    default:
        desc = prepared(c, *lab);
    }
    try {
        const server::BuiltGraph built = server::build_graph(desc, *lab->buffers, *lab->devices[0]);
        server::run_checked(built, *lab->devices[0]);
        computed.add(built);
    } catch (const std::exception &) { // refused, or no memory for its scratch: never an abort
    }
    for (const wire::TensorDesc & t : desc.tensors) {
        if (t.buffer != 0 && t.buffer != lab->handle) {
            lab->buffers->free(t.buffer);
        }
    }
    return 0;
}

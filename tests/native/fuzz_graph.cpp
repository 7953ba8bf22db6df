// Graphs whose shapes nearly fit: what the checks let pass is computed, so a check that is missing shows as an abort.
#include "server/graph_builder.h"

#include <ggml-backend-impl.h>

#include <array>
#include <cstdlib>

using namespace meshllm;

namespace {

constexpr uint64_t buffer_size = 1 << 18;

struct Lab {
    std::vector<std::unique_ptr<server::Device>> devices;
    std::unique_ptr<server::Buffers> buffers;
    uint64_t handle = 0;

    Lab() {
        ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        devices.push_back(std::make_unique<server::Device>(cpu, 2, 1 << 22));
        buffers = std::make_unique<server::Buffers>(devices);
        handle = buffers->allocate(0, buffer_size).buffer;
        ggml_backend_buffer_clear(buffers->at(handle).buffer, 0); // indices of 0 are valid
    }
};

/// Choices from the input; zeros when it is used up.
class Choices {
  public:
    Choices(const uint8_t * data, size_t size) : data_(data), size_(size) {}
    uint8_t next() { return size_ == 0 ? 0 : (size_--, *data_++); }
    bool one_in(int n) { return next() % n == 0; }
    template <class T, size_t N>
    T of(const std::array<T, N> & options) {
        return options[next() % N];
    }

  private:
    const uint8_t * data_;
    size_t size_;
};

constexpr std::array<int64_t, 8> sizes = {1, 2, 4, 32, 64, 3, 0, 256};
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

using Shape = std::array<int64_t, 4>;

/// An operator of op_check_recurrent.cpp with sources that fit: random shapes would hardly ever.
struct Recipe {
    uint32_t op;
    std::vector<Shape> sources;
    Shape result;
    std::array<int32_t, 4> params{};
    int ids = -1;  // the source that holds indices
    int mask = -1; // the source of 16-bit floats
};

Recipe recipe(Choices & c) {
    constexpr std::array<int64_t, 4> few = {1, 2, 3, 4};
    const int64_t n = c.of(few), h = c.of(few), tokens = c.of(few), seqs = c.of(few), size = c.of(sizes);
    const int64_t wide = 64 * (1 + c.next() % 2), all = tokens * seqs;
    const int32_t k = 1 + c.next() % 3;
    const Shape heads = {wide, h, all, 1}, states = {wide * wide * h, seqs, 1, 1};
    const Shape outputs = {wide * h, all + wide * seqs, 1, 1};
    switch (c.next() % 15) {
    case 0:
        return {GGML_OP_FILL, {{size, n, h, seqs}}, {size, n, h, seqs}};
    case 1:
        return {GGML_OP_SET, {{32, n, h, 1}, {n, 1, 1, 1}}, {32, n, h, 1}, {128, c.next(), c.next(), 4 * c.next()}};
    case 2:
        return {GGML_OP_DIAG, {{n, 1, h, seqs}}, {n, n, h, seqs}};
    case 3:
        return {GGML_OP_TRI, {{n, n, h, seqs}}, {n, n, h, seqs}, {c.next() % 5}};
    case 4:
        return {GGML_OP_SOLVE_TRI, {{n, n, h, seqs}, {tokens, n, h, seqs}}, {tokens, n, h, seqs}};
    case 5:
        return {GGML_OP_SSM_CONV, {{n - 1 + tokens, h, seqs, 1}, {n, h, 1, 1}}, {h, tokens, seqs, 1}};
    case 6: {
        const int64_t decay = c.one_in(2) ? 1 : 16;
        const Shape bc = {16, 1, tokens, seqs}, x = {n, h, tokens, seqs};
        return {GGML_OP_SSM_SCAN,
                {{16, n, h, seqs}, x, {h, tokens, seqs, 1}, {decay, h, 1, 1}, bc, bc, {seqs, 1, 1, 1}},
                {n * h * all + k * 16 * n * h * seqs, 1, 1, 1},
                {k},
                6};
    }
    case 7: {
        const Shape v = {4 * n, h, tokens, seqs};
        return {GGML_OP_GATED_DELTA_NET,
                {{4 * n, 1, tokens, seqs},
                 {4 * n, h, tokens, 1},
                 v,
                 {1, h, tokens, seqs},
                 {1, h, tokens, seqs},
                 {4 * n, 4 * n, h, seqs}},
                {4 * n * h, all + k * 4 * n * seqs, 1, 1},
                {k}};
    }
    case 8:
        return {GGML_OP_RWKV_WKV6, {heads, heads, heads, {wide, h, 1, 1}, heads, states}, outputs};
    case 9:
        return {GGML_OP_RWKV_WKV7, {heads, heads, heads, heads, heads, heads, states}, outputs};
    case 10:
        return {GGML_OP_GATED_LINEAR_ATTN, {heads, heads, heads, heads, states}, outputs};
    case 11:
        return {GGML_OP_LIGHTNING_INDEXER,
                {{32, h, tokens, seqs}, {32, 1, size, seqs}, {h, tokens, 1, seqs}, {size, tokens, 1, 1}},
                {size, tokens, 1, seqs},
                {},
                -1,
                3};
    case 12:
        return {GGML_OP_DSV4_HC_COMB, {{24, tokens, 1, 1}, {3, 1, 1, 1}, {24, 1, 1, 1}}, {4, 4, tokens, 1}, {0, k}};
    case 13:
        return {GGML_OP_DSV4_HC_PRE, {{size, h, tokens, 1}, {h, tokens, 1, 1}}, {size, tokens, 1, 1}};
    default:
        return {GGML_OP_DSV4_HC_POST,
                {{size, tokens, 1, 1}, {size, h, tokens, 1}, {h, tokens, 1, 1}, {h, h, tokens, 1}},
                {size, h, tokens, 1}};
    }
}

/// The graph of one recipe, with something changed now and then.
wire::GraphDesc prepared(Choices & c, uint64_t handle) {
    const Recipe r = recipe(c);
    wire::GraphDesc desc;
    const auto add = [&](const Shape & ne, uint32_t type) {
        wire::TensorDesc t;
        t.type = c.one_in(64) ? c.of(types) : type;
        t.ne = ne;
        if (c.one_in(32)) {
            t.ne[c.next() % 4] = c.of(sizes);
        }
        contiguous(t);
        if (c.one_in(32)) {
            t.nb[c.next() % 4] = 4 * c.next();
        }
        t.buffer = handle;
        t.offset = uint64_t(c.next()) * 32;
        desc.tensors.push_back(t);
    };
    for (int i = 0; i < static_cast<int>(r.sources.size()); i++) {
        add(r.sources[i], i == r.ids ? GGML_TYPE_I32 : i == r.mask ? GGML_TYPE_F16 : GGML_TYPE_F32);
    }
    add(r.result, GGML_TYPE_F32);
    wire::TensorDesc & node = desc.tensors.back();
    node.op = r.op;
    node.flags = GGML_TENSOR_FLAG_COMPUTE;
    std::copy(r.params.begin(), r.params.end(), node.op_params.begin());
    if (c.one_in(16)) {
        node.op_params[c.next() % 4] = static_cast<int8_t>(c.next());
    }
    for (size_t i = 0; i < r.sources.size(); i++) {
        node.src[i] = static_cast<uint32_t>(c.one_in(32) ? c.next() % r.sources.size() : i);
    }
    desc.nodes = {static_cast<uint32_t>(r.sources.size())};
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
    static Lab lab;
    Choices c(data, size);
    const wire::GraphDesc desc = c.one_in(2) ? prepared(c, lab.handle) : random_graph(c, lab.handle);
    try {
        server::BuiltGraph graph = server::build_graph(desc, *lab.buffers, *lab.devices[0]);
        if (server::check_indices(graph.indices).empty()) {
            lab.devices[0]->compute(graph.graph);
        }
    } catch (const std::exception &) { // refused, or no memory for its scratch: never an abort
    }
    return 0;
}

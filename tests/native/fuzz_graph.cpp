// Graphs whose shapes nearly fit: what the checks let pass is computed, so a check that is missing shows as an abort.
#include "server/graph_builder.h"

#include <ggml-backend-impl.h>

#include <array>
#include <cstdlib>

using namespace meshllm;

namespace {

constexpr uint64_t buffer_size = 1 << 16;

struct Lab {
    std::vector<std::unique_ptr<server::Device>> devices;
    std::unique_ptr<server::Buffers> buffers;
    uint64_t handle = 0;

    Lab() {
        ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        devices.push_back(std::make_unique<server::Device>(cpu, 2, 1 << 20));
        buffers = std::make_unique<server::Buffers>(devices);
        handle = buffers->allocate(0, buffer_size).buffer;
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

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static Lab lab;
    Choices c(data, size);
    wire::GraphDesc desc;
    const size_t n = 2 + c.next() % 6;
    for (size_t i = 0; i < n; i++) {
        wire::TensorDesc t = tensor(c, desc.tensors, lab.handle);
        if (i >= 2) {
            make_node(c, t, desc.tensors.size());
            desc.nodes.push_back(static_cast<uint32_t>(i));
        }
        desc.tensors.push_back(t);
    }
    try {
        server::BuiltGraph graph = server::build_graph(desc, *lab.buffers, *lab.devices[0]);
        if (server::check_indices(graph.indices).empty()) {
            lab.devices[0]->compute(graph.graph);
        }
    } catch (const std::exception &) { // refused, or no memory for its scratch: never an abort
    }
    return 0;
}

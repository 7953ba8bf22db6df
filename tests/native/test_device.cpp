// What a device that is not a CPU brings: equal addresses, offsets of views, memory that runs out while computing.
// Without a framework: prints each failed check, and exits with 1 when there was one.
#include "server/graph_builder.h"
#include "server/op_check.h"

#include <ggml-backend-impl.h>
#include <ggml-cpp.h>
#include <ggml-impl.h>

#include <cstdio>
#include <stdexcept>
#include <string>

using namespace meshllm;

namespace {

int n_checks = 0, n_failed = 0;

void check(bool ok, const char * what) {
    n_checks++;
    if (!ok) {
        n_failed++;
        std::printf("%s\n", what);
    }
}

// --- a device whose memory runs out in the first graph ---

int n_backends = 0, n_graphs = 0;

const char * name(ggml_backend_t /*backend*/) {
    return "fragile";
}
void free_backend(ggml_backend_t backend) {
    delete backend;
}
ggml_status compute(ggml_backend_t /*backend*/, ggml_cgraph * /*graph*/) {
    if (n_graphs++ == 0) {
        throw std::runtime_error("ErrorOutOfDeviceMemory");
    }
    return GGML_STATUS_SUCCESS;
}
ggml_backend_t start(ggml_backend_dev_t device, const char * /*params*/) {
    static ggml_guid guid = {'f', 'r', 'a', 'g', 'i', 'l', 'e'};
    ggml_backend_i interface{};
    interface.get_name = name;
    interface.free = free_backend;
    interface.graph_compute = compute;
    n_backends++;
    return new ggml_backend{&guid, interface, device, nullptr};
}

ggml_backend_dev_t fragile() {
    static ggml_backend_device device{};
    device.iface.get_name = [](ggml_backend_dev_t) { return "fragile"; };
    device.iface.get_type = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
    device.iface.init_backend = start;
    device.iface.get_buffer_type = [](ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); };
    return &device;
}

void test_memory_that_runs_out() {
    server::Device device(fragile(), 1, 0);
    const ggml_context_ptr context{ggml_init({ggml_graph_overhead(), nullptr, true})};
    ggml_cgraph * graph = ggml_new_graph(context.get());
    std::string why;
    try {
        device.compute(graph);
    } catch (const std::exception & e) {
        why = e.what();
    }
    check(why == "the device fragile could not compute a graph: ErrorOutOfDeviceMemory", why.c_str());
    device.compute(graph);
    check(n_backends == 2 && n_graphs == 2, "the next graph meets the backend that has failed");
}

// --- graphs over the memory of a CPU ---

struct Lab {
    std::vector<std::unique_ptr<server::Device>> devices;
    std::unique_ptr<server::Buffers> buffers;
    uint64_t handle = 0;

    Lab() {
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        devices.push_back(std::make_unique<server::Device>(cpu, 1, uint64_t(1) << 26));
        buffers = std::make_unique<server::Buffers>(devices);
        handle = buffers->allocate(0, 4096).buffer;
    }
    server::BuiltGraph build(const wire::GraphDesc & graph) {
        return server::build_graph(graph, *buffers, *devices.front());
    }
    wire::TensorDesc tensor(ggml_type type, int64_t n0, int64_t n1, uint64_t offset) const {
        wire::TensorDesc t;
        t.type = type;
        t.ne = {n0, n1, 1, 1};
        t.nb[0] = ggml_type_size(type);
        t.nb[1] = t.nb[0] * static_cast<uint64_t>(n0);
        t.nb[2] = t.nb[3] = t.nb[1] * static_cast<uint64_t>(n1);
        t.buffer = handle;
        t.offset = offset;
        return t;
    }
};

wire::TensorDesc node(wire::TensorDesc t, ggml_op op, uint32_t a, uint32_t b) {
    t.op = op;
    t.flags = GGML_TENSOR_FLAG_COMPUTE;
    t.src[0] = a;
    t.src[1] = b;
    return t;
}

void test_offsets_of_views(Lab & lab) {
    wire::GraphDesc graph;
    graph.tensors = {lab.tensor(GGML_TYPE_F32, 32, 1, 128), lab.tensor(GGML_TYPE_F32, 4, 1, 144),
                     node(lab.tensor(GGML_TYPE_F32, 4, 1, 512), GGML_OP_ADD, 1, 1)};
    graph.tensors[1].op = GGML_OP_VIEW;
    graph.tensors[1].src[0] = graph.tensors[1].view_src = 0;
    graph.tensors[1].view_offs = 0x7ff00000;
    graph.nodes = {2};
    const auto built = lab.build(graph);
    check(built.graph->nodes[0]->src[0]->view_offs == 16, "a client says where a view lies");
    graph.tensors[1].offset = 64;
    std::string why;
    try {
        lab.build(graph);
    } catch (const ProtocolError & e) {
        why = e.what();
    }
    check(why.find("begins before") != std::string::npos, "a view may begin before what it views");
}

void test_indices_are_read_once(Lab & lab) {
    wire::GraphDesc graph;
    graph.tensors = {lab.tensor(GGML_TYPE_F32, 4, 8, 0), lab.tensor(GGML_TYPE_F32, 4, 6, 512),
                     lab.tensor(GGML_TYPE_I32, 3, 1, 1024)};
    for (uint32_t i = 0; i < 4; i++) {
        const auto t = lab.tensor(GGML_TYPE_F32, 4, 3, 2048 + 64 * i);
        graph.tensors.push_back(node(t, GGML_OP_GET_ROWS, i % 2, 2));
        graph.nodes.push_back(3 + i);
    }
    const auto built = lab.build(graph);
    check(built.indices.size() == 1 && built.indices[0].limit == 6, "the same indices are read again");
}

// --- addresses ---

void test_equal_addresses_of_two_buffers() {
    const ggml_context_ptr context{ggml_init({8 * ggml_tensor_overhead(), nullptr, true})};
    ggml_tensor * a = ggml_new_tensor_1d(context.get(), GGML_TYPE_F32, 32);
    ggml_tensor * t = ggml_add(context.get(), a, a);
    ggml_backend_buffer one{}, other{};
    a->data = reinterpret_cast<void *>(0x1000);
    t->data = reinterpret_cast<void *>(0x1010);
    a->buffer = t->buffer = &one;
    check(!server::check_op(t).empty(), "an operator may write over what it reads");
    t->buffer = &other;
    check(server::check_op(t).empty(), "tensors of different buffers are taken for one memory");
}

} // namespace

int main() {
    Lab lab;
    test_memory_that_runs_out();
    test_offsets_of_views(lab);
    test_indices_are_read_once(lab);
    test_equal_addresses_of_two_buffers();
    std::printf("%d checks, %d failed\n", n_checks, n_failed);
    return n_failed == 0 ? 0 : 1;
}

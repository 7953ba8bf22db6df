#include "measure/figures.h"

#include <ggml-backend-impl.h>
#include <ggml-cpu.h>

#include <array>
#include <cctype>
#include <utility>

namespace meshllm::measure {

namespace {

constexpr int n_devices = 3;
constexpr int host_index = 2;
constexpr std::array<const char *, n_devices> names = {"STAGE0", "STAGE1", "HOST"};

std::map<std::string, size_t> sizes;
std::vector<int> layers; // of each device

int index_of(ggml_backend_dev_t device) {
    return static_cast<int>(reinterpret_cast<size_t>(device->context));
}

ggml_backend_dev_t cpu() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

// --- buffers: nothing is ever read or written ---

void * base(ggml_backend_buffer_t /*buffer*/) {
    return reinterpret_cast<void *>(0x1000); // an address that is aligned and not null
}
void set_memory(ggml_backend_buffer_t, ggml_tensor *, uint8_t, size_t, size_t) {}
void set_tensor(ggml_backend_buffer_t, ggml_tensor *, const void *, size_t, size_t) {}
void get_tensor(ggml_backend_buffer_t, const ggml_tensor *, void *, size_t, size_t) {}
void clear(ggml_backend_buffer_t, uint8_t) {}

const ggml_backend_buffer_i buffer_interface = {
    /* .free_buffer   = */ nullptr,
    /* .get_base      = */ base,
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */ set_memory,
    /* .set_tensor    = */ set_tensor,
    /* .get_tensor    = */ get_tensor,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ clear,
    /* .reset         = */ nullptr,
};

const char * buffer_type_name(ggml_backend_buffer_type_t type) {
    return names[static_cast<size_t>(index_of(type->device))];
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    return ggml_backend_buffer_init(type, buffer_interface, nullptr, size);
}

size_t alignment(ggml_backend_buffer_type_t /*type*/) {
    return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
}

size_t alloc_size(ggml_backend_buffer_type_t type, const ggml_tensor * tensor) {
    const size_t size = ggml_backend_buft_get_alloc_size(ggml_backend_cpu_buffer_type(), tensor);
    const std::string name = tensor->name;
    if (tensor->buffer != nullptr && tensor->buffer->buft != type) {
        return size; // it lies elsewhere: the graph's allocator asks the first device for it all the same
    }
    if (name.rfind("blk.", 0) == 0 || name.rfind("cache_", 0) == 0 || name.rfind("output", 0) == 0 ||
        name.rfind("token_embd", 0) == 0) {
        sizes[name] = size;
    }
    return size;
}

ggml_backend_buffer_type buffer_types[n_devices];

// --- backend: computes nothing ---

ggml_guid_t guid() {
    static ggml_guid id = {'m', 'e', 's', 'h', '-', 'l', 'l', 'm', ' ', 'f', 'i', 'g', 'u', 'r', 'e', 1};
    return &id;
}

const char * backend_name(ggml_backend_t backend) {
    return names[static_cast<size_t>(index_of(backend->device))];
}
void backend_free(ggml_backend_t backend) {
    delete backend;
}
void synchronize(ggml_backend_t /*backend*/) {}
ggml_status compute(ggml_backend_t /*backend*/, ggml_cgraph * /*graph*/) {
    return GGML_STATUS_FAILED;
}
void event_record(ggml_backend_t /*backend*/, ggml_backend_event_t /*event*/) {}

ggml_backend_t init_backend(ggml_backend_dev_t device, const char * /*params*/) {
    ggml_backend_i interface{};
    interface.get_name = backend_name;
    interface.free = backend_free;
    interface.synchronize = synchronize;
    interface.graph_compute = compute;
    interface.event_record = event_record;
    interface.event_wait = event_record;
    return new ggml_backend{guid(), interface, device, nullptr};
}

// --- device: what stages and HOST say of themselves (backend/stage.cpp, backend/host.cpp) ---

const char * device_name(ggml_backend_dev_t device) {
    return names[static_cast<size_t>(index_of(device))];
}
void memory(ggml_backend_dev_t /*device*/, size_t * free, size_t * total) {
    *free = *total = size_t(1) << 50; // whatever the model takes
}
enum ggml_backend_dev_type device_type(ggml_backend_dev_t /*device*/) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}
void properties(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    *props = {};
    props->name = props->description = device_name(device);
    props->type = device_type(device);
    memory(device, &props->memory_free, &props->memory_total);
    props->caps.async = props->caps.events = true;
}
ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t device) {
    const int index = index_of(device);
    return index == host_index ? ggml_backend_cpu_buffer_type() : &buffer_types[index];
}
/// llama.cpp assigns the first and the last operation of a layer to the layer's device, but forgets that when it plans
/// without allocating (ggml_backend_sched_reserve_size resets it): so the other device does not take them.
bool is_of_other(ggml_backend_dev_t device, const std::string & name) {
    const size_t dash = name.find('-');
    const std::string stem = name.substr(0, dash);
    if (dash == std::string::npos || (stem != "norm" && stem != "l_last") || !std::isdigit(name[dash + 1])) {
        return false;
    }
    int il = std::stoi(name.substr(dash + 1));
    size_t index = 0;
    while (index + 1 < layers.size() && il >= layers[index]) {
        il -= layers[index++];
    }
    return index_of(device) != static_cast<int>(index);
}
bool supports_op(ggml_backend_dev_t device, const ggml_tensor * op) {
    if (is_of_other(device, op->name)) {
        return false;
    }
    ggml_tensor copy = *op; // the CPU refuses memory that is not the host's
    std::array<ggml_tensor, GGML_MAX_SRC> sources;
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        if (op->src[i] != nullptr) {
            sources[i] = *op->src[i];
            sources[i].buffer = nullptr;
            copy.src[i] = &sources[i];
        }
    }
    return ggml_backend_dev_supports_op(cpu(), &copy);
}
bool supports_buffer_type(ggml_backend_dev_t device, ggml_backend_buffer_type_t type) {
    return type == buffer_type(device) || (index_of(device) == host_index && ggml_backend_buft_is_host(type));
}
ggml_backend_event_t event_new(ggml_backend_dev_t device) {
    return new ggml_backend_event{device, nullptr};
}
void event_free(ggml_backend_dev_t /*device*/, ggml_backend_event_t event) {
    delete event;
}
void event_synchronize(ggml_backend_dev_t /*device*/, ggml_backend_event_t /*event*/) {}

const ggml_backend_device_i device_interface = {
    /* .get_name             = */ device_name,
    /* .get_description      = */ device_name,
    /* .get_memory           = */ memory,
    /* .get_type             = */ device_type,
    /* .get_props            = */ properties,
    /* .init_backend         = */ init_backend,
    /* .get_buffer_type      = */ buffer_type,
    /* .get_host_buffer_type = */ nullptr,
    /* .buffer_from_host_ptr = */ nullptr,
    /* .supports_op          = */ supports_op,
    /* .supports_buft        = */ supports_buffer_type,
    /* .offload_op           = */ nullptr,
    /* .event_new            = */ event_new,
    /* .event_free           = */ event_free,
    /* .event_synchronize    = */ event_synchronize,
};

// --- registry: llama.cpp asks a device for the functions of its backend ---

const char * registry_name(ggml_backend_reg_t /*registry*/) {
    return "figures";
}
size_t count(ggml_backend_reg_t /*registry*/) {
    return n_devices;
}
ggml_backend_dev_t get_device(ggml_backend_reg_t /*registry*/, size_t index) {
    return figure_device(static_cast<int>(index));
}

ggml_backend_reg registry = {GGML_BACKEND_API_VERSION, {registry_name, count, get_device, nullptr}, nullptr};

} // namespace

const std::map<std::string, size_t> & placed() {
    return sizes;
}

void share(std::vector<int> of_each) {
    layers = std::move(of_each);
}

void forget() {
    sizes.clear();
}

ggml_backend_dev_t figure_device(int index) {
    static ggml_backend_device devices[n_devices];
    ggml_backend_device & device = devices[index];
    device = {device_interface, &registry, reinterpret_cast<void *>(static_cast<size_t>(index))};
    buffer_types[index] = {{buffer_type_name, alloc_buffer, alignment, nullptr, alloc_size, nullptr}, &device, nullptr};
    return &device;
}

} // namespace meshllm::measure

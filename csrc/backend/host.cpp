#include "backend/host.h"

#include "compute/cpu_threads.h"

#include <ggml-cpp.h>
#include <ggml-impl.h>

#include <utility>

namespace meshllm::backend {

namespace {

struct HostBackend {
    Host * host;
    ggml_backend_ptr inner;
    std::unique_ptr<compute::CpuThreads> threads; // freed before the backend it belongs to
    struct Arrival {                              // a result on its way into memory that we cannot address
        ggml_tensor * dst;
        std::vector<uint8_t> bytes;
    };
    std::vector<Arrival> arrivals;
    std::vector<StageLink *> awaited; // stages whose results the next graph needs
};

Host & host_of(ggml_backend_dev_t device) {
    return *static_cast<Host *>(device->context);
}
HostBackend & of(ggml_backend_t backend) {
    return *static_cast<HostBackend *>(backend->context);
}

ggml_guid_t host_guid() {
    static ggml_guid guid = {'m', 'e', 's', 'h', '-', 'l', 'l', 'm', ' ', 'h', 'o', 's', 't', 0, 0, 1};
    return &guid;
}

// --- backend ---

const char * backend_name(ggml_backend_t /*backend*/) {
    return "HOST";
}

void backend_free(ggml_backend_t backend) {
    delete &of(backend);
    delete backend;
}

/// Waits for the results of the stages. False when one of them is lost.
bool arrive(HostBackend & self) {
    bool ok = true;
    for (StageLink * link : std::exchange(self.awaited, {})) {
        ok = link->guarded([&] { link->wait(); }) && ok;
    }
    for (const HostBackend::Arrival & a : std::exchange(self.arrivals, {})) {
        if (ok) {
            ggml_backend_tensor_set(a.dst, a.bytes.data(), 0, a.bytes.size());
        }
    }
    return ok;
}

void set_tensor_async(ggml_backend_t backend, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    ggml_backend_tensor_set_async(of(backend).inner.get(), tensor, data, offset, size);
}

void get_tensor_async(ggml_backend_t backend, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    ggml_backend_tensor_get_async(of(backend).inner.get(), tensor, data, offset, size);
}

bool cpy_tensor_async(ggml_backend_t backend_src, ggml_backend_t backend_dst, const ggml_tensor * src,
                      ggml_tensor * dst) {
    HostBackend & self = of(backend_dst);
    const BufferContext * from = stage_buffer(memory_of(src));
    if (from == nullptr) {
        const bool same = backend_src == backend_dst && self.inner->iface.cpy_tensor_async != nullptr;
        return same && self.inner->iface.cpy_tensor_async(self.inner.get(), self.inner.get(), src, dst);
    }
    const size_t size = ggml_nbytes(src);
    if (size == 0) {
        return true;
    }
    void * out = dst->data;
    if (!ggml_backend_buffer_is_host(memory_of(dst))) {
        self.arrivals.push_back({dst, std::vector<uint8_t>(size)});
        out = self.arrivals.back().bytes.data();
    }
    from->link->guarded([&] { queue_get(*from->stage, src, out, 0, size); });
    self.awaited.push_back(from->link.get());
    return true;
}

void synchronize(ggml_backend_t backend) {
    arrive(of(backend));
    ggml_backend_synchronize(of(backend).inner.get());
}

ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    HostBackend & self = of(backend);
    self.host->ring.fetch_results();
    const bool arrived = arrive(self);
    // Also of stages whose results were not needed here.
    if (self.host->ring.take_refusal() || self.host->ring.lost() || !arrived) {
        return GGML_STATUS_FAILED;
    }
    return ggml_backend_graph_compute_async(self.inner.get(), graph);
}

void graph_optimize(ggml_backend_t backend, ggml_cgraph * graph, ggml_backend_graph_optimize_params * params) {
    ggml_backend_t inner = of(backend).inner.get();
    if (inner->iface.graph_optimize != nullptr) {
        inner->iface.graph_optimize(inner, graph, params);
    }
}

// --- events: the inner device's, if it has any; a device without events computes synchronously ---

ggml_backend_event_t inner_event(ggml_backend_event_t event) {
    return static_cast<ggml_backend_event_t>(event->context);
}

ggml_backend_event_t event_new(ggml_backend_dev_t device) {
    return new ggml_backend_event{device, ggml_backend_event_new(host_of(device).inner)};
}

void event_free(ggml_backend_dev_t /*device*/, ggml_backend_event_t event) {
    ggml_backend_event_free(inner_event(event));
    delete event;
}

void event_synchronize(ggml_backend_dev_t /*device*/, ggml_backend_event_t event) {
    if (inner_event(event) != nullptr) {
        ggml_backend_event_synchronize(inner_event(event));
    }
}

void event_record(ggml_backend_t backend, ggml_backend_event_t event) {
    if (inner_event(event) != nullptr) {
        ggml_backend_event_record(inner_event(event), of(backend).inner.get());
    }
}

void event_wait(ggml_backend_t backend, ggml_backend_event_t event) {
    if (stage_of(backend) == nullptr && event->device == backend->device && inner_event(event) != nullptr) {
        ggml_backend_event_wait(of(backend).inner.get(), inner_event(event));
    }
}

const ggml_backend_i backend_interface = {
    /* .get_name            = */ backend_name,
    /* .free                = */ backend_free,
    /* .set_tensor_async    = */ set_tensor_async,
    /* .get_tensor_async    = */ get_tensor_async,
    /* .set_tensor_2d_async = */ nullptr,
    /* .get_tensor_2d_async = */ nullptr,
    /* .cpy_tensor_async    = */ cpy_tensor_async,
    /* .synchronize         = */ synchronize,
    /* .graph_plan_create   = */ nullptr,
    /* .graph_plan_free     = */ nullptr,
    /* .graph_plan_update   = */ nullptr,
    /* .graph_plan_compute  = */ nullptr,
    /* .graph_compute       = */ graph_compute,
    /* .event_record        = */ event_record,
    /* .event_wait          = */ event_wait,
    /* .graph_optimize      = */ graph_optimize,
};

// --- device: all but the backend is the inner device's ---

const char * device_name(ggml_backend_dev_t /*device*/) {
    return "HOST";
}

const char * device_description(ggml_backend_dev_t device) {
    return ggml_backend_dev_description(host_of(device).inner);
}

void device_memory(ggml_backend_dev_t device, size_t * free, size_t * total) {
    ggml_backend_dev_memory(host_of(device).inner, free, total);
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t /*device*/) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

void device_props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    ggml_backend_dev_get_props(host_of(device).inner, props);
    props->name = device_name(device);
    props->type = device_type(device);
    props->caps.async = true;
    props->caps.events = true;
}

ggml_backend_t init_backend(ggml_backend_dev_t device, const char * params) {
    ggml_backend_ptr inner(ggml_backend_dev_init(host_of(device).inner, params));
    if (!inner) {
        return nullptr;
    }
    auto threads = std::make_unique<compute::CpuThreads>(inner.get(), compute::default_threads());
    auto self =
        std::make_unique<HostBackend>(HostBackend{&host_of(device), std::move(inner), std::move(threads), {}, {}});
    return new ggml_backend{host_guid(), backend_interface, device, self.release()};
}

ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t device) {
    return ggml_backend_dev_buffer_type(host_of(device).inner);
}

ggml_backend_buffer_type_t host_buffer_type(ggml_backend_dev_t device) {
    return ggml_backend_dev_host_buffer_type(host_of(device).inner);
}

ggml_backend_buffer_t buffer_from_host_ptr(ggml_backend_dev_t device, void * p, size_t size, size_t max_tensor_size) {
    return ggml_backend_dev_buffer_from_host_ptr(host_of(device).inner, p, size, max_tensor_size);
}

bool supports_op(ggml_backend_dev_t device, const ggml_tensor * op) {
    return ggml_backend_dev_supports_op(host_of(device).inner, op);
}

bool supports_buft(ggml_backend_dev_t device, ggml_backend_buffer_type_t type) {
    return ggml_backend_dev_supports_buft(host_of(device).inner, type);
}

bool offload_op(ggml_backend_dev_t device, const ggml_tensor * op) {
    return ggml_backend_dev_offload_op(host_of(device).inner, op);
}

const ggml_backend_device_i device_interface = {
    /* .get_name             = */ device_name,
    /* .get_description      = */ device_description,
    /* .get_memory           = */ device_memory,
    /* .get_type             = */ device_type,
    /* .get_props            = */ device_props,
    /* .init_backend         = */ init_backend,
    /* .get_buffer_type      = */ buffer_type,
    /* .get_host_buffer_type = */ host_buffer_type,
    /* .buffer_from_host_ptr = */ buffer_from_host_ptr,
    /* .supports_op          = */ supports_op,
    /* .supports_buft        = */ supports_buft,
    /* .offload_op           = */ offload_op,
    /* .event_new            = */ event_new,
    /* .event_free           = */ event_free,
    /* .event_synchronize    = */ event_synchronize,
};

bool is_host(ggml_backend_dev_t device) {
    return device != nullptr && device->iface.get_name == device_name;
}

} // namespace

void make_host_device(Host & host, const std::string & inner_name, ggml_backend_reg_t reg) {
    host.inner = ggml_backend_dev_by_name(inner_name.c_str());
    if (host.inner == nullptr) {
        throw std::runtime_error("ggml has no device '" + inner_name + "' for the host's own layers");
    }
    host.device = {device_interface, reg, &host};
}

void set_n_threads(ggml_backend_t backend, int n_threads) {
    if (is_host(ggml_backend_get_device(backend))) {
        of(backend).threads->resize(n_threads);
    }
}

ggml_backend_buffer_type_t * extra_buffer_types(ggml_backend_dev_t device) {
    if (!is_host(device)) {
        return nullptr;
    }
    ggml_backend_dev_t inner = host_of(device).inner;
    auto * get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(inner), "ggml_backend_dev_get_extra_bufts"));
    return get == nullptr ? nullptr : get(inner);
}

} // namespace meshllm::backend

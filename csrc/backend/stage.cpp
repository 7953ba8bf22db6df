#include "backend/stage.h"

#include <ggml-impl.h>

#include <algorithm>
#include <atomic>

namespace meshllm::backend {

namespace {

Stage & device_stage(ggml_backend_dev_t device) {
    return *static_cast<Stage *>(device->context);
}

ggml_guid_t stage_guid() {
    static ggml_guid guid = {'m', 'e', 's', 'h', '-', 'l', 'l', 'm', ' ', 's', 't', 'a', 'g', 'e', 0, 1};
    return &guid;
}

// --- events: a position in the link's stream of requests ---

struct EventContext {
    uint64_t ticket = 0; // the event is complete when the replies up to this one have arrived
};

ggml_backend_event_t event_new(ggml_backend_dev_t device) {
    return new ggml_backend_event{device, new EventContext};
}

void event_free(ggml_backend_dev_t /*device*/, ggml_backend_event_t event) {
    delete static_cast<EventContext *>(event->context);
    delete event;
}

// Commands run in order and own their data, so only replies can be outstanding.
void event_synchronize(ggml_backend_dev_t device, ggml_backend_event_t event) {
    StageLink & link = *device_stage(device).link;
    link.guarded([&] { link.wait_for(static_cast<EventContext *>(event->context)->ticket); });
}

void event_record(ggml_backend_t backend, ggml_backend_event_t event) {
    static_cast<EventContext *>(event->context)->ticket = stage_of(backend)->link->ticket();
}

void event_wait(ggml_backend_t /*backend*/, ggml_backend_event_t /*event*/) {} // one stream is in order by itself

// --- backend ---

const char * backend_name(ggml_backend_t backend) {
    return stage_of(backend)->name.c_str();
}

void backend_free(ggml_backend_t backend) {
    delete backend;
}

void set_tensor_async(ggml_backend_t backend, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    Stage & stage = *stage_of(backend);
    stage.link->guarded([&] { queue_set(stage, tensor, data, offset, size); });
}

void get_tensor_async(ggml_backend_t backend, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    Stage & stage = *stage_of(backend);
    stage.link->guarded([&] {
        const bool output = (tensor->flags & GGML_TENSOR_FLAG_OUTPUT) != 0 && stage.link->mesh();
        if (!output || !stage.results->take(tensor->name, range_of(tensor, offset, size), data)) {
            queue_get(stage, tensor, data, offset, size);
        }
    });
}

void synchronize(ggml_backend_t backend) {
    StageLink & link = *stage_of(backend)->link;
    link.guarded([&] { link.wait(); });
}

ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    Stage & stage = *stage_of(backend);
    if (stage.ring->take_refusal()) {
        return GGML_STATUS_FAILED;
    }
    const bool ok = stage.link->guarded([&] {
        if (graph->n_nodes > 0) {
            stage.graphs->compute(graph);
            stage.results->expect(graph);
        }
    });
    return ok ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

// --- from stage to stage ---

uint64_t next_transfer() {
    static std::atomic<uint64_t> next{1};
    return next++;
}

/// The number under which `from` can push to `to`, if it can; asked once, when first needed.
std::optional<uint32_t> peer_number(Stage & from, Stage & to) {
    const auto known = from.peers.find(to.link.get());
    if (known != from.peers.end()) {
        return known->second;
    }
    std::optional<uint32_t> number;
    if (from.link->mesh() && to.link->mesh()) {
        const auto next = static_cast<uint32_t>(from.next_peer++);
        const wire::RegisterPeer request{next, to.link->session_key(), to.link->config().peer_address};
        if (from.link->call<uint8_t>(wire::Command::register_peer, wire::encode(request)) != 0) {
            number = next;
        } else {
            GGML_LOG_WARN("mesh-llm: %s (%s) cannot reach %s at %s: the host relays between them\n",
                          from.link->label().c_str(), from.link->config().name.c_str(), to.link->label().c_str(),
                          request.address.c_str());
        }
    }
    from.peers[to.link.get()] = number;
    return number;
}

// Each link has its own guarded() call, so that the one that fails is the one reported as lost. When the source fails,
// the destination computes with old data; HOST then finds the lost link and discards the result.
void push(Stage & from, Stage & to, uint32_t peer, const ggml_tensor * src, const ggml_tensor * dst, size_t size) {
    const uint64_t transfer = next_transfer();
    const bool sent = from.link->guarded([&] {
        const wire::PushTensor request{peer, transfer, range_of(src, 0, size)};
        from.link->send(wire::Command::push_tensor_to_peer, wire::view_of(request));
        from.link->flush();
        from.link->counters().pushes++;
        from.link->counters().push_bytes += size;
    });
    if (sent) {
        to.link->guarded([&] {
            const wire::AwaitTensor request{transfer, range_of(dst, 0, size)};
            to.link->send(wire::Command::await_tensor, wire::view_of(request));
        });
    }
}

void relay(Stage & from, Stage & to, const ggml_tensor * src, const ggml_tensor * dst, size_t size) {
    std::vector<uint8_t> bytes(size);
    const bool received = from.link->guarded([&] {
        queue_get(from, src, bytes.data(), 0, size);
        from.link->wait();
        from.link->counters().relays++;
        from.link->counters().relay_bytes += size;
    });
    if (received) {
        to.link->guarded([&] { queue_set(to, dst, bytes.data(), 0, size); });
    }
}

void copy_between(Stage & from, Stage & to, const ggml_tensor * src, const ggml_tensor * dst) {
    const size_t size = ggml_nbytes(src);
    std::optional<uint32_t> peer;
    from.link->guarded([&] { peer = peer_number(from, to); });
    if (peer && size <= wire::max_data_payload - sizeof(wire::PeerDataHead)) {
        push(from, to, *peer, src, dst, size);
    } else {
        relay(from, to, src, dst, size);
    }
}

/// ggml calls this on the destination's backend, whose next graph_compute reports a failure.
bool cpy_tensor_async(ggml_backend_t backend_src, ggml_backend_t backend_dst, const ggml_tensor * src,
                      ggml_tensor * dst) {
    Stage & to = *stage_of(backend_dst);
    if (stage_buffer(memory_of(dst)) == nullptr) {
        return false;
    }
    if (ggml_nbytes(src) == 0) {
        return true;
    }
    if (const BufferContext * from = stage_buffer(memory_of(src))) {
        if (from->stage == &to) {
            return queue_copy(to, src, dst);
        }
        copy_between(*from->stage, to, src, dst);
        return true;
    }
    if (!ggml_backend_buffer_is_host(memory_of(src))) {
        return false;
    }
    ggml_backend_synchronize(backend_src);
    set_tensor_async(backend_dst, dst, src->data, 0, ggml_nbytes(src));
    return true;
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
    /* .graph_optimize      = */ nullptr,
};

// --- which operators the remote device computes ---

// Sizes that grow with the context or the batch must not cause a query, and so a round trip, for every new shape.
// Devices decide by types, layout, the exact length of rows, whether there is more than one row, and whether a source
// repeats for another. The length of the context is a multiple of 256, so all multiples are one class.
uint64_t row_class(int64_t n) {
    return n > 0 && n % 256 == 0 ? 256 : static_cast<uint64_t>(n);
}

void add_to_key(wire::Writer & w, const ggml_tensor * t) {
    w.varint(static_cast<uint64_t>(t->type) + 1);
    w.varint(row_class(t->ne[0]));
    for (int i = 1; i < wire::n_dims; i++) {
        w.varint(static_cast<uint64_t>(std::min<int64_t>(t->ne[i], 2)));
    }
    w.put(static_cast<uint8_t>(ggml_is_contiguous(t) | ggml_is_contiguous_1(t) << 1 | ggml_is_contiguous_2(t) << 2 |
                               ggml_is_permuted(t) << 3 | ggml_is_transposed(t) << 4 |
                               (t->nb[0] == ggml_type_size(t->type)) << 5 | (t->view_src != nullptr) << 6));
}

std::string support_key(const ggml_tensor * op) {
    wire::Bytes key;
    wire::Writer w(key);
    w.varint(op->op);
    w.bytes({reinterpret_cast<const uint8_t *>(op->op_params), sizeof(op->op_params)});
    add_to_key(w, op);
    const ggml_tensor *a = op->src[0], *b = op->src[1];
    w.put(static_cast<uint8_t>(a != nullptr && b != nullptr && a->ne[2] == b->ne[2] && a->ne[3] == b->ne[3]));
    for (const ggml_tensor * s : op->src) {
        if (s == nullptr) {
            w.varint(0);
        } else {
            add_to_key(w, s);
        }
    }
    return {key.begin(), key.end()};
}

bool query_supports_op(StageLink & link, const ggml_tensor * op) {
    wire::GraphDesc desc;
    desc.device = link.config().device;
    wire::TensorDesc self = describe_tensor(op, nullptr);
    for (int i = 0; i < wire::n_srcs; i++) {
        if (op->src[i] != nullptr) {
            self.src[i] = static_cast<uint32_t>(desc.tensors.size());
            desc.tensors.push_back(describe_tensor(op->src[i], nullptr));
            desc.tensors.back().op = GGML_OP_NONE;
            desc.tensors.back().op_params = {};
        }
    }
    desc.tensors.push_back(self);
    wire::Bytes payload;
    wire::encode_graph(desc, payload);
    link.counters().supports_op_queries++;
    return link.call<uint8_t>(wire::Command::supports_op, payload) != 0;
}

std::string shape_of(const ggml_tensor * t) {
    std::string out = ggml_type_name(t->type);
    for (int i = 0; i < wire::n_dims; i++) {
        out += i == 0 ? '[' : ',';
        out += std::to_string(t->ne[i]);
    }
    return out + (ggml_is_contiguous(t) ? "]" : "] not contiguous");
}

/// A host that computes an operator in the middle of a stage's layer costs a round trip, each time.
void warn_unsupported(const StageLink & link, const ggml_tensor * op) {
    std::string line = std::string(ggml_op_desc(op)) + " '" + op->name + "' " + shape_of(op);
    for (int i = 0; i < wire::n_srcs && op->src[i] != nullptr; i++) {
        line += i == 0 ? " of " : ", ";
        line += shape_of(op->src[i]);
    }
    GGML_LOG_WARN("mesh-llm: %s (%s) leaves to the host: %s\n", link.label().c_str(), link.config().name.c_str(),
                  line.c_str());
}

bool supports_op(ggml_backend_dev_t device, const ggml_tensor * op) {
    Stage & stage = device_stage(device);
    StageLink & link = *stage.link;
    if (ggml_is_empty(op)) {
        return true; // of a batch without outputs: wherever it is, it computes nothing
    }
    switch (op->op) {
    case GGML_OP_NONE:
    case GGML_OP_RESHAPE:
    case GGML_OP_VIEW:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE:
        return true;
    default:
        break;
    }
    if (!link.mesh()) {
        return true; // a stock server cannot be asked; its own client assumes the same
    }
    // Also for a lost stage: its graph then fails; the scheduler would abort on an operator without a device.
    bool supported = true;
    link.guarded([&] {
        const std::string key = support_key(op);
        auto known = stage.supported_ops.find(key);
        if (known == stage.supported_ops.end()) {
            known = stage.supported_ops.emplace(key, query_supports_op(link, op)).first;
            if (!known->second) {
                warn_unsupported(link, op);
            }
        }
        supported = known->second;
    });
    return supported;
}

// --- device ---

const char * device_name(ggml_backend_dev_t device) {
    return device_stage(device).name.c_str();
}
const char * device_description(ggml_backend_dev_t device) {
    return device_stage(device).description.c_str();
}

void device_memory(ggml_backend_dev_t device, size_t * free, size_t * total) {
    const wire::DeviceInfo & info = device_stage(device).link->device();
    *free = info.memory_free;
    *total = info.memory_total;
}

// llama.cpp assigns layers only to GPUs; the description says what the remote device really is.
enum ggml_backend_dev_type device_type(ggml_backend_dev_t /*device*/) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

void device_props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    props->name = device_name(device);
    props->description = device_description(device);
    props->type = device_type(device);
    device_memory(device, &props->memory_free, &props->memory_total);
    props->caps = {/*async*/ true, /*host_buffer*/ false, /*buffer_from_host_ptr*/ false, /*events*/ true,
                   /*mmap_support*/ true};
}

ggml_backend_t init_backend(ggml_backend_dev_t device, const char * /*params*/) {
    return new ggml_backend{stage_guid(), backend_interface, device, &device_stage(device)};
}

ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t device) {
    return &device_stage(device).buffer_type;
}

bool supports_buft(ggml_backend_dev_t device, ggml_backend_buffer_type_t type) {
    return type == &device_stage(device).buffer_type;
}

const ggml_backend_device_i device_interface = {
    /* .get_name             = */ device_name,
    /* .get_description      = */ device_description,
    /* .get_memory           = */ device_memory,
    /* .get_type             = */ device_type,
    /* .get_props            = */ device_props,
    /* .init_backend         = */ init_backend,
    /* .get_buffer_type      = */ buffer_type,
    /* .get_host_buffer_type = */ nullptr,
    /* .buffer_from_host_ptr = */ nullptr,
    /* .supports_op          = */ supports_op,
    /* .supports_buft        = */ supports_buft,
    /* .offload_op           = */ nullptr,
    /* .event_new            = */ event_new,
    /* .event_free           = */ event_free,
    /* .event_synchronize    = */ event_synchronize,
};

} // namespace

bool Ring::lost() const {
    return std::ranges::any_of(stages, [](const Stage * s) { return s->link->lost(); });
}

// Received in the order of the ring: a stage that is held up until its reply is read must not keep the next ones, whose
// replies are waited for, from what they await.
void Ring::fetch_results() {
    for (Stage * stage : stages) {
        stage->link->guarded([&] { stage->results->request(); });
    }
    for (Stage * stage : stages) {
        stage->link->guarded([&] { stage->results->receive(); });
    }
}

// A refusal travels with what is pushed, so any of the stages between may have refused as well. RECOVER follows all
// frames of the failed graphs on every link, so none of them computes on or is taken for a refusal of what comes next.
bool Ring::take_refusal() {
    if (std::ranges::none_of(stages, [](const Stage * s) { return s->link->refused(); })) {
        return false;
    }
    for (Stage * stage : stages) {
        stage->link->guarded([&] {
            stage->link->wait(); // replies still on their way may be refused too
            stage->graphs->clear();
            stage->link->recover();
            stage->link->flush();
        });
    }
    return true;
}

Stage * stage_of(ggml_backend_t backend) {
    return backend != nullptr && ggml_guid_matches(backend->guid, stage_guid()) ? static_cast<Stage *>(backend->context)
                                                                                : nullptr;
}

void make_stage_device(Stage & stage, ggml_backend_reg_t reg) {
    stage.device = {device_interface, reg, &stage};
    stage.buffer_type = {stage_buffer_type_interface(), &stage.device, &stage};
}

} // namespace meshllm::backend

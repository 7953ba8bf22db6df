#include "backend/buffer.h"

#include <ggml-impl.h>

#include <atomic>
#include <cstring>
#include <utility>

namespace meshllm::backend {

namespace {

constexpr size_t piece = 256 << 20; // bytes; larger writes and reads are split
constexpr size_t row_padding = 512; // elements, to which GPUs pad rows of quantised weights (the stock client's rule)

Stage & stage_of(ggml_backend_buffer_type_t type) {
    return *static_cast<Stage *>(type->context);
}
BufferContext & context_of(ggml_backend_buffer_t buffer) {
    return *static_cast<BufferContext *>(buffer->context);
}

// --- buffer ---

void free_buffer(ggml_backend_buffer_t buffer) {
    std::unique_ptr<BufferContext> context(&context_of(buffer));
    context->link->guarded([&] {
        context->stage->graphs->drop_buffer(context->handle);
        context->stage->results->drop_buffer(context->handle);
        context->link->forget_base(context->handle);
        context->link->send(wire::Command::free_buffer, wire::view_of(context->handle));
        context->link->flush();
    });
}

void * get_base(ggml_backend_buffer_t buffer) {
    return context_of(buffer).base;
}

bool padded(const ggml_tensor * tensor) {
    return ggml_is_quantized(tensor->type) && tensor->ne[0] % row_padding != 0 && tensor->view_src == nullptr;
}

ggml_status init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    BufferContext & context = context_of(buffer);
    StageLink & link = *context.link;
    if (link.device().alloc_rule == wire::AllocRule::nbytes || !padded(tensor)) {
        return GGML_STATUS_SUCCESS;
    }
    const bool ok = link.guarded([&] {
        wire::TensorDesc desc = describe_tensor(tensor, &link);
        desc.op = GGML_OP_NONE;
        link.send(wire::Command::init_tensor, wire::view_of(wire::to_stock(desc, 1, link)));
    });
    return ok ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

void set_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    BufferContext & context = context_of(buffer);
    context.link->guarded([&] { queue_set(*context.stage, tensor, data, offset, size); });
}

// ggml gives this function no way to fail: a lost stage reads as zeros, and the next graph fails.
void get_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    BufferContext & context = context_of(buffer);
    const bool ok = context.link->guarded([&] {
        if (context.link->mesh() && size <= piece) {
            return context.stage->reads->get(range_of(tensor, offset, size), ggml_backend_buffer_get_size(buffer),
                                             data);
        }
        queue_get(*context.stage, tensor, data, offset, size);
        context.link->wait();
    });
    if (!ok) {
        std::memset(data, 0, size);
    }
}

void memset_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    const std::vector<uint8_t> bytes(std::min(size, piece), value);
    for (size_t done = 0; done < size; done += bytes.size()) {
        set_tensor(buffer, tensor, bytes.data(), offset + done, std::min(bytes.size(), size - done));
    }
}

/// llama.cpp copies the states of sequences so.
bool cpy_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * src, ggml_tensor * dst) {
    const BufferContext * from = stage_buffer(memory_of(src));
    return from != nullptr && from->stage == context_of(buffer).stage && queue_copy(*from->stage, src, dst);
}

void clear(ggml_backend_buffer_t buffer, uint8_t value) {
    BufferContext & context = context_of(buffer);
    context.link->guarded([&] {
        context.link->send(wire::Command::buffer_clear, wire::view_of(wire::BufferClear{context.handle, value}));
    });
}

const ggml_backend_buffer_i buffer_interface = {
    /* .free_buffer   = */ free_buffer,
    /* .get_base      = */ get_base,
    /* .init_tensor   = */ init_tensor,
    /* .memset_tensor = */ memset_tensor,
    /* .set_tensor    = */ set_tensor,
    /* .get_tensor    = */ get_tensor,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ cpy_tensor,
    /* .clear         = */ clear,
    /* .reset         = */ nullptr,
};

// --- buffer type ---

const char * get_name(ggml_backend_buffer_type_t type) {
    return stage_of(type).name.c_str();
}

// Addresses that are never dereferenced, far apart and far from real memory, so that ggml can compare them.
uint8_t * next_base(size_t size) {
    static std::atomic<uint64_t> next{uint64_t(1) << 50};
    const uint64_t span = (size + (uint64_t(1) << 30)) & ~((uint64_t(1) << 30) - 1);
    return reinterpret_cast<uint8_t *>(next.fetch_add(span + (uint64_t(1) << 30)));
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    Stage & stage = stage_of(type);
    StageLink & link = *stage.link;
    wire::AllocReply reply{};
    link.guarded([&] {
        const wire::AllocRequest request{link.config().device, size};
        reply = link.call<wire::AllocReply>(wire::Command::alloc_buffer, wire::view_of(request));
    });
    if (reply.buffer == 0) {
        if (!link.lost()) {
            GGML_LOG_ERROR("mesh-llm: %s (%s) is out of memory: %zu MiB more are needed\n", link.label().c_str(),
                           link.config().name.c_str(), size >> 20);
        }
        return nullptr;
    }
    auto context =
        std::make_unique<BufferContext>(BufferContext{stage.link, &stage, reply.buffer, next_base(reply.size)});
    return ggml_backend_buffer_init(type, buffer_interface, context.release(), reply.size);
}

size_t get_alignment(ggml_backend_buffer_type_t type) {
    return stage_of(type).link->device().alignment;
}

size_t get_max_size(ggml_backend_buffer_type_t type) {
    return stage_of(type).link->device().max_size;
}

AllocKey alloc_key(const ggml_tensor * t) {
    AllocKey key{};
    auto at = key.begin();
    *at++ = t->type;
    *at++ = t->op;
    at = std::copy_n(t->ne, wire::n_dims, at);
    at = std::copy_n(t->nb, wire::n_dims, at);
    at = std::transform(t->op_params, t->op_params + wire::n_op_params, at,
                        [](int32_t p) { return static_cast<uint32_t>(p); });
    std::transform(t->src, t->src + wire::n_srcs, at,
                   [](const ggml_tensor * s) -> uint64_t { return s == nullptr ? 0 : uint64_t(s->type) + 1; });
    return key;
}

uint64_t query_alloc_size(StageLink & link, const ggml_tensor * tensor) {
    wire::AllocSizeRequest request{};
    request.device = link.config().device;
    request.tensor = wire::to_stock(describe_tensor(tensor, nullptr), 1, link);
    for (int i = 0; i < wire::n_srcs; i++) {
        if (tensor->src[i] != nullptr) {
            const auto id = static_cast<uint64_t>(i) + 2;
            request.srcs[i] = wire::to_stock(describe_tensor(tensor->src[i], nullptr), id, link);
            request.tensor.src[i] = id;
        }
    }
    link.counters().alloc_size_queries++;
    return link.call<uint64_t>(wire::Command::get_alloc_size, wire::view_of(request));
}

size_t get_alloc_size(ggml_backend_buffer_type_t type, const ggml_tensor * tensor) {
    StageLink & link = *stage_of(type).link;
    const size_t plain = ggml_nbytes(tensor);
    if (link.device().alloc_rule == wire::AllocRule::nbytes ||
        (!padded(tensor) && !ggml_op_alloc_size_may_expand(tensor->op))) {
        return plain;
    }
    auto & known = stage_of(type).alloc_sizes;
    uint64_t size = plain;
    link.guarded([&] {
        const AllocKey key = alloc_key(tensor);
        auto it = known.find(key);
        if (it == known.end()) {
            it = known.emplace(key, query_alloc_size(link, tensor)).first;
        }
        size = it->second;
    });
    return std::max<size_t>(size, plain); // stock strides have 32 bits: a truncated one returns too small a size
}

/// Lets the stage read these bytes from its own files. False when it cannot.
bool queue_gguf(Stage & stage, const ggml_tensor * tensor, const uint8_t * data, size_t offset, size_t size) {
    StageLink & link = *stage.link;
    auto request = stage.weights->find(tensor, data, offset, size);
    if (!request) {
        return false;
    }
    if (!link.mesh() || !link.has_model(request->model)) {
        if (!std::exchange(stage.warned_no_model, true)) {
            GGML_LOG_WARN("mesh-llm: %s (%s) %s: the weights are sent over the network\n", link.label().c_str(),
                          link.config().name.c_str(),
                          link.mesh() ? "does not have this model's files" : "is a stock ggml-rpc-server");
        }
        return false;
    }
    request->range = range_of(tensor, offset, size);
    link.send(wire::Command::set_tensor_gguf, wire::encode(*request));
    link.flush(); // the stage reads while we continue
    link.counters().weight_bytes_local += size;
    return true;
}

wire::StockTensor stock_tensor(StageLink & link, const ggml_tensor * tensor) {
    wire::TensorDesc desc = describe_tensor(tensor, &link);
    desc.op = GGML_OP_NONE;
    return wire::to_stock(desc, 1, link);
}

} // namespace

const BufferContext * stage_buffer(ggml_backend_buffer_t buffer) {
    const bool ours = buffer != nullptr && buffer->iface.free_buffer == free_buffer;
    return ours ? &context_of(buffer) : nullptr;
}

wire::ByteRange range_of(const ggml_tensor * tensor, size_t offset, size_t size) {
    const BufferContext * context = stage_buffer(memory_of(tensor));
    return {context->handle, static_cast<uint64_t>(static_cast<uint8_t *>(tensor->data) - context->base) + offset,
            size};
}

void queue_set(Stage & stage, const ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    const auto * bytes = static_cast<const uint8_t *>(data);
    if (queue_gguf(stage, tensor, bytes, offset, size)) {
        return;
    }
    StageLink & link = *stage.link;
    if (ggml_backend_buffer_get_usage(memory_of(tensor)) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS) {
        link.counters().weight_bytes_sent += size;
    }
    for (size_t done = 0; done < size; done += piece) {
        const size_t n = std::min(piece, size - done);
        const wire::ByteView body(bytes + done, n);
        if (link.mesh()) {
            const wire::ByteRange range = range_of(tensor, offset + done, n);
            link.send(wire::Command::set_bytes, wire::view_of(wire::SetBytesHead{range.buffer, range.offset}), body);
        } else {
            const wire::SetTensorHead head{stock_tensor(link, tensor), 0, offset + done};
            link.send(wire::Command::set_tensor, wire::view_of(head), body);
        }
    }
}

void queue_get(Stage & stage, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    StageLink & link = *stage.link;
    auto * out = static_cast<uint8_t *>(data);
    for (size_t done = 0; done < size; done += piece) {
        const size_t n = std::min(piece, size - done);
        if (link.mesh()) {
            const wire::ByteRange range = range_of(tensor, offset + done, n);
            link.request_into(wire::Command::get_bytes, wire::view_of(range), out + done, n);
        } else {
            const wire::GetTensor request{stock_tensor(link, tensor), offset + done, n};
            link.request_into(wire::Command::get_tensor, wire::view_of(request), out + done, n);
        }
    }
    link.flush();
}

bool queue_copy(Stage & stage, const ggml_tensor * src, const ggml_tensor * dst) {
    StageLink & link = *stage.link;
    if (link.version() < 2 || !ggml_is_contiguous(src) || !ggml_is_contiguous(dst) || ggml_nbytes(src) == 0) {
        return false;
    }
    const wire::ByteRange to = range_of(dst, 0, ggml_nbytes(dst));
    const wire::ByteRange from = range_of(src, 0, to.size);
    if (from.buffer == to.buffer && from.offset < to.offset + to.size && to.offset < from.offset + from.size) {
        return false;
    }
    const wire::CopyBytes request{from, to.buffer, to.offset};
    link.guarded([&] { link.send(wire::Command::copy_bytes, wire::view_of(request)); });
    return true;
}

ggml_backend_buffer_type_i stage_buffer_type_interface() {
    return {
        /* .get_name       = */ get_name,
        /* .alloc_buffer   = */ alloc_buffer,
        /* .get_alignment  = */ get_alignment,
        /* .get_max_size   = */ get_max_size,
        /* .get_alloc_size = */ get_alloc_size,
        /* .is_host        = */ nullptr,
    };
}

} // namespace meshllm::backend

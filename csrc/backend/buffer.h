// Memory of a stage as a ggml buffer type and its buffers.
#pragma once

#include "backend/graph_cache.h"
#include "backend/read_ahead.h"
#include "backend/step_results.h"
#include "backend/weights.h"

#include <ggml-backend-impl.h>

#include <map>
#include <memory>

namespace meshllm::backend {

/// Everything that a tensor's allocation size may depend on, except for the sizes of its sources: those of the reserved
/// graph are the largest, and with them in the key a growing context would cause a query each time (the stock client's
/// rule).
using AllocKey = std::array<uint64_t, 2 + 2 * wire::n_dims + wire::n_op_params + wire::n_srcs>;

struct Ring;

/// One stage: its link and everything that depends on it. Lives as long as the process.
struct Stage {
    Ring * ring;
    std::shared_ptr<StageLink> link;
    std::unique_ptr<GraphCache> graphs;
    std::unique_ptr<ReadAhead> reads;
    std::unique_ptr<StepResults> results;
    const Weights * weights = nullptr;
    std::map<AllocKey, uint64_t> alloc_sizes; // guarded by the link's mutex, as is what follows
    std::unordered_map<std::string, bool> supported_ops;
    bool warned_no_model = false;
    uint64_t next_peer = 0;
    std::unordered_map<const StageLink *, std::optional<uint32_t>> peers; // that it can push to; nullopt: it cannot
    ggml_backend_buffer_type buffer_type{};
    ggml_backend_device device{};
    std::string name, description;
};

/// All stages of this process, in order. Lives as long as they do.
struct Ring {
    std::vector<Stage *> stages;

    bool lost() const;
    /// Fetches what llama.cpp is going to read from stages; after all that they send each other.
    void fetch_results();
    /// Whether a stage has refused a graph since this was last asked; all stages have recovered then.
    bool take_refusal();
};

struct BufferContext {
    std::shared_ptr<StageLink> link;
    Stage * stage;
    uint64_t handle;
    uint8_t * base; // never dereferenced; offsets are relative to it
};

/// Null for a buffer of another backend.
const BufferContext * stage_buffer(ggml_backend_buffer_t buffer);

/// The buffer of a tensor, or of the tensor that it is a view of.
inline ggml_backend_buffer_t memory_of(const ggml_tensor * tensor) {
    return tensor->view_src != nullptr ? tensor->view_src->buffer : tensor->buffer;
}

/// `size` bytes at `offset` of a tensor, as a range of its stage's buffer.
wire::ByteRange range_of(const ggml_tensor * tensor, size_t offset, size_t size);

/// Queue a write of, or a read from, a tensor; inside link->guarded().
void queue_set(Stage & stage, const ggml_tensor * tensor, const void * data, size_t offset, size_t size);
void queue_get(Stage & stage, const ggml_tensor * tensor, void * data, size_t offset, size_t size);

/// Copies between two tensors of one stage, without a wait. False when its server cannot.
bool queue_copy(Stage & stage, const ggml_tensor * src, const ggml_tensor * dst);

ggml_backend_buffer_type_i stage_buffer_type_interface();

} // namespace meshllm::backend

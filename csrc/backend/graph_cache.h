// Graphs of one device: encoded once per shape, kept by the server in numbered slots, and run again by number.
//
// Only this side decides which graph is in which slot, least recently used first, so that the two cannot disagree.
#pragma once

#include "backend/link.h"

#include <ggml-backend.h>

namespace meshllm::backend {

class GraphCache {
  public:
    explicit GraphCache(StageLink & link) : link_(link) {}

    /// Queues the computation of `graph`; call inside link.guarded().
    void compute(const ggml_cgraph * graph);

    /// Forgets all graphs: whether the server has those that were sent last is not known.
    void clear() { slots_.assign(1, {}); }

    /// The server drops the graphs that point into a freed buffer; so must we.
    void drop_buffer(uint64_t buffer);

  private:
    struct Slot {
        wire::Bytes encoded; // empty: the slot is free
        size_t hash = 0;
        uint64_t uid = 0; // of the last ggml graph that encoded to this
        uint64_t used = 0;
        std::vector<uint64_t> buffers;
    };
    size_t find_uid(uint64_t uid) const;
    size_t find_or_send(const ggml_cgraph * graph);
    size_t least_used() const;
    void run(size_t slot);

    StageLink & link_;
    std::vector<Slot> slots_{1};
    uint64_t clock_ = 0;
};

/// A graph as it crosses the wire. What other splits have computed becomes a leaf: it is in memory already.
wire::GraphDesc describe_graph(const ggml_cgraph * graph, const StageLink & link, uint32_t device);

/// One tensor without its sources, and without its memory when that is on another stage.
wire::TensorDesc describe_tensor(const ggml_tensor * tensor, const StageLink * link);

} // namespace meshllm::backend

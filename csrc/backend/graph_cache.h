// Graphs of one device: encoded once per shape, kept by the server in numbered slots, run again by number.
//
// Which graph lies in which slot is decided here alone, least recently used first, so the two sides cannot disagree.
#pragma once

#include "backend/link.h"

#include <ggml-backend.h>

namespace meshllm::backend {

class GraphCache {
  public:
    explicit GraphCache(StageLink & link) : link_(link) {}

    /// Queues the computation of `graph`; call inside link.guarded().
    void compute(const ggml_cgraph * graph);

    /// The server drops the graphs that point into a freed buffer; so must we.
    void drop_buffer(uint64_t buffer);

  private:
    struct Slot {
        wire::Bytes encoded; // empty: nothing there
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

/// A graph as it crosses the wire. What other splits computed becomes a leaf: it lies in memory already.
wire::GraphDesc describe_graph(const ggml_cgraph * graph, const StageLink & link, uint32_t device);

/// One tensor without sources; memory of other stages is left out.
wire::TensorDesc describe_tensor(const ggml_tensor * tensor, const StageLink * link);

} // namespace meshllm::backend

#include "backend/graph_cache.h"

#include "backend/buffer.h"

#include <ggml-impl.h>

#include <algorithm>
#include <string_view>

namespace meshllm::backend {

wire::TensorDesc describe_tensor(const ggml_tensor * t, const StageLink * link) {
    wire::TensorDesc d;
    d.type = t->type;
    d.op = t->op;
    d.flags = t->flags;
    std::copy_n(t->ne, wire::n_dims, d.ne.begin());
    std::copy_n(t->nb, wire::n_dims, d.nb.begin());
    std::copy_n(t->op_params, wire::n_op_params, d.op_params.begin());
    d.view_offs = t->view_offs;
    d.name = t->name;
    const BufferContext * buffer = link == nullptr ? nullptr : stage_buffer(memory_of(t));
    if (buffer != nullptr && buffer->link.get() == link && t->data != nullptr) {
        d.buffer = buffer->handle;
        d.offset = static_cast<uint64_t>(static_cast<uint8_t *>(t->data) - buffer->base);
    }
    return d;
}

namespace {

/// Numbers the tensors of a graph so that each follows the others that it reads.
class Describer {
  public:
    Describer(const ggml_cgraph * graph, const StageLink & link, wire::GraphDesc & out)
        : graph_(graph), link_(link), out_(out) {
        index_.reserve(2 * static_cast<size_t>(graph->n_nodes));
        for (int i = 0; i < graph->n_nodes; i++) {
            out_.nodes.push_back(add_node(graph->nodes[i]));
        }
    }

  private:
    uint32_t add_node(const ggml_tensor * t) {
        wire::TensorDesc d = describe_tensor(t, &link_);
        for (int i = 0; i < wire::n_srcs; i++) {
            if (t->src[i] != nullptr && t->src[i] != t) {
                d.src[i] = add(t->src[i]);
            }
        }
        if (t->view_src != nullptr) {
            d.view_src = add(t->view_src);
        }
        const auto itself = static_cast<uint32_t>(out_.tensors.size()); // what it reads precedes it now
        for (int i = 0; i < wire::n_srcs; i++) {
            if (t->src[i] == t) {
                d.src[i] = itself;
            }
        }
        return push(t, std::move(d));
    }

    /// A source. Those that this split computes precede the nodes that read them; all others are leaves here.
    uint32_t add(const ggml_tensor * t) {
        const auto known = index_.find(t);
        if (known != index_.end()) {
            return known->second;
        }
        wire::TensorDesc d = describe_tensor(t, &link_);
        d.op = GGML_OP_NONE;
        d.op_params = {};
        if (t->view_src != nullptr) { // which is no view itself
            d.view_src = add(t->view_src);
        }
        return push(t, std::move(d));
    }

    uint32_t push(const ggml_tensor * t, wire::TensorDesc d) {
        const size_t pos = ggml_hash_find(&graph_->visited_hash_set, t);
        if (pos != GGML_HASHSET_FULL && ggml_bitset_get(graph_->visited_hash_set.used, pos)) {
            d.use_count = graph_->use_counts[pos];
        }
        const auto index = static_cast<uint32_t>(out_.tensors.size());
        out_.tensors.push_back(std::move(d));
        index_[t] = index;
        return index;
    }

    const ggml_cgraph * graph_;
    const StageLink & link_;
    wire::GraphDesc & out_;
    std::unordered_map<const ggml_tensor *, uint32_t> index_;
};

} // namespace

wire::GraphDesc describe_graph(const ggml_cgraph * graph, const StageLink & link, uint32_t device) {
    wire::GraphDesc desc;
    desc.device = device;
    Describer(graph, link, desc);
    return desc;
}

void GraphCache::compute(const ggml_cgraph * graph) {
    slots_.resize(link_.graph_slots());
    size_t slot = graph->uid == 0 ? slots_.size() : find_uid(graph->uid);
    if (slot == slots_.size()) {
        slot = find_or_send(graph);
        slots_[slot].uid = graph->uid;
    } else {
        link_.counters().graph_hits++;
        run(slot);
    }
    slots_[slot].used = ++clock_;
    link_.flush();
}

size_t GraphCache::find_uid(uint64_t uid) const {
    const auto it = std::ranges::find_if(slots_, [&](const Slot & s) { return !s.encoded.empty() && s.uid == uid; });
    return static_cast<size_t>(it - slots_.begin());
}

size_t GraphCache::least_used() const {
    const auto it = std::ranges::min_element(slots_, {}, &Slot::used);
    return static_cast<size_t>(it - slots_.begin());
}

void GraphCache::run(size_t slot) {
    const uint32_t device = link_.config().device;
    if (link_.mesh()) {
        link_.send(wire::Command::graph_run, wire::view_of(wire::GraphRun{device, static_cast<uint32_t>(slot)}));
    } else {
        link_.send(wire::Command::graph_recompute, wire::view_of(device));
    }
}

size_t GraphCache::find_or_send(const ggml_cgraph * graph) {
    const wire::GraphDesc desc = describe_graph(graph, link_, link_.config().device);
    wire::Bytes encoded;
    wire::encode_graph(desc, encoded);
    const size_t hash = std::hash<std::string_view>{}({reinterpret_cast<const char *>(encoded.data()), encoded.size()});
    for (size_t i = 0; i < slots_.size(); i++) {
        if (slots_[i].hash == hash && slots_[i].encoded == encoded) {
            link_.counters().graph_hits++;
            run(i);
            return i;
        }
    }
    const size_t i = least_used();
    Slot & slot = slots_[i];
    const auto number = static_cast<uint32_t>(i);
    link_.counters().graph_sends++;
    if (link_.mesh()) {
        link_.counters().graph_bytes += encoded.size();
        link_.send(wire::Command::graph_put, wire::view_of(number), encoded);
        run(i);
    } else {
        const wire::Bytes stock = wire::encode_stock_graph(desc, link_);
        link_.counters().graph_bytes += stock.size();
        link_.send(wire::Command::graph_compute, stock); // computes at once
    }
    slot = {std::move(encoded), hash, 0, 0, {}};
    for (const wire::TensorDesc & t : desc.tensors) {
        if (t.buffer != 0 && std::ranges::find(slot.buffers, t.buffer) == slot.buffers.end()) {
            slot.buffers.push_back(t.buffer);
        }
    }
    return i;
}

void GraphCache::drop_buffer(uint64_t buffer) {
    for (Slot & slot : slots_) {
        if (std::ranges::find(slot.buffers, buffer) != slot.buffers.end()) {
            slot = {};
        }
    }
}

} // namespace meshllm::backend

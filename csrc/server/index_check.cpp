#include "server/index_check.h"

#include "server/op_check.h"
#include "server/require.h"

#include <ggml-backend.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <unordered_map>

namespace meshllm::server {

namespace {

bool is_index(Tensor t) {
    return t->type == GGML_TYPE_I32 || t->type == GGML_TYPE_I64;
}

/// Addresses of different buffers may be the same.
struct Memory {
    ggml_backend_buffer_t buffer;
    const uint8_t *begin, *end;
    bool overlaps(const Memory & other) const {
        return buffer == other.buffer && begin < other.end && other.begin < end;
    }
    bool holds(const Memory & other) const {
        return buffer == other.buffer && begin <= other.begin && other.end <= end;
    }
};

Memory memory_of(Tensor t) {
    const auto * data = static_cast<const uint8_t *>(t->data);
    return {t->buffer, data, data + ggml_nbytes(t)};
}

class IndexTracer {
  public:
    IndexTracer(const ggml_cgraph * graph, std::vector<IndexCheck> & checks)
        : graph_(const_cast<ggml_cgraph *>(graph)), checks_(checks) {
        for (int i = 0; i < ggml_graph_n_nodes(graph_); i++) {
            position_[ggml_graph_node(graph_, i)] = i;
        }
    }

    void trace_all() {
        for (int i = 0; i < ggml_graph_n_nodes(graph_); i++) {
            Tensor t = ggml_graph_node(graph_, i);
            if (ggml_is_empty(t)) {
                continue;
            }
            switch (t->op) {
            case GGML_OP_GET_ROWS:
                trace(t->src[1], i, t->src[0]->ne[1]);
                break;
            case GGML_OP_SET_ROWS:
                trace(t->src[1], i, t->ne[1]);
                break;
            case GGML_OP_MUL_MAT_ID:
                trace(t->src[2], i, t->src[0]->ne[2]);
                break;
            case GGML_OP_SSM_SCAN:
                trace(t->src[6], i, t->src[0]->ne[3]);
                break;
            case GGML_OP_ADD_ID:
                trace(t->src[2], i, t->src[1]->ne[1]);
                break;
            default:
                break;
            }
        }
        std::stable_sort(checks_.begin(), checks_.end(), [](auto & a, auto & b) { return a.after < b.after; });
    }

  private:
    /// `ids` are read by node `user`; their values must lie below `limit`.
    void trace(Tensor ids, int user, int64_t limit) {
        Tensor base = ids;
        while (position_.contains(base) && does_no_work(base) && base->src[0] != nullptr) {
            base = base->src[0];
        }
        const auto found = position_.find(base);
        const int maker = found != position_.end() && !does_no_work(base) && found->second < user ? found->second : -1;
        for (int i = maker + 1; i <= user; i++) { // the user too: it writes while it reads them
            Tensor t = ggml_graph_node(graph_, i);
            require(does_no_work(t) || ggml_is_empty(t) || !memory_of(t).overlaps(memory_of(ids)),
                    "indices are overwritten before they are used");
        }
        if (maker < 0) {
            return add_check(ids, limit, 0);
        }
        require(memory_of(base).holds(memory_of(ids)), "indices lie outside the result that computes them");
        // in the gaps of a result with gaps lies what a client has written
        const bool whole = ids->type == base->type && ggml_is_contiguous(base);
        if (!whole || !trace_maker(base, maker, limit)) {
            add_check(ids, limit, maker + 1);
        }
    }

    /// False when the values are known only once they are computed: numbers that were floats, two tensors in one, or
    /// the position of the largest of several values, which on some devices is -1 when none is a number.
    bool trace_maker(Tensor maker, int at, int64_t limit) {
        switch (maker->op) {
        case GGML_OP_ARGSORT:
        case GGML_OP_TOP_K: // values are positions in a row of the source
            require(maker->src[0]->ne[0] <= limit, "indices may exceed the range they select from");
            return true;
        case GGML_OP_CONT:
        case GGML_OP_CPY:
        case GGML_OP_DUP:
        case GGML_OP_GET_ROWS:
            if (maker->src[0]->type != maker->type) {
                return false;
            }
            trace(maker->src[0], at, limit);
            return true;
        default:
            return false;
        }
    }

    /// Each layer reads the same ones; reading them from a GPU waits for it.
    void add_check(Tensor ids, int64_t limit, int after) {
        require(ids->data != nullptr && is_index(ids), "indices have no memory");
        const auto [known, added] = check_of_.try_emplace({ids, after}, checks_.size());
        if (added) {
            checks_.push_back({ids, limit, after});
        } else {
            checks_[known->second].limit = std::min(checks_[known->second].limit, limit);
        }
    }

    ggml_cgraph * graph_;
    std::vector<IndexCheck> & checks_;
    std::unordered_map<Tensor, int> position_;
    std::map<std::pair<Tensor, int>, size_t> check_of_; // indices and when they are checked
};

template <class T>
bool all_below(Tensor ids, const std::vector<uint8_t> & bytes, int64_t limit) {
    for (int64_t i3 = 0; i3 < ids->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < ids->ne[2]; i2++) {
            for (int64_t i1 = 0; i1 < ids->ne[1]; i1++) {
                for (int64_t i0 = 0; i0 < ids->ne[0]; i0++) {
                    T value;
                    std::memcpy(&value,
                                bytes.data() + i0 * ids->nb[0] + i1 * ids->nb[1] + i2 * ids->nb[2] + i3 * ids->nb[3],
                                sizeof(T));
                    if (value < 0 || value >= limit) {
                        return false;
                    }
                }
            }
        }
    }
    return true;
}

} // namespace

std::string check_graph(const ggml_cgraph * graph, std::vector<IndexCheck> & checks) {
    try {
        IndexTracer(graph, checks).trace_all();
        return "";
    } catch (const UnmetRequirement & unmet) {
        return unmet.text;
    }
}

std::string check_indices(const std::vector<IndexCheck> & checks) {
    std::vector<uint8_t> bytes;
    for (const IndexCheck & c : checks) {
        bytes.resize(ggml_nbytes(c.ids));
        ggml_backend_tensor_get(c.ids, bytes.data(), 0, bytes.size());
        const bool ok = c.ids->type == GGML_TYPE_I64 ? all_below<int64_t>(c.ids, bytes, c.limit)
                                                     : all_below<int32_t>(c.ids, bytes, c.limit);
        if (!ok) {
            return std::string("an index in '") + c.ids->name + "' is out of range";
        }
    }
    return "";
}

} // namespace meshllm::server

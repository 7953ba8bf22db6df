#include "wire/graph.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <unordered_map>

namespace meshllm::wire {

namespace {

// | type | op | flags | ne[4] | nb[4] | mask of op_params, those set | buffer (, offset) |
// | mask of sources, distance back to each, 0 for itself | distance to view_src or 0 | view_offs | use_count | name |
void encode_tensor(Writer & w, const TensorDesc & t, uint32_t index) {
    w.varint(t.type);
    w.varint(t.op);
    w.zigzag(t.flags);
    for (int64_t n : t.ne) {
        w.zigzag(n);
    }
    for (uint64_t n : t.nb) {
        w.varint(n);
    }
    uint16_t mask = 0;
    for (int i = 0; i < n_op_params; i++) {
        mask |= static_cast<uint16_t>((t.op_params[i] != 0) << i);
    }
    w.put(mask);
    for (int32_t p : t.op_params) {
        if (p != 0) {
            w.put(p);
        }
    }
    w.varint(t.buffer);
    if (t.buffer != 0) {
        w.varint(t.offset);
    }
    mask = 0;
    for (int i = 0; i < n_srcs; i++) {
        mask |= static_cast<uint16_t>((t.src[i] != none) << i);
    }
    w.put(mask);
    for (uint32_t s : t.src) {
        if (s != none) {
            w.varint(index - s);
        }
    }
    w.varint(t.view_src == none ? 0 : index - t.view_src);
    w.varint(t.view_offs);
    w.zigzag(t.use_count);
    w.text(t.name);
}

uint32_t earlier(uint64_t distance, uint32_t index) {
    if (distance == 0 || distance > index) {
        throw ProtocolError("a tensor of a graph reads one that does not precede it");
    }
    return index - static_cast<uint32_t>(distance);
}

template <class T>
T narrow(uint64_t value, const char * what) {
    if (value > static_cast<uint64_t>(std::numeric_limits<T>::max())) {
        throw ProtocolError(std::string("a field of a tensor is out of range: ") + what);
    }
    return static_cast<T>(value);
}

void decode_sources(Reader & r, TensorDesc & t, uint32_t index) {
    const auto mask = r.get<uint16_t>();
    if (mask >> n_srcs) {
        throw ProtocolError("a tensor has more than 10 sources");
    }
    for (int i = 0; i < n_srcs; i++) {
        if (mask >> i & 1) {
            const uint64_t distance = r.varint();
            t.src[i] = distance == 0 ? index : earlier(distance, index);
        }
    }
    const uint64_t view = r.varint();
    t.view_src = view == 0 ? none : earlier(view, index);
    t.view_offs = r.varint();
}

TensorDesc decode_tensor(Reader & r, uint32_t index) {
    TensorDesc t;
    t.type = narrow<uint32_t>(r.varint(), "type");
    t.op = narrow<uint32_t>(r.varint(), "op");
    t.flags = static_cast<int32_t>(r.zigzag());
    for (int64_t & n : t.ne) {
        n = r.zigzag();
    }
    for (uint64_t & n : t.nb) {
        n = r.varint();
    }
    const auto mask = r.get<uint16_t>();
    for (int i = 0; i < n_op_params; i++) {
        if (mask >> i & 1) {
            t.op_params[i] = r.get<int32_t>();
        }
    }
    t.buffer = r.varint();
    if (t.buffer != 0) {
        t.offset = r.varint();
    }
    decode_sources(r, t, index);
    t.use_count = static_cast<int32_t>(r.zigzag());
    const std::string_view name = r.text();
    if (name.size() >= sizeof(StockTensor::name)) {
        throw ProtocolError("the name of a tensor is longer than 63 bytes");
    }
    t.name = name;
    return t;
}

} // namespace

void encode_graph(const GraphDesc & graph, Bytes & out) {
    Writer w(out);
    w.varint(graph.device);
    w.varint(graph.tensors.size());
    for (uint32_t i = 0; i < graph.tensors.size(); i++) {
        encode_tensor(w, graph.tensors[i], i);
    }
    w.varint(graph.nodes.size());
    for (uint32_t node : graph.nodes) {
        w.varint(node);
    }
}

static GraphDesc decode_graph(Reader & r) {
    constexpr size_t smallest_tensor = 20; // bytes; a false count must not make us reserve memory
    GraphDesc graph;
    graph.device = narrow<uint32_t>(r.varint(), "device");
    const uint64_t n_tensors = r.varint();
    if (n_tensors > max_graph_tensors || n_tensors > r.remaining() / smallest_tensor) {
        throw ProtocolError("a graph announces more tensors than it contains");
    }
    graph.tensors.reserve(n_tensors);
    for (uint32_t i = 0; i < n_tensors; i++) {
        graph.tensors.push_back(decode_tensor(r, i));
    }
    const uint64_t n_nodes = r.varint();
    if (n_nodes > n_tensors) {
        throw ProtocolError("a graph has more nodes than tensors");
    }
    for (uint64_t i = 0; i < n_nodes; i++) {
        const uint64_t node = r.varint();
        if (node >= n_tensors) {
            throw ProtocolError("a node of a graph is not one of its tensors");
        }
        graph.nodes.push_back(static_cast<uint32_t>(node));
    }
    r.expect_end();
    return graph;
}

GraphDesc decode_graph(ByteView payload) {
    Reader r(payload);
    return decode_graph(r);
}

GraphPut decode_graph_put(ByteView payload) {
    Reader r(payload);
    GraphPut put;
    put.slot = r.get<uint32_t>();
    if (put.slot >= max_graph_slots) {
        throw ProtocolError("a graph is put into a slot that does not exist");
    }
    put.graph = decode_graph(r);
    return put;
}

TensorDesc from_stock(const StockTensor & s, const AddressMap & addresses) {
    TensorDesc t;
    t.type = s.type;
    t.op = s.op;
    t.flags = s.flags;
    for (int i = 0; i < n_dims; i++) { // by index: a member of a packed structure cannot be referenced
        t.ne[i] = s.ne[i];
        t.nb[i] = s.nb[i];
    }
    static_assert(sizeof(s.op_params) == sizeof(t.op_params));
    std::memcpy(t.op_params.data(), &s.op_params, sizeof(s.op_params));
    t.view_offs = s.view_offs;
    t.use_count = s.use_count;
    t.name.assign(s.name, strnlen(s.name, sizeof(s.name) - 1));
    if (s.buffer != 0) {
        const uint64_t base = addresses.base_of(s.buffer);
        if (s.data < base) {
            throw ProtocolError("a tensor lies before its buffer");
        }
        t.buffer = s.buffer;
        t.offset = s.data - base;
    } else if (s.data != 0) {
        throw ProtocolError("a tensor has an address but no buffer");
    }
    return t;
}

namespace {

/// Orders the tensors of a stock graph so that each follows those it reads.
class StockOrder {
  public:
    StockOrder(ByteView tensors, const AddressMap & addresses) : raw_(tensors), addresses_(addresses) {
        const size_t n = raw_.size() / sizeof(StockTensor);
        for (uint32_t i = 0; i < n; i++) {
            const StockTensor t = at(i);
            if (t.id != 0) {
                position_.emplace(t.id, i);
            }
        }
        index_.assign(n, unvisited);
    }

    uint32_t place(uint64_t id, std::vector<TensorDesc> & out) {
        visit(lookup(id), out);
        return index_[lookup(id)];
    }

  private:
    static constexpr uint32_t unvisited = UINT32_MAX, open = UINT32_MAX - 1;

    StockTensor at(uint32_t i) const {
        StockTensor t;
        std::memcpy(&t, raw_.data() + size_t(i) * sizeof(t), sizeof(t));
        return t;
    }

    uint32_t lookup(uint64_t id) const {
        const auto it = position_.find(id);
        if (it == position_.end()) {
            throw ProtocolError("a graph refers to a tensor that it does not contain");
        }
        return it->second;
    }

    // Depth-first without recursion: a chain as long as the graph must not overflow the stack.
    void visit(uint32_t root, std::vector<TensorDesc> & out) {
        std::vector<uint32_t> stack{root};
        while (!stack.empty()) {
            const uint32_t i = stack.back();
            if (index_[i] < open) {
                stack.pop_back();
                continue;
            }
            const StockTensor t = at(i);
            if (index_[i] == unvisited) {
                index_[i] = open;
                if (push_sources(t, stack)) {
                    continue;
                }
            }
            index_[i] = static_cast<uint32_t>(out.size());
            out.push_back(with_sources(t));
            stack.pop_back();
        }
    }

    bool push_sources(const StockTensor & t, std::vector<uint32_t> & stack) {
        const size_t before = stack.size();
        const auto push = [&](uint64_t id) {
            if (id != 0 && index_[lookup(id)] == unvisited) {
                stack.push_back(lookup(id));
            }
        };
        for (int i = 0; i < n_srcs; i++) {
            push(t.src[i]);
        }
        push(t.view_src);
        return stack.size() > before;
    }

    TensorDesc with_sources(const StockTensor & t) const {
        TensorDesc desc = from_stock(t, addresses_);
        const auto placed = [&](uint64_t id) {
            if (id == 0) {
                return none;
            }
            const uint32_t index = index_[lookup(id)];
            if (index >= open) {
                throw ProtocolError("a graph has a cycle");
            }
            return index;
        };
        for (int i = 0; i < n_srcs; i++) {
            desc.src[i] = placed(t.src[i]);
        }
        desc.view_src = placed(t.view_src);
        if (t.view_src != 0 && t.view_src == t.id) {
            throw ProtocolError("a tensor is a view of itself");
        }
        return desc;
    }

    ByteView raw_;
    const AddressMap & addresses_;
    std::unordered_map<uint64_t, uint32_t> position_;
    std::vector<uint32_t> index_;
};

} // namespace

GraphDesc decode_stock_graph(ByteView payload, const AddressMap & addresses) {
    Reader r(payload);
    GraphDesc graph;
    graph.device = r.get<uint32_t>();
    const auto n_nodes = r.get<uint32_t>();
    const ByteView ids = r.bytes(size_t(n_nodes) * sizeof(uint64_t));
    const auto n_tensors = r.get<uint32_t>();
    if (n_tensors > max_graph_tensors || n_nodes > n_tensors) {
        throw ProtocolError("a graph has too many tensors, or more nodes than tensors");
    }
    StockOrder order(r.bytes(size_t(n_tensors) * sizeof(StockTensor)), addresses);
    Reader node_ids(ids);
    for (uint32_t i = 0; i < n_nodes; i++) {
        graph.nodes.push_back(order.place(node_ids.get<uint64_t>(), graph.tensors));
    }
    return graph;
}

StockTensor to_stock(const TensorDesc & t, uint64_t id, const AddressMap & addresses) {
    StockTensor s{};
    s.id = id;
    s.type = t.type;
    s.op = t.op;
    s.flags = t.flags;
    for (int i = 0; i < n_dims; i++) {
        s.ne[i] = static_cast<uint32_t>(t.ne[i]);
        s.nb[i] = static_cast<uint32_t>(t.nb[i]);
    }
    std::copy(t.op_params.begin(), t.op_params.end(), s.op_params);
    for (int i = 0; i < n_srcs; i++) {
        s.src[i] = t.src[i] == none ? 0 : t.src[i] + 1;
    }
    s.view_src = t.view_src == none ? 0 : t.view_src + 1;
    s.view_offs = t.view_offs;
    s.buffer = t.buffer;
    s.data = t.buffer == 0 ? 0 : addresses.base_of(t.buffer) + t.offset;
    std::copy_n(t.name.data(), std::min(t.name.size(), sizeof(s.name) - 1), s.name);
    s.use_count = t.use_count;
    return s;
}

Bytes encode_stock_graph(const GraphDesc & graph, const AddressMap & addresses) {
    Bytes out;
    Writer w(out);
    w.put(graph.device);
    w.put(static_cast<uint32_t>(graph.nodes.size()));
    for (uint32_t node : graph.nodes) {
        w.put(uint64_t(node) + 1);
    }
    w.put(static_cast<uint32_t>(graph.tensors.size()));
    for (uint32_t i = 0; i < graph.tensors.size(); i++) {
        w.put(to_stock(graph.tensors[i], uint64_t(i) + 1, addresses));
    }
    return out;
}

} // namespace meshllm::wire

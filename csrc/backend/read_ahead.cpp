#include "backend/read_ahead.h"

#include "backend/buffer.h"

namespace meshllm::backend {

void ReadAhead::expect(const ggml_cgraph * graph) {
    if (results_.empty()) {
        return;
    }
    for (int i = 0; i < graph->n_nodes; i++) {
        const ggml_tensor * node = graph->nodes[i];
        if ((node->flags & GGML_TENSOR_FLAG_OUTPUT) == 0) {
            continue;
        }
        const auto found = results_.find(node->name);
        if (found == results_.end()) {
            continue;
        }
        Result & result = found->second;
        if (result.state == State::received) { // and was not read: it is no longer wanted
            results_.erase(found);
            continue;
        }
        result.state = State::expected;
        result.tensor = node;
        result.reader = std::this_thread::get_id();
    }
}

void ReadAhead::request(Stage & stage) {
    for (auto & [name, result] : results_) {
        if (result.state == State::expected && result.reader == std::this_thread::get_id()) {
            result.bytes.resize(ggml_nbytes(result.tensor));
            queue_get(stage, result.tensor, result.bytes.data(), 0, result.bytes.size());
            result.state = State::requested;
        }
    }
}

void ReadAhead::receive(Stage & stage) {
    for (auto & [name, result] : results_) {
        if (result.state == State::requested && result.reader == std::this_thread::get_id()) {
            stage.link->wait();
            result.state = State::received;
        }
    }
}

bool ReadAhead::take(const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    if ((tensor->flags & GGML_TENSOR_FLAG_OUTPUT) == 0) {
        return false;
    }
    Result & result = results_[tensor->name]; // from now on it is expected
    const bool received = result.state == State::received || result.state == State::taken;
    if (!received || result.tensor != tensor || offset + size > result.bytes.size()) {
        return false;
    }
    std::memcpy(data, result.bytes.data() + offset, size);
    result.state = State::taken;
    return true;
}

} // namespace meshllm::backend

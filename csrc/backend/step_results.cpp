#include "backend/step_results.h"

#include "backend/buffer.h"

#include <cstring>

namespace meshllm::backend {

void StepResults::expect(const ggml_cgraph * graph) {
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
        result.range = range_of(node, 0, ggml_nbytes(node));
        result.reader = std::this_thread::get_id();
    }
}

void StepResults::request() {
    bool any = false;
    for (auto & [name, result] : results_) {
        if (result.state == State::expected && result.reader == std::this_thread::get_id()) {
            result.bytes.resize(result.range.size);
            link_.request_into(wire::Command::get_bytes, wire::view_of(result.range), result.bytes.data(),
                               result.bytes.size());
            result.state = State::requested;
            any = true;
        }
    }
    if (any) {
        link_.flush();
    }
}

void StepResults::receive() {
    for (auto & [name, result] : results_) {
        if (result.state == State::requested && result.reader == std::this_thread::get_id()) {
            link_.wait();
            result.state = State::received;
        }
    }
}

bool StepResults::take(const char * name, const wire::ByteRange & range, void * data) {
    Result & result = results_[name]; // from now on it is expected
    const bool received = result.state == State::received || result.state == State::taken;
    if (!received || range.buffer != result.range.buffer || range.offset < result.range.offset ||
        range.offset + range.size > result.range.offset + result.range.size) {
        return false;
    }
    std::memcpy(data, result.bytes.data() + (range.offset - result.range.offset), range.size);
    result.state = State::taken;
    return true;
}

void StepResults::drop_buffer(uint64_t buffer) {
    std::erase_if(results_, [&](const auto & entry) { return entry.second.range.buffer == buffer; });
}

} // namespace meshllm::backend

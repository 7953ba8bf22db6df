// Results that llama.cpp reads back from stages after each step, such as the hidden states that a draft is fed with.
// They are asked for while the step is computed, so that reading them costs no round trip of its own.
#pragma once

#include "backend/link.h"

#include <ggml-impl.h>

#include <string>
#include <thread>
#include <unordered_map>

namespace meshllm::backend {

/// Of one stage; to be used inside its link's guarded().
class StepResults {
  public:
    explicit StepResults(StageLink & link) : link_(link) {}

    /// Notes which results of `graph` will be read, from what was read of earlier ones.
    void expect(const ggml_cgraph * graph);
    /// Asks for what this thread expects. The stage sends it before it does anything else, and so may be held up until
    /// it is received: other stages must not wait for something that is asked of it later.
    void request();
    void receive();
    /// Copies the result `name`, if `range` of it was received; false when it was not expected, as at the first time.
    bool take(const char * name, const wire::ByteRange & range, void * data);
    /// The buffer is about to be freed.
    void drop_buffer(uint64_t buffer);

  private:
    enum class State { idle, expected, requested, received, taken };
    struct Result {
        State state = State::idle;
        wire::ByteRange range{};
        std::thread::id reader;
        wire::Bytes bytes;
    };

    StageLink & link_;
    std::unordered_map<std::string, Result> results_; // by the tensor's name
};

} // namespace meshllm::backend

// Results that llama.cpp reads back from stages after each step, such as the hidden states that a draft is fed with.
// They are asked for while the step is computed, so that reading them costs no round trip of its own.
#pragma once

#include <ggml-impl.h>

#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace meshllm::backend {

struct Stage;

/// Of one stage; to be used inside its link's guarded().
class ReadAhead {
  public:
    /// Notes which results of `graph` will be read, from what was read of earlier ones.
    void expect(const ggml_cgraph * graph);
    /// Asks for what this thread expects. The stage sends it before it does anything else, and so may be held up until
    /// it is received: other stages must not wait for something that is asked of it later.
    void request(Stage & stage);
    void receive(Stage & stage);
    /// Copies a result that was received; false when it was not expected, as when it is read for the first time.
    bool take(const ggml_tensor * tensor, void * data, size_t offset, size_t size);

  private:
    enum class State { idle, expected, requested, received, taken };
    struct Result {
        State state = State::idle;
        const ggml_tensor * tensor = nullptr;
        std::thread::id reader;
        std::vector<uint8_t> bytes;
    };
    std::unordered_map<std::string, Result> results_; // by the tensor's name
};

} // namespace meshllm::backend

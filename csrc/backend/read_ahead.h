// Reads of one stage that follow each other at a constant stride, several at a time.
//
// llama.cpp reads a state (a context checkpoint, a prompt for its cache, a saved slot) tensor by tensor and waits for
// each: at 20 ms of RTT 72 tensors take 1.5 s. The tensors of a state lie at equal distances in their buffer, which are
// learnt from the first state that is read. What is read ahead is used only while no other command has been sent.
#pragma once

#include "backend/link.h"

namespace meshllm::backend {

class ReadAhead {
  public:
    explicit ReadAhead(StageLink & link) : link_(link) {}

    /// Reads `range` of a buffer of `buffer_size` bytes; call inside link.guarded().
    void get(const wire::ByteRange & range, uint64_t buffer_size, void * out);

  private:
    struct Habit {           // of a buffer's readers
        uint64_t stride = 0; // bytes, modulo 2^64
        size_t window = 0;   // blocks to request ahead
    };
    struct Block {
        wire::ByteRange range;
        wire::Bytes bytes;
        uint64_t ticket;
    };
    bool take(const wire::ByteRange & range, void * out);
    void drop();
    const Habit & learn(const wire::ByteRange & range);
    void request(wire::ByteRange next, const Habit & habit, uint64_t buffer_size);

    StageLink & link_;
    std::deque<Block> blocks_;
    bool taken_ = false; // one of those that were requested last
    std::unordered_map<uint64_t, Habit> habits_;
    wire::ByteRange last_{};
    uint64_t frames_ = 0; // that had been sent when `last_` was read
};

} // namespace meshllm::backend

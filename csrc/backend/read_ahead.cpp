#include "backend/read_ahead.h"

#include <algorithm>

namespace meshllm::backend {

namespace {

constexpr size_t growth = 8, max_window = 1024; // blocks
constexpr uint64_t max_bytes = 64 << 20;

bool same(const wire::ByteRange & a, const wire::ByteRange & b) {
    return a.buffer == b.buffer && a.offset == b.offset && a.size == b.size;
}

} // namespace

void ReadAhead::get(const wire::ByteRange & range, uint64_t buffer_size, void * out) {
    if (link_.counters().frames_sent != frames_) { // the memory may have changed
        drop();
        last_ = {};
    }
    if (!take(range, out)) {
        const Habit & habit = learn(range);
        drop();
        link_.request_into(wire::Command::get_bytes, wire::view_of(range), out, range.size);
        const uint64_t ticket = link_.ticket();
        request(range, habit, buffer_size);
        link_.flush();
        link_.wait_for(ticket);
    }
    last_ = range;
    frames_ = link_.counters().frames_sent;
}

bool ReadAhead::take(const wire::ByteRange & range, void * out) {
    if (blocks_.empty() || !same(blocks_.front().range, range)) {
        return false;
    }
    const Block & block = blocks_.front();
    link_.wait_for(block.ticket);
    std::copy(block.bytes.begin(), block.bytes.end(), static_cast<uint8_t *>(out));
    blocks_.pop_front();
    taken_ = true;
    return true;
}

/// Replies that are still on their way need the blocks' memory.
void ReadAhead::drop() {
    if (!blocks_.empty()) {
        link_.wait_for(blocks_.back().ticket);
        blocks_.clear();
    }
}

// A state has several rows of tensors, such as all keys and then all values, at the same stride; so a jump alone is no
// reason to doubt it, but a prediction of which nothing was used is.
const ReadAhead::Habit & ReadAhead::learn(const wire::ByteRange & range) {
    Habit & habit = habits_[range.buffer];
    const uint64_t stride = range.offset - last_.offset;
    if (range.buffer != last_.buffer || stride == 0) {
        return habit;
    }
    const bool failed = !blocks_.empty() && !taken_;
    if (stride == habit.stride) {
        habit.window = std::clamp<size_t>(habit.window * growth, 1, max_window);
    } else if (failed || habit.window == 0) {
        habit = {stride, 0};
    }
    return habit;
}

void ReadAhead::request(wire::ByteRange next, const Habit & habit, uint64_t buffer_size) {
    taken_ = false;
    for (size_t i = 1; i <= habit.window && i * next.size <= max_bytes; i++) {
        next.offset += habit.stride;
        if (next.offset > buffer_size || next.size > buffer_size - next.offset) {
            return;
        }
        blocks_.push_back({next, wire::Bytes(next.size), 0});
        Block & block = blocks_.back();
        link_.request_into(wire::Command::get_bytes, wire::view_of(next), block.bytes.data(), next.size);
        block.ticket = link_.ticket();
    }
}

} // namespace meshllm::backend

#include "quic/shared.h"

#include <utility>

namespace meshllm::quic {

uint64_t Shared::new_handle() {
    std::lock_guard lock(mutex);
    return new_handle_locked();
}

std::vector<Event> Shared::take_events() {
    std::lock_guard lock(mutex);
    events_ready.drain();
    return std::exchange(events_, {});
}

void Shared::emit(Event event) {
    std::lock_guard lock(mutex);
    emit_locked(std::move(event));
}

void Shared::emit_locked(Event event) {
    if (events_.empty()) {
        events_ready.notify();
    }
    events_.push_back(std::move(event));
}

void Shared::fail_locked(Stream & stream, const std::string & reason) {
    stream.error = stream.error.empty() ? reason : stream.error;
    stream.out.clear();
    for (const auto & [waits, type] : {std::pair(&stream.reader_waits, Event::Type::readable),
                                       std::pair(&stream.writer_waits, Event::Type::writable)}) {
        if (std::exchange(*waits, false)) {
            emit_locked({.type = type, .link = stream.link_handle, .stream = stream.handle});
        }
    }
}

std::shared_ptr<Stream> Shared::find_locked(uint64_t stream) const {
    const auto found = streams.find(stream);
    return found == streams.end() ? nullptr : found->second;
}

void Shared::mark_undelivered(Stream & stream) {
    if (!std::exchange(stream.undelivered, true)) {
        undelivered.push_back(stream.shared_from_this());
    }
}

} // namespace meshllm::quic

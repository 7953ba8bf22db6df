#include "quic/stream.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <sys/socket.h>
#include <utility>

namespace meshllm::quic {

namespace {

constexpr size_t chunk_size = 64 << 10;
constexpr uint64_t shortest_rtt_us = 2000; // shorter ones measure the threads, not the path

#ifdef MSG_NOSIGNAL
constexpr int send_flags = MSG_DONTWAIT | MSG_NOSIGNAL;
#else
constexpr int send_flags = MSG_DONTWAIT; // Python ignores SIGPIPE
#endif

bool transient(int error) {
    return error == EAGAIN || error == EWOULDBLOCK || error == EINTR || error == ENOBUFS;
}

} // namespace

void Queue::push(std::span<const uint8_t> bytes) {
    size_ += bytes.size();
    if (!chunks_.empty()) {
        Bytes & last = chunks_.back();
        const size_t fits = std::min(bytes.size(), last.capacity() - last.size());
        last.insert(last.end(), bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(fits));
        bytes = bytes.subspan(fits);
    }
    if (!bytes.empty()) {
        Bytes & next = chunks_.emplace_back();
        next.reserve(std::max(chunk_size, bytes.size()));
        next.assign(bytes.begin(), bytes.end());
    }
}

std::span<const uint8_t> Queue::front() const {
    return chunks_.empty() ? std::span<const uint8_t>{} : std::span(chunks_.front()).subspan(begin_);
}

void Queue::pop(size_t n) {
    size_ -= n;
    begin_ += n;
    if (begin_ == chunks_.front().size()) {
        chunks_.pop_front();
        begin_ = 0;
    }
}

void Queue::read(std::span<uint8_t> out) {
    while (!out.empty()) {
        const auto part = front();
        const size_t n = std::min(part.size(), out.size());
        std::memcpy(out.data(), part.data(), n);
        out = out.subspan(n);
        pop(n);
    }
}

void Queue::clear() {
    chunks_.clear();
    begin_ = size_ = 0;
}

bool Window::consumed(uint64_t n_bytes, uint64_t now_us, uint64_t rtt_us) {
    consumed_ += n_bytes;
    if (consumed_ - advertised_ < size_ / 4) {
        return false;
    }
    // A quarter consumed in less than half a round trip: the window is less than twice what is in flight.
    if (advertised_us_ != 0 && now_us - advertised_us_ < std::max(rtt_us, shortest_rtt_us) / 2) {
        size_ = std::min(2 * size_, largest);
    }
    return true;
}

void Window::advertised(uint64_t now_us) {
    advertised_ = consumed_;
    advertised_us_ = now_us;
}

void Splice::push(std::span<const uint8_t> bytes, bool end) {
    backlog_.push(bytes);
    finish_ = finish_ || end;
}

size_t Splice::flush() {
    size_t n = 0;
    while (backlog_.size() > 0 && !broken_) {
        const auto part = backlog_.front();
        const ssize_t sent = ::send(fd_.get(), part.data(), part.size(), send_flags);
        if (sent <= 0) {
            broken_ = sent < 0 && !transient(errno);
            break;
        }
        backlog_.pop(static_cast<size_t>(sent));
        n += static_cast<size_t>(sent);
    }
    if (finish_ && backlog_.size() == 0) {
        ::shutdown(fd_.get(), SHUT_WR);
    }
    return n;
}

size_t Splice::available(size_t wanted) {
    if (end_ - begin_ < wanted && !at_end_ && !broken_) {
        std::memmove(ahead_.data(), ahead_.data() + begin_, end_ - begin_);
        end_ -= std::exchange(begin_, 0);
        const ssize_t got = ::recv(fd_.get(), ahead_.data() + end_, ahead_.size() - end_, MSG_DONTWAIT);
        end_ += got > 0 ? static_cast<size_t>(got) : 0;
        at_end_ = got == 0;
        broken_ = got < 0 && !transient(errno);
    }
    return end_ - begin_;
}

void Splice::read(std::span<uint8_t> out) {
    std::memcpy(out.data(), ahead_.data() + begin_, out.size());
    begin_ += out.size();
}

} // namespace meshllm::quic

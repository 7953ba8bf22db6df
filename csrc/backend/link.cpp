#include "backend/link.h"

#include <ggml-impl.h>
#include <ggml.h>

#include <chrono>
#include <poll.h>
#include <utility>

namespace meshllm::backend {

namespace {

constexpr size_t gather_limit = 64 << 10; // bytes of frames, which are then handed to the kernel anyway
constexpr size_t copy_limit = 32 << 10;   // bytes; larger bodies are sent without a copy

} // namespace

StageLink::StageLink(std::string label, StageConfig config, CountersFile & file, size_t index)
    : label_(std::move(label)), config_(std::move(config)), file_(file), counters_(file.stage(index)) {}

void StageLink::connect(double timeout_s) {
    channel::Stream stream = channel::Stream::connect(config_.address, timeout_s);
    stream.set_read_timeout(timeout_s);
    server_ = channel::introduce(stream, ggml_version());
    if (config_.device >= server_.devices.size()) {
        throw ProtocolError("the server has no device " + std::to_string(config_.device));
    }
    stream_.emplace(std::move(stream));
}

bool StageLink::has_model(const wire::Fingerprint & fingerprint) const {
    return std::ranges::find(server_.models, fingerprint) != server_.models.end();
}

bool StageLink::guarded(const std::function<void()> & work) {
    std::lock_guard lock(mutex_);
    if (lost_) {
        return false;
    }
    try {
        work();
        return true;
    } catch (const std::exception & e) {
        mark_lost(e.what());
        return false;
    }
}

void StageLink::mark_lost(const std::string & why) {
    lost_ = true;
    const std::string line = label_ + " (" + config_.name + ") is lost: " + why;
    GGML_LOG_ERROR("mesh-llm: %s\n", line.c_str());
    counters_.lost = 1;
    file_.set_error(line);
    file_.set_state(State::lost);
    pending_.clear();
    out_.clear();
    stream_.reset(); // the server then frees our memory
}

void StageLink::send(wire::Command command, wire::ByteView head, wire::ByteView body) {
    wire::Writer w(out_);
    w.put(command);
    w.put(uint64_t(head.size() + body.size()));
    w.bytes(head);
    counters_.frames_sent++;
    counters_.bytes_sent += wire::header_size + head.size() + body.size();
    if (body.size() <= copy_limit) {
        w.bytes(body);
    } else {
        flush();
        exchange(body, false, 0);
    }
    if (out_.size() >= gather_limit) {
        flush();
    }
}

void StageLink::flush() {
    wire::ByteView rest(out_);
    exchange(rest, false, 0);
    out_.clear();
}

void StageLink::request_into(wire::Command command, wire::ByteView payload, void * out, size_t size) {
    send(command, payload);
    pending_.push_back({static_cast<uint8_t *>(out), size});
    requested_++;
}

void StageLink::wait() {
    wait_for(requested_);
}

void StageLink::wait_for(uint64_t ticket) {
    if (completed_ >= ticket) {
        return;
    }
    flush();
    read_replies();
    if (completed_ >= ticket) {
        return;
    }
    const auto begin = std::chrono::steady_clock::now();
    wire::ByteView nothing;
    exchange(nothing, true, ticket);
    if (ticket > waited_for_) {
        counters_.blocking_waits++;
        waited_for_ = requested_;
    }
    counters_.wait_ns += static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin).count());
}

// Sends all of `out`, reading replies meanwhile; with `until_replied`, continues until `ticket` is complete.
void StageLink::exchange(wire::ByteView & out, bool until_replied, uint64_t ticket) {
    while (!out.empty() || (until_replied && completed_ < ticket)) {
        if (!out.empty()) {
            out = out.subspan(stream_->write_some(out));
            if (out.empty()) {
                continue;
            }
        }
        pollfd p{stream_->fd(), static_cast<short>((out.empty() ? 0 : POLLOUT) | (pending_.empty() ? 0 : POLLIN)), 0};
        ::poll(&p, 1, -1); // the socket's keep-alive probes end the wait when the other machine dies silently
        if (!pending_.empty()) {
            read_replies();
        }
    }
}

void StageLink::read_replies() {
    while (!pending_.empty()) {
        if (head_have_ < sizeof(head_)) {
            const size_t n = stream_->read_some({head_ + head_have_, sizeof(head_) - head_have_});
            head_have_ += n;
            if (n == 0) {
                return;
            }
            if (head_have_ == sizeof(head_)) {
                begin_reply();
            }
            continue;
        }
        Pending & p = pending_.front();
        uint8_t * out = error_ ? error_->data() : p.out;
        const size_t size = error_ ? error_->size() : p.size;
        if (body_have_ < size) {
            const size_t n = stream_->read_some({out + body_have_, size - body_have_});
            body_have_ += n;
            if (n == 0) {
                return;
            }
        }
        if (body_have_ == size) {
            if (error_) {
                end_error();
            }
            counters_.frames_received++;
            counters_.bytes_received += sizeof(head_) + size;
            pending_.pop_front();
            completed_++;
            head_have_ = body_have_ = 0;
        }
    }
}

void StageLink::begin_reply() {
    uint64_t size;
    std::memcpy(&size, head_, sizeof(size));
    if (mesh() && (size & wire::reply_error_bit)) {
        error_refuses_ = (size & wire::reply_refused_bit) != 0;
        size &= ~(wire::reply_error_bit | wire::reply_refused_bit);
        error_.emplace(std::min<uint64_t>(size, wire::max_error_text));
    } else if (size != pending_.front().size) {
        throw ProtocolError("the server's reply has an unexpected size");
    }
}

void StageLink::end_error() {
    const std::string text(error_->begin(), error_->end());
    if (!error_refuses_) {
        throw ProtocolError(text);
    }
    if (!std::exchange(refused_, true)) {
        counters_.refusals++;
        GGML_LOG_ERROR("mesh-llm: %s (%s) refuses a graph, and what is in work fails: %s\n", label_.c_str(),
                       config_.name.c_str(), text.c_str());
    }
    std::memset(pending_.front().out, 0, pending_.front().size);
    error_.reset();
}

void StageLink::recover() {
    refused_ = false;
    if (version() >= 2) {
        send(wire::Command::recover, {});
    }
}

uint64_t StageLink::base_of(uint64_t buffer) const {
    if (const auto known = bases_.find(buffer); known != bases_.end()) {
        return known->second;
    }
    auto * self = const_cast<StageLink *>(this);
    const auto base = self->call<uint64_t>(wire::Command::buffer_get_base, wire::view_of(buffer));
    return bases_[buffer] = base;
}

} // namespace meshllm::backend

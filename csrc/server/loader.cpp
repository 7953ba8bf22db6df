#include "server/loader.h"

#include "channel/fd.h"

#include <ggml-backend.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <unistd.h>

namespace meshllm::server {

namespace {

constexpr size_t chunk = 4 << 20;    // bytes read at a time for a device whose memory we cannot address
constexpr size_t max_pending = 1024; // reads queued by one session; more wait

void read_file(int fd, const std::string & file, uint64_t offset, uint8_t * out, size_t size) {
    while (size > 0) {
        const ssize_t n = ::pread(fd, out, size, static_cast<off_t>(offset));
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            throw std::runtime_error("cannot read weights from " + file + ": " +
                                     (n == 0 ? "the file was truncated while it was read" : std::strerror(errno)));
        }
        out += n;
        offset += static_cast<uint64_t>(n);
        size -= static_cast<size_t>(n);
    }
}

void load(const Models::Source & source, const Buffers::Entry & entry, const wire::ByteRange & range) {
    const channel::Fd fd(::open(source.file.c_str(), O_RDONLY | O_CLOEXEC));
    if (fd.get() < 0) {
        throw std::runtime_error("cannot open " + source.file + ": " + std::strerror(errno));
    }
    if (entry.host) {
        read_file(fd.get(), source.file, source.offset, entry.base + range.offset, range.size);
        return;
    }
    std::vector<uint8_t> bytes(std::min<uint64_t>(chunk, range.size));
    for (uint64_t done = 0; done < range.size;) {
        const size_t n = std::min<uint64_t>(bytes.size(), range.size - done);
        read_file(fd.get(), source.file, source.offset + done, bytes.data(), n);
        write_bytes(entry, range.offset + done, bytes.data(), n);
        done += n;
    }
}

} // namespace

void Models::replace(const std::vector<ModelFiles> & models) {
    std::map<wire::Fingerprint, gguf::Index> opened;
    for (const ModelFiles & m : models) {
        opened.insert_or_assign(m.fingerprint, gguf::Index::open(m.files));
    }
    std::lock_guard lock(mutex_);
    models_ = std::move(opened);
}

std::vector<wire::Fingerprint> Models::fingerprints() const {
    std::lock_guard lock(mutex_);
    std::vector<wire::Fingerprint> out;
    for (const auto & [fingerprint, index] : models_) {
        out.push_back(fingerprint);
    }
    return out;
}

Models::Source Models::find(const wire::SetTensorGguf & request) const {
    std::lock_guard lock(mutex_);
    const auto model = models_.find(request.model);
    if (model == models_.end()) {
        throw ProtocolError("this server does not have the model whose weights are requested");
    }
    const gguf::TensorInfo * info = model->second.find(request.name);
    if (info == nullptr) {
        throw ProtocolError("the model has no tensor of the requested name");
    }
    if (info->type != request.type || info->ne != request.ne) {
        throw ProtocolError("the tensor '" + info->name + "' has a different type or shape in this server's file");
    }
    if (request.data_offset > info->size || request.range.size > info->size - request.data_offset) {
        throw ProtocolError("the tensor '" + info->name + "' is shorter than the requested range");
    }
    return {model->second.files().at(info->file), info->offset + request.data_offset};
}

void Loader::Batch::add(Models::Source source, const Buffers::Entry & entry, const wire::ByteRange & range) {
    {
        std::unique_lock lock(loader_.mutex_);
        loader_.done_.wait(lock, [this] { return pending_ < max_pending; });
        pending_++;
    }
    loader_.executor_.post([this, source = std::move(source), entry, range] { run(source, entry, range); });
}

void Loader::Batch::run(const Models::Source & source, const Buffers::Entry & entry, const wire::ByteRange & range) {
    std::unique_lock lock(loader_.mutex_);
    const bool skip = !error_.empty();
    lock.unlock();
    std::string error;
    try {
        if (!skip) {
            load(source, entry, range);
            loader_.counters_.weight_bytes_local += range.size;
        }
    } catch (const std::exception & e) {
        error = e.what();
    }
    lock.lock();
    if (error_.empty()) {
        error_ = error;
    }
    pending_--;
    loader_.done_.notify_all();
}

void Loader::Batch::wait() {
    std::unique_lock lock(loader_.mutex_);
    loader_.done_.wait(lock, [this] { return pending_ == 0; });
    if (!error_.empty()) {
        throw std::runtime_error(error_);
    }
}

Loader::Batch::~Batch() {
    std::unique_lock lock(loader_.mutex_);
    error_ = "the session ended"; // queued reads are skipped
    loader_.done_.wait(lock, [this] { return pending_ == 0; });
}

} // namespace meshllm::server

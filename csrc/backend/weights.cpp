#include "backend/weights.h"

#include "channel/fd.h"

#include <ggml.h>

#include <algorithm>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

namespace meshllm::backend {

namespace {

constexpr size_t sample = 1024; // bytes compared at the beginning, middle and end of a write

} // namespace

Weights::Weights(const Config & config) : fingerprint_(config.fingerprint) {
    if (config.model_files.empty()) {
        return;
    }
    index_.emplace(gguf::Index::open(config.model_files));
    for (const std::string & path : index_->files()) {
        const channel::Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
        struct stat info{};
        if (fd.get() < 0 || ::fstat(fd.get(), &info) != 0) {
            throw std::runtime_error("cannot open " + path + ": " + std::strerror(errno));
        }
        const auto size = static_cast<size_t>(info.st_size);
        void * p = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd.get(), 0);
        if (p == MAP_FAILED) {
            throw std::runtime_error("cannot map " + path + ": " + std::strerror(errno));
        }
        files_.push_back({static_cast<const uint8_t *>(p), size});
    }
}

Weights::~Weights() {
    for (const Mapping & m : files_) {
        ::munmap(const_cast<uint8_t *>(m.data), m.size);
    }
}

// A draft model or an adapter may have tensors of the same name and shape.
bool Weights::same_bytes(const gguf::TensorInfo & info, const uint8_t * data, size_t offset, size_t size) const {
    const uint8_t * ours = files_.at(info.file).data + info.offset + offset;
    const size_t n = std::min(size, sample);
    return std::memcmp(ours, data, n) == 0 && std::memcmp(ours + size - n, data + size - n, n) == 0 &&
           std::memcmp(ours + (size - n) / 2, data + (size - n) / 2, n) == 0;
}

std::optional<wire::SetTensorGguf> Weights::find(const ggml_tensor * tensor, const uint8_t * data, size_t offset,
                                                 size_t size) const {
    const bool weights = tensor->buffer != nullptr && tensor->view_src == nullptr &&
                         ggml_backend_buffer_get_usage(tensor->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
    if (!weights || !index_) {
        return std::nullopt;
    }
    const gguf::TensorInfo * info = index_->find(tensor->name);
    if (info == nullptr || info->type != static_cast<uint32_t>(tensor->type) ||
        !std::equal(info->ne.begin(), info->ne.end(), tensor->ne) || !ggml_is_contiguous(tensor) ||
        offset > info->size || size > info->size - offset || !same_bytes(*info, data, offset, size)) {
        return std::nullopt;
    }
    wire::SetTensorGguf request;
    request.model = fingerprint_;
    request.name = info->name;
    request.type = info->type;
    request.ne = info->ne;
    request.data_offset = offset;
    return request;
}

} // namespace meshllm::backend

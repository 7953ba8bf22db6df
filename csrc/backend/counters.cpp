#include "backend/counters.h"

#include "channel/fd.h"

#include <algorithm>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace meshllm::backend {

namespace {

constexpr size_t file_size = 8192, stages_at = 64, n_stages_at = 8, state_at = 12, error_at = 4608, error_size = 512;
constexpr char magic[] = "MLCOUNT1";

} // namespace

CountersFile::CountersFile(const std::string & path, uint32_t n_stages) {
    if (!path.empty()) {
        const channel::Fd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
        if (fd.get() >= 0 && ::ftruncate(fd.get(), file_size) == 0) {
            void * p = ::mmap(nullptr, file_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
            mapped_ = p != MAP_FAILED;
            data_ = mapped_ ? static_cast<uint8_t *>(p) : nullptr;
        }
    }
    if (data_ == nullptr) {
        data_ = static_cast<uint8_t *>(::operator new(file_size));
    }
    std::memset(data_, 0, file_size);
    std::memcpy(data_ + n_stages_at, &n_stages, sizeof(n_stages));
    std::memcpy(data_, magic, sizeof(magic) - 1);
}

CountersFile::~CountersFile() {
    if (mapped_) {
        ::munmap(data_, file_size);
    } else {
        ::operator delete(data_);
    }
}

StageCounters & CountersFile::stage(size_t index) {
    return *reinterpret_cast<StageCounters *>(data_ + stages_at + index * sizeof(StageCounters));
}

void CountersFile::set_state(State state) {
    reinterpret_cast<std::atomic<uint32_t> *>(data_ + state_at)->store(static_cast<uint32_t>(state));
}

void CountersFile::set_error(const std::string & text) {
    if (data_[error_at] == 0) {
        std::memcpy(data_ + error_at, text.data(), std::min(text.size(), error_size - 1));
    }
}

} // namespace meshllm::backend

// SET_TENSOR_GGUF: weights from this machine's own files into device buffers, several tensors at once.
#pragma once

#include "gguf/index.h"
#include "server/buffers.h"
#include "server/counters.h"

#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <thread>

namespace meshllm::server {

struct ModelFiles {
    wire::Fingerprint fingerprint;
    std::vector<std::string> files;
};

/// The models whose files this machine has. Sessions ask while it is replaced.
class Models {
  public:
    /// These and no others from now on. Throws gguf::GgufError when a file is missing or broken; then nothing changes.
    void replace(const std::vector<ModelFiles> & models);
    std::vector<wire::Fingerprint> fingerprints() const;

    struct Source {
        std::string file;
        uint64_t offset; // in the file
    };
    /// Where the bytes lie. Throws ProtocolError unless name, type, shape and range are those of the file.
    Source find(const wire::SetTensorGguf & request) const;

  private:
    mutable std::mutex mutex_;
    std::map<wire::Fingerprint, gguf::Index> models_;
};

/// Threads that read files for all sessions.
class Loader {
  public:
    Loader(int n_threads, Counters & counters);
    ~Loader();

    /// The reads of one session. wait() returns when all are done and throws what went wrong first.
    class Batch {
      public:
        explicit Batch(Loader & loader) : loader_(loader) {}
        ~Batch();
        void add(Models::Source source, const Buffers::Entry & entry, const wire::ByteRange & range);
        void wait();

      private:
        friend class Loader;
        Loader & loader_;
        size_t pending_ = 0; // guarded by loader_.mutex_
        std::string error_;
    };

  private:
    struct Job {
        Batch * batch;
        Models::Source source;
        Buffers::Entry entry;
        wire::ByteRange range;
    };
    void work();

    Counters & counters_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::deque<Job> jobs_;
    bool stopping_ = false;
    std::vector<std::thread> threads_;
};

} // namespace meshllm::server

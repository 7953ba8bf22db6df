// SET_TENSOR_GGUF: weights from this machine's own files into device buffers, several tensors at once.
#pragma once

#include "gguf/index.h"
#include "server/buffers.h"
#include "server/counters.h"
#include "server/executor.h"

#include <condition_variable>
#include <map>
#include <mutex>

namespace meshllm::server {

struct ModelFiles {
    wire::Fingerprint fingerprint;
    std::vector<std::string> files;
};

/// The models whose files this machine has. They may be replaced while sessions use them.
class Models {
  public:
    /// Replaces all models. Throws gguf::GgufError when a file is missing or broken; then nothing changes.
    void replace(const std::vector<ModelFiles> & models);
    std::vector<wire::Fingerprint> fingerprints() const;

    struct Source {
        std::string file;
        uint64_t offset; // in the file
    };
    /// Where the bytes are. Throws ProtocolError unless name, type, shape and range match the file.
    Source find(const wire::SetTensorGguf & request) const;

  private:
    mutable std::mutex mutex_;
    std::map<wire::Fingerprint, gguf::Index> models_;
};

/// Reads files for all sessions, several at once.
class Loader {
  public:
    Loader(int n_threads, Counters & counters) : counters_(counters), executor_(n_threads) {}

    /// The reads of one session. wait() returns when all are done and throws the first error.
    class Batch {
      public:
        explicit Batch(Loader & loader) : loader_(loader) {}
        ~Batch();
        void add(Models::Source source, const Buffers::Entry & entry, const wire::ByteRange & range);
        void wait();

      private:
        void run(const Models::Source & source, const Buffers::Entry & entry, const wire::ByteRange & range);

        Loader & loader_;
        size_t pending_ = 0; // guarded by loader_.mutex_, as is the error
        std::string error_;
    };

  private:
    Counters & counters_;
    std::mutex mutex_;
    std::condition_variable done_;
    Executor executor_;
};

} // namespace meshllm::server

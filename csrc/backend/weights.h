// Recognises writes of model weights, which a stage can read from its own files instead.
#pragma once

#include "backend/config.h"
#include "gguf/index.h"

#include <ggml-backend.h>

#include <optional>

namespace meshllm::backend {

class Weights {
  public:
    /// Without model files nothing is ever found. Throws gguf::GgufError.
    explicit Weights(const Config & config);
    ~Weights();
    Weights(const Weights &) = delete;
    Weights & operator=(const Weights &) = delete;

    const wire::Fingerprint & fingerprint() const { return fingerprint_; }

    /// The request that loads the same bytes from a stage's own file, if `data` equals our file at that place.
    std::optional<wire::SetTensorGguf> find(const ggml_tensor * tensor, const uint8_t * data, size_t offset,
                                            size_t size) const;

  private:
    struct Mapping {
        const uint8_t * data = nullptr;
        size_t size = 0;
    };
    bool same_bytes(const gguf::TensorInfo & info, const uint8_t * data, size_t offset, size_t size) const;

    wire::Fingerprint fingerprint_;
    std::optional<gguf::Index> index_;
    std::vector<Mapping> files_;
};

} // namespace meshllm::backend

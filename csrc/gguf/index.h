// Index of a local GGUF model, a single file or a split one: where each tensor is. ggml's own reader parses.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <variant>
#include <vector>

namespace meshllm::gguf {

struct TensorInfo {
    std::string name;
    uint32_t type = 0;             // enum ggml_type
    std::array<int64_t, 4> ne{};   // elements
    uint32_t file = 0;             // index into files()
    uint64_t offset = 0, size = 0; // bytes, from the start of that file
};

/// One line for the user: which file, what is wrong, what to do.
class GgufError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Index {
  public:
    /// `files` are all parts, in order. Throws GgufError.
    static Index open(const std::vector<std::string> & files);

    /// Null when no tensor has that name.
    const TensorInfo * find(std::string_view name) const;

    const std::vector<TensorInfo> & tensors() const { return tensors_; }
    const std::vector<std::string> & files() const { return files_; }

    struct File {
        uint64_t data_offset = 0; // bytes before the tensor data: metadata and tensor infos
        uint64_t size = 0;        // bytes
    };
    const std::vector<File> & file_infos() const { return file_infos_; }

    /// Scalars and strings of the first file's metadata.
    using Value = std::variant<int64_t, uint64_t, double, bool, std::string>;
    const std::map<std::string, Value> & metadata() const { return metadata_; }

  private:
    void add_file(const std::string & path, size_t n_files);

    std::vector<std::string> files_;
    std::vector<File> file_infos_;
    std::vector<TensorInfo> tensors_;
    std::unordered_map<std::string, size_t> by_name_;
    std::map<std::string, Value> metadata_;
    int64_t n_tensors_ = -1; // in all files, according to the first; -1 when it does not say
};

/// All parts of a split model (NAME-00001-of-00003.gguf) of which `path` is one, or {path}. Throws GgufError when a
/// part is missing.
std::vector<std::string> split_parts(const std::string & path);

} // namespace meshllm::gguf

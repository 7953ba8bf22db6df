#include "gguf/index.h"

#include <ggml.h>
#include <gguf.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <regex>
#include <sys/stat.h>

namespace meshllm::gguf {

namespace {

using Context = std::unique_ptr<gguf_context, decltype(&gguf_free)>;

// ggml's reader trusts counts in so far as it reserves memory for them: compare them with the file's size first.
constexpr uint64_t smallest_tensor_info = 24, smallest_key_value = 13; // bytes

uint64_t regular_file_size(const std::string & path) {
    struct stat info {};
    if (::stat(path.c_str(), &info) != 0) {
        throw GgufError("cannot open " + path + ": " + std::strerror(errno));
    }
    if (!S_ISREG(info.st_mode)) {
        throw GgufError(path + " is not a file");
    }
    return static_cast<uint64_t>(info.st_size);
}

void check_head(const std::string & path, uint64_t size) {
    struct {
        char magic[4];
        uint32_t version;
        uint64_t n_tensors, n_keys;
    } head{};
    static_assert(sizeof(head) == 24);
    const std::unique_ptr<FILE, int (*)(FILE *)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) {
        throw GgufError("cannot open " + path + ": " + std::strerror(errno));
    }
    const size_t n = std::fread(&head, 1, sizeof(head), file.get());
    if (n < sizeof(head.magic) || std::memcmp(head.magic, "GGUF", 4) != 0) {
        throw GgufError(path + " is not a GGUF file");
    }
    if (n < sizeof(head) || head.n_tensors > size / smallest_tensor_info || head.n_keys > size / smallest_key_value) {
        throw GgufError(path + " is truncated or broken; download it again");
    }
}

std::map<std::string, Index::Value> read_metadata(const gguf_context * g) {
    std::map<std::string, Index::Value> out;
    for (int64_t i = 0; i < gguf_get_n_kv(g); i++) {
        const char * key = gguf_get_key(g, i);
        switch (gguf_get_kv_type(g, i)) {
        case GGUF_TYPE_UINT8:
            out[key] = int64_t(gguf_get_val_u8(g, i));
            break;
        case GGUF_TYPE_INT8:
            out[key] = int64_t(gguf_get_val_i8(g, i));
            break;
        case GGUF_TYPE_UINT16:
            out[key] = int64_t(gguf_get_val_u16(g, i));
            break;
        case GGUF_TYPE_INT16:
            out[key] = int64_t(gguf_get_val_i16(g, i));
            break;
        case GGUF_TYPE_UINT32:
            out[key] = int64_t(gguf_get_val_u32(g, i));
            break;
        case GGUF_TYPE_INT32:
            out[key] = int64_t(gguf_get_val_i32(g, i));
            break;
        case GGUF_TYPE_UINT64:
            out[key] = static_cast<int64_t>(gguf_get_val_u64(g, i));
            break;
        case GGUF_TYPE_INT64:
            out[key] = gguf_get_val_i64(g, i);
            break;
        case GGUF_TYPE_FLOAT32:
            out[key] = double(gguf_get_val_f32(g, i));
            break;
        case GGUF_TYPE_FLOAT64:
            out[key] = gguf_get_val_f64(g, i);
            break;
        case GGUF_TYPE_BOOL:
            out[key] = gguf_get_val_bool(g, i);
            break;
        case GGUF_TYPE_STRING:
            out[key] = std::string(gguf_get_val_str(g, i));
            break;
        default: // arrays: vocabularies, megabytes that nobody asks for here
            break;
        }
    }
    return out;
}

/// What split.count says, 1 where it is missing.
uint64_t split_count(const gguf_context * g) {
    const int64_t key = gguf_find_key(g, "split.count");
    return key >= 0 && gguf_get_kv_type(g, key) == GGUF_TYPE_UINT16 ? gguf_get_val_u16(g, key) : 1;
}

} // namespace

void Index::add_file(const std::string & path, size_t n_files) {
    const uint64_t size = regular_file_size(path);
    check_head(path, size);
    ggml_context * shapes = nullptr;
    const Context g(gguf_init_from_file(path.c_str(), {/*no_alloc*/ true, &shapes}), gguf_free);
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> owner(shapes, ggml_free);
    if (!g) {
        throw GgufError(path + " is truncated or broken; download it again");
    }
    if (std::max<uint64_t>(split_count(g.get()), 1) != n_files) {
        throw GgufError(path + " belongs to a model of " + std::to_string(split_count(g.get())) + " files; " +
                        std::to_string(n_files) + " were given");
    }
    const auto file = static_cast<uint32_t>(files_.size());
    const uint64_t data = gguf_get_data_offset(g.get());
    for (int64_t i = 0; i < gguf_get_n_tensors(g.get()); i++) {
        TensorInfo info{gguf_get_tensor_name(g.get(), i), static_cast<uint32_t>(gguf_get_tensor_type(g.get(), i)), {},
                        file, data + gguf_get_tensor_offset(g.get(), i), gguf_get_tensor_size(g.get(), i)};
        const ggml_tensor * shape = ggml_get_tensor(shapes, info.name.c_str());
        if (shape == nullptr || info.offset > size || info.size > size - info.offset) {
            throw GgufError(path + " is truncated: '" + info.name + "' lies beyond its end; download it again");
        }
        std::copy_n(shape->ne, info.ne.size(), info.ne.begin());
        if (!by_name_.try_emplace(info.name, tensors_.size()).second) {
            throw GgufError(path + " holds the tensor '" + info.name + "' a second time");
        }
        tensors_.push_back(std::move(info));
    }
    if (files_.empty()) {
        metadata_ = read_metadata(g.get());
    }
    files_.push_back(path);
    file_infos_.push_back({data, size});
}

Index Index::open(const std::vector<std::string> & files) {
    if (files.empty()) {
        throw GgufError("no model file is named");
    }
    Index index;
    for (const std::string & path : files) {
        index.add_file(path, files.size());
    }
    return index;
}

const TensorInfo * Index::find(std::string_view name) const {
    const auto it = by_name_.find(std::string(name));
    return it == by_name_.end() ? nullptr : &tensors_[it->second];
}

std::vector<std::string> split_parts(const std::string & path) {
    static const std::regex pattern(R"((.*)-(\d{5})-of-(\d{5})\.gguf)");
    std::smatch match;
    if (!std::regex_match(path, match, pattern)) {
        return {path};
    }
    const int count = std::stoi(match[3]);
    std::vector<std::string> parts;
    for (int i = 1; i <= count; i++) {
        char number[32];
        std::snprintf(number, sizeof(number), "-%05d-of-%05d.gguf", i, count);
        parts.push_back(match[1].str() + number);
        struct stat info {};
        if (::stat(parts.back().c_str(), &info) != 0) {
            throw GgufError("the model is split into " + std::to_string(count) + " files and this one is missing: " +
                            parts.back());
        }
    }
    return parts;
}

} // namespace meshllm::gguf

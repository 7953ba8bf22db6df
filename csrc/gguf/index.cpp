#include "gguf/index.h"

#include <ggml.h>
#include <gguf.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <sys/stat.h>

namespace meshllm::gguf {

namespace {

using Context = std::unique_ptr<gguf_context, decltype(&gguf_free)>;
using Shapes = std::unique_ptr<ggml_context, decltype(&ggml_free)>;

// ggml's reader accepts any length or count that fits into the file, and model files are large: it would read a string
// of 1 GiB. The vocabularies of today's models take up to 20 MB; the largest models have about 50000 tensors.
constexpr uint64_t max_header = 128u << 20; // bytes
constexpr uint64_t max_tensors = 1u << 18;
constexpr uint64_t smallest_tensor_info = 24, smallest_key_value = 13; // bytes

[[noreturn]] void broken(const std::string & path, const std::string & why) {
    throw GgufError(path + " is truncated or broken: " + why + "; download it again");
}

/// A name from a file, safe to print on a terminal.
std::string printable(std::string name) {
    std::replace_if(name.begin(), name.end(), [](unsigned char c) { return c < ' ' || c > '~'; }, '?');
    return "'" + name + "'";
}

/// A regular file, read in order through a buffer.
class Reader {
  public:
    explicit Reader(const std::string & path) : path_(path), file_(nullptr, std::fclose) {
        // opening a pipe would block, and the system would truncate the name at a zero byte
        struct stat info{};
        if (path.find('\0') != std::string::npos) {
            throw GgufError("the name of a model file contains a zero byte");
        }
        if (::stat(path.c_str(), &info) != 0) {
            throw GgufError("cannot open " + path + ": " + std::strerror(errno));
        }
        if (!S_ISREG(info.st_mode)) {
            throw GgufError(path + " is not a file; name a .gguf file");
        }
        file_.reset(std::fopen(path.c_str(), "rbe"));
        if (!file_ || ::fstat(::fileno(file_.get()), &info) != 0) {
            throw GgufError("cannot open " + path + ": " + std::strerror(errno));
        }
        size_ = static_cast<uint64_t>(info.st_size);
    }

    uint64_t size() const { return size_; }

    /// The number of bytes read, fewer than `size` only at the end of the file.
    size_t read(void * out, uint64_t offset, size_t size) {
        if (offset != position_ && ::fseeko(file_.get(), static_cast<off_t>(offset), SEEK_SET) != 0) {
            return 0;
        }
        const size_t n = std::fread(out, 1, size, file_.get());
        position_ = offset + n;
        return n;
    }

    /// Throws GgufError for what ggml's reader would refuse without a reason, or read without end.
    void check_head() {
        struct {
            char magic[4];
            uint32_t version;
            uint64_t n_tensors, n_keys;
        } head{};
        static_assert(sizeof(head) == 24);
        const size_t n = read(&head, 0, sizeof(head));
        if (n == 0) {
            throw GgufError(path_ + " is empty; download it again");
        }
        if (n < sizeof(head.magic) || std::memcmp(head.magic, GGUF_MAGIC, sizeof(head.magic)) != 0) {
            throw GgufError(path_ + " is not a GGUF file; name a .gguf file");
        }
        if (n < sizeof(head)) {
            broken(path_, "it ends in its header");
        }
        if (head.version < 2 || head.version > GGUF_VERSION) { // includes files of the other byte order
            throw GgufError(path_ + " is GGUF version " + std::to_string(head.version) + ", and versions 2 to " +
                            std::to_string(GGUF_VERSION) + " can be read; get the model in one of these");
        }
        if (head.n_tensors > std::min(size_ / smallest_tensor_info, max_tensors) ||
            head.n_keys > size_ / smallest_key_value) {
            broken(path_, "its header claims more than the file can contain");
        }
    }

    /// ggml's view of the file's header, and through `shapes` of its tensors.
    Context parse(Shapes & shapes) {
        const auto callback = [](void * reader, void * out, uint64_t offset, size_t n) {
            return static_cast<Reader *>(reader)->read(out, offset, n);
        };
        ggml_context * context = nullptr;
        Context g(gguf_init_from_callback(callback, this, 0, std::min(size_, max_header), {true, &context}), gguf_free);
        shapes.reset(context);
        if (!g) {
            broken(path_, "its header cannot be read");
        }
        return g;
    }

  private:
    std::string path_;
    std::unique_ptr<FILE, int (*)(FILE *)> file_;
    uint64_t size_ = 0, position_ = 0; // bytes
};

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
            out[key] = gguf_get_val_u64(g, i);
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
        default: // arrays: vocabularies of megabytes, which nobody needs here
            break;
        }
    }
    return out;
}

/// The value of an integer key if it has the type that llama.cpp's gguf-split writes, else `missing`.
int64_t split_value(const gguf_context * g, const char * name, gguf_type type, int64_t missing) {
    const int64_t key = gguf_find_key(g, name);
    if (key < 0 || gguf_get_kv_type(g, key) != type) {
        return missing;
    }
    return type == GGUF_TYPE_UINT16 ? gguf_get_val_u16(g, key) : gguf_get_val_i32(g, key);
}

/// Throws GgufError unless the file is part number `part` of `n_files`.
void check_part(const gguf_context * g, const std::string & path, size_t part, size_t n_files) {
    const int64_t count = std::max<int64_t>(split_value(g, "split.count", GGUF_TYPE_UINT16, 1), 1);
    if (count != static_cast<int64_t>(n_files)) {
        throw GgufError(path + " belongs to a model of " + std::to_string(count) + " file(s), not " +
                        std::to_string(n_files) + "; keep the parts together under the names they came with");
    }
    const int64_t number = split_value(g, "split.no", GGUF_TYPE_UINT16, 0);
    if (number != static_cast<int64_t>(part)) {
        throw GgufError(path + " is part " + std::to_string(number + 1) + " of its model where part " +
                        std::to_string(part + 1) + " belongs; give the parts the names they came with");
    }
}

} // namespace

void Index::add_file(const std::string & path, size_t n_files) {
    Reader reader(path);
    reader.check_head();
    Shapes shapes(nullptr, ggml_free);
    const Context g = reader.parse(shapes);
    check_part(g.get(), path, files_.size(), n_files);

    const auto file = static_cast<uint32_t>(files_.size());
    const uint64_t data = gguf_get_data_offset(g.get());
    ggml_tensor * shape = ggml_get_first_tensor(shapes.get()); // in the same order
    for (int64_t i = 0; i < gguf_get_n_tensors(g.get()); i++, shape = ggml_get_next_tensor(shapes.get(), shape)) {
        TensorInfo info{shape->name, static_cast<uint32_t>(shape->type), {}, file, 0, ggml_nbytes(shape)};
        const uint64_t offset = gguf_get_tensor_offset(g.get(), i), space = reader.size() - data;
        if (offset > space || info.size > space - offset) {
            broken(path, "its tensor " + printable(info.name) + " lies beyond its end");
        }
        info.offset = data + offset;
        std::copy_n(shape->ne, info.ne.size(), info.ne.begin());
        if (!by_name_.try_emplace(info.name, tensors_.size()).second) {
            throw GgufError(path + " contains the tensor " + printable(info.name) + " twice; download the model again");
        }
        tensors_.push_back(std::move(info));
    }
    if (files_.empty()) {
        metadata_ = read_metadata(g.get());
        n_tensors_ = split_value(g.get(), "split.tensors.count", GGUF_TYPE_INT32, -1);
    }
    files_.push_back(path);
    file_infos_.push_back({data, reader.size()});
}

Index Index::open(const std::vector<std::string> & files) {
    if (files.empty()) {
        throw GgufError("no model file is named");
    }
    Index index;
    for (const std::string & path : files) {
        index.add_file(path, files.size());
    }
    if (index.n_tensors_ >= 0 && index.n_tensors_ != static_cast<int64_t>(index.tensors_.size())) {
        throw GgufError("the parts of " + files.front() + " hold " + std::to_string(index.tensors_.size()) +
                        " tensors, not the " + std::to_string(index.n_tensors_) +
                        " that it names; download the model again");
    }
    return index;
}

const TensorInfo * Index::find(std::string_view name) const {
    const auto it = by_name_.find(std::string(name));
    return it == by_name_.end() ? nullptr : &tensors_[it->second];
}

std::vector<std::string> split_parts(const std::string & path) {
    const auto ending = [](int number, int count) { // as llama.cpp's gguf-split names the parts
        char text[48];
        std::snprintf(text, sizeof(text), "-%05d-of-%05d.gguf", number, count);
        return std::string(text);
    };
    const std::string last = path.substr(path.size() - std::min(path.size(), ending(1, 1).size()));
    int number = 0, count = 0;
    if (std::sscanf(last.c_str(), "-%5d-of-%5d.gguf", &number, &count) != 2 || number < 1 || number > count ||
        last != ending(number, count)) {
        return {path};
    }
    std::vector<std::string> parts;
    for (int i = 1; i <= count; i++) {
        parts.push_back(path.substr(0, path.size() - last.size()) + ending(i, count));
        struct stat info{};
        if (::stat(parts.back().c_str(), &info) != 0) {
            throw GgufError("the model is split into " + std::to_string(count) +
                            " files and this one is missing: " + parts.back());
        }
    }
    return parts;
}

} // namespace meshllm::gguf

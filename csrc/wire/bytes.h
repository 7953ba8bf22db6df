// Readers and writers of little-endian bytes; every read is checked against the end of its range.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace meshllm {

/// The peer violated the protocol: its fault, not ours. The message is one line for a person.
class ProtocolError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

} // namespace meshllm

namespace meshllm::wire {

static_assert(std::endian::native == std::endian::little, "numbers and structures are copied as they lie in memory");

using Bytes = std::vector<uint8_t>;
using ByteView = std::span<const uint8_t>;

class Reader {
  public:
    explicit Reader(ByteView data) : data_(data) {}

    size_t remaining() const { return data_.size() - pos_; }

    ByteView bytes(size_t n) {
        if (n > remaining()) {
            throw ProtocolError("a payload ends before its last field");
        }
        ByteView out = data_.subspan(pos_, n);
        pos_ += n;
        return out;
    }

    ByteView rest() { return bytes(remaining()); }

    /// A fixed-size little-endian integer or float.
    template <class T>
    T get() {
        T value;
        std::memcpy(&value, bytes(sizeof(T)).data(), sizeof(T));
        return value;
    }

    /// LEB128, at most 10 bytes.
    uint64_t varint() {
        uint64_t value = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            const auto byte = get<uint8_t>();
            value |= uint64_t(byte & 0x7f) << shift;
            if (!(byte & 0x80)) {
                return value;
            }
        }
        throw ProtocolError("a varint is longer than 10 bytes");
    }

    int64_t zigzag() {
        const uint64_t v = varint();
        return static_cast<int64_t>((v >> 1) ^ (~(v & 1) + 1));
    }

    /// Length (varint) and bytes.
    std::string_view text() {
        const ByteView b = bytes(static_cast<size_t>(std::min<uint64_t>(varint(), SIZE_MAX)));
        return {reinterpret_cast<const char *>(b.data()), b.size()};
    }

    void expect_end() const {
        if (remaining() != 0) {
            throw ProtocolError("a payload is longer than its fields");
        }
    }

  private:
    ByteView data_;
    size_t pos_ = 0;
};

class Writer {
  public:
    explicit Writer(Bytes & out) : out_(out) {}

    void bytes(ByteView b) {
        const size_t at = out_.size();
        out_.resize(at + b.size());
        if (!b.empty()) {
            std::memcpy(out_.data() + at, b.data(), b.size());
        }
    }

    template <class T>
    void put(T value) {
        uint8_t raw[sizeof(T)];
        std::memcpy(raw, &value, sizeof(T));
        bytes(raw);
    }

    void varint(uint64_t value) {
        while (value >= 0x80) {
            out_.push_back(static_cast<uint8_t>(value) | 0x80);
            value >>= 7;
        }
        out_.push_back(static_cast<uint8_t>(value));
    }

    void zigzag(int64_t value) { varint((static_cast<uint64_t>(value) << 1) ^ static_cast<uint64_t>(value >> 63)); }

    void text(std::string_view s) {
        varint(s.size());
        bytes({reinterpret_cast<const uint8_t *>(s.data()), s.size()});
    }

  private:
    Bytes & out_;
};

} // namespace meshllm::wire

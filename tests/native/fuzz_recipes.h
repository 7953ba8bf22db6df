// Operators with sources that fit, for fuzz_graph.cpp: random shapes would hardly ever. Parameters are plausible, not
// always right: what the checks let pass is computed.
#pragma once

#include <ggml.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

namespace recipes {

/// Choices from the input; zeros when it is used up.
class Choices {
  public:
    Choices(const uint8_t * data, size_t size) : data_(data), size_(size) {}
    uint8_t next() { return size_ == 0 ? 0 : (size_--, *data_++); }
    bool one_in(int n) { return next() % n == 0; }
    template <class T, size_t N>
    T of(const std::array<T, N> & options) {
        return options[next() % N];
    }
    /// From 1 to `n`, mostly.
    int small(int n) { return one_in(32) ? static_cast<int8_t>(next()) : 1 + next() % n; }

  private:
    const uint8_t * data_;
    size_t size_;
};

constexpr std::array<int64_t, 8> sizes = {1, 2, 4, 32, 64, 3, 0, 256};
constexpr std::array<int64_t, 4> few = {1, 2, 3, 4};
constexpr std::array<uint32_t, 2> halves = {GGML_TYPE_F32, GGML_TYPE_F16};
constexpr std::array<uint32_t, 3> floats = {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16};
constexpr std::array<uint32_t, 5> weights = {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0,
                                             GGML_TYPE_Q4_K};

using Shape = std::array<int64_t, 4>;

struct Operand {
    Shape ne;
    uint32_t type = GGML_TYPE_F32;
};

struct Recipe {
    uint32_t op;
    std::vector<Operand> sources;
    Operand result;
    std::vector<int32_t> params{};
    bool to_itself = false; // ggml_cast names the destination of a copy so
};

inline int32_t bits(float value) {
    int32_t out;
    std::memcpy(&out, &value, sizeof(out));
    return out;
}

inline Recipe recurrent(Choices & c) {
    const int64_t n = c.of(few), h = c.of(few), tokens = c.of(few), seqs = c.of(few), size = c.of(sizes);
    const int64_t wide = 64 * (1 + c.next() % 2), all = tokens * seqs;
    const int32_t k = 1 + c.next() % 3;
    const Operand heads = {{wide, h, all, 1}}, states = {{wide * wide * h, seqs, 1, 1}};
    const Operand outputs = {{wide * h, all + wide * seqs, 1, 1}};
    switch (c.next() % 13) {
    case 0:
        return {GGML_OP_DIAG, {{{n, 1, h, seqs}}}, {{n, n, h, seqs}}};
    case 1:
        return {GGML_OP_TRI, {{{n, n, h, seqs}}}, {{n, n, h, seqs}}, {c.next() % 5}};
    case 2:
        return {GGML_OP_SOLVE_TRI, {{{n, n, h, seqs}}, {{tokens, n, h, seqs}}}, {{tokens, n, h, seqs}}};
    case 3:
        return {GGML_OP_SSM_CONV, {{{n - 1 + tokens, h, seqs, 1}}, {{n, h, 1, 1}}}, {{h, tokens, seqs, 1}}};
    case 4: {
        const int64_t decay = c.one_in(2) ? 1 : 16;
        const Operand bc = {{16, 1, tokens, seqs}}, x = {{n, h, tokens, seqs}}, s = {{16, n, h, seqs}};
        return {GGML_OP_SSM_SCAN,
                {s, x, {{h, tokens, seqs, 1}}, {{decay, h, 1, 1}}, bc, bc, {{seqs, 1, 1, 1}, GGML_TYPE_I32}},
                {{n * h * all + k * 16 * n * h * seqs, 1, 1, 1}},
                {k}};
    }
    case 5: {
        const Operand v = {{4 * n, h, tokens, seqs}}, g = {{1, h, tokens, seqs}};
        return {GGML_OP_GATED_DELTA_NET,
                {{{4 * n, 1, tokens, seqs}}, {{4 * n, h, tokens, 1}}, v, g, g, {{4 * n, 4 * n, h, seqs}}},
                {{4 * n * h, all + k * 4 * n * seqs, 1, 1}},
                {k}};
    }
    case 6:
        return {GGML_OP_RWKV_WKV6, {heads, heads, heads, {{wide, h, 1, 1}}, heads, states}, outputs};
    case 7:
        return {GGML_OP_RWKV_WKV7, {heads, heads, heads, heads, heads, heads, states}, outputs};
    case 8:
        return {GGML_OP_GATED_LINEAR_ATTN, {heads, heads, heads, heads, states}, outputs};
    case 9:
        return {GGML_OP_LIGHTNING_INDEXER,
                {{{32, h, tokens, seqs}},
                 {{32, 1, size, seqs}, c.of(weights)},
                 {{h, tokens, 1, seqs}},
                 {{size, tokens, 1, 1}, GGML_TYPE_F16}},
                {{size, tokens, 1, seqs}}};
    case 10:
        return {
            GGML_OP_DSV4_HC_COMB, {{{24, tokens, 1, 1}}, {{3, 1, 1, 1}}, {{24, 1, 1, 1}}}, {{4, 4, tokens, 1}}, {0, k}};
    case 11:
        return {GGML_OP_DSV4_HC_PRE, {{{size, h, tokens, 1}}, {{h, tokens, 1, 1}}}, {{size, tokens, 1, 1}}};
    default:
        return {GGML_OP_DSV4_HC_POST,
                {{{size, tokens, 1, 1}}, {{size, h, tokens, 1}}, {{h, tokens, 1, 1}}, {{h, h, tokens, 1}}},
                {{size, h, tokens, 1}}};
    }
}

inline Recipe attention(Choices & c) {
    const int64_t n = 32 * c.of(few), h = c.of(few), r = c.of(few), tokens = c.of(sizes), kv = c.of(sizes);
    const int64_t seqs = c.of(few);
    const uint32_t type = c.of(weights);
    const int64_t row = type == GGML_TYPE_Q4_K ? 256 : n;
    switch (c.next() % 11) {
    case 0:
        return {GGML_OP_MUL_MAT,
                {{{row, n, h, seqs}, type}, {{row, tokens, h * r, seqs}, c.one_in(4) ? type : GGML_TYPE_F32}},
                {{n, tokens, h * r, seqs}},
                {0, c.one_in(8) ? GGML_HINT_SRC0_IS_HADAMARD : 0}};
    case 1:
        return {GGML_OP_MUL_MAT_ID,
                {{{row, n, h, 1}, type}, {{row, r, tokens, 1}}, {{r, tokens, 1, 1}, GGML_TYPE_I32}},
                {{n, r, tokens, 1}}};
    case 2:
        return {GGML_OP_OUT_PROD, {{{row, kv, h, seqs}, type}, {{n, kv, h * r, seqs}}}, {{row, n, h * r, seqs}}};
    case 3:
        return {GGML_OP_SOFT_MAX,
                {{{kv, tokens, h * r, seqs}}, {{kv, tokens, h, 1}, c.of(halves)}, {{h * r, 1, 1, 1}}},
                {{kv, tokens, h * r, seqs}},
                {bits(0.5f), bits(c.one_in(2) ? 0.0f : 8.0f)}};
    case 4: {
        const int32_t dims = static_cast<int32_t>(c.one_in(2) ? n : n / 2), offset = c.one_in(4) ? c.next() : 0;
        const int32_t mode = c.of(std::array<int32_t, 6>{0, 2, 8, 24, 40, 1});
        Recipe out = {c.one_in(4) ? uint32_t(GGML_OP_ROPE_BACK) : uint32_t(GGML_OP_ROPE),
                      {{{n, h, tokens, 1}, c.of(halves)}, {{tokens * (mode >= 8 ? 4 : 1), 1, 1, 1}, GGML_TYPE_I32}},
                      {{n, h, tokens, 1}},
                      {0, dims, mode, 0, 512, bits(1e4f), bits(1.0f), 0, bits(1.0f), bits(32.0f), bits(1.0f),
                       c.next() % 9, c.next() % 9, c.next() % 9, c.next() % 9, offset}};
        out.result.type = out.sources[0].type;
        if (c.one_in(2)) {
            out.sources.push_back({{dims / 2, 1, 1, 1}});
        }
        return out;
    }
    case 5: {
        const uint32_t k = c.of(weights), v = c.one_in(2) ? k : c.of(weights);
        const int64_t dk = k == GGML_TYPE_Q4_K ? 256 : n, dv = v == GGML_TYPE_Q4_K ? 256 : n;
        return {GGML_OP_FLASH_ATTN_EXT,
                {{{dk, tokens, h * r, seqs}},
                 {{dk, c.one_in(8) ? 512 : kv, h, seqs}, k},
                 {{dv, kv, h, seqs}, v},
                 {{kv, tokens, 1, 1}, GGML_TYPE_F16},
                 {{h * r, 1, 1, 1}}},
                {{dv, h * r, tokens, seqs}},
                {bits(0.5f), 0, c.one_in(2) ? bits(30.0f) : 0, c.one_in(2) ? 0 : 10}};
    }
    case 6:
        return {GGML_OP_DIAG_MASK_INF, {{{kv, tokens, h, seqs}}}, {{kv, tokens, h, seqs}}, {c.next()}};
    case 7: {
        const int64_t w = c.small(8), x = c.small(16), y = c.small(16), nx = (x + w - 1) / std::max<int64_t>(w, 1),
                      ny = (y + w - 1) / std::max<int64_t>(w, 1);
        return {GGML_OP_WIN_PART,
                {{{n, x, y, 1}}},
                {{n, w, w, nx * ny}},
                {static_cast<int32_t>(nx), static_cast<int32_t>(ny), static_cast<int32_t>(w)}};
    }
    case 8: {
        const int64_t w = c.small(8), x = c.small(16), y = c.small(16), nx = (x + w - 1) / std::max<int64_t>(w, 1),
                      ny = (y + w - 1) / std::max<int64_t>(w, 1);
        return {GGML_OP_WIN_UNPART, {{{n, w, w, nx * ny}}}, {{n, x, y, 1}}, {static_cast<int32_t>(w)}};
    }
    case 9:
        return {GGML_OP_GET_REL_POS, {{{n, 2 * h - 1, 1, 1}, GGML_TYPE_F16}}, {{n, h, h, 1}, GGML_TYPE_F16}};
    default: {
        const int64_t w = c.of(few);
        return {GGML_OP_ADD_REL_POS,
                {{{w * w, h * r, seqs, 1}}, {{w, h, r, seqs}}, {{w, h, r, seqs}}},
                {{w * w, h * r, seqs, 1}},
                {c.next() % 2}};
    }
    }
}

inline Recipe rows(Choices & c) {
    const int64_t n = c.of(sizes), h = c.of(few), r = c.of(few), seqs = c.of(few);
    const Operand a = {{n, h, r, seqs}};
    const uint32_t type = c.of(floats);
    const auto alike = [&](uint32_t op, std::vector<int32_t> params = {}) {
        return Recipe{op, {{a.ne, type}}, {a.ne, type}, std::move(params)};
    };
    switch (c.next() % 15) {
    case 0:
        return alike(GGML_OP_UNARY, {c.next() % (GGML_UNARY_OP_COUNT + 1)});
    case 1:
        return alike(c.of(std::array<uint32_t, 5>{GGML_OP_SQR, GGML_OP_SQRT, GGML_OP_LOG, GGML_OP_SIN, GGML_OP_COS}));
    case 2:
        return alike(c.of(std::array<uint32_t, 3>{GGML_OP_SCALE, GGML_OP_CLAMP, GGML_OP_LEAKY_RELU}),
                     {bits(0.5f), bits(c.one_in(2) ? 0.0f : 1.0f)});
    case 3:
        return {GGML_OP_GLU, {{{2 * n, h, r, seqs}, type}}, {a.ne, type}, {c.next() % (GGML_GLU_OP_COUNT + 1)}};
    case 4:
        return {GGML_OP_GLU, {{a.ne, type}, {a.ne, type}}, {a.ne, type}, {c.next() % (GGML_GLU_OP_COUNT + 1)}};
    case 5:
        return {c.of(std::array<uint32_t, 4>{GGML_OP_NORM, GGML_OP_RMS_NORM, GGML_OP_L2_NORM, GGML_OP_CUMSUM}), {a}, a};
    case 6:
        return {GGML_OP_GROUP_NORM, {a}, a, {c.small(4), 0}};
    case 7:
        return {c.one_in(2) ? uint32_t(GGML_OP_SUM_ROWS) : uint32_t(GGML_OP_MEAN), {a}, {{1, h, r, seqs}}};
    case 8:
        return {GGML_OP_SUM, {a}, {{1, 1, 1, 1}}};
    case 9:
        return {GGML_OP_ARGMAX, {{{n, h, 1, 1}}}, {{h, 1, 1, 1}, GGML_TYPE_I32}};
    case 10:
        return {GGML_OP_COUNT_EQUAL,
                {{{n, h, 1, 1}, GGML_TYPE_I32}, {{n, h, 1, 1}, GGML_TYPE_I32}},
                {{1, 1, 1, 1}, GGML_TYPE_I64}};
    case 11:
        return {GGML_OP_ARGSORT, {a}, {a.ne, GGML_TYPE_I32}, {c.next() % 3}};
    case 12:
        return {GGML_OP_TOP_K, {a}, {{std::min(n, h), h, r, seqs}, GGML_TYPE_I32}};
    case 13: {
        const uint32_t op = c.of(std::array<uint32_t, 4>{GGML_OP_ADD, GGML_OP_SUB, GGML_OP_MUL, GGML_OP_DIV});
        return {op, {{a.ne, type}, {{n, 1, r, 1}, c.one_in(2) ? type : uint32_t(GGML_TYPE_F32)}}, {a.ne, type}};
    }
    default:
        return {c.one_in(2) ? uint32_t(GGML_OP_ADD1) : uint32_t(GGML_OP_ADD_ID),
                {{{n, h, r, 1}}, {{c.one_in(2) ? 1 : n, seqs, 1, 1}}, {{h, r, 1, 1}, GGML_TYPE_I32}},
                {{n, h, r, 1}}};
    }
}

inline Recipe memory(Choices & c) {
    const int64_t n = c.of(sizes), h = c.of(few), r = c.of(few), seqs = c.of(few);
    const uint32_t type = c.of(weights), other = c.of(std::array<uint32_t, 5>{0, 1, 2, GGML_TYPE_I32, GGML_TYPE_Q4_0});
    const int64_t row = type == GGML_TYPE_Q4_K ? 256 : type == GGML_TYPE_Q8_0 ? 32 * h : n;
    const Operand a = {{n, h, r, seqs}};
    switch (c.next() % 13) {
    case 0: // a copy may have another shape
        return {c.of(std::array<uint32_t, 3>{GGML_OP_CPY, GGML_OP_CONT, GGML_OP_DUP}),
                {{{row * r, h, 1, seqs}, type}},
                {{row, c.one_in(2) ? h * r : h, c.one_in(2) ? 1 : r, seqs}, c.one_in(2) ? type : other},
                {},
                true};
    case 1:
        return {GGML_OP_REPEAT, {{a.ne, other}}, {{n * 2, h, r * 3, seqs * 2}, other}};
    case 2: {
        Recipe out = {
            GGML_OP_CONCAT, {{{row, h, r, seqs}, type}, {{row, h, r, seqs}, type}}, {{row, h, r, seqs}, type}};
        const int dim = c.next() % 4;
        out.result.ne[dim] *= 2;
        out.params = {dim};
        return out;
    }
    case 3:
        return {GGML_OP_GET_ROWS, {{{row, h, r, seqs}, type}, {{n, r, seqs, 1}, GGML_TYPE_I32}}, {{row, n, r, seqs}}};
    case 4:
        return {GGML_OP_SET_ROWS,
                {{{row, n, r, seqs}, c.of(halves)},
                 {{n, 1, 1, 1}, c.one_in(2) ? uint32_t(GGML_TYPE_I32) : uint32_t(GGML_TYPE_I64)}},
                {{row, h, r, seqs}, type}};
    case 5:
    case 6:
        return {c.one_in(2) ? uint32_t(GGML_OP_SET) : uint32_t(GGML_OP_ACC),
                {{{32, h, r, 1}}, {{h, 1, 1, 1}}},
                {{32, h, r, 1}},
                {128, 128 * static_cast<int32_t>(h), c.one_in(8) ? c.next() : static_cast<int32_t>(128 * h * r),
                 4 * (c.next() % 48), c.next() % 2}};
    case 7: {
        Recipe out = {GGML_OP_PAD, {a}, a};
        for (int64_t & ne : out.result.ne) {
            const int before = c.one_in(2) ? 0 : c.next() % 5, after = c.one_in(2) ? 0 : c.next() % 5;
            out.params.insert(out.params.end(), {before, after});
            ne += before + after;
        }
        out.params.push_back(c.next() % 2);
        return out;
    }
    case 8: {
        const int before = c.next() % 8, after = c.next() % 8;
        return {GGML_OP_PAD_REFLECT_1D, {a}, {{n + before + after, h, r, seqs}}, {before, after}};
    }
    case 9:
        return {GGML_OP_ROLL,
                {a},
                a,
                {static_cast<int8_t>(c.next()), c.next() % 4 - 2, c.next() % 4 - 2, c.next() % 4 - 2}};
    case 10:
        return {GGML_OP_FILL, {{a.ne, c.of(halves)}}, a};
    case 11:
        return {GGML_OP_ARANGE, {}, {{n, 1, 1, 1}}, {0, bits(static_cast<float>(n)), bits(1.0f)}};
    default:
        return {GGML_OP_TIMESTEP_EMBEDDING, {{{h, 1, 1, 1}}}, {{n, h, 1, 1}}, {static_cast<int32_t>(n), c.small(100)}};
    }
}

/// How a kernel moves over an image in one dimension, and what it makes of its size.
struct Step {
    int64_t kernel;
    int32_t stride, padding, dilation;

    explicit Step(Choices & c)
        : kernel(1 + c.next() % 4), stride(c.small(3)), padding(c.one_in(2) ? 0 : c.next() % 5), dilation(c.small(3)) {}
    int64_t size(int64_t image) const {
        return stride == 0 ? 0 : (image + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
    }
};

inline Recipe convolution(Choices & c) {
    const int64_t w = 1 + c.next() % 12, h = 1 + c.next() % 12, d = 1 + c.next() % 4, in = c.of(few), out = c.of(few),
                  batch = c.of(few);
    const Step x(c), y(c), z(c);
    const uint32_t type = c.of(halves), dst = c.of(halves);
    const int64_t patch = x.kernel * y.kernel * in;
    const std::vector<int32_t> plane = {x.stride, y.stride, x.padding, y.padding, x.dilation, y.dilation, 1};
    std::vector<int32_t> space = {x.stride,  y.stride,   z.stride,   x.padding,  y.padding,
                                  z.padding, x.dilation, y.dilation, z.dilation, static_cast<int32_t>(in)};
    switch (c.next() % 12) {
    case 0:
        return {GGML_OP_IM2COL,
                {{{x.kernel, y.kernel, in, out}, type}, {{w, h, in, batch}}},
                {{patch, x.size(w), y.size(h), batch}, dst},
                plane};
    case 1:
        return {GGML_OP_IM2COL,
                {{{x.kernel, in, out, 1}, type}, {{w, in, batch, 1}}},
                {{x.kernel * in, x.size(w), batch, 1}, dst},
                {x.stride, 0, x.padding, 0, x.dilation, 0, 0}};
    case 2:
        return {GGML_OP_IM2COL_3D,
                {{{x.kernel, y.kernel, z.kernel, in * out}, type}, {{w, h, d, in * batch}}},
                {{patch * z.kernel, x.size(w), y.size(h), z.size(d) * batch}, dst},
                space};
    case 3:
        return {GGML_OP_COL2IM_1D,
                {{{x.kernel * out, w, 1, 1}, type}},
                {{(w - 1) * x.stride + x.kernel - 2 * x.padding, out, 1, 1}, type},
                {x.stride, static_cast<int32_t>(out), x.padding}};
    case 4:
        return {GGML_OP_CONV_2D,
                {{{x.kernel, y.kernel, in, out}, type}, {{w, h, in, batch}}},
                {{x.size(w), y.size(h), out, batch}},
                {x.stride, y.stride, x.padding, y.padding, x.dilation, y.dilation}};
    case 5:
        return {GGML_OP_CONV_2D_DW,
                {{{x.kernel, y.kernel, 1, in}, type}, {{w, h, in, batch}}},
                {{x.size(w), y.size(h), in, batch}},
                {x.stride, y.stride, x.padding, y.padding, x.dilation, y.dilation}};
    case 6:
        space.insert(space.end(), {static_cast<int32_t>(batch), static_cast<int32_t>(out)});
        return {GGML_OP_CONV_3D,
                {{{x.kernel, y.kernel, z.kernel, in * out}, type}, {{w, h, d, in * batch}}},
                {{x.size(w), y.size(h), z.size(d), out * batch}},
                space};
    case 7:
        return {GGML_OP_CONV_TRANSPOSE_1D,
                {{{x.kernel, out, in, 1}, type}, {{w, in, 1, 1}}},
                {{(w - 1) * x.stride + x.kernel, out, 1, 1}},
                {x.stride, 0, 1}};
    case 8:
        return {GGML_OP_CONV_TRANSPOSE_2D,
                {{{x.kernel, y.kernel, out, in}, type}, {{w, h, in, batch}}},
                {{(w - 1) * x.stride + x.kernel, (h - 1) * x.stride + y.kernel, out, batch}},
                {x.stride}};
    case 9: {
        const int64_t size = x.stride == 0 ? 0 : (w + 2 * x.padding - x.kernel) / x.stride + 1;
        return {GGML_OP_POOL_1D,
                {{{w, h, in, batch}}},
                {{size, h, in, batch}},
                {c.next() % 3, static_cast<int32_t>(x.kernel), x.stride, x.padding}};
    }
    case 10: {
        const int64_t nw = x.stride == 0 ? 0 : (w + 2 * x.padding - x.kernel) / x.stride + 1;
        const int64_t nh = y.stride == 0 ? 0 : (h + 2 * y.padding - y.kernel) / y.stride + 1;
        return {GGML_OP_POOL_2D,
                {{{w, h, in, batch}}},
                {{nw, nh, in, batch}},
                {c.next() % 3, static_cast<int32_t>(x.kernel), static_cast<int32_t>(y.kernel), x.stride, y.stride,
                 x.padding, y.padding}};
    }
    default:
        return {GGML_OP_UPSCALE,
                {{{w, h, in, batch}}},
                {{1 + c.next() % 20, 1 + c.next() % 20, c.of(few), c.of(few)}},
                {c.next() % 4 + (c.next() % 4 << 8)}};
    }
}

inline Recipe any(Choices & c) {
    switch (c.next() % 6) {
    case 0:
        return recurrent(c);
    case 1:
        return attention(c);
    case 2:
        return rows(c);
    case 3:
        return memory(c);
    default:
        return convolution(c);
    }
}

} // namespace recipes

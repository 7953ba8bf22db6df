// What the rules of the op_check_*.cpp files share, and the rules.
#pragma once

#include "server/require.h"

#include <ggml.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>

namespace meshllm::server {

using Wide = unsigned __int128; // products of a client's sizes do not overflow it

inline Tensor source(Tensor node, int i) {
    require(node->src[i] != nullptr, "a source is missing");
    require(ggml_is_empty(node) || !ggml_is_empty(node->src[i]), "a source is empty");
    return node->src[i];
}

inline bool is(Tensor t, std::initializer_list<ggml_type> types) {
    return std::find(types.begin(), types.end(), t->type) != types.end();
}
inline void require_f32(std::initializer_list<Tensor> tensors) {
    for (Tensor t : tensors) {
        require(is(t, {GGML_TYPE_F32}), "the types do not match");
    }
}

inline bool shape(Tensor t, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1, int64_t ne3 = 1) {
    return t->ne[0] == ne0 && t->ne[1] == ne1 && t->ne[2] == ne2 && t->ne[3] == ne3;
}

inline bool dense_rows(Tensor t) {
    return t->nb[0] == ggml_type_size(t->type);
}
/// Without a gap, and with the strides that say so also in dimensions of one element: ggml_is_contiguous ignores those,
/// but kernels multiply them with the number of a row, assert their order, or copy that many bytes.
/// build_graph gives each contiguous tensor these strides.
inline bool dense(Tensor t) {
    return ggml_is_contiguous(t) && dense_rows(t) && t->nb[1] == ggml_row_size(t->type, t->ne[0]) &&
           t->nb[2] == t->nb[1] * static_cast<size_t>(t->ne[1]) && t->nb[3] == t->nb[2] * static_cast<size_t>(t->ne[2]);
}
/// Row i of all rows lies at i * nb[1]: many kernels find it so.
inline bool even_rows(Tensor t) {
    return dense_rows(t) && (t->ne[2] == 1 || t->nb[2] == t->nb[1] * static_cast<size_t>(t->ne[1])) &&
           (t->ne[3] == 1 || t->nb[3] == t->nb[1] * static_cast<size_t>(t->ne[1] * t->ne[2]));
}
inline float param_f32(Tensor t, int i) {
    float value;
    std::memcpy(&value, t->op_params + i, sizeof(value));
    return value;
}

inline bool divides(int64_t a, int64_t b) {
    return a > 0 ? b % a == 0 : b == 0;
}

/// Some kernels count elements and bytes in int.
inline void require_int(std::initializer_list<Tensor> tensors) {
    for (Tensor t : tensors) {
        require(ggml_nbytes(t) <= INT32_MAX, "the tensors are too large");
    }
}

/// What a kernel of a GPU starts for dimensions 1 and higher: more is an error, which ends the process.
constexpr int64_t max_grid = 65535;

namespace rules {

// op_check_elementwise.cpp: each value depends on the values at the same position only
void binary(Tensor t);
void add_id(Tensor t);
void add1(Tensor t);
void elementwise(Tensor t);
void unary(Tensor t);
void leaky_relu(Tensor t);
void scale(Tensor t);
void clamp(Tensor t);
void glu(Tensor t);

// op_check_rows.cpp: norms, sums, order
void norm(Tensor t);
void rms_norm(Tensor t);
void group_norm(Tensor t);
void reduce_rows(Tensor t);
void sum(Tensor t);
void cumsum(Tensor t);
void argmax(Tensor t);
void count_equal(Tensor t);
void argsort(Tensor t);
void top_k(Tensor t);

// op_check_memory.cpp: copies and constants
void copy(Tensor t);
void repeat(Tensor t);
void concat(Tensor t);
void get_rows(Tensor t);
void set_rows(Tensor t);
void set(Tensor t);
void acc(Tensor t);
void pad(Tensor t);
void pad_reflect_1d(Tensor t);
void roll(Tensor t);
void fill(Tensor t);
void arange(Tensor t);
void timestep_embedding(Tensor t);

// op_check_attention.cpp: matrices and attention
void mul_mat(Tensor t);
void mul_mat_id(Tensor t);
void out_prod(Tensor t);
void diag_mask(Tensor t);
void soft_max(Tensor t);
void rope(Tensor t);
void flash_attn(Tensor t);
void win_part(Tensor t);
void win_unpart(Tensor t);
void get_rel_pos(Tensor t);
void add_rel_pos(Tensor t);

// op_check_convolution.cpp: of images and sounds
void im2col(Tensor t);
void im2col_3d(Tensor t);
void col2im_1d(Tensor t);
void conv_2d(Tensor t);
void conv_2d_dw(Tensor t);
void conv_3d(Tensor t);
void conv_transpose_1d(Tensor t);
void conv_transpose_2d(Tensor t);
void pool_1d(Tensor t);
void pool_2d(Tensor t);
void upscale(Tensor t);

// op_check_recurrent.cpp: operators with state, those that only they need, and sparse attention
void diag(Tensor t);
void tri(Tensor t);
void solve_tri(Tensor t);
void ssm_conv(Tensor t);
void ssm_scan(Tensor t);
void gated_delta_net(Tensor t);
void rwkv_wkv6(Tensor t);
void rwkv_wkv7(Tensor t);
void gated_linear_attn(Tensor t);
void lightning_indexer(Tensor t);
void dsv4_hc_comb(Tensor t);
void dsv4_hc_pre(Tensor t);
void dsv4_hc_post(Tensor t);

} // namespace rules

} // namespace meshllm::server

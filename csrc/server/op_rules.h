// What the rules of op_check.cpp share, and the rules of its other files.
#pragma once

#include "server/require.h"

#include <ggml.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>

namespace meshllm::server {

inline Tensor source(Tensor node, int i) {
    require(node->src[i] != nullptr, "a source is missing");
    require(ggml_is_empty(node) || !ggml_is_empty(node->src[i]), "a source is empty");
    return node->src[i];
}

inline bool is(Tensor t, std::initializer_list<ggml_type> types) {
    return std::find(types.begin(), types.end(), t->type) != types.end();
}

inline bool dense_rows(Tensor t) {
    return t->nb[0] == ggml_type_size(t->type);
}
inline bool dense(Tensor t) {
    return ggml_is_contiguous(t) && dense_rows(t);
}
/// Also in dimensions of one element, whose strides ggml_is_contiguous ignores but some kernels assert.
inline bool plain(Tensor t) {
    return dense(t) && t->nb[0] <= t->nb[1] && t->nb[1] <= t->nb[2] && t->nb[2] <= t->nb[3];
}
inline float param_f32(Tensor t, int i) {
    float value;
    std::memcpy(&value, t->op_params + i, sizeof(value));
    return value;
}

inline bool divides(int64_t a, int64_t b) {
    return a > 0 ? b % a == 0 : b == 0;
}

/// Operators with state, and those that only they need: op_check_recurrent.cpp.
namespace rules {

void fill(Tensor t);
void set(Tensor t);
void arange(Tensor t);
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

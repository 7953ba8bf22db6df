// The operators of models with state (Mamba, RWKV, gated delta nets) and of sparse attention, after ggml 0.25.3:
// constructors in ggml.c, kernels in ggml-cpu/ops.cpp.
#include "server/op_rules.h"

namespace meshllm::server::rules {

namespace {

/// The first two dimensions lie in memory without a gap.
bool dense_matrices(Tensor t) {
    return dense_rows(t) && t->nb[1] == static_cast<size_t>(t->ne[0]) * t->nb[0];
}

} // namespace

void diag(Tensor t) {
    Tensor a = source(t, 0);
    require_f32({a, t});
    require(a->ne[1] == 1 && shape(t, a->ne[0], a->ne[0], a->ne[2], a->ne[3]), "the shapes do not match");
    require(dense_rows(a) && dense(t), "the tensors are not contiguous");
}

void tri(Tensor t) {
    Tensor a = source(t, 0);
    require_f32({a, t});
    require(ggml_are_same_shape(a, t) && a->ne[0] == a->ne[1], "the shapes do not match");
    require(dense(a) && dense(t), "the tensors are not contiguous");
    require(t->op_params[0] >= GGML_TRI_TYPE_UPPER_DIAG && t->op_params[0] <= GGML_TRI_TYPE_LOWER,
            "the kind of triangle does not exist");
}

void solve_tri(Tensor t) {
    Tensor a = source(t, 0), b = source(t, 1);
    require_f32({a, b, t});
    require(a->ne[0] == a->ne[1] && a->ne[1] == b->ne[1] && a->ne[2] == b->ne[2] && a->ne[3] == b->ne[3] &&
                ggml_are_same_shape(b, t),
            "the shapes do not match");
    require(dense(a) && dense(b) && dense(t), "the tensors are not contiguous");
}

void ssm_conv(Tensor t) {
    Tensor x = source(t, 0), c = source(t, 1);
    require_f32({x, c, t});
    require(x->ne[3] == 1 && c->ne[1] == x->ne[1] && c->ne[2] == 1 && c->ne[3] == 1 && x->ne[0] >= c->ne[0] - 1 &&
                shape(t, x->ne[1], x->ne[0] - c->ne[0] + 1, x->ne[2]),
            "the shapes do not match");
    require(dense_matrices(x) && dense(c) && dense_rows(t), "the tensors are not contiguous");
}

void ssm_scan(Tensor t) {
    Tensor s = source(t, 0), x = source(t, 1), dt = source(t, 2), a = source(t, 3), b = source(t, 4), c = source(t, 5),
           ids = source(t, 6);
    require_f32({s, x, dt, a, b, c, t});
    require(is(ids, {GGML_TYPE_I32}), "the types do not match");
    const int64_t d_state = s->ne[0], head_dim = x->ne[0], n_head = x->ne[1], n_tokens = x->ne[2], n_seqs = x->ne[3];
    require(s->ne[1] == head_dim && s->ne[2] == n_head && shape(dt, n_head, n_tokens, n_seqs) &&
                shape(a, a->ne[0], n_head) && (a->ne[0] == 1 || a->ne[0] == d_state) &&
                shape(b, d_state, b->ne[1], n_tokens, n_seqs) && ggml_are_same_shape(b, c) &&
                divides(b->ne[1], n_head) && shape(ids, n_seqs, 1),
            "the shapes do not match");
    require(dense(s) && dense_matrices(x) && dense(dt) && dense(a) && dense_matrices(b) && dense_matrices(c) &&
                dense(ids) && dense(t),
            "the tensors are not contiguous");
    const int64_t snapshots = t->op_params[0];
    require(snapshots >= 1 && (a->ne[0] == 1 || (snapshots == 1 && d_state % 16 == 0)), // 16: a vector of SVE
            "the parameters are invalid");
    const Wide states = Wide(snapshots) * Wide(d_state * head_dim) * Wide(n_head * n_seqs);
    require(Wide(ggml_nelements(t)) == Wide(ggml_nelements(x)) + states, "the sizes do not match");
}

void gated_delta_net(Tensor t) {
    Tensor q = source(t, 0), k = source(t, 1), v = source(t, 2), g = source(t, 3), beta = source(t, 4),
           state = source(t, 5);
    require_f32({q, k, v, g, beta, state, t});
    const int64_t size = v->ne[0], n_heads = v->ne[1], n_tokens = v->ne[2], n_seqs = v->ne[3];
    require(size <= 4096, "the heads are too large"); // each thread has scratch memory for a state
    for (Tensor heads : {q, k}) {
        require(heads->ne[0] == size && divides(heads->ne[1], n_heads) && heads->ne[2] == n_tokens &&
                    divides(heads->ne[3], n_seqs),
                "the shapes do not match");
    }
    require((g->ne[0] == 1 || g->ne[0] == size) && shape(g, g->ne[0], n_heads, n_tokens, n_seqs) &&
                shape(beta, 1, n_heads, n_tokens, n_seqs) && shape(state, size, size, n_heads, n_seqs),
            "the shapes do not match");
    require(ggml_is_contiguous_rows(q) && ggml_is_contiguous_rows(k) && ggml_is_contiguous_rows(v) && dense_rows(q) &&
                dense_rows(k) && dense_rows(v) && dense(g) && dense(beta) && dense(state) && dense(t),
            "the tensors are not contiguous");
    const int64_t snapshots = t->op_params[0];
    require(snapshots >= 1, "the parameters are invalid");
    const Wide rows = Wide(n_tokens * n_seqs) + Wide(snapshots) * Wide(size) * Wide(n_seqs);
    require(t->ne[0] == size * n_heads && Wide(t->ne[1]) == rows && t->ne[2] == 1 && t->ne[3] == 1,
            "the sizes do not match");
}

namespace {

/// Sources `first` to `last` are [size, heads, tokens]; source `at` is the state. The result holds outputs, then
/// states.
void linear_attention(Tensor t, int first, int last, int at) {
    Tensor k = source(t, first), state = source(t, at);
    const int64_t size = k->ne[0], n_heads = k->ne[1], n_tokens = k->ne[2], n_seqs = state->ne[1];
    for (int i = first; i <= last; i++) {
        Tensor a = source(t, i);
        require_f32({a});
        require(shape(a, size, n_heads, n_tokens) && dense(a), "the shapes do not match");
    }
    require_f32({state, t});
    require(Wide(ggml_nelements(state)) == Wide(size * size) * Wide(n_heads * n_seqs) && dense(state),
            "the shapes do not match");
    require(n_tokens >= n_seqs && divides(n_seqs, n_tokens), "sequences have no token, or not as many as others");
    require(shape(t, size * n_heads, n_tokens + size * n_seqs) && dense(t), "the sizes do not match");
}

} // namespace

void rwkv_wkv6(Tensor t) {
    Tensor k = source(t, 0), first = source(t, 3), decay = source(t, 4);
    linear_attention(t, 0, 2, 5);
    require_f32({first, decay});
    require(ggml_nelements(first) == k->ne[0] * k->ne[1] && dense(first) && ggml_are_same_shape(decay, k) &&
                dense(decay),
            "the shapes do not match");
}

void rwkv_wkv7(Tensor t) {
    linear_attention(t, 0, 5, 6);
    require(source(t, 0)->ne[0] % 64 == 0,
            "heads are not whole vectors"); // the kernel has no loop for what is left over
}

void gated_linear_attn(Tensor t) {
    linear_attention(t, 0, 3, 4);
}

void lightning_indexer(Tensor t) {
    Tensor q = source(t, 0), k = source(t, 1), weights = source(t, 2), mask = source(t, 3);
    require_f32({q, weights, t});
    require(is(mask, {GGML_TYPE_F16}) && (is(k, {GGML_TYPE_F32}) || ggml_get_type_traits(k->type)->to_float != nullptr),
            "the types do not match");
    const int64_t n_heads = q->ne[1], n_tokens = q->ne[2], n_streams = q->ne[3], n_kv = k->ne[2];
    require(shape(k, q->ne[0], 1, n_kv, n_streams) && shape(weights, n_heads, n_tokens, 1, n_streams) &&
                shape(mask, n_kv, n_tokens, 1, mask->ne[3]) && divides(mask->ne[3], n_streams) &&
                shape(t, n_kv, n_tokens, 1, n_streams),
            "the shapes do not match");
    require(dense_rows(q) && dense_rows(k) && dense_rows(weights) && dense_rows(mask) && dense_rows(t),
            "rows are not contiguous");
}

void dsv4_hc_comb(Tensor t) {
    Tensor mixes = source(t, 0), scale = source(t, 1), base = source(t, 2);
    constexpr int64_t streams = 4, n_mixes = (2 + streams) * streams;
    require_f32({mixes, scale, base, t});
    require(shape(mixes, n_mixes, mixes->ne[1]) && scale->ne[0] >= 3 && shape(scale, scale->ne[0], 1) &&
                shape(base, n_mixes, 1) && shape(t, streams, streams, mixes->ne[1]),
            "the shapes do not match");
    require(t->op_params[1] > 0 && t->op_params[1] <= 1000, "the number of iterations is invalid");
}

void dsv4_hc_pre(Tensor t) {
    Tensor x = source(t, 0), weights = source(t, 1);
    require_f32({x, weights, t});
    const int64_t n_embd = x->ne[0], streams = x->ne[1], n_tokens = x->ne[2];
    const bool gated = t->op_params[1] != 0;
    require(x->ne[3] == 1 && shape(t, n_embd, n_tokens) &&
                (gated ? shape(weights, n_embd, streams, n_tokens) : shape(weights, streams, n_tokens)),
            "the shapes do not match");
}

void dsv4_hc_post(Tensor t) {
    Tensor x = source(t, 0), residual = source(t, 1), post = source(t, 2);
    require_f32({x, residual, post, t});
    const int64_t n_embd = x->ne[0], n_tokens = x->ne[1], streams = residual->ne[1];
    require(shape(x, n_embd, n_tokens) && shape(residual, n_embd, streams, n_tokens) &&
                shape(post, streams, n_tokens) && shape(t, n_embd, streams, n_tokens),
            "the shapes do not match");
    if (t->src[3] != nullptr) {
        Tensor comb = source(t, 3);
        require_f32({comb});
        require(shape(comb, streams, streams, n_tokens), "the shapes do not match");
    }
}

} // namespace meshllm::server::rules

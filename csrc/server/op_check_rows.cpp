// Norms, sums, and the order of values.
#include "server/op_rules.h"

namespace meshllm::server::rules {

/// The kernels follow any strides.
void norm(Tensor t) {
    Tensor a = source(t, 0);
    require_f32({a, t});
    require(ggml_are_same_shape(a, t), "the shapes do not match");
    require(param_f32(t, 0) >= 0.0f, "epsilon is negative");
}

void rms_norm(Tensor t) {
    norm(t);
    require(dense_rows(t->src[0]) && dense_rows(t), "rows are not contiguous");
}

void group_norm(Tensor t) {
    Tensor a = source(t, 0);
    require(ggml_are_same_shape(a, t) && is(a, {GGML_TYPE_F32}) && is(t, {GGML_TYPE_F32}),
            "the shapes or types do not match");
    require(dense(a) && dense(t), "the tensors are not contiguous");
    require(t->op_params[0] > 0 && t->op_params[0] <= std::max<int64_t>(a->ne[2], 1) && param_f32(t, 1) >= 0.0f,
            "the parameters are invalid");
}

/// Each row becomes one value.
void reduce_rows(Tensor t) {
    Tensor a = source(t, 0);
    require(t->ne[0] == 1 && a->ne[1] == t->ne[1] && a->ne[2] == t->ne[2] && a->ne[3] == t->ne[3],
            "the shapes do not match");
    require(is(a, {GGML_TYPE_F32}) && is(t, {GGML_TYPE_F32}) && dense_rows(a) && dense_rows(t),
            "the types do not match");
}

void sum(Tensor t) {
    Tensor a = source(t, 0);
    require_f32({a, t});
    require(ggml_nelements(t) == 1, "the shapes do not match");
    require(dense_rows(a) && ggml_is_contiguously_allocated(a) && dense_rows(t), "the tensors are not contiguous");
}

void cumsum(Tensor t) {
    Tensor a = source(t, 0);
    require(ggml_are_same_shape(a, t) && is(a, {GGML_TYPE_F32}) && is(t, {GGML_TYPE_F32}) && dense_rows(a) &&
                dense_rows(t),
            "the shapes or types do not match");
}

void argmax(Tensor t) {
    Tensor a = source(t, 0);
    require(is(a, {GGML_TYPE_F32}) && is(t, {GGML_TYPE_I32}) && dense(a) && dense(t), "the types do not match");
    require(t->ne[0] == a->ne[1] && ggml_nelements(t) == t->ne[0] && a->ne[2] == 1 && a->ne[3] == 1 && a->ne[0] > 0,
            "the shapes do not match");
}

void count_equal(Tensor t) {
    Tensor a = source(t, 0), b = source(t, 1);
    require(is(a, {GGML_TYPE_I32}) && is(b, {GGML_TYPE_I32}) && is(t, {GGML_TYPE_I64}), "the types do not match");
    // the CPU's kernel miscalculates the place of rows in more dimensions
    require(ggml_are_same_shape(a, b) && a->ne[2] == 1 && a->ne[3] == 1 && ggml_nelements(t) == 1,
            "the shapes do not match");
    require(dense(a) && dense(b), "the tensors are not contiguous");
    require_int({a});
}

void argsort(Tensor t) {
    Tensor a = source(t, 0);
    require(ggml_are_same_shape(a, t) && is(a, {GGML_TYPE_F32}) && is(t, {GGML_TYPE_I32}) && dense(a) && dense(t),
            "the shapes or types do not match");
    require(t->op_params[0] == GGML_SORT_ORDER_ASC || t->op_params[0] == GGML_SORT_ORDER_DESC,
            "the order does not exist");
}

void top_k(Tensor t) {
    Tensor a = source(t, 0);
    require(is(a, {GGML_TYPE_F32}) && is(t, {GGML_TYPE_I32}) && dense(a) && dense(t), "the types do not match");
    require(t->ne[0] > 0 && t->ne[0] <= a->ne[0] && t->ne[1] == a->ne[1] && t->ne[2] == a->ne[2] &&
                t->ne[3] == a->ne[3],
            "the shapes do not match");
}

} // namespace meshllm::server::rules

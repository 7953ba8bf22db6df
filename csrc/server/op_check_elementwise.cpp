// Operators whose every value depends on the values at the same position only.
#include "server/op_rules.h"

namespace meshllm::server::rules {

void binary(Tensor t) {
    Tensor a = source(t, 0), b = source(t, 1);
    require(ggml_are_same_shape(a, t) && ggml_can_repeat(b, a), "the shapes do not match");
    require(dense_rows(t) && dense_rows(a), "rows are not contiguous");
    const bool same = a->type == b->type && b->type == t->type && is(t, {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16});
    const bool mixed = is(a, {GGML_TYPE_F16, GGML_TYPE_BF16}) && b->type == GGML_TYPE_F32 &&
                       (t->type == a->type || t->type == GGML_TYPE_F32);
    require(same || mixed, "the types do not match");
}

void add_id(Tensor t) {
    Tensor a = source(t, 0), b = source(t, 1), ids = source(t, 2);
    require(is(t, {GGML_TYPE_F32}) && is(a, {GGML_TYPE_F32}) && is(b, {GGML_TYPE_F32}) && is(ids, {GGML_TYPE_I32}),
            "the types do not match");
    require(ggml_are_same_shape(a, t) && a->ne[0] == b->ne[0] && a->ne[1] == ids->ne[0] && a->ne[2] == ids->ne[1] &&
                a->ne[3] == 1,
            "the shapes do not match");
    require(dense_rows(t) && dense_rows(a) && dense_rows(b) && dense_rows(ids), "rows are not contiguous");
}

void add1(Tensor t) {
    Tensor a = source(t, 0), b = source(t, 1);
    require_f32({a, b, t});
    require(ggml_are_same_shape(a, t) && ggml_nelements(b) == 1, "the shapes do not match");
    require(dense_rows(a) && dense_rows(b) && dense_rows(t), "rows are not contiguous");
}

void elementwise(Tensor t) {
    Tensor a = source(t, 0);
    require(ggml_are_same_shape(a, t), "the shapes do not match");
    require(a->type == t->type && is(t, {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16}), "the types do not match");
    require(dense_rows(a) && dense_rows(t), "rows are not contiguous");
}

void unary(Tensor t) {
    elementwise(t);
    switch (t->op_params[0]) {
    case GGML_UNARY_OP_ABS:
    case GGML_UNARY_OP_SGN:
    case GGML_UNARY_OP_NEG:
    case GGML_UNARY_OP_STEP:
    case GGML_UNARY_OP_TANH:
    case GGML_UNARY_OP_ELU:
    case GGML_UNARY_OP_RELU:
    case GGML_UNARY_OP_SIGMOID:
    case GGML_UNARY_OP_GELU:
    case GGML_UNARY_OP_GELU_QUICK:
    case GGML_UNARY_OP_SILU:
    case GGML_UNARY_OP_HARDSWISH:
    case GGML_UNARY_OP_HARDSIGMOID:
    case GGML_UNARY_OP_EXP:
    case GGML_UNARY_OP_EXPM1:
    case GGML_UNARY_OP_SOFTPLUS:
    case GGML_UNARY_OP_GELU_ERF:
    case GGML_UNARY_OP_FLOOR:
    case GGML_UNARY_OP_CEIL:
    case GGML_UNARY_OP_ROUND:
    case GGML_UNARY_OP_TRUNC:
        return;
    case GGML_UNARY_OP_XIELU:
        return require(ggml_is_contiguous_1(t) && ggml_is_contiguous_1(t->src[0]), "the tensors are not contiguous");
    default:
        throw UnmetRequirement{"the function is unknown"};
    }
}

void leaky_relu(Tensor t) {
    elementwise(t);
    require(dense(t) && dense(t->src[0]), "the tensors are not contiguous");
    require(is(t, {GGML_TYPE_F32, GGML_TYPE_F16}), "the types do not match");
}

void scale(Tensor t) {
    elementwise(t);
    require(dense(t) && dense(t->src[0]), "the tensors are not contiguous");
    require(is(t, {GGML_TYPE_F32, GGML_TYPE_BF16}), "the types do not match");
}

void clamp(Tensor t) {
    leaky_relu(t);
}

namespace {

bool glu_computes(int function, ggml_type type) {
    switch (function) {
    case GGML_GLU_OP_REGLU:
    case GGML_GLU_OP_GEGLU:
    case GGML_GLU_OP_SWIGLU:
    case GGML_GLU_OP_GEGLU_ERF:
    case GGML_GLU_OP_GEGLU_QUICK:
        return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
    case GGML_GLU_OP_SWIGLU_OAI:
        return type == GGML_TYPE_F32;
    case GGML_GLU_OP_SWIGLU_CLAMP:
        return type == GGML_TYPE_F32 || type == GGML_TYPE_F16;
    default:
        throw UnmetRequirement{"the function is unknown"};
    }
}

} // namespace

void glu(Tensor t) {
    Tensor a = source(t, 0), b = t->src[1];
    require(glu_computes(t->op_params[0], t->type) && a->type == t->type, "the types do not match");
    require(a->ne[1] == t->ne[1] && a->ne[2] == t->ne[2] && a->ne[3] == t->ne[3], "the shapes do not match");
    require(ggml_is_contiguous_1(a) && even_rows(a) && dense(t), "the tensors are not contiguous");
    if (b == nullptr) {
        return require(t->ne[0] == a->ne[0] / 2, "the shapes do not match");
    }
    require(source(t, 1)->type == t->type && ggml_are_same_shape(a, b) && t->ne[0] == a->ne[0] &&
                ggml_is_contiguous_1(b) && even_rows(b),
            "the shapes do not match");
}

} // namespace meshllm::server::rules

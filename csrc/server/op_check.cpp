#include "server/op_check.h"

#include "server/op_rules.h"

#include <ggml-backend.h>
#include <ggml-cpu.h>

#include <algorithm>
#include <cmath>
#include <unordered_map>

namespace meshllm::server {

namespace {

/// `mask` broadcasts to [ne0, rows, heads, batches].
void require_mask(Tensor mask, int64_t ne0, int64_t rows, int64_t heads, int64_t batches) {
    require(dense(mask) && mask->ne[0] == ne0 && mask->ne[1] >= rows && divides(mask->ne[2], heads) &&
                divides(mask->ne[3], batches),
            "the mask does not match");
}

/// Kernels copy rows with memcpy: source and destination must be disjoint or identical.
void require_apart(Tensor t, Tensor a) {
    if (t->data == nullptr || a->data == nullptr || ggml_is_empty(t)) {
        return;
    }
    const auto *t0 = static_cast<const uint8_t *>(t->data), *a0 = static_cast<const uint8_t *>(a->data);
    const bool apart = t0 + ggml_nbytes(t) <= a0 || a0 + ggml_nbytes(a) <= t0;
    require(apart || (t0 == a0 && t->type == a->type && ggml_are_same_shape(t, a) && ggml_are_same_stride(t, a)),
            "source and destination overlap");
}

// --- rules ---

void no_work(Tensor) {}

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

/// Each value depends on the source's value at the same position only.
void elementwise(Tensor t) {
    Tensor a = source(t, 0);
    require(ggml_are_same_shape(a, t), "the shapes do not match");
    require(a->type == t->type && is(t, {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16}), "the types do not match");
    require(ggml_is_contiguous_1(a) && ggml_is_contiguous_1(t) && dense_rows(a) && dense_rows(t),
            "the tensors are not contiguous");
}

void unary(Tensor t) {
    require(t->op_params[0] >= 0 && t->op_params[0] < GGML_UNARY_OP_COUNT, "the function does not exist");
    elementwise(t);
}

void scale(Tensor t) {
    elementwise(t);
    require(dense(t) && dense(t->src[0]), "the tensors are not contiguous");
    require(is(t, {GGML_TYPE_F32}), "the types do not match");
}

void norm(Tensor t) {
    Tensor a = source(t, 0);
    require(ggml_are_same_shape(a, t) && is(a, {GGML_TYPE_F32}) && is(t, {GGML_TYPE_F32}),
            "the shapes or types do not match");
    require(dense_rows(a) && dense_rows(t), "rows are not contiguous");
    require(param_f32(t, 0) >= 0.0f, "epsilon is negative");
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
    require(ggml_nelements(t) == 1 && is(a, {GGML_TYPE_F32}) && is(t, {GGML_TYPE_F32}) && dense_rows(a) &&
                dense_rows(t),
            "the shapes or types do not match");
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

void repeat(Tensor t) {
    Tensor a = source(t, 0);
    require(ggml_can_repeat(a, t) && a->type == t->type && is(t, {GGML_TYPE_F32, GGML_TYPE_F16}),
            "the shapes or types do not match");
    require(dense_rows(a) && dense_rows(t), "rows are not contiguous");
}

void concat(Tensor t) {
    Tensor a = source(t, 0), b = source(t, 1);
    const int dim = t->op_params[0];
    require(dim >= 0 && dim < GGML_MAX_DIMS && a->type == b->type && a->type == t->type &&
                is(t, {GGML_TYPE_F32, GGML_TYPE_I32, GGML_TYPE_F16, GGML_TYPE_BF16}),
            "the types do not match");
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        require(i == dim ? t->ne[i] == a->ne[i] + b->ne[i] : (t->ne[i] == a->ne[i] && t->ne[i] == b->ne[i]),
                "the shapes do not match");
    }
    require(dense_rows(t), "rows are not contiguous");
}

void copy(Tensor t) {
    Tensor a = source(t, 0);
    require(ggml_nelements(a) == ggml_nelements(t), "the sizes do not match");
    const auto floats = {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16};
    if (is(a, floats) && is(t, floats)) {
        return;
    }
    if (a->type == t->type && !ggml_is_quantized(t->type)) {
        require(dense(a) || dense(t), "the tensors are not contiguous");
        return;
    }
    if (a->type == t->type) {
        require((dense(a) && dense(t)) || ggml_are_same_shape(a, t), "the shapes do not match");
        return;
    }
    if (is(a, floats)) { // to a quantised type
        require(ggml_is_quantized(t->type) && ggml_get_type_traits_cpu(t->type)->from_float != nullptr,
                "the types do not match");
        require(ggml_is_contiguous(t) && dense_rows(t) && dense_rows(a) && divides(ggml_blck_size(t->type), a->ne[0]),
                "the tensors are not contiguous");
        return;
    }
    require(ggml_is_quantized(a->type) && is(t, {GGML_TYPE_F32}) && ggml_get_type_traits(a->type)->to_float != nullptr,
            "the types do not match");
    // ggml dequantises by the shape of src[1] if a copy has one
    require(ggml_is_contiguous(a) && dense(t) && ggml_nelements(t) < UINT32_MAX, "the tensors are not contiguous");
    require(t->src[1] == nullptr ||
                (ggml_are_same_shape(t->src[1], t) && dense(t->src[1]) && t->src[1]->type == t->type),
            "the target does not match");
    require(t->op == GGML_OP_CPY, "only CPY dequantises");
    require(t->src[1] != nullptr, "the target is missing");
}

bool has_dot(ggml_type type) {
    const ggml_type_traits_cpu * traits = ggml_get_type_traits_cpu(type);
    return traits->vec_dot != nullptr && ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float != nullptr;
}

void mul_mat(Tensor t) {
    Tensor a = source(t, 0), b = source(t, 1);
    require(a->ne[0] == b->ne[0] && t->ne[0] == a->ne[1] && t->ne[1] == b->ne[1] && t->ne[2] == b->ne[2] &&
                t->ne[3] == b->ne[3] && divides(a->ne[2], b->ne[2]) && divides(a->ne[3], b->ne[3]),
            "the shapes do not match");
    require(is(t, {GGML_TYPE_F32}) && has_dot(a->type), "the types do not match");
    require(is(b, {GGML_TYPE_F32}) || (b->type == a->type && is(b, {GGML_TYPE_F16, GGML_TYPE_BF16})),
            "the types do not match");
    require(dense_rows(a) && dense_rows(b) && plain(t), "rows are not contiguous");
    if (t->op_params[1] != 0) { // a Hadamard rotation instead of a product
        require(t->op_params[1] == GGML_HINT_SRC0_IS_HADAMARD && is(a, {GGML_TYPE_F32}) && is(b, {GGML_TYPE_F32}) &&
                    a->ne[0] == a->ne[1] && b->ne[0] > 0 && (b->ne[0] & (b->ne[0] - 1)) == 0,
                "the hint does not match");
    }
}

void mul_mat_id(Tensor t) {
    Tensor a = source(t, 0), b = source(t, 1), ids = source(t, 2);
    require(is(t, {GGML_TYPE_F32}) && is(b, {GGML_TYPE_F32}) && is(ids, {GGML_TYPE_I32}) && has_dot(a->type),
            "the types do not match");
    require(a->ne[3] == 1 && b->ne[3] == 1 && ids->ne[2] == 1 && ids->ne[3] == 1 && ids->ne[1] == b->ne[2] &&
                a->ne[0] == b->ne[0] && divides(b->ne[1], ids->ne[0]),
            "the shapes do not match");
    require(t->ne[0] == a->ne[1] && t->ne[1] == ids->ne[0] && t->ne[2] == b->ne[2] && t->ne[3] == 1,
            "the shapes do not match");
    require(dense_rows(a) && dense_rows(b) && plain(t) && dense_rows(ids), "rows are not contiguous");
}

void get_rows(Tensor t) {
    Tensor a = source(t, 0), ids = source(t, 1);
    require(is(ids, {GGML_TYPE_I32}) && ids->ne[3] == 1, "the indices do not match");
    require(t->ne[0] == a->ne[0] && t->ne[1] == ids->ne[0] && t->ne[2] == ids->ne[1] && t->ne[3] == ids->ne[2] &&
                a->ne[2] == ids->ne[1] && a->ne[3] == ids->ne[2],
            "the shapes do not match");
    const bool numbers = is(a, {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16}) ||
                         (ggml_is_quantized(a->type) && ggml_get_type_traits(a->type)->to_float != nullptr);
    require((numbers && is(t, {GGML_TYPE_F32})) || (is(a, {GGML_TYPE_I32}) && is(t, {GGML_TYPE_I32})),
            "the types do not match");
    require(dense_rows(a) && dense_rows(t) && dense_rows(ids), "rows are not contiguous");
}

void set_rows(Tensor t) {
    Tensor b = source(t, 0), ids = source(t, 1);
    require(is(ids, {GGML_TYPE_I32, GGML_TYPE_I64}) && ids->ne[3] == 1 && dense_rows(ids), "the indices do not match");
    require(t->ne[0] == b->ne[0] && t->ne[2] == b->ne[2] && t->ne[3] == b->ne[3] && b->ne[1] == ids->ne[0] &&
                divides(ids->ne[1], b->ne[2]) && divides(ids->ne[2], b->ne[3]),
            "the shapes do not match");
    require(is(b, {GGML_TYPE_F32}) || (is(b, {GGML_TYPE_F16}) && is(t, {GGML_TYPE_F16})), "the types do not match");
    require(ggml_get_type_traits_cpu(t->type)->from_float != nullptr, "the types do not match");
    require(dense_rows(b) && dense_rows(t), "rows are not contiguous");
}

void diag_mask(Tensor t) {
    scale(t);
    require(t->op_params[0] >= 0, "the parameters are invalid");
}

void soft_max(Tensor t) {
    Tensor a = source(t, 0), mask = t->src[1], sinks = t->src[2];
    require(ggml_are_same_shape(a, t) && is(a, {GGML_TYPE_F32}) && is(t, {GGML_TYPE_F32}) && dense(a) && dense(t),
            "the shapes or types do not match");
    if (mask != nullptr) {
        require(is(source(t, 1), {GGML_TYPE_F32, GGML_TYPE_F16}), "the types do not match");
        require_mask(mask, a->ne[0], a->ne[1], a->ne[2], a->ne[3]);
    }
    require(mask != nullptr || !(param_f32(t, 1) > 0.0f), "a bias without a mask");
    if (sinks != nullptr) {
        require(is(source(t, 2), {GGML_TYPE_F32}) && dense(sinks) && sinks->ne[0] == a->ne[2],
                "the sinks do not match");
    }
}

// The kernel fills its cache of angles for whole rows, so it reads ne[0] / 2 factors even where only n_dims are used.
void require_factors(Tensor factors, int n_dims, int64_t ne0) {
    require(is(factors, {GGML_TYPE_F32}) && dense(factors) && factors->ne[0] >= n_dims / 2, "the factors do not match");
    if (factors->ne[0] < ne0 / 2 && factors->data != nullptr && factors->buffer != nullptr) {
        const auto * base = static_cast<const uint8_t *>(ggml_backend_buffer_get_base(factors->buffer));
        const auto * end = base + ggml_backend_buffer_get_size(factors->buffer);
        require(end - static_cast<const uint8_t *>(factors->data) >= ne0 / 2 * int64_t(sizeof(float)),
                "the factors lie at the end of a buffer");
    }
}

void rope(Tensor t) {
    Tensor a = source(t, 0), pos = source(t, 1);
    const int n_dims = t->op_params[1], mode = t->op_params[2], offset = t->op_params[15];
    const int * sections = t->op_params + 11;
    require(ggml_are_same_shape(a, t) && a->type == t->type && is(t, {GGML_TYPE_F32, GGML_TYPE_F16}) && dense_rows(a) &&
                dense_rows(t),
            "the shapes or types do not match");
    const auto modes = {GGML_ROPE_TYPE_NORMAL, GGML_ROPE_TYPE_NEOX, GGML_ROPE_TYPE_MROPE, GGML_ROPE_TYPE_VISION,
                        GGML_ROPE_TYPE_IMROPE};
    require(std::find(modes.begin(), modes.end(), mode) != modes.end(), "the mode does not exist");
    require(n_dims > 0 && n_dims % 2 == 0 && offset >= 0 && offset % 2 == 0 && int64_t(offset) + n_dims <= a->ne[0] &&
                a->ne[0] % 2 == 0,
            "the rotated part is too large");
    const bool multi = (mode & GGML_ROPE_TYPE_MROPE) != 0;
    if (multi) {
        int64_t total = 0;
        for (int i = 0; i < 4; i++) {
            require(sections[i] >= 0, "the sections do not match");
            total += sections[i];
        }
        require(total > 0 && total <= a->ne[0] && sections[0] + sections[1] + sections[2] > 0,
                "the sections do not match");
        // in vision mode the kernels divide by the sum of the first two sections
        require(mode != GGML_ROPE_TYPE_VISION ||
                    (n_dims == a->ne[0] / 2 && offset == 0 && sections[0] > 0 && sections[1] > 0),
                "the sections do not match");
    }
    require(is(pos, {GGML_TYPE_I32}) && dense(pos) && pos->ne[0] >= a->ne[2] * (multi ? 4 : 1),
            "the positions do not fit");
    if (t->src[2] != nullptr) {
        require_factors(source(t, 2), n_dims, a->ne[0]);
    }
}

void flash_attn(Tensor t) {
    Tensor q = source(t, 0), k = source(t, 1), v = source(t, 2), mask = t->src[3], sinks = t->src[4];
    require(is(q, {GGML_TYPE_F32}) && is(t, {GGML_TYPE_F32}) && has_dot(k->type), "the types do not match");
    require(is(v, {GGML_TYPE_F32}) || ggml_get_type_traits(v->type)->to_float != nullptr, "the types do not match");
    require(q->ne[0] == k->ne[0] && k->ne[1] == v->ne[1] && divides(k->ne[2], q->ne[2]) &&
                divides(v->ne[2], q->ne[2]) && q->ne[3] == k->ne[3] && q->ne[3] == v->ne[3],
            "the shapes do not match");
    require(t->ne[0] == v->ne[0] && t->ne[1] == q->ne[2] && t->ne[2] == q->ne[1] && t->ne[3] == q->ne[3],
            "the shapes do not match");
    require(dense_rows(q) && dense_rows(k) && dense_rows(v) && plain(t), "rows are not contiguous");
    if (mask != nullptr) {
        require(is(source(t, 3), {GGML_TYPE_F16}), "the types do not match");
        require_mask(mask, k->ne[1], q->ne[1], q->ne[2], q->ne[3]);
    }
    require(mask != nullptr || !(param_f32(t, 1) > 0.0f), "a bias without a mask");
    require(t->op_params[3] == GGML_PREC_DEFAULT || t->op_params[3] == GGML_PREC_F32, "the precision does not exist");
    if (sinks != nullptr) {
        require(is(source(t, 4), {GGML_TYPE_F32}) && dense(sinks) && sinks->ne[0] == q->ne[2],
                "the sinks do not match");
    }
}

void pad(Tensor t) {
    Tensor a = source(t, 0);
    require(is(a, {GGML_TYPE_F32}) && is(t, {GGML_TYPE_F32}) && dense_rows(a) && dense(t), "the types do not match");
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        const int64_t before = t->op_params[2 * i], after = t->op_params[2 * i + 1];
        require(before >= 0 && after >= 0 && t->ne[i] == a->ne[i] + before + after, "the shapes do not match");
    }
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

void glu(Tensor t) {
    Tensor a = source(t, 0), b = t->src[1];
    require(t->op_params[0] >= 0 && t->op_params[0] < GGML_GLU_OP_COUNT, "the function does not exist");
    require(is(a, {GGML_TYPE_F32}) && is(t, {GGML_TYPE_F32}), "the types do not match");
    require(a->ne[1] == t->ne[1] && a->ne[2] == t->ne[2] && a->ne[3] == t->ne[3], "the shapes do not match");
    require(ggml_is_contiguous_1(a) && ggml_is_contiguous_1(t) && dense_rows(a) && dense_rows(t),
            "the tensors are not contiguous");
    if (b == nullptr) {
        require(a->ne[0] % 2 == 0 && t->ne[0] == a->ne[0] / 2, "the shapes do not match");
        return;
    }
    require(is(source(t, 1), {GGML_TYPE_F32}) && ggml_are_same_shape(a, b) && t->ne[0] == a->ne[0] &&
                ggml_is_contiguous_1(b) && dense_rows(b),
            "the shapes do not match");
}

using Rule = void (*)(Tensor);

const std::unordered_map<int, Rule> & rule_table() {
    static const std::unordered_map<int, Rule> table = {
        {GGML_OP_NONE, no_work},
        {GGML_OP_VIEW, no_work},
        {GGML_OP_RESHAPE, no_work},
        {GGML_OP_PERMUTE, no_work},
        {GGML_OP_TRANSPOSE, no_work},
        {GGML_OP_ADD, binary},
        {GGML_OP_SUB, binary},
        {GGML_OP_MUL, binary},
        {GGML_OP_DIV, binary},
        {GGML_OP_ADD_ID, add_id},
        {GGML_OP_SQR, elementwise},
        {GGML_OP_SQRT, elementwise},
        {GGML_OP_LOG, elementwise},
        {GGML_OP_SIN, elementwise},
        {GGML_OP_COS, elementwise},
        {GGML_OP_UNARY, unary},
        {GGML_OP_SCALE, scale},
        {GGML_OP_CLAMP, scale},
        {GGML_OP_NORM, norm},
        {GGML_OP_RMS_NORM, norm},
        {GGML_OP_L2_NORM, norm},
        {GGML_OP_GROUP_NORM, group_norm},
        {GGML_OP_SUM_ROWS, reduce_rows},
        {GGML_OP_MEAN, reduce_rows},
        {GGML_OP_SUM, sum},
        {GGML_OP_CUMSUM, cumsum},
        {GGML_OP_ARGMAX, argmax},
        {GGML_OP_REPEAT, repeat},
        {GGML_OP_CONCAT, concat},
        {GGML_OP_DUP, copy},
        {GGML_OP_CPY, copy},
        {GGML_OP_CONT, copy},
        {GGML_OP_MUL_MAT, mul_mat},
        {GGML_OP_MUL_MAT_ID, mul_mat_id},
        {GGML_OP_GET_ROWS, get_rows},
        {GGML_OP_SET_ROWS, set_rows},
        {GGML_OP_DIAG_MASK_INF, diag_mask},
        {GGML_OP_SOFT_MAX, soft_max},
        {GGML_OP_ROPE, rope},
        {GGML_OP_ROPE_BACK, rope},
        {GGML_OP_FLASH_ATTN_EXT, flash_attn},
        {GGML_OP_PAD, pad},
        {GGML_OP_ARGSORT, argsort},
        {GGML_OP_TOP_K, top_k},
        {GGML_OP_GLU, glu},
        {GGML_OP_FILL, rules::fill},
        {GGML_OP_SET, rules::set},
        {GGML_OP_ARANGE, rules::arange},
        {GGML_OP_DIAG, rules::diag},
        {GGML_OP_TRI, rules::tri},
        {GGML_OP_SOLVE_TRI, rules::solve_tri},
        {GGML_OP_SSM_CONV, rules::ssm_conv},
        {GGML_OP_SSM_SCAN, rules::ssm_scan},
        {GGML_OP_GATED_DELTA_NET, rules::gated_delta_net},
        {GGML_OP_RWKV_WKV6, rules::rwkv_wkv6},
        {GGML_OP_RWKV_WKV7, rules::rwkv_wkv7},
        {GGML_OP_GATED_LINEAR_ATTN, rules::gated_linear_attn},
        {GGML_OP_LIGHTNING_INDEXER, rules::lightning_indexer},
        {GGML_OP_DSV4_HC_COMB, rules::dsv4_hc_comb},
        {GGML_OP_DSV4_HC_PRE, rules::dsv4_hc_pre},
        {GGML_OP_DSV4_HC_POST, rules::dsv4_hc_post},
    };
    return table;
}

} // namespace

bool does_no_work(const ggml_tensor * node) {
    const auto rule = rule_table().find(node->op);
    return rule != rule_table().end() && rule->second == no_work;
}

std::string check_op(const ggml_tensor * node) {
    const auto rule = rule_table().find(node->op);
    if (rule == rule_table().end()) {
        return "the operator is not supported over the mesh";
    }
    try {
        rule->second(node);
        if (rule->second != no_work) {
            for (int i = 0; i < GGML_MAX_SRC; i++) {
                // the second source of a copy is its destination
                const bool destination = i == 1 && (node->op == GGML_OP_CPY || node->op == GGML_OP_DUP);
                if (node->src[i] != nullptr && !destination) {
                    require_apart(node, node->src[i]);
                }
            }
        }
        return "";
    } catch (const UnmetRequirement & unmet) {
        return unmet.text;
    }
}

} // namespace meshllm::server

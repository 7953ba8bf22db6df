// Copies and constants.
#include "server/op_rules.h"

#include <ggml-cpu.h>

#include <cmath>

namespace meshllm::server::rules {

namespace {

/// CPUs write a copy to the node, CUDA and others to its second source: both must be the same memory.
void require_target(Tensor t) {
    Tensor target = source(t, 1);
    require(target == t || (target->type == t->type && ggml_are_same_shape(target, t) &&
                            ggml_are_same_stride(target, t) && target->data == t->data),
            "the target does not match");
}

void copy_to_quantised(Tensor t, Tensor a) {
    require(ggml_is_quantized(t->type) && ggml_get_type_traits_cpu(t->type)->from_float != nullptr,
            "the types do not match");
    require(dense(t) && dense_rows(a) && divides(ggml_blck_size(t->type), a->ne[0]), "the tensors are not contiguous");
    require(a->ne[0] <= t->ne[0], "the scratch memory, a row of the target, is too small for a row of the source");
}

void copy_from_quantised(Tensor t, Tensor a) {
    require(ggml_is_quantized(a->type) && is(t, {GGML_TYPE_F32}) && ggml_get_type_traits(a->type)->to_float != nullptr,
            "the types do not match");
    require(dense(t) && ggml_nelements(t) < UINT32_MAX, "the tensors are not contiguous");
}

} // namespace

void copy(Tensor t) {
    Tensor a = source(t, 0);
    require(ggml_nelements(a) == ggml_nelements(t), "the sizes do not match");
    if (t->op == GGML_OP_CPY) {
        require_target(t);
    }
    if (a->type == t->type) {
        // of blocks, the kernel copies too many bytes where only the result has no gaps and the shapes differ
        require(!ggml_is_quantized(t->type) || (dense(a) && dense(t)) || ggml_are_same_shape(a, t) ||
                    !ggml_is_contiguous(t),
                "the shapes do not match");
        return;
    }
    require(t->op == GGML_OP_CPY, "only CPY changes the type"); // others have no scratch memory
    const auto floats = {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16};
    const bool number = (is(a, {GGML_TYPE_F32}) && is(t, {GGML_TYPE_I32})) ||
                        (is(a, {GGML_TYPE_I32}) && is(t, {GGML_TYPE_F32})); // check_graph follows where integers go
    if (number || (is(a, floats) && is(t, floats))) {
        return;
    }
    return is(a, floats) ? copy_to_quantised(t, a) : copy_from_quantised(t, a);
}

void repeat(Tensor t) {
    Tensor a = source(t, 0);
    require(ggml_can_repeat(a, t) && a->type == t->type &&
                is(t, {GGML_TYPE_F32, GGML_TYPE_I32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_I16}),
            "the shapes or types do not match");
    require(dense_rows(a) && dense_rows(t), "rows are not contiguous");
}

void concat(Tensor t) {
    Tensor a = t->src[0], b = t->src[1]; // either may be empty, though the result is not
    require(a != nullptr && b != nullptr, "a source is missing");
    const int dim = t->op_params[0];
    require(dim >= 0 && dim < GGML_MAX_DIMS && a->type == b->type && a->type == t->type, "the types do not match");
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        require(i == dim ? t->ne[i] == a->ne[i] + b->ne[i] : (t->ne[i] == a->ne[i] && t->ne[i] == b->ne[i]),
                "the shapes do not match");
    }
    const bool by_rows = ggml_type_size(t->type) > 4 || ggml_is_quantized(t->type);
    require(dense_rows(t) && (!by_rows || (dense_rows(a) && dense_rows(b))), "rows are not contiguous");
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
    // from F16 to another type, the CPU's threads share scratch memory for one of them
    require(is(b, {GGML_TYPE_F32}) || (is(b, {GGML_TYPE_F16}) && is(t, {GGML_TYPE_F16})), "the types do not match");
    require(ggml_get_type_traits_cpu(t->type)->from_float != nullptr, "the types do not match");
    require(dense_rows(b) && dense_rows(t), "rows are not contiguous");
}

namespace {

/// `b` is written to a part of `a` that begins at an offset and has strides of its own.
void require_part(Tensor t, Tensor a, Tensor b) {
    require(ggml_are_same_shape(a, t) && a->type == t->type && b->type == t->type, "the shapes or types do not match");
    require(dense(a) && dense(t) && dense_rows(b), "the tensors are not contiguous");
    Wide end = ggml_type_size(t->type) * static_cast<Wide>(b->ne[0]);
    for (int i = 0; i < 4; i++) {
        require(t->op_params[i] >= 0, "the offset or a stride is negative");
        require(t->op_params[i] % 4 == 0, "the part is misaligned");
        end += static_cast<Wide>(t->op_params[i]) * static_cast<Wide>(i == 3 ? 1 : b->ne[i + 1] - 1);
    }
    require(end <= ggml_nbytes(t), "the part lies outside the tensor");
}

} // namespace

void set(Tensor t) {
    require_part(t, source(t, 0), source(t, 1));
    require(is(t, {GGML_TYPE_F32, GGML_TYPE_I32}), "the types do not match");
}

void acc(Tensor t) {
    require_part(t, source(t, 0), source(t, 1));
    require_f32({t});
    require(t->op_params[0] > 0 && t->op_params[1] > 0 && t->op_params[2] > 0,
            "a stride is zero"); // CUDA divides by it
}

void pad(Tensor t) {
    Tensor a = source(t, 0);
    require_f32({a, t});
    require(dense(t), "the tensors are not contiguous");
    const bool circular = t->op_params[8] != 0;
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        const int64_t before = t->op_params[2 * i], after = t->op_params[2 * i + 1];
        require(before >= 0 && after >= 0 && t->ne[i] == a->ne[i] + before + after, "the shapes do not match");
        // kernels add the size once to what lies before the beginning
        require(!circular || (before <= a->ne[i] && after <= a->ne[i]), "the padding is longer than what it repeats");
    }
    require_int({t});
    require(t->ne[1] <= max_grid && t->ne[2] * t->ne[3] <= max_grid, "there are too many rows");
}

void pad_reflect_1d(Tensor t) {
    Tensor a = source(t, 0);
    require_f32({a, t});
    const int64_t before = t->op_params[0], after = t->op_params[1];
    require(before >= 0 && after >= 0 && before < a->ne[0] && after < a->ne[0] &&
                shape(t, a->ne[0] + before + after, a->ne[1], a->ne[2], a->ne[3]),
            "the shapes do not match");
    require(dense(a) && dense(t), "the tensors are not contiguous");
    require_int({t});
    require(t->ne[2] <= max_grid && t->ne[3] <= max_grid, "there are too many rows");
}

/// The kernel adds or subtracts a size once.
void roll(Tensor t) {
    Tensor a = source(t, 0);
    require_f32({a, t});
    require(ggml_are_same_shape(a, t), "the shapes do not match");
    require(dense_rows(a) && dense_rows(t), "rows are not contiguous");
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        require(t->op_params[i] > -a->ne[i] && t->op_params[i] < a->ne[i], "the shift is too large");
    }
}

void fill(Tensor t) {
    Tensor a = source(t, 0);
    require(ggml_are_same_shape(a, t) && a->type == t->type && is(t, {GGML_TYPE_F32, GGML_TYPE_F16}),
            "the shapes or types do not match");
    require(dense(a) && dense(t), "the tensors are not contiguous");
}

void arange(Tensor t) {
    require_f32({t});
    const float steps = std::ceil((param_f32(t, 1) - param_f32(t, 0)) / param_f32(t, 2));
    require(dense(t) && std::isfinite(steps) && steps >= 0.0f && steps <= 2147483647.0f &&
                static_cast<int64_t>(steps) == ggml_nelements(t),
            "the sizes do not match");
}

void timestep_embedding(Tensor t) {
    Tensor a = source(t, 0);
    require_f32({a, t});
    require(t->op_params[1] > 0, "the period is not positive");
    require(shape(a, a->ne[0]) && shape(t, t->op_params[0], a->ne[0]), "the shapes do not match");
    require(dense(a) && dense(t), "the tensors are not contiguous");
    require_int({t});
    require(a->ne[0] <= max_grid, "there are too many rows");
}

} // namespace meshllm::server::rules

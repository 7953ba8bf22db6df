// Matrices and attention.
#include "server/op_rules.h"

#include <ggml-backend.h>
#include <ggml-cpu.h>

namespace meshllm::server::rules {

namespace {

constexpr Wide max_choices = Wide(1) << 27; // 8 bytes each; 10 of 512 experts for 2048 tokens are 2^23
constexpr int64_t max_head = 1 << 14;

/// `mask` broadcasts to [ne0, rows, heads, batches].
void require_mask(Tensor mask, int64_t ne0, int64_t rows, int64_t heads, int64_t batches) {
    require(dense(mask) && mask->ne[0] == ne0 && mask->ne[1] >= rows && divides(mask->ne[2], heads) &&
                divides(mask->ne[3], batches),
            "the mask does not match");
}

bool has_dot(ggml_type type) {
    const ggml_type_traits_cpu * traits = ggml_get_type_traits_cpu(type);
    return traits->vec_dot != nullptr && ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float != nullptr;
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

} // namespace

void mul_mat(Tensor t) {
    Tensor a = source(t, 0), b = source(t, 1);
    require(a->ne[0] == b->ne[0] && t->ne[0] == a->ne[1] && t->ne[1] == b->ne[1] && t->ne[2] == b->ne[2] &&
                t->ne[3] == b->ne[3] && divides(a->ne[2], b->ne[2]) && divides(a->ne[3], b->ne[3]),
            "the shapes do not match");
    require(is(t, {GGML_TYPE_F32}) && has_dot(a->type), "the types do not match");
    const bool rotation = t->op_params[1] == GGML_HINT_SRC0_IS_HADAMARD; // of F16 too
    require(is(b, {GGML_TYPE_F32}) || (b->type == a->type && is(b, {GGML_TYPE_F16, GGML_TYPE_BF16})) ||
                (rotation && is(b, {GGML_TYPE_F16})),
            "the types do not match");
    require(dense_rows(a) && dense_rows(b) && dense(t), "rows are not contiguous");
    if (t->op_params[1] != 0) { // a Hadamard rotation instead of a product
        require(rotation && is(b, {GGML_TYPE_F32, GGML_TYPE_F16}) && is(a, {GGML_TYPE_F32}) && a->ne[0] == a->ne[1] &&
                    b->ne[0] > 0 && (b->ne[0] & (b->ne[0] - 1)) == 0,
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
    require(dense_rows(a) && dense_rows(b) && dense(t) && dense_rows(ids), "rows are not contiguous");
    // the CPU's scratch memory lists, for each expert, all that may choose it
    require(a->ne[2] * Wide(ggml_nelements(ids)) <= max_choices, "there are too many experts");
}

/// Of the rows of two matrices. Where the second one is transposed, it is that of one without gaps.
void out_prod(Tensor t) {
    Tensor a = source(t, 0), b = source(t, 1);
    require_f32({b, t});
    require(is(a, {GGML_TYPE_F32, GGML_TYPE_F16}) ||
                (ggml_is_quantized(a->type) && ggml_get_type_traits(a->type)->to_float != nullptr),
            "the types do not match");
    require(a->ne[1] == b->ne[1] && shape(t, a->ne[0], b->ne[0], b->ne[2], b->ne[3]) && divides(a->ne[2], b->ne[2]) &&
                divides(a->ne[3], b->ne[3]),
            "the shapes do not match");
    require(is(a, {GGML_TYPE_F32}) || (a->ne[2] == b->ne[2] && a->ne[3] == b->ne[3]), "the shapes do not match");
    const size_t row = static_cast<size_t>(b->ne[1]) * sizeof(float);
    const bool transposed = b->nb[1] == sizeof(float) && b->nb[0] == row &&
                            b->nb[2] == row * static_cast<size_t>(b->ne[0]) &&
                            b->nb[3] == b->nb[2] * static_cast<size_t>(b->ne[2]);
    require(dense(a) && (dense(b) || transposed) && dense(t), "the tensors are not contiguous");
    constexpr size_t longest = 1 << 26; // a kernel multiplies it by 31, in int
    require(a->nb[1] <= longest && b->nb[1] <= longest, "rows are too long");
}

void diag_mask(Tensor t) {
    scale(t);
    require_f32({t});
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
    require(k->ne[0] <= max_head && v->ne[0] <= max_head, "the heads are too large"); // for the scratch memory
    require(is(v, {GGML_TYPE_F32}) || ggml_get_type_traits(v->type)->to_float != nullptr, "the types do not match");
    require(q->ne[0] == k->ne[0] && k->ne[1] == v->ne[1] && divides(k->ne[2], q->ne[2]) &&
                divides(v->ne[2], q->ne[2]) && q->ne[3] == k->ne[3] && q->ne[3] == v->ne[3],
            "the shapes do not match");
    require(t->ne[0] == v->ne[0] && t->ne[1] == q->ne[2] && t->ne[2] == q->ne[1] && t->ne[3] == q->ne[3],
            "the shapes do not match");
    require(dense_rows(q) && dense_rows(k) && dense_rows(v) && dense(t), "rows are not contiguous");
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

/// An image [channels, w, h] as windows [channels, size, size, n].
void win_part(Tensor t) {
    Tensor a = source(t, 0);
    require_f32({a, t});
    const int64_t nx = t->op_params[0], ny = t->op_params[1], size = t->op_params[2];
    require(size > 0 && a->ne[3] == 1 && nx == (a->ne[1] + size - 1) / size && ny == (a->ne[2] + size - 1) / size &&
                shape(t, a->ne[0], size, size, nx * ny),
            "the shapes do not match");
    require(dense(a) && dense(t), "the tensors are not contiguous");
    require_int({a, t});
}

void win_unpart(Tensor t) {
    Tensor a = source(t, 0);
    require_f32({a, t});
    const int64_t size = t->op_params[0];
    require(size > 0 && t->ne[3] == 1, "the shapes do not match");
    const int64_t nx = (t->ne[1] + size - 1) / size, ny = (t->ne[2] + size - 1) / size;
    require(shape(a, t->ne[0], size, size, nx * ny), "the shapes do not match");
    require(dense(a) && dense(t), "the tensors are not contiguous");
    require_int({a, t});
}

void get_rel_pos(Tensor t) {
    Tensor a = source(t, 0);
    require(is(a, {GGML_TYPE_F16}) && is(t, {GGML_TYPE_F16}), "the types do not match");
    require(shape(a, a->ne[0], 2 * t->ne[1] - 1) && shape(t, a->ne[0], t->ne[1], t->ne[1]), "the shapes do not match");
    require(dense(a) && dense(t), "the tensors are not contiguous");
}

void add_rel_pos(Tensor t) {
    Tensor a = source(t, 0), w = source(t, 1), h = source(t, 2);
    require_f32({a, w, h, t});
    require(ggml_are_same_shape(a, t) && ggml_are_same_shape(w, h) &&
                shape(a, w->ne[0] * w->ne[0], w->ne[1] * w->ne[2], w->ne[3]),
            "the shapes do not match");
    require(dense(a) && dense(w) && dense(h) && dense(t), "the tensors are not contiguous");
}

} // namespace meshllm::server::rules

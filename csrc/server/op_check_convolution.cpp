// Convolutions, pooling and interpolation of images and sounds. What a kernel reads outside the image is padding, so
// the rules are about sizes: those of the result must be what the sizes of its sources say, and none may overflow an
// int.
#include "server/op_rules.h"

namespace meshllm::server::rules {

namespace {

/// ggml_calc_conv_output_size. Kernels calculate places in the padded image in int.
int64_t conv_size(int64_t image, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    require(stride > 0 && padding >= 0 && dilation > 0, "the parameters are invalid");
    const int64_t padded = image + 2 * padding, span = dilation * (kernel - 1) + 1;
    require(padded <= INT32_MAX && span <= padded, "the image is too small or too large");
    return (padded - span) / stride + 1;
}

/// ggml_calc_conv_transpose_output_size without padding.
int64_t conv_transpose_size(int64_t image, int64_t kernel, int64_t stride) {
    require(stride > 0, "the parameters are invalid");
    return (image - 1) * stride + kernel;
}

void require_kernel(Tensor kernel) {
    require(is(kernel, {GGML_TYPE_F32, GGML_TYPE_F16}), "the types do not match");
    require(dense(kernel), "the kernel is not contiguous");
}

/// The CPU computes `patch` times `outputs` in scratch memory that must hold at least one patch.
void require_patch_fits(Tensor kernel, Wide patch, Wide outputs) {
    constexpr Wide scratch = 16 << 20; // GGML_IM2COL_WORK_SIZE
    require(patch * ggml_type_size(kernel->type) + outputs * sizeof(float) <= scratch, "the kernel is too large");
}

/// The channels (dimension 2) of a pixel lie side by side, and pixels without a gap.
bool channels_first(Tensor t) {
    const auto channels = static_cast<size_t>(t->ne[2]), w = static_cast<size_t>(t->ne[0]),
               h = static_cast<size_t>(t->ne[1]);
    const size_t nb0 = channels * sizeof(float);
    return t->nb[2] == sizeof(float) && (w == 1 || t->nb[0] == nb0) && (h == 1 || t->nb[1] == w * nb0) &&
           (t->ne[3] == 1 || t->nb[3] == w * h * nb0);
}

} // namespace

/// The kernel's values are not read, only its shape.
void im2col(Tensor t) {
    Tensor kernel = source(t, 0), image = source(t, 1);
    const int32_t * p = t->op_params; // s0, s1, p0, p1, d0, d1, is_2D
    require_f32({image});
    require(is(t, {GGML_TYPE_F32, GGML_TYPE_F16}), "the types do not match");
    const int64_t w = conv_size(image->ne[0], kernel->ne[0], p[0], p[2], p[4]);
    if (p[6] == 1) {
        const int64_t h = conv_size(image->ne[1], kernel->ne[1], p[1], p[3], p[5]);
        require(kernel->ne[2] == image->ne[2] &&
                    Wide(t->ne[0]) == Wide(kernel->ne[0] * kernel->ne[1]) * Wide(kernel->ne[2]) && t->ne[1] == w &&
                    t->ne[2] == h && t->ne[3] == image->ne[3],
                "the shapes do not match");
    } else {
        require(kernel->ne[1] == image->ne[1] && image->ne[3] == 1 &&
                    shape(t, kernel->ne[0] * kernel->ne[1], w, image->ne[2]),
                "the shapes do not match");
    }
    require(dense(image) && dense(t), "the tensors are not contiguous");
    require_int({image, t});
}

void im2col_3d(Tensor t) {
    Tensor kernel = source(t, 0), image = source(t, 1);
    const int32_t * p = t->op_params; // s0, s1, s2, p0, p1, p2, d0, d1, d2, channels
    require_f32({image});
    require(is(t, {GGML_TYPE_F32, GGML_TYPE_F16}), "the types do not match");
    const int64_t channels = p[9];
    require(channels > 0 && divides(channels, image->ne[3]), "the shapes do not match");
    const int64_t batch = image->ne[3] / channels;
    int64_t size[3];
    for (int i = 0; i < 3; i++) {
        size[i] = conv_size(image->ne[i], kernel->ne[i], p[i], p[3 + i], p[6 + i]);
    }
    const Wide patch = Wide(kernel->ne[0] * kernel->ne[1]) * Wide(kernel->ne[2]) * Wide(channels);
    require(Wide(t->ne[0]) == patch && t->ne[1] == size[0] && t->ne[2] == size[1] &&
                Wide(t->ne[3]) == Wide(size[2]) * Wide(batch),
            "the shapes do not match");
    require(dense_rows(image) && dense(t), "the tensors are not contiguous");
    require_int({image, t});
}

/// Columns [kernel * channels, n] summed up to signals [length, channels].
void col2im_1d(Tensor t) {
    Tensor a = source(t, 0);
    const int64_t stride = t->op_params[0], channels = t->op_params[1], padding = t->op_params[2];
    require(a->type == t->type && is(t, {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16}), "the types do not match");
    require(stride > 0 && channels > 0 && padding >= 0 && divides(channels, a->ne[0]), "the parameters are invalid");
    const int64_t kernel = a->ne[0] / channels;
    require(shape(a, a->ne[0], a->ne[1]) && shape(t, (a->ne[1] - 1) * stride + kernel - 2 * padding, channels),
            "the shapes do not match");
    require(t->ne[0] + 2 * padding <= INT32_MAX - stride, "the parameters are invalid");
    require(dense(a) && dense(t), "the tensors are not contiguous");
    require_int({a, t});
}

void conv_2d(Tensor t) {
    Tensor kernel = source(t, 0), image = source(t, 1);
    const int32_t * p = t->op_params; // s0, s1, p0, p1, d0, d1
    require_f32({image, t});
    require_kernel(kernel);
    require(kernel->ne[2] == image->ne[2] &&
                shape(t, conv_size(image->ne[0], kernel->ne[0], p[0], p[2], p[4]),
                      conv_size(image->ne[1], kernel->ne[1], p[1], p[3], p[5]), kernel->ne[3], image->ne[3]),
            "the shapes do not match");
    require(p[6] == 0, "the parameters are invalid"); // CUDA asserts it
    require(dense(t), "the tensors are not contiguous");
    require_patch_fits(kernel, Wide(kernel->ne[0] * kernel->ne[1]) * Wide(kernel->ne[2]), Wide(kernel->ne[3]));
    require_int({kernel, image, t});
}

/// One kernel for each channel. Channels may lie first or last.
void conv_2d_dw(Tensor t) {
    Tensor kernel = source(t, 0), image = source(t, 1);
    const int32_t * p = t->op_params; // s0, s1, p0, p1, d0, d1
    require_f32({image, t});
    require(is(kernel, {GGML_TYPE_F32, GGML_TYPE_F16}), "the types do not match");
    require(kernel->ne[2] == 1 && kernel->ne[3] == image->ne[2] &&
                shape(t, conv_size(image->ne[0], kernel->ne[0], p[0], p[2], p[4]),
                      conv_size(image->ne[1], kernel->ne[1], p[1], p[3], p[5]), image->ne[2], image->ne[3]),
            "the shapes do not match");
    const bool last = dense(image) && dense(kernel) && dense(t);
    // the kernel's values, in any order, are as many as its memory holds: build_graph makes sure of it
    const bool first = !ggml_is_contiguous(image) && ggml_is_contiguous_channels(image) && channels_first(image) &&
                       kernel->nb[0] >= kernel->nb[2] && kernel->nb[1] >= kernel->nb[0] && channels_first(t);
    require(last || first, "the tensors are not contiguous");
    require_int({kernel, image, t});
}

void conv_3d(Tensor t) {
    Tensor kernel = source(t, 0), image = source(t, 1);
    const int32_t * p = t->op_params; // s0, s1, s2, p0, p1, p2, d0, d1, d2, channels, batch, outputs
    require_f32({image, t});
    require_kernel(kernel);
    const int64_t channels = p[9], batch = p[10], outputs = p[11];
    require(channels > 0 && batch > 0 && outputs > 0 && kernel->ne[3] == channels * outputs &&
                image->ne[3] == channels * batch && t->ne[3] == outputs * batch,
            "the shapes do not match");
    for (int i = 0; i < 3; i++) {
        require(t->ne[i] == conv_size(image->ne[i], kernel->ne[i], p[i], p[3 + i], p[6 + i]),
                "the shapes do not match");
    }
    require(dense(t), "the tensors are not contiguous");
    require_patch_fits(kernel, Wide(kernel->ne[0] * kernel->ne[1]) * Wide(kernel->ne[2]) * Wide(channels),
                       Wide(outputs));
    require_int({kernel, image, t});
}

void conv_transpose_1d(Tensor t) {
    Tensor kernel = source(t, 0), signal = source(t, 1);
    require_f32({signal, t});
    require_kernel(kernel);
    require(kernel->ne[3] == 1 && kernel->ne[2] == signal->ne[1] && shape(signal, signal->ne[0], signal->ne[1]) &&
                shape(t, conv_transpose_size(signal->ne[0], kernel->ne[0], t->op_params[0]), kernel->ne[1]),
            "the shapes do not match");
    require(t->op_params[1] == 0 && t->op_params[2] == 1, "the parameters are invalid");
    require(dense(signal) && dense(t), "the tensors are not contiguous");
    require_int({kernel, signal, t});
}

void conv_transpose_2d(Tensor t) {
    Tensor kernel = source(t, 0), image = source(t, 1);
    require_f32({image, t});
    require_kernel(kernel);
    const int64_t stride = t->op_params[0];
    require(kernel->ne[3] == image->ne[2] &&
                shape(t, conv_transpose_size(image->ne[0], kernel->ne[0], stride),
                      conv_transpose_size(image->ne[1], kernel->ne[1], stride), kernel->ne[2], image->ne[3]),
            "the shapes do not match");
    require(dense(image) && dense(t), "the tensors are not contiguous");
    require_int({kernel, image, t});
}

namespace {

/// Dimension `i` of a pool with windows of `size`. Half a pixel of padding is possible, of which ggml keeps the whole
/// part.
void require_pool(Tensor t, int i, int64_t size, int64_t stride, int64_t padding) {
    const int64_t image = t->src[0]->ne[i];
    require(size > 0 && stride > 0 && padding >= 0 && padding <= image && image <= INT32_MAX / 4,
            "the parameters are invalid");
    require((t->ne[i] - 1) * stride + size <= image + 2 * padding + 1, "the shapes do not match");
}

void pool(Tensor t) {
    Tensor a = source(t, 0);
    require_f32({a, t});
    require(t->op_params[0] == GGML_OP_POOL_MAX || t->op_params[0] == GGML_OP_POOL_AVG, "the function is unknown");
    require(a->ne[2] == t->ne[2] && a->ne[3] == t->ne[3], "the shapes do not match");
    require(dense(a) && dense(t), "the tensors are not contiguous");
    require_int({a, t});
}

} // namespace

void pool_1d(Tensor t) {
    pool(t);
    const int32_t * p = t->op_params; // function, k0, s0, p0
    require_pool(t, 0, p[1], p[2], p[3]);
    require(t->src[0]->ne[1] == t->ne[1], "the shapes do not match");
}

void pool_2d(Tensor t) {
    pool(t);
    const int32_t * p = t->op_params; // function, k0, k1, s0, s1, p0, p1
    require_pool(t, 0, p[1], p[3], p[5]);
    require_pool(t, 1, p[2], p[4], p[6]);
    require(int64_t(p[1]) * p[2] <= INT32_MAX, "the parameters are invalid");
}

/// Kernels divide a place by the ratio of two sizes in 32-bit floats: below 2^20 the result is a place in the source.
void upscale(Tensor t) {
    Tensor a = source(t, 0);
    require_f32({a, t});
    const int mode = t->op_params[0] & 0xFF, flags = t->op_params[0] & ~0xFF;
    require(mode < GGML_SCALE_MODE_COUNT && (flags & ~(GGML_SCALE_FLAG_ALIGN_CORNERS | GGML_SCALE_FLAG_ANTIALIAS)) == 0,
            "the mode does not exist");
    require((flags & GGML_SCALE_FLAG_ANTIALIAS) == 0 || mode == GGML_SCALE_MODE_BILINEAR, "the mode does not exist");
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        require(a->ne[i] < 1 << 20 && t->ne[i] < 1 << 20, "the image is too large");
    }
    require(dense(t), "the tensors are not contiguous");
    require_int({a, t});
}

} // namespace meshllm::server::rules

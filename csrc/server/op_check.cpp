#include "server/op_check.h"

#include "server/op_rules.h"

#include <array>

namespace meshllm::server {

namespace {

/// Kernels copy rows with memcpy: source and destination must be disjoint or identical.
void require_apart(Tensor t, Tensor a) {
    // a GPU's driver may give all its buffers the same address
    if (t->data == nullptr || a->data == nullptr || ggml_is_empty(t) || t->buffer != a->buffer) {
        return;
    }
    const auto *t0 = static_cast<const uint8_t *>(t->data), *a0 = static_cast<const uint8_t *>(a->data);
    const bool apart = t0 + ggml_nbytes(t) <= a0 || a0 + ggml_nbytes(a) <= t0;
    require(apart || (t0 == a0 && t->type == a->type && ggml_are_same_shape(t, a) && ggml_are_same_stride(t, a)),
            "source and destination overlap");
}

void no_work(Tensor) {}

constexpr const char * training = "only training computes it";
constexpr const char * address = "it calls a function by its address, which a client would choose";

struct Operator {
    ggml_op op;
    void (*rule)(Tensor);
    const char * excluded = nullptr; // why there is no rule
};

// Each operator of ggml is here: tests/native/test_ops.cpp fails when an update of llama.cpp brings a new one.
constexpr Operator operators[] = {
    {GGML_OP_NONE, no_work},
    {GGML_OP_DUP, rules::copy},
    {GGML_OP_ADD, rules::binary},
    {GGML_OP_ADD_ID, rules::add_id},
    {GGML_OP_ADD1, rules::add1},
    {GGML_OP_ACC, rules::acc},
    {GGML_OP_SUB, rules::binary},
    {GGML_OP_MUL, rules::binary},
    {GGML_OP_DIV, rules::binary},
    {GGML_OP_SQR, rules::elementwise},
    {GGML_OP_SQRT, rules::elementwise},
    {GGML_OP_LOG, rules::elementwise},
    {GGML_OP_SIN, rules::elementwise},
    {GGML_OP_COS, rules::elementwise},
    {GGML_OP_SUM, rules::sum},
    {GGML_OP_SUM_ROWS, rules::reduce_rows},
    {GGML_OP_CUMSUM, rules::cumsum},
    {GGML_OP_MEAN, rules::reduce_rows},
    {GGML_OP_ARGMAX, rules::argmax},
    {GGML_OP_COUNT_EQUAL, rules::count_equal},
    {GGML_OP_REPEAT, rules::repeat},
    {GGML_OP_REPEAT_BACK, nullptr, training},
    {GGML_OP_CONCAT, rules::concat},
    {GGML_OP_SILU_BACK, nullptr, training},
    {GGML_OP_NORM, rules::norm},
    {GGML_OP_RMS_NORM, rules::rms_norm},
    {GGML_OP_RMS_NORM_BACK, nullptr, training},
    {GGML_OP_GROUP_NORM, rules::group_norm},
    {GGML_OP_L2_NORM, rules::norm},
    {GGML_OP_MUL_MAT, rules::mul_mat},
    {GGML_OP_MUL_MAT_ID, rules::mul_mat_id},
    {GGML_OP_OUT_PROD, rules::out_prod},
    {GGML_OP_SCALE, rules::scale},
    {GGML_OP_SET, rules::set},
    {GGML_OP_CPY, rules::copy},
    {GGML_OP_CONT, rules::copy},
    {GGML_OP_RESHAPE, no_work},
    {GGML_OP_VIEW, no_work},
    {GGML_OP_PERMUTE, no_work},
    {GGML_OP_TRANSPOSE, no_work},
    {GGML_OP_GET_ROWS, rules::get_rows},
    {GGML_OP_GET_ROWS_BACK, nullptr, training},
    {GGML_OP_SET_ROWS, rules::set_rows},
    {GGML_OP_DIAG, rules::diag},
    {GGML_OP_DIAG_MASK_INF, rules::diag_mask},
    {GGML_OP_DIAG_MASK_ZERO, rules::diag_mask},
    {GGML_OP_SOFT_MAX, rules::soft_max},
    {GGML_OP_SOFT_MAX_BACK, nullptr, training},
    {GGML_OP_ROPE, rules::rope},
    {GGML_OP_ROPE_BACK, rules::rope},
    {GGML_OP_CLAMP, rules::clamp},
    {GGML_OP_CONV_TRANSPOSE_1D, rules::conv_transpose_1d},
    {GGML_OP_IM2COL, rules::im2col},
    {GGML_OP_IM2COL_BACK, nullptr, training},
    {GGML_OP_IM2COL_3D, rules::im2col_3d},
    {GGML_OP_COL2IM_1D, rules::col2im_1d},
    {GGML_OP_CONV_2D, rules::conv_2d},
    {GGML_OP_CONV_3D, rules::conv_3d},
    {GGML_OP_CONV_2D_DW, rules::conv_2d_dw},
    {GGML_OP_CONV_TRANSPOSE_2D, rules::conv_transpose_2d},
    {GGML_OP_POOL_1D, rules::pool_1d},
    {GGML_OP_POOL_2D, rules::pool_2d},
    {GGML_OP_POOL_2D_BACK, nullptr, training},
    {GGML_OP_UPSCALE, rules::upscale},
    {GGML_OP_PAD, rules::pad},
    {GGML_OP_PAD_REFLECT_1D, rules::pad_reflect_1d},
    {GGML_OP_ROLL, rules::roll},
    {GGML_OP_ARANGE, rules::arange},
    {GGML_OP_TIMESTEP_EMBEDDING, rules::timestep_embedding},
    {GGML_OP_ARGSORT, rules::argsort},
    {GGML_OP_TOP_K, rules::top_k},
    {GGML_OP_LEAKY_RELU, rules::leaky_relu},
    {GGML_OP_TRI, rules::tri},
    {GGML_OP_FILL, rules::fill},
    {GGML_OP_FLASH_ATTN_EXT, rules::flash_attn},
    {GGML_OP_FLASH_ATTN_BACK, nullptr, training},
    {GGML_OP_SSM_CONV, rules::ssm_conv},
    {GGML_OP_SSM_SCAN, rules::ssm_scan},
    {GGML_OP_WIN_PART, rules::win_part},
    {GGML_OP_WIN_UNPART, rules::win_unpart},
    {GGML_OP_GET_REL_POS, rules::get_rel_pos},
    {GGML_OP_ADD_REL_POS, rules::add_rel_pos},
    {GGML_OP_RWKV_WKV6, rules::rwkv_wkv6},
    {GGML_OP_GATED_LINEAR_ATTN, rules::gated_linear_attn},
    {GGML_OP_RWKV_WKV7, rules::rwkv_wkv7},
    {GGML_OP_SOLVE_TRI, rules::solve_tri},
    {GGML_OP_GATED_DELTA_NET, rules::gated_delta_net},
    {GGML_OP_LIGHTNING_INDEXER, rules::lightning_indexer},
    {GGML_OP_DSV4_HC_COMB, rules::dsv4_hc_comb},
    {GGML_OP_DSV4_HC_PRE, rules::dsv4_hc_pre},
    {GGML_OP_DSV4_HC_POST, rules::dsv4_hc_post},
    {GGML_OP_UNARY, rules::unary},
    {GGML_OP_MAP_CUSTOM1, nullptr, address},
    {GGML_OP_MAP_CUSTOM2, nullptr, address},
    {GGML_OP_MAP_CUSTOM3, nullptr, address},
    {GGML_OP_CUSTOM, nullptr, address},
    {GGML_OP_CROSS_ENTROPY_LOSS, nullptr, training},
    {GGML_OP_CROSS_ENTROPY_LOSS_BACK, nullptr, training},
    {GGML_OP_OPT_STEP_ADAMW, nullptr, training},
    {GGML_OP_OPT_STEP_SGD, nullptr, training},
    {GGML_OP_GLU, rules::glu},
};

const Operator & find(ggml_op op) {
    static const auto table = [] {
        std::array<Operator, GGML_OP_COUNT> all{};
        for (const Operator & o : operators) {
            all[o.op] = o;
        }
        return all;
    }();
    return table.at(op);
}

} // namespace

bool has_rule(ggml_op op) {
    return find(op).rule != nullptr;
}

const char * exclusion(ggml_op op) {
    return find(op).excluded;
}

bool does_no_work(const ggml_tensor * node) {
    return find(node->op).rule == no_work;
}

std::string check_op(const ggml_tensor * node) {
    const Operator & found = find(node->op);
    if (found.rule == nullptr) {
        return std::string("the operator is not supported over the mesh: ") +
               (found.excluded != nullptr ? found.excluded : "it is unknown");
    }
    try {
        found.rule(node);
        if (found.rule != no_work) {
            for (int i = 0; i < GGML_MAX_SRC; i++) {
                // the second source of a copy is its destination
                const bool destination = i == 1 && node->op == GGML_OP_CPY;
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

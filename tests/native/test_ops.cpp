// Every operator and function of the ggml that is built has a rule, or a reason for having none. Without a framework:
// prints each that has neither, and exits with 1 when there was one.
#include "server/op_check.h"

#include <ggml.h>

#include <cstdio>
#include <set>
#include <string>

using namespace meshllm;

namespace {

int n_checks = 0, n_failed = 0;

void check(bool ok, const char * name, const char * what) {
    n_checks++;
    if (!ok) {
        n_failed++;
        std::printf("%s %s\n", name, what);
    }
}

/// One of F32 without gaps, with nothing but an operator, a function and sources of its own.
struct Node {
    ggml_context * context = ggml_init({16 * ggml_tensor_overhead(), nullptr, true});
    ggml_tensor * a = ggml_new_tensor_2d(context, GGML_TYPE_F32, 32, 4);
    ggml_tensor * b = ggml_new_tensor_2d(context, GGML_TYPE_F32, 32, 4);
    ggml_tensor * t = ggml_new_tensor_2d(context, GGML_TYPE_F32, 32, 4);

    explicit Node(ggml_op op, int function = 0) {
        t->op = op;
        t->op_params[0] = function;
        t->src[0] = a;
        t->src[1] = op == GGML_OP_GLU ? b : nullptr;
    }
    ~Node() { ggml_free(context); }
    Node(const Node &) = delete;
    Node & operator=(const Node &) = delete;
};

void test_operators() {
    std::set<std::string> reasons;
    for (int i = 0; i < GGML_OP_COUNT; i++) {
        const auto op = static_cast<ggml_op>(i);
        const char * why = server::exclusion(op);
        check(server::has_rule(op) != (why != nullptr), ggml_op_name(op),
              "needs a rule, or a reason for having none, in csrc/server/op_check.cpp");
        if (why != nullptr) {
            reasons.insert(why);
            const std::string refusal = server::check_op(Node(op).t);
            check(refusal.find(why) != std::string::npos, ggml_op_name(op), "is not refused with its reason");
        }
    }
    check(reasons.size() == 2, "the table", "has other reasons than that training needs it, and addresses");
}

void test_functions() {
    for (int i = 0; i < GGML_UNARY_OP_COUNT; i++) {
        check(server::check_op(Node(GGML_OP_UNARY, i).t).empty(), ggml_unary_op_name(static_cast<ggml_unary_op>(i)),
              "has no rule in csrc/server/op_check_elementwise.cpp");
    }
    for (int i = 0; i < GGML_GLU_OP_COUNT; i++) {
        check(server::check_op(Node(GGML_OP_GLU, i).t).empty(), ggml_glu_op_name(static_cast<ggml_glu_op>(i)),
              "has no rule in csrc/server/op_check_elementwise.cpp");
    }
    for (const auto & [op, count] :
         {std::pair{GGML_OP_UNARY, int(GGML_UNARY_OP_COUNT)}, {GGML_OP_GLU, int(GGML_GLU_OP_COUNT)}}) {
        check(!server::check_op(Node(op, count).t).empty(), ggml_op_name(op), "accepts a function that does not exist");
        check(!server::check_op(Node(op, -1).t).empty(), ggml_op_name(op), "accepts a function that does not exist");
    }
}

} // namespace

int main() {
    test_operators();
    test_functions();
    std::printf("%d checks, %d failed\n", n_checks, n_failed);
    return n_failed == 0 ? 0 : 1;
}

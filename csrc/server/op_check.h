// What each operator requires of its tensors. Where a requirement is not met, ggml's kernels assert, which ends the
// process, or access memory outside their tensors; so a graph from a peer is checked before it is accepted.
//
// The rules are those of ggml 0.25.3: the constructors in ggml.c and the CPU kernels in ggml-cpu/ops.cpp, which are the
// strictest of all devices; where one for CUDA asserts more, that too. An operator without a rule is refused and then
// runs on the host.
#pragma once

#include <ggml.h>

#include <string>

namespace meshllm::server {

/// Empty when ggml can compute `node` without an assertion or an access outside its tensors, else the reason in one
/// line. Checks types, shapes, strides and parameters, and addresses where the tensors have some.
std::string check_op(const ggml_tensor * node);

bool has_rule(ggml_op op);

/// Why an operator has no rule, and so never runs on a stage. Null when it has one, or when nobody has decided: it is
/// new in ggml.
const char * exclusion(ggml_op op);

/// Whether the node only gives memory another shape.
bool does_no_work(const ggml_tensor * node);

} // namespace meshllm::server

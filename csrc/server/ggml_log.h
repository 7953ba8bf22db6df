// What ggml says while it fails. It would print it; we have one line for it.
#pragma once

#include <string>

namespace meshllm::server {

/// From now on nothing of ggml is printed in this process, and its last error is kept.
void keep_ggml_errors();

/// The last error since this was called, without its newline; "" for none.
std::string take_ggml_error();

} // namespace meshllm::server

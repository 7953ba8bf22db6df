#include "server/ggml_log.h"

#include <ggml.h>

#include <mutex>
#include <utility>

namespace meshllm::server {

namespace {

std::mutex mutex;
std::string last_error;

} // namespace

void keep_ggml_errors() {
    ggml_log_set(
        [](ggml_log_level level, const char * text, void *) {
            if (level == GGML_LOG_LEVEL_ERROR) {
                std::lock_guard lock(mutex);
                last_error = text;
            }
        },
        nullptr);
}

std::string take_ggml_error() {
    std::lock_guard lock(mutex);
    std::string error = std::exchange(last_error, "");
    while (!error.empty() && (error.back() == '\n' || error.back() == ' ')) {
        error.pop_back();
    }
    return error;
}

} // namespace meshllm::server

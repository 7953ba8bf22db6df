// The backend's configuration: the JSON file that MESH_LLM_BACKEND_CONFIG names (docs/architecture.md).
#pragma once

#include "wire/frames.h"

namespace meshllm::backend {

struct StageConfig {
    std::string name;         // of the machine, for messages
    std::string address;      // as the host reaches it
    std::string peer_address; // as the other stages reach it
    uint32_t device = 0;      // of that server
};

struct Config {
    std::vector<StageConfig> stages; // in the order of the layers
    std::string host_device;         // ggml's name of the host's own device
    wire::Fingerprint fingerprint{};
    std::vector<std::string> model_files; // empty: weights are always sent
    std::string counters_file;            // empty: counters stay in memory
    double connect_timeout_s = 10;
};

/// Throws std::runtime_error with one line for the user.
Config load_config(const std::string & path);

} // namespace meshllm::backend

#include "backend/config.h"

#include <nlohmann/json.hpp>

#include <fstream>

namespace meshllm::backend {

namespace {

constexpr size_t max_stages = 16; // GGML_SCHED_MAX_BACKENDS; HOST and CPU leave 14

wire::Fingerprint parse_fingerprint(const std::string & hex) {
    wire::Fingerprint out;
    if (hex.size() != 2 * out.size() || hex.find_first_not_of("0123456789abcdef") != std::string::npos) {
        throw std::runtime_error("the model's fingerprint is not 64 hexadecimal digits");
    }
    for (size_t i = 0; i < out.size(); i++) {
        out[i] = static_cast<uint8_t>(std::stoul(hex.substr(2 * i, 2), nullptr, 16));
    }
    return out;
}

StageConfig parse_stage(const nlohmann::json & json) {
    StageConfig stage;
    stage.address = json.at("address").get<std::string>();
    stage.name = json.value("name", stage.address);
    stage.peer_address = json.value("peer_address", stage.address);
    stage.device = json.value("device", 0u);
    return stage;
}

Config parse(const nlohmann::json & json) {
    Config config;
    for (const auto & stage : json.at("stages")) {
        config.stages.push_back(parse_stage(stage));
    }
    if (config.stages.empty() || config.stages.size() > max_stages - 2) {
        throw std::runtime_error("there must be 1 to 14 stages");
    }
    config.host_device = json.value("host_device", "CPU");
    if (json.contains("model")) {
        config.fingerprint = parse_fingerprint(json["model"].at("fingerprint").get<std::string>());
        config.model_files = json["model"].at("files").get<std::vector<std::string>>();
    }
    config.counters_file = json.value("counters", "");
    if (json.contains("limits")) {
        config.connect_timeout_s = json["limits"].value("connect_timeout_s", config.connect_timeout_s);
    }
    return config;
}

} // namespace

Config load_config(const std::string & path) {
    try {
        std::ifstream file(path);
        if (!file) {
            throw std::runtime_error("the file cannot be read");
        }
        return parse(nlohmann::json::parse(file));
    } catch (const std::exception & e) {
        throw std::runtime_error("MESH_LLM_BACKEND_CONFIG (" + path + "): " + e.what());
    }
}

} // namespace meshllm::backend

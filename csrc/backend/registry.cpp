// The entry point by which ggml loads the library: GGML_BACKEND_PATH names it, MESH_LLM_BACKEND_CONFIG its stages.
#include "backend/host.h"

#include <ggml-impl.h>

#include <cstdlib>
#include <cstring>

namespace meshllm::backend {

namespace {

struct Mesh {
    Config config;
    std::unique_ptr<CountersFile> counters;
    std::unique_ptr<Weights> weights;
    std::vector<std::unique_ptr<Stage>> stages;
    Host host;
    ggml_backend_reg reg{};
};

Mesh & mesh_of(ggml_backend_reg_t reg) {
    return *static_cast<Mesh *>(reg->context);
}

const char * reg_name(ggml_backend_reg_t /*reg*/) {
    return "MESH";
}

size_t device_count(ggml_backend_reg_t reg) {
    return mesh_of(reg).stages.size() + 1;
}

ggml_backend_dev_t get_device(ggml_backend_reg_t reg, size_t index) {
    Mesh & mesh = mesh_of(reg);
    return index < mesh.stages.size() ? &mesh.stages[index]->device : &mesh.host.device;
}

void * get_proc_address(ggml_backend_reg_t /*reg*/, const char * name) {
    if (std::strcmp(name, "ggml_backend_set_n_threads") == 0) {
        return reinterpret_cast<void *>(set_n_threads);
    }
    if (std::strcmp(name, "ggml_backend_dev_get_extra_bufts") == 0) {
        return reinterpret_cast<void *>(extra_buffer_types);
    }
    return nullptr;
}

const ggml_backend_reg_i reg_interface = {reg_name, device_count, get_device, get_proc_address};

std::unique_ptr<Stage> connect_stage(Mesh & mesh, size_t index) {
    auto stage = std::make_unique<Stage>();
    stage->name = "STAGE" + std::to_string(index);
    stage->link = std::make_shared<StageLink>(stage->name, mesh.config.stages[index], *mesh.counters, index);
    stage->graphs = std::make_unique<GraphCache>(*stage->link);
    stage->reads = std::make_unique<ReadAhead>(*stage->link);
    stage->results = std::make_unique<StepResults>(*stage->link);
    stage->weights = mesh.weights.get();
    const StageConfig & config = stage->link->config();
    if (!stage->link->guarded([&] { stage->link->connect(mesh.config.connect_timeout_s); })) {
        return nullptr;
    }
    stage->description = config.name + ": " + stage->link->device().description;
    make_stage_device(*stage, &mesh.reg);
    stage->ring = &mesh.host.ring;
    mesh.host.ring.stages.push_back(stage.get());
    return stage;
}

// Never freed: ggml keeps devices until the process ends.
ggml_backend_reg_t start(const std::string & config_path) {
    auto mesh = std::make_unique<Mesh>();
    mesh->config = load_config(config_path);
    const auto n_stages = static_cast<uint32_t>(mesh->config.stages.size());
    mesh->counters = std::make_unique<CountersFile>(mesh->config.counters_file, n_stages);
    mesh->weights = std::make_unique<Weights>(mesh->config);
    mesh->reg = {GGML_BACKEND_API_VERSION, reg_interface, mesh.get()};
    make_host_device(mesh->host, mesh->config.host_device, &mesh->reg);
    for (size_t i = 0; i < n_stages; i++) {
        auto stage = connect_stage(*mesh, i);
        if (!stage) {
            mesh.release(); // never freed, as above
            return nullptr;
        }
        mesh->stages.push_back(std::move(stage));
    }
    mesh->counters->set_state(State::connected);
    return &mesh.release()->reg;
}

} // namespace

} // namespace meshllm::backend

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) {
    const char * path = std::getenv("MESH_LLM_BACKEND_CONFIG");
    try {
        if (path == nullptr) {
            throw std::runtime_error("MESH_LLM_BACKEND_CONFIG names no configuration");
        }
        static ggml_backend_reg_t reg = meshllm::backend::start(path); // ggml may load us more than once
        return reg;
    } catch (const std::exception & e) {
        GGML_LOG_ERROR("mesh-llm: %s\n", e.what());
        return nullptr;
    }
}

extern "C" __attribute__((visibility("default"))) int ggml_backend_score(void) {
    return std::getenv("MESH_LLM_BACKEND_CONFIG") == nullptr ? 0 : 1;
}

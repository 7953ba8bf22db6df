// llama.cpp's own test of architectures (tests/test-llama-archs.cpp of the pinned source), over the devices of
// libggml-mesh. "-b STAGE0" means one stage, or with MESH_LLM_RING all stages and HOST, each with a part of the layers.
#include <ggml-backend.h>
#include <llama-cpp.h>
#include <llama.h>

#include <cstdlib>
#include <cstring>
#include <vector>

static llama_model_params over_ring(llama_model_params params) {
    static std::vector<ggml_backend_dev_t> ring;
    static std::vector<float> equal_shares(llama_max_devices(), 1.0f);
    const bool wanted = std::getenv("MESH_LLM_RING") != nullptr && params.devices != nullptr &&
                        params.devices[0] != nullptr &&
                        std::strcmp(ggml_backend_dev_name(params.devices[0]), "STAGE0") == 0;
    if (!wanted) {
        return params;
    }
    ring.clear();
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        const char * name = ggml_backend_dev_name(device);
        if (std::strncmp(name, "STAGE", 5) == 0 || std::strcmp(name, "HOST") == 0) {
            ring.push_back(device);
        }
    }
    ring.push_back(nullptr);
    params.devices = ring.data();
    params.tensor_split = equal_shares.data();
    return params;
}

// The two calls by which the test loads a model.
#define llama_model_init_from_user(metadata, set_data, user, params)                                                   \
    llama_model_init_from_user(metadata, set_data, user, over_ring(params))
#define llama_model_load_from_file_ptr(file, params) llama_model_load_from_file_ptr(file, over_ring(params))
#define main test_llama_archs
#include <tests/test-llama-archs.cpp>
#undef main

int main(int argc, char ** argv) {
    ggml_backend_load_all(); // reads GGML_BACKEND_PATH
    return test_llama_archs(argc, argv);
}

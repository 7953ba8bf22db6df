// mesh-llm-measure LLAMA-SERVER'S ARGUMENTS: prints in JSON what the model takes with them, as llama.cpp plans it.
//
// Nothing is loaded or computed: llama.cpp is asked with `no_alloc`, as its own --fit does, on devices that are only
// figures. It is asked in several layouts (on one device, over a stage and HOST, on the CPU alone) and for several
// contexts. All sizes are bytes; lists have one number for each of "contexts".
#include "measure/figures.h"

#include <arg.h>
#include <common.h>
#include <log.h>
#include <mtmd.h>
#include <nlohmann/json.hpp>
#include <speculative.h>
#include <src/llama-ext.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using meshllm::measure::figure_device;
using meshllm::measure::forget;
using meshllm::measure::placed;
using nlohmann::json;

// Tokens. Every sliding window with its batch is longer than the first, and shorter than the last two: between those,
// only what grows with the context grows.
const std::vector<uint32_t> contexts = {1024, 4096, 16384, 131072, 262144};

std::string first_error; // later ones follow from it

void keep_error(ggml_log_level level, const char * text, void * /*user_data*/) {
    if (level == GGML_LOG_LEVEL_ERROR && first_error.empty()) {
        first_error = text;
    }
}

/// What tools/server/server.cpp and server-context.cpp make of the arguments before they load the model.
void adjust(common_params & params) {
    if (params.embedding) {
        params.n_batch = std::min(params.n_batch, params.n_ubatch);
    }
    if (params.n_parallel < 0) {
        params.n_parallel = 4;
        params.kv_unified = true;
    }
    const bool pooled =
        params.pooling_type != LLAMA_POOLING_TYPE_UNSPECIFIED && params.pooling_type != LLAMA_POOLING_TYPE_NONE;
    common_speculative_output_limits limits = {params.n_batch, 1};
    if (!params.embedding && !pooled) {
        const int n_max = common_speculative_n_max(&params.speculative);
        limits = common_speculative_get_output_limits(params.n_batch, params.n_parallel, n_max);
    }
    params.n_outputs_max = std::max<int32_t>(1, limits.total);
    params.n_outputs_max_per_seq = std::max<int32_t>(1, limits.per_seq);
}

struct Sums {
    size_t stage = 0;      // compute of a stage
    size_t host = 0;       // compute of the host or the CPU
    size_t host_model = 0; // weights outside the figure devices
};

Sums sums(const llama_context * context) {
    Sums found;
    for (const auto & [type, bytes] : llama_get_memory_breakdown(context)) {
        if (ggml_backend_buft_is_host(type)) {
            found.host += bytes.compute;
            found.host_model += bytes.model;
        } else {
            found.stage = std::max(found.stage, bytes.compute);
        }
    }
    return found;
}

/// The model laid out on `devices`, or on the CPU. `visit` sees each context.
/// `split`: layers of each device; the output layer is one more of the last.
template <typename Visit>
void plan(const common_params & params, std::vector<ggml_backend_dev_t> devices, const std::vector<int> & split,
          Visit visit) {
    common_params copy = params;
    auto model_params = common_model_params_to_llama(copy);
    model_params.n_gpu_layers = devices.empty() ? 0 : 999;
    devices.push_back(nullptr);
    model_params.devices = devices.data();
    std::vector<float> shares(llama_max_devices(), 0.0F);
    std::transform(split.begin(), split.end(), shares.begin(), [](int n) { return static_cast<float>(n); });
    model_params.tensor_split = shares.data();
    meshllm::measure::share(split);
    model_params.no_alloc = true;
    model_params.load_mode = LLAMA_LOAD_MODE_NONE;
    const std::unique_ptr<llama_model, decltype(&llama_model_free)> model(
        llama_model_load_from_file(params.model.path.c_str(), model_params), llama_model_free);
    if (!model) {
        throw std::runtime_error(first_error.empty() ? "llama.cpp cannot load the model" : first_error);
    }
    auto context_params = common_context_params_to_llama(params);
    for (const uint32_t n_ctx : contexts) {
        context_params.n_ctx = n_ctx * (params.kv_unified ? 1 : static_cast<uint32_t>(params.n_parallel));
        forget(); // recurrent states are placed now, the rest when it is asked for
        const std::unique_ptr<llama_context, decltype(&llama_free)> context(
            llama_init_from_model(model.get(), context_params), llama_free);
        if (!context) {
            throw std::runtime_error(first_error.empty() ? "llama.cpp cannot make a context" : first_error);
        }
        visit(model.get(), context.get());
    }
}

/// The layer in "blk.12.attn_q.weight" or "cache_k_l12"; -1 for other tensors.
int layer_of(const std::string & name) {
    const size_t at = name.rfind("blk.", 0) == 0 ? 4 : name.rfind("cache_", 0) == 0 ? name.rfind("_l") + 2 : 0;
    return at < 2 || at >= name.size() || name[at] < '0' || name[at] > '9' ? -1 : std::stoi(name.substr(at));
}

void keep_larger(json & sizes, size_t at, size_t size) {
    if (at == sizes.size()) {
        sizes.push_back(size);
    } else {
        sizes[at] = std::max(sizes[at].get<size_t>(), size);
    }
}

json measure(const common_params & params) {
    json out = {{"n_ctx", params.n_ctx}, {"contexts", json::array()}, {"layers", json::array()}};
    json & layers = out["layers"];
    size_t n_contexts = 0;
    size_t output = 0, tied = 0;
    for (const char * key : {"compute_stage", "compute_host", "compute_alone", "compute_cpu", "compute_output"}) {
        out[key] = json::array();
    }
    // All on one device, to which each tensor is known by name.
    plan(params, {figure_device(0)}, {}, [&](const llama_model * model, const llama_context * context) {
        const Sums found = sums(context);
        if (layers.empty()) {
            const int n = llama_model_n_layer(model) + llama_model_n_layer_nextn(model);
            for (int i = 0; i < n; i++) {
                layers.push_back({{"weights", 0}, {"state", json::array()}});
            }
            out["n_ctx_train"] = llama_model_n_ctx_train(model);
            out["host_weights"] = found.host_model;
            const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
            out["logits"] = sizeof(float) * static_cast<size_t>(n_vocab) * static_cast<size_t>(params.n_outputs_max);
        }
        output = tied = 0;
        for (auto & layer : layers) {
            layer["weights"] = 0;
            layer["state"].push_back(0);
        }
        for (const auto & [name, size] : placed()) {
            const int il = layer_of(name);
            if (name.rfind("token_embd", 0) == 0) {
                tied += size;
            } else if (il < 0) {
                output += size;
            } else if (static_cast<size_t>(il) < layers.size()) {
                json & layer = layers[static_cast<size_t>(il)];
                json & sum = name[0] == 'b' ? layer["weights"] : layer["state"][n_contexts];
                sum = sum.get<size_t>() + size;
            }
        }
        n_contexts++;
        out["contexts"].push_back(llama_n_ctx(context));
        out["compute_alone"].push_back(found.stage + found.host);
    });
    out["output_weights"] = output;
    out["tied_weights"] = tied; // a second copy of the embedding as output layer, where the host's device is a GPU
    // Over stages and HOST, in several ways: what a device computes depends on the kinds of its layers, and on whether
    // it is the first.
    const int n = static_cast<int>(layers.size());
    const std::vector<ggml_backend_dev_t> devices = {figure_device(0), figure_device(1), figure_device(2)};
    for (const std::vector<int> & split : {std::vector{n, 0, 1}, std::vector{n - n / 2, n / 2, 1}}) {
        size_t at = 0;
        plan(params, devices, split, [&](const llama_model * /*model*/, const llama_context * context) {
            const Sums found = sums(context);
            keep_larger(out["compute_stage"], at, found.stage);
            keep_larger(out["compute_output"], at++, found.host / 2); // HOST's and the CPU's are the same buffer
        });
    }
    plan(params, devices, {1, 0, n}, [&](const llama_model * /*model*/, const llama_context * context) {
        out["compute_host"].push_back(sums(context).host / 2);
    });
    plan(params, {}, {}, [&](const llama_model * /*model*/, const llama_context * context) {
        out["compute_cpu"].push_back(sums(context).host);
    });
    return out;
}

/// All that the projector takes, also to encode an image.
size_t projector_bytes(const common_params & params) {
    auto context_params = mtmd_context_params_default();
    context_params.use_gpu = false;
    context_params.image_min_tokens = params.image_min_tokens;
    context_params.image_max_tokens = params.image_max_tokens;
    size_t sum = 0;
    for (const auto & [device, bytes] : mtmd_get_memory_usage(params.mmproj.path.c_str(), context_params)) {
        sum += bytes;
    }
    return sum;
}

} // namespace

int main(int argc, char ** argv) {
    common_log_pause(common_log_main());
    common_params params;
    if (!common_params_parse(argc, argv, params, LLAMA_EXAMPLE_SERVER)) {
        return 2;
    }
    llama_log_set(keep_error, nullptr);
    mtmd_log_set(keep_error, nullptr);
    llama_backend_init();
    try {
        adjust(params);
        json out = measure(params);
        out["projector"] = params.mmproj.path.empty() ? 0 : projector_bytes(params);
        std::printf("%s\n", out.dump().c_str());
    } catch (const std::exception & error) {
        std::fprintf(stderr, "mesh-llm-measure: %s\n", error.what());
        return 1;
    }
    return 0;
}

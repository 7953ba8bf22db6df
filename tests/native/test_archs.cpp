// llama.cpp's own test of architectures (tests/test-llama-archs.cpp of the pinned source), over the devices of
// libggml-mesh. "-b STAGE0" means one stage, or with MESH_LLM_RING all stages and HOST, each with a part of the layers.
// "--others" as the first argument: the embedding models and some others, which that test leaves out.
#include <ggml-backend.h>
#include <llama-cpp.h>
#include <llama.h>
#include <src/llama-model.h>

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

// The test asks for four threads, which wait for each other on a busy machine longer than these tiny models compute.
static llama_context_params of_one_thread(llama_context_params params) {
    params.n_threads = params.n_threads_batch = 1;
    return params;
}

// The calls by which the test loads a model.
#define llama_model_init_from_user(metadata, set_data, user, params)                                                   \
    llama_model_init_from_user(metadata, set_data, user, over_ring(params))
#define llama_model_load_from_file_ptr(file, params) llama_model_load_from_file_ptr(file, over_ring(params))
#define llama_init_from_model(model, params) llama_init_from_model(model, of_one_thread(params))
#define main test_llama_archs
#include <tests/test-llama-archs.cpp>
#undef main

// What llama.cpp's test leaves out for want of a tokenizer, of logits or of some parameter.
struct Other {
    llm_arch arch;
    bool moe;
    bool embeds; // rather than giving logits
};
static const std::vector<Other> others = {
    {LLM_ARCH_BERT, false, true},          {LLM_ARCH_MODERN_BERT, false, true}, {LLM_ARCH_NOMIC_BERT, false, true},
    {LLM_ARCH_NOMIC_BERT_MOE, true, true}, {LLM_ARCH_NEO_BERT, false, true},    {LLM_ARCH_JINA_BERT_V2, false, true},
    {LLM_ARCH_JINA_BERT_V3, false, true},  {LLM_ARCH_EUROBERT, false, true},    {LLM_ARCH_GEMMA_EMBEDDING, false, true},
    {LLM_ARCH_LLAMA_EMBED, false, true},   {LLM_ARCH_T5ENCODER, false, true},   {LLM_ARCH_GEMMA4, false, false},
    {LLM_ARCH_RWKV6, false, false},        {LLM_ARCH_RWKV7, false, false},      {LLM_ARCH_ARWKV7, false, false},
};

static gguf_context_ptr metadata_of(const Other & other, enum llama_pooling_type pooling) {
    gguf_context_ptr gguf = get_gguf_ctx(other.arch, other.moe);
    const std::string prefix = std::string(llm_arch_name(other.arch)) + ".";
    if (other.embeds) {
        gguf_set_val_u32(gguf.get(), "tokenizer.ggml.token_type_count", 2);
        gguf_set_val_u32(gguf.get(), (prefix + "pooling_type").c_str(), pooling);
        gguf_set_val_bool(gguf.get(), (prefix + "attention.causal").c_str(), false);
    }
    for (const char * rank : {"decay_lora_rank", "iclr_lora_rank", "value_residual_mix_lora_rank", "gate_lora_rank"}) {
        gguf_set_val_u32(gguf.get(), (prefix + "attention." + rank).c_str(), 32); // RWKV 7
    }
    if (other.arch == LLM_ARCH_ARWKV7) {
        gguf_set_val_u32(gguf.get(), (prefix + "token_shift_count").c_str(), 1);
    }
    if (other.arch == LLM_ARCH_GEMMA4) {
        const bool sliding[] = {true, true, true, true, false};
        gguf_set_arr_data(gguf.get(), (prefix + "attention.sliding_window_pattern").c_str(), GGUF_TYPE_BOOL, sliding,
                          5);
    }
    return gguf;
}

static std::vector<float> embed(llama_model * model, llama_context * context, const std::vector<llama_token> & tokens) {
    llama_set_embeddings(context, true);
    common_batch batch(context);
    for (size_t i = 0; i < tokens.size(); i++) {
        batch.add(tokens[i], i, 0, true);
    }
    const auto type = llama_model_has_encoder(model) ? LLAMA_PROCESS_TYPE_ENCODE : LLAMA_PROCESS_TYPE_DECODE;
    if (llama_process(context, type, batch.get())) {
        throw std::runtime_error("failed to embed");
    }
    std::vector<float> found;
    for (size_t i = 0; i < tokens.size(); i++) {
        const float * each = llama_get_embeddings_ith(context, i);
        found.insert(found.end(), each, each + llama_model_n_embd(model));
    }
    return found;
}

static std::vector<float> compute(const Other & other, size_t seed, const std::vector<ggml_backend_dev_t> & devices) {
    const std::vector<llama_token> tokens = get_tokens(128, 128, seed);
    gguf_context_ptr gguf = metadata_of(other, LLAMA_POOLING_TYPE_NONE);
    const auto made = get_model_and_ctx(gguf.get(), nullptr, seed, 0.1f, devices, LLAMA_SPLIT_MODE_LAYER, other.embeds);
    return other.embeds ? embed(made.first.get(), made.second.get(), tokens)
                        : get_logits(made.first.get(), made.second.get(), tokens);
}

static void save(const llama_model * model, const std::string & path) {
    llama_model_saver saver(model);
    saver.add_kv_from_model();
    saver.add_tensors_from_model();
    if (gguf_find_tensor(saver.gguf_ctx, model->tok_embd->name) < 0) { // left out of models without an output layer
        saver.add_tensor(model->tok_embd);
    }
    saver.save(path);
}

// One line per model, as of llama.cpp's test; with a folder the models are written there.
static int test_others(const std::string & filter, size_t seed, const std::string & folder) {
    bool all_ok = true;
    for (const Other & other : others) {
        const char * name = llm_arch_name(other.arch);
        if (!arch_matches(filter, other.arch)) {
            continue;
        }
        if (!folder.empty()) {
            gguf_context_ptr gguf = metadata_of(other, LLAMA_POOLING_TYPE_MEAN);
            const auto made = get_model_and_ctx(gguf.get(), nullptr, seed, 0.1f, {});
            save(made.first.get(), folder + "/" + name + ".gguf");
            continue;
        }
        const std::vector<float> alone = compute(other, seed, {});
        const std::vector<float> over_stages = compute(other, seed, {ggml_backend_dev_by_name("STAGE0")});
        const double error = nmse(alone, over_stages);
        const bool ok = error < 1e-4; // llama.cpp's own limit; false for NaN
        printf("|%16s| %s (%.2e)|\n", name, ok ? "OK" : "FAIL", error);
        fflush(stdout);
        all_ok = all_ok && ok;
    }
    return all_ok ? 0 : 1;
}

int main(int argc, char ** argv) {
    ggml_backend_load_all(); // reads GGML_BACKEND_PATH
    if (argc < 2 || std::strcmp(argv[1], "--others") != 0) {
        const int status = test_llama_archs(argc, argv);
        common_log_flush(common_log_main());
        return status;
    }
    std::string filter;
    std::string folder;
    size_t seed = 1;
    llama_log_set(
        [](ggml_log_level level, const char * text, void *) {
            if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) {
                std::fputs(text, stderr);
            }
        },
        nullptr);
    for (int i = 2; i + 1 < argc; i += 2) {
        const std::string option = argv[i];
        if (option == "-a") {
            filter = argv[i + 1];
        } else if (option == "-o") {
            folder = argv[i + 1];
        } else if (option == "-s") {
            seed = std::stoull(argv[i + 1]);
        }
    }
    return test_others(filter, seed, folder);
}

#pragma once

// What the programs of this folder have in common: a model, its text, and how they end when something is not there.

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

static llama_model * model;
static std::vector<llama_token> text;

[[noreturn]] static void die(const char * what) {
    fprintf(stderr, "error: %s\n", what);
    exit(1);
}

static ggml_type type_from_name(const char * name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * other = ggml_type_name((ggml_type) i);
        if (other && strcmp(name, other) == 0) {
            return (ggml_type) i;
        }
    }
    die("unknown type");
}

// at least 800 tokens; of llama.cpp's log only the errors are printed. LLAMA_ARG_SPLIT_MODE (layer, tensor; none: the first alone) is for devices,
// LLAMA_ARG_N_GPU_LAYERS how many layers these have.
static void load_model_and_text(const char * model_path, const char * text_path) {
    llama_log_set([](ggml_log_level level, const char * line, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            fputs(line, stderr);
        }
    }, nullptr);

    llama_model_params params = llama_model_default_params();
    if (const char * mode = getenv("LLAMA_ARG_SPLIT_MODE")) {
        ggml_backend_load_all();
        if (!ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU)) {
            die("no devices");
        }
        params.split_mode = strcmp(mode, "tensor") == 0 ? LLAMA_SPLIT_MODE_TENSOR :
                            strcmp(mode, "none")   == 0 ? LLAMA_SPLIT_MODE_NONE : LLAMA_SPLIT_MODE_LAYER;
    }
    if (const char * layers = getenv("LLAMA_ARG_N_GPU_LAYERS")) {
        params.n_gpu_layers = atoi(layers);
    }
    model = llama_model_load_from_file(model_path, params);
    if (!model) {
        die("no model");
    }

    std::ifstream file(text_path, std::ios::binary);
    const std::string prose((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    text.resize(4096);
    const int n = llama_tokenize(llama_model_get_vocab(model), prose.data(), (int) std::min<size_t>(prose.size(), 6000), text.data(), (int) text.size(), true, false);
    if (n < 800) {
        die("the text is too short");
    }
    text.resize(n);
}

#pragma once

// --kv-layers, --kv-profile, --kv-recent and --kv-first. They reach libllama through the environment, so that programs without common options, as
// llama-bench, take the same from there.

#include "arg.h"

#include <cstdlib>
#include <filesystem>
#include <regex>
#include <string>

static void rq_set_env(const char * name, const std::string & value) {
#if defined(_WIN32)
    _putenv_s(name, value.c_str());
#else
    setenv(name, value.c_str(), 1);
#endif
}

// as UTF-8 on every system; from C++20 on u8string() is no std::string
static std::string rq_utf8(const std::filesystem::path & path) {
    const auto text = path.u8string();
    return { text.begin(), text.end() };
}

// The profile beside a model is used unless another one is named, or none: NAME-kv.gguf, where NAME is that of the model without its
// quantization and shard number, or else the whole of it. ggufrq/models/names.py says the same.
static void rq_find_profile(const std::string & model) {
    static const std::regex shard("-[0-9]{5}-of-[0-9]{5}$");
    static const std::regex gguf("[-_.]GGUF$", std::regex::icase);
    static const std::regex encoding("[-_.]((UD-)?I?Q[0-9][A-Za-z0-9_]*|TQ[0-9][A-Za-z0-9_]*|MXFP4[A-Za-z0-9_]*|B?F16|F32)$", std::regex::icase);

    const std::filesystem::path path = std::filesystem::u8path(model);

    const std::string stem = rq_utf8(path.stem());

    std::string name = std::regex_replace(std::regex_replace(stem, shard, ""), gguf, "");
    const std::string base = std::regex_replace(name, encoding, "");
    name = base.empty() ? name : base;

    std::string found;
    for (const auto & end : { name, stem }) {
        const auto profile = path.parent_path() / std::filesystem::u8path(end + "-kv.gguf");
        std::error_code error;
        if (found.empty() && std::filesystem::is_regular_file(profile, error)) {
            found = rq_utf8(profile);
        }
    }
    rq_set_env("LLAMA_RQ_PROFILE_BESIDE", found);
}

static common_arg rq_arg_kv_layers() {
    return common_arg(
        {"--kv-layers"}, "SPEC",
        "KV cache data types of single layers, beside -ctk and -ctv for all others: LAYERS:TYPE or LAYERS:TYPE_K/TYPE_V,\n"
        "with ';' between them, as in \"0-1,-1:q8_0;5:iso4/iso3\"; layers with a KV cache count from 0, or from the end: -1",
        [](common_params &, const std::string & value) { rq_set_env("LLAMA_RQ_LAYERS", value); }
    ).set_env("LLAMA_RQ_LAYERS");
}

static common_arg rq_arg_kv_profile() {
    return common_arg(
        {"--kv-profile", "--kv-calib"}, "FILE",
        "metric in which K is stored, for rotated cache types of K: a file made by `ggufrq calibrate`, or none\n"
        "(default: NAME-kv.gguf beside the model, if it is there)",
        [](common_params &, const std::string & value) { rq_set_env("LLAMA_RQ_PROFILE", value); }
    ).set_env("LLAMA_RQ_PROFILE");
}

static common_arg rq_arg_kv_first() {
    return common_arg(
        {"--kv-first"}, "N",
        "each query sees the first N tokens of its sequence in f16, beside a quantized cache (default: 0)",
        [](common_params &, const std::string & value) { rq_set_env("LLAMA_RQ_FIRST", value); }
    ).set_env("LLAMA_RQ_FIRST");
}

static common_arg rq_arg_kv_recent() {
    return common_arg(
        {"--kv-recent"}, "N",
        "each query sees the newest N tokens of its sequence in f16, beside a quantized cache (default: 0)",
        [](common_params &, const std::string & value) { rq_set_env("LLAMA_RQ_RECENT", value); }
    ).set_env("LLAMA_RQ_RECENT");
}

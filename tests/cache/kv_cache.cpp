// What a KV cache must survive, driven through llama.h: shifted positions, several sequences, copied sequences, saved
// states. Prints one JSON object of normalised errors of logits against the same steps with an f16 cache, or against
// the same cache type where the result must not depend on the step.
//
//   kv_cache MODEL TEXT TYPE_K TYPE_V FLASH_ATTN STATE_FILE write|read
//
// LLAMA_RQ_LAYERS, LLAMA_RQ_PROFILE, LLAMA_RQ_RECENT and LLAMA_RQ_FIRST hold for all but the f16 cache.

#include "kv_driver.h"

#include <cmath>

using logits_t = std::vector<float>;

struct session {
    llama_context * ctx;

    session(ggml_type type_k, ggml_type type_v, bool flash_attn, bool unified) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx           = 1024;
        params.n_batch         = 1024;
        params.n_ubatch        = 128;
        params.n_seq_max       = 2;
        params.n_threads       = 1;
        params.n_threads_batch = 1;
        params.type_k          = type_k;
        params.type_v          = type_v;
        params.kv_unified      = unified;
        params.flash_attn_type = flash_attn ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
        ctx = llama_init_from_model(model, params);
        if (!ctx) {
            die("no context");
        }
    }

    ~session() { llama_free(ctx); }

    llama_memory_t memory() { return llama_get_memory(ctx); }

    // decode n tokens from `from` of the text at position pos; returns the logits after the last one
    logits_t decode(int seq, int from, int n, int pos) {
        llama_batch batch = llama_batch_init(n, 0, 1);
        for (int i = 0; i < n; ++i) {
            batch.token   [i]    = text[from + i];
            batch.pos     [i]    = pos + i;
            batch.n_seq_id[i]    = 1;
            batch.seq_id  [i][0] = seq;
            batch.logits  [i]    = i == n - 1;
        }
        batch.n_tokens = n;
        if (llama_decode(ctx, batch) != 0) {
            die("decode failed");
        }
        llama_batch_free(batch);
        const float * logits = llama_get_logits_ith(ctx, n - 1);
        return logits_t(logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model)));
    }
};

// mean squared difference over the variance of b
static double nmse(const logits_t & a, const logits_t & b) {
    double mean = 0.0, diff = 0.0, var = 0.0;
    for (float v : b) { mean += v; }
    mean /= b.size();
    for (size_t i = 0; i < b.size(); ++i) {
        diff += std::pow((double) a[i] - b[i], 2);
        var  += std::pow(b[i] - mean, 2);
    }
    return diff/var;
}

struct result {
    logits_t plain;   // after 300 tokens
    logits_t next;    // and 40 more
    logits_t shifted; // the same 40 after 100 tokens in the middle were dropped and the rest moved down
};

static result steps(session & s) {
    result r;
    r.plain = s.decode(0, 0, 300, 0);
    r.next  = s.decode(0, 300, 40, 300);
    if (!llama_memory_can_shift(s.memory())) {
        return r;
    }
    llama_memory_seq_rm (s.memory(), 0, 300, -1);
    llama_memory_seq_rm (s.memory(), 0,  50, 150);
    llama_memory_seq_add(s.memory(), 0, 150, -1, -100);
    r.shifted = s.decode(0, 300, 40, 200);
    return r;
}

static result reference_steps(bool flash_attn) {
    const char * names[] = { "LLAMA_RQ_LAYERS", "LLAMA_RQ_PROFILE", "LLAMA_RQ_RECENT", "LLAMA_RQ_FIRST" };
    std::vector<std::string> values;
    for (const char * name : names) {
        const char * value = getenv(name);
        values.push_back(value ? value : "");
        unsetenv(name);
    }
    session reference(GGML_TYPE_F16, GGML_TYPE_F16, flash_attn, true);
    for (size_t i = 0; i < values.size(); ++i) {
        setenv(names[i], values[i].c_str(), 1);
    }
    return steps(reference);
}

int main(int argc, char ** argv) {
    if (argc != 8) {
        die("usage: kv_cache MODEL TEXT TYPE_K TYPE_V FLASH_ATTN STATE_FILE write|read");
    }
    const ggml_type   type_k     = type_from_name(argv[3]);
    const ggml_type   type_v     = type_from_name(argv[4]);
    const bool        flash_attn = atoi(argv[5]) != 0;
    const std::string state_file = argv[6];
    const bool        write      = strcmp(argv[7], "write") == 0;

    load_model_and_text(argv[1], argv[2]);

    session s(type_k, type_v, flash_attn, true);

    if (!write) {
        // a state of another process, type or rotation
        std::vector<llama_token> tokens(1024);
        size_t n_tokens = 0;
        const bool restored = llama_state_load_file(s.ctx, state_file.c_str(), tokens.data(), tokens.size(), &n_tokens);
        printf("{\"restored\": %s", restored ? "true" : "false");
        if (restored) {
            session fresh(type_k, type_v, flash_attn, true);
            fresh.decode(0, 0, 300, 0);
            printf(", \"state\": %.3e", nmse(s.decode(0, 300, 40, 300), fresh.decode(0, 300, 40, 300)));
        }
        printf("}\n");
        return 0;
    }

    const result got = steps(s);

    const result want = reference_steps(flash_attn);
    printf("{\"plain\": %.3e, \"next\": %.3e", nmse(got.plain, want.plain), nmse(got.next, want.next));
    if (!got.shifted.empty()) {
        printf(", \"shifted\": %.3e", nmse(got.shifted, want.shifted));
    }

    // two sequences side by side, in one stream and in two, must not see each other
    for (bool unified : { true, false }) {
        session both(type_k, type_v, flash_attn, unified);
        both.decode(1, 400, 200, 0);
        both.decode(0,   0, 300, 0);
        both.decode(1, 600,  60, 200);
        printf(", \"sequences_%s\": %.3e", unified ? "unified" : "streams", nmse(both.decode(0, 300, 40, 300), got.next));
        llama_memory_seq_rm(both.memory(), 1, -1, -1);
        llama_memory_seq_rm(both.memory(), 0, 300, -1);
        if (unified) {
            // recurrent layers cannot be cut back, so that a model with them is copied whole
            session copy(type_k, type_v, flash_attn, unified);
            copy.decode(0, 0, 300, 0);
            llama_memory_seq_cp(copy.memory(), 0, 1, -1, -1);
            printf(", \"copied\": %.3e", nmse(copy.decode(1, 300, 40, 300), got.next));
        }
    }

    session saved(type_k, type_v, flash_attn, true);
    saved.decode(0, 0, 300, 0);
    if (!llama_state_save_file(saved.ctx, state_file.c_str(), text.data(), 300)) {
        die("the state could not be saved");
    }
    printf("}\n");

    return 0;
}

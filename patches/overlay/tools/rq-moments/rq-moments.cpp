// llama-rq-moments: sums over a text of K, K*K^T and Q*Q^T before RoPE, by layer and KV head, of which `ggufrq calibrate` makes a profile.
//
//   llama-rq-moments -m MODEL -f TEXT -o MOMENTS.gguf -c TOKENS --chunks N
//
// Each chunk is a text of its own from position 0. The last quarter of the chunks is summed apart, for telling what a profile gains
// on text that it was not made from. Sums are written after each chunk; a file of the same chunks is gone on with.
//
// general.type is kv-moments, rq.moments.{n_ctx,chunks,held,done} how many tokens a chunk has, how many chunks there are, are held out
// and are done. Tensors in f64: {fit,held}.N.{k,kk,qq}.{rope,norm,plain}, shapes as in src/llama-rq-moments.h, queries summed by KV head.

#include "arg.h"
#include "common.h"
#include "ggml-cpp.h"
#include "gguf.h"
#include "llama.h"
#include "log.h"

#include <algorithm>
#include <array>
#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

static constexpr uint32_t RQ_MOMENTS_VERSION = 1;

struct rq_sum {
    std::array<int64_t, 3> ne;
    std::vector<double>    values;
};

class rq_moments {
public:
    std::string set; // which chunks are summed now: fit or held

    // for the scheduler: which nodes it is to show, and once they are computed, their values
    bool see(const ggml_tensor * t, bool ask) {
        char what[3];
        char how[6];
        int  il;
        if (sscanf(t->name, "rq_sum_%2[kq]_%5[a-z]-%d", what, how, &il) != 3) {
            return !ask;
        }
        if (!ask) {
            add(set + "." + std::to_string(il) + ".", what, how, t);
        }
        return true;
    }

    bool empty() const {
        return sums.empty();
    }

    void write(const std::string & path, int n_ctx, int n_chunk, int n_held, int n_done) const {
        size_t size = 0;
        for (const auto & [_, sum] : sums) {
            size += sum.values.size()*sizeof(double) + ggml_tensor_overhead() + GGML_MEM_ALIGN;
        }
        ggml_context_ptr ctx(ggml_init({ size, nullptr, false }));
        gguf_context_ptr out(gguf_init_empty());
        gguf_set_val_str(out.get(), "general.architecture", "kv-moments");
        gguf_set_val_str(out.get(), "general.type", "kv-moments");
        gguf_set_val_u32(out.get(), "rq.moments.version", RQ_MOMENTS_VERSION);
        gguf_set_val_u32(out.get(), "rq.moments.n_ctx",  n_ctx);
        gguf_set_val_u32(out.get(), "rq.moments.chunks", n_chunk);
        gguf_set_val_u32(out.get(), "rq.moments.held",   n_held);
        gguf_set_val_u32(out.get(), "rq.moments.done",   n_done);
        for (const auto & [name, sum] : sums) {
            ggml_tensor * t = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F64, sum.ne[0], sum.ne[1], sum.ne[2]);
            ggml_set_name(t, name.c_str());
            std::copy(sum.values.begin(), sum.values.end(), (double *) t->data);
            gguf_add_tensor(out.get(), t);
        }
        const std::string making = path + ".part";
        std::error_code   error;
        const bool written = gguf_write_to_file(out.get(), making.c_str(), false);
        if (written) { // replaces a file that is there, also on Windows, where rename() does not
            std::filesystem::rename(std::filesystem::u8path(making), std::filesystem::u8path(path), error);
        }
        if (!written || error) {
            throw std::runtime_error("cannot write " + path);
        }
    }

    // how many chunks the sums of a file are over, 0 where there is none that can be gone on with
    int read(const std::string & path, int n_ctx, int n_chunk, int n_held) {
        FILE * there = fopen(path.c_str(), "rb"); // gguf_init_from_file calls it an error when there is none
        if (!there) {
            return 0;
        }
        fclose(there);

        ggml_context * data = nullptr;
        gguf_context_ptr in(gguf_init_from_file(path.c_str(), { false, &data }));
        ggml_context_ptr ctx(data);

        const auto value = [&](const char * key) {
            const int64_t id = in ? gguf_find_key(in.get(), (std::string("rq.moments.") + key).c_str()) : -1;
            return id >= 0 && gguf_get_kv_type(in.get(), id) == GGUF_TYPE_UINT32 ? (int) gguf_get_val_u32(in.get(), id) : -1;
        };
        if (value("version") != (int) RQ_MOMENTS_VERSION || value("n_ctx") != n_ctx || value("chunks") != n_chunk || value("held") != n_held) {
            return 0;
        }
        for (ggml_tensor * t = ggml_get_first_tensor(data); t; t = ggml_get_next_tensor(data, t)) {
            if (t->type == GGML_TYPE_F64) {
                const double * values = (const double *) t->data;
                sums[t->name] = { { t->ne[0], t->ne[1], t->ne[2] }, std::vector<double>(values, values + ggml_nelements(t)) };
            }
        }
        return value("done");
    }

private:
    std::map<std::string, rq_sum> sums;

    std::vector<float> buf;

    void add(const std::string & layer, const std::string & what, const std::string & how, const ggml_tensor * t) {
        std::array<int64_t, 3> ne = { t->ne[0], t->ne[1], t->ne[2] };
        if (what == "qq") { // those of a group into that of their KV head; the sums of K come first in a graph
            const auto k = std::find_if(sums.begin(), sums.end(), [&](const auto & it) { return it.first.rfind(layer + "kk.", 0) == 0; });
            if (k == sums.end()) {
                return;
            }
            ne[2] = k->second.ne[2];
        }
        rq_sum & sum = sums[layer + what + "." + how];
        if (sum.values.empty()) {
            sum = { ne, std::vector<double>(ne[0]*ne[1]*ne[2]) };
        }
        buf.resize(ggml_nelements(t));
        ggml_backend_tensor_get(t, buf.data(), 0, ggml_nbytes(t));

        const int64_t n_head  = t->ne[2];
        const int64_t n_inner = t->ne[0]*t->ne[1];
        for (int64_t h = 0; h < n_head; ++h) {
            double      * dst = sum.values.data() + h/(n_head/ne[2])*n_inner;
            const float * src = buf.data() + h*n_inner;
            for (int64_t i = 0; i < n_inner; ++i) {
                dst[i] += src[i];
            }
        }
    }
};

static bool rq_see(ggml_tensor * t, bool ask, void * moments) {
    return ((rq_moments *) moments)->see(t, ask);
}

static void rq_sum_chunk(llama_context * ctx, std::vector<llama_token> tokens, int n_batch) {
    const llama_vocab * vocab = llama_model_get_vocab(llama_get_model(ctx));
    if (llama_vocab_get_add_bos(vocab)) {
        tokens[0] = llama_vocab_bos(vocab);
    }
    llama_memory_clear(llama_get_memory(ctx), true);

    llama_batch batch = llama_batch_init(n_batch, 0, 1);
    int rc = 0;
    for (int first = 0; first < (int) tokens.size() && rc == 0; first += n_batch) {
        batch.n_tokens = std::min<int>(n_batch, tokens.size() - first);
        for (int i = 0; i < batch.n_tokens; ++i) {
            batch.token   [i]    = tokens[first + i];
            batch.pos     [i]    = first + i;
            batch.n_seq_id[i]    = 1;
            batch.seq_id  [i][0] = 0;
            batch.logits  [i]    = false;
        }
        rc = llama_decode(ctx, batch);
    }
    llama_batch_free(batch);
    if (rc != 0) {
        throw std::runtime_error("the model cannot be evaluated, llama_decode gives " + std::to_string(rc));
    }
}

static void rq_run(common_params & params) {
    const int n_ctx = params.n_ctx;
    if (n_ctx < 1) {
        throw std::runtime_error("-c says how many tokens a chunk has: 1 or more");
    }

    rq_moments moments;
    params.cb_eval           = rq_see;
    params.cb_eval_user_data = &moments;
    params.warmup            = false;
    params.n_parallel        = 1;
    params.cache_type_k      = GGML_TYPE_F16; // a quantized K is rotated before it is seen
    params.cache_type_v      = GGML_TYPE_F16;
    params.n_batch           = std::min(params.n_batch, n_ctx);

    auto init = common_init_from_params(params);
    llama_context * ctx = init->context();
    if (!ctx || !llama_get_memory(ctx)) {
        throw std::runtime_error("there is no context with a KV cache");
    }
    const auto tokens = common_tokenize(ctx, params.prompt, true, params.parse_special);
    const int n_there = tokens.size()/n_ctx;
    const int n_chunk = params.n_chunks < 0 ? n_there : std::min(params.n_chunks, n_there);
    if (n_chunk == 0) {
        throw std::runtime_error("the text has " + std::to_string(tokens.size()) + " tokens, less than one chunk of " + std::to_string(n_ctx));
    }
    const int n_held = n_chunk/4;

    int n_done = moments.read(params.out_file, n_ctx, n_chunk, n_held);
    printf("moments: %d chunks of %d tokens, %d held out, %d done\n", n_chunk, n_ctx, n_held, n_done);
    fflush(stdout);
    for (; n_done < n_chunk; ++n_done) {
        moments.set = n_done < n_chunk - n_held ? "fit" : "held";
        rq_sum_chunk(ctx, { tokens.begin() + (size_t) n_done*n_ctx, tokens.begin() + (size_t) (n_done + 1)*n_ctx }, params.n_batch);
        if (moments.empty()) {
            throw std::runtime_error("no layer of this model has attention with a KV cache of its own");
        }
        moments.write(params.out_file, n_ctx, n_chunk, n_held, n_done + 1);
        printf("[%d]", n_done + 1);
        fflush(stdout);
    }
    printf("\n");
}

int main(int argc, char ** argv) {
    std::setlocale(LC_NUMERIC, "C");

    common_params params;
    params.n_ctx    = 1024;
    params.escape   = false;
    params.out_file = "moments.gguf";

    common_init();
    if (!common_params_parse(argc, argv, params, LLAMA_EXAMPLE_IMATRIX)) {
        return 1;
    }
#if defined(_WIN32)
    _putenv_s("LLAMA_RQ_MOMENTS", "1");
#else
    setenv("LLAMA_RQ_MOMENTS", "1", 1);
#endif

    llama_backend_init();
    llama_numa_init(params.numa);
    int rc = 0;
    try {
        rq_run(params);
    } catch (const std::exception & error) {
        LOG_ERR("%s: %s\n", __func__, error.what());
        rc = 1;
    }
    llama_backend_free();
    return rc;
}

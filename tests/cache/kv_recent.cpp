// What each query sees of the newest and the first tokens in f16 (LLAMA_RQ_RECENT, LLAMA_RQ_FIRST), looked at inside the graph
// while tokens are decoded, removed, replaced, copied, shifted, saved and restored. At every attention: each key that a
// query sees must be seen once, in the cache or as it was computed; as computed exactly those of the newest N and the
// first S tokens (or, after what drops them, some of these), and these with the very values that this token had.
//
//   kv_recent MODEL TEXT TYPE_K TYPE_V N,S SEED all|recurrent     (recurrent: without what such models cannot do)

#include "kv_driver.h"

#include "ggml-rq-types.h"

#include <map>
#include <random>
#include <set>
#include <utility>

static std::mt19937 rng;
static int n_recent;
static int n_first;

static int any(int lo, int hi) {
    return std::uniform_int_distribution<int>(lo, hi)(rng);
}

struct token_at {
    int seq, pos;
};

// K and V of a token, all heads, as f16
using row_t = std::vector<ggml_fp16_t>;

static bool is_exact(int pos, int query) {
    return pos > query - n_recent || pos < n_first;
}

struct oracle {
    std::string step;
    std::vector<token_at> ubatch;                      // in the order in which the graph has them
    std::map<int, std::map<int, std::vector<row_t>>> known; // by sequence and position: rows by layer, none if they changed
    bool all_held = true;                              // none of the newest tokens may be missing
    bool first_held = true;                            // nor of the first
    int  layer = 0;
    int  checked = 0, missing = 0;

    void fail(const token_at & t, const char * what) const {
        fprintf(stderr, "kv_recent: %s, layer %d, sequence %d, position %d: %s\n", step.c_str(), layer, t.seq, t.pos, what);
        exit(1);
    }

    // row e of two sources of an attention, in stream s
    static void append(const ggml_tensor * held, const ggml_tensor * cur, int64_t e, int64_t s, row_t & row) {
        const bool          is_held = e < held->ne[1];
        const ggml_tensor * t       = is_held ? held : cur;
        for (int64_t h = 0; h < t->ne[2]; ++h) {
            const char * x = (const char *) t->data + (is_held ? e : e - held->ne[1])*t->nb[1] + h*t->nb[2] + s*t->nb[3];
            const size_t n = row.size();
            row.resize(n + t->ne[0]);
            if (is_held) {
                memcpy(row.data() + n, x, t->ne[0]*sizeof(ggml_fp16_t));
            } else {
                ggml_fp32_to_fp16_row((const float *) x, row.data() + n, t->ne[0]);
            }
        }
    }

    void check(const ggml_tensor * attn) {
        const ggml_tensor * mask   = attn->src[3];
        const ggml_tensor * recent = attn->src[GGML_RQ_RECENT_MASK];
        if (!recent) {
            die("an attention without recent rows");
        }
        const int64_t n_tps = attn->src[0]->ne[1];
        if ((int64_t) ubatch.size() != n_tps*attn->src[0]->ne[3]) {
            die("a ubatch of another size than expected");
        }
        const auto row = [&](int64_t e, int64_t s) {
            row_t r;
            append(attn->src[GGML_RQ_RECENT_K], attn->src[GGML_RQ_RECENT_K_NEW], e, s, r);
            append(attn->src[GGML_RQ_RECENT_V], attn->src[GGML_RQ_RECENT_V_NEW], e, s, r);
            return r;
        };
        const auto seen_by = [&](const ggml_tensor * m, int64_t i, int64_t c) {
            return *(const ggml_fp16_t *) ((const char *) m->data + c*m->nb[0] + i % n_tps*m->nb[1] + i/n_tps*m->nb[3]) != 0xfc00;
        };
        for (size_t i = 0; i < ubatch.size(); ++i) {
            auto & rows = known[ubatch[i].seq][ubatch[i].pos];
            rows.resize(std::max<size_t>(rows.size(), layer + 1));
            rows[layer] = row(attn->src[GGML_RQ_RECENT_K]->ne[1] + i % n_tps, i/n_tps);
        }
        for (size_t i = 0; i < ubatch.size(); ++i) {
            const token_at t = ubatch[i];
            const auto & tokens = known[t.seq];

            int n_cache = 0;
            for (int64_t c = 0; c < mask->ne[0]; ++c) {
                n_cache += seen_by(mask, i, c);
            }
            std::set<int> seen;
            for (int64_t e = 0; e < recent->ne[0]; ++e) {
                if (!seen_by(recent, i, e)) {
                    continue;
                }
                const row_t r = row(e, i/n_tps);
                bool found = false;
                for (int q = 0; q <= t.pos && !found; ++q) {
                    if (!is_exact(q, t.pos)) {
                        continue;
                    }
                    const auto it = tokens.find(q);
                    found = it != tokens.end() && (int) it->second.size() > layer && it->second[layer] == r && seen.insert(q).second;
                }
                if (!found) {
                    fail(t, "sees as computed what is no token of its newest, or one twice");
                }
            }
            const int n_tokens = (int) std::distance(tokens.begin(), tokens.upper_bound(t.pos));
            if (n_cache + (int) seen.size() != n_tokens) {
                fail(t, ("sees " + std::to_string(n_cache) + " tokens in the cache and " + std::to_string(seen.size()) + " as computed, of " + std::to_string(n_tokens)).c_str());
            }
            for (int q = 0; q <= t.pos; ++q) {
                if (is_exact(q, t.pos) && tokens.count(q) && !seen.count(q)) {
                    ++missing;
                    if (q < n_first ? first_held : all_held) {
                        fail(t, ("sees the token at " + std::to_string(q) + " in the cache only").c_str());
                    }
                }
            }
            ++checked;
        }
        ++layer;
    }
};

static oracle expect;

static bool on_node(ggml_tensor * t, bool ask, void *) {
    if (t->op != GGML_OP_FLASH_ATTN_EXT) {
        return !ask;
    }
    if (!ask) {
        expect.check(t);
    }
    return true;
}

struct session {
    llama_context * ctx;
    bool unified;

    explicit session(ggml_type type_k, ggml_type type_v, bool unified) : unified(unified) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx           = 4096*(unified ? 1 : 3);
        params.n_batch         = 512;
        params.n_ubatch        = 512;
        params.n_seq_max       = 3;
        params.n_threads       = 1;
        params.n_threads_batch = 1;
        params.type_k          = type_k;
        params.type_v          = type_v;
        params.kv_unified      = unified;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        params.cb_eval         = on_node;
        ctx = llama_init_from_model(model, params);
        if (!ctx) {
            die("no context");
        }
        expect.known.clear();
        expect.all_held = expect.first_held = true;
    }

    ~session() { llama_free(ctx); }

    llama_memory_t memory() { return llama_get_memory(ctx); }

    int next(int seq) { return expect.known[seq].empty() ? 0 : expect.known[seq].rbegin()->first + 1; }

    // n tokens at the end of each of these sequences, in one ubatch; text from `from` on
    void decode(const char * step, const std::vector<int> & seqs, int n, int from) {
        expect.step  = std::string(step) + (unified ? ", one stream" : ", streams");
        expect.layer = 0;
        expect.ubatch.clear();
        llama_batch batch = llama_batch_init(n*(int) seqs.size(), 0, 1);
        for (int seq : seqs) {
            const int pos = next(seq);
            for (int i = 0; i < n; ++i) {
                const int b = batch.n_tokens++;
                batch.token   [b]    = text[(from + 37*seq + pos + i) % text.size()];
                batch.pos     [b]    = pos + i;
                batch.n_seq_id[b]    = 1;
                batch.seq_id  [b][0] = seq;
                batch.logits  [b]    = i == n - 1;
                expect.ubatch.push_back({ seq, pos + i });
            }
        }
        if (llama_decode(ctx, batch) != 0) {
            die("decode failed");
        }
        llama_batch_free(batch);
        if (expect.layer == 0) {
            die("no attention was seen");
        }
    }

    void remove(int seq, int from, int to) {
        if (!llama_memory_seq_rm(memory(), seq, from, to)) {
            die("tokens could not be removed");
        }
        auto & tokens = expect.known[seq];
        tokens.erase(tokens.lower_bound(from), to < 0 ? tokens.end() : tokens.lower_bound(to));
    }
};

static void texts_in_pieces(session & s) {
    for (int n : { 1, 1, 7, 64, 1, 128, 3, 1 }) {
        s.decode("one sequence", { 0 }, n, 0);
    }
    s.decode("a second one", { 1 }, 100, 0);
    for (int i = 0; i < 12; ++i) {
        s.decode("two at a time", { 0, 1 }, any(1, 20), 0);
    }
    // those who compute little must not lose their newest tokens to one who computes much
    s.decode("a long third one", { 2 }, 200, 0);
    s.decode("the first after it", { 0 }, 1, 0);
    s.decode("all", { 0, 1, 2 }, 1, 0);
}

static void saved(session & s) {
    std::vector<uint8_t> state(llama_state_get_size(s.ctx));
    state.resize(llama_state_get_data(s.ctx, state.data(), state.size()));
    const auto then = expect.known;
    s.decode("after saving", { 0 }, 20, 500);
    if (llama_state_set_data(s.ctx, state.data(), state.size()) != state.size()) {
        die("the state was not restored");
    }
    expect.known    = then;
    expect.all_held = expect.first_held = false; // the first do not come again
    expect.missing  = 0;
    s.decode("after restoring", { 0 }, 1, 900);
    if (n_recent > 1 && expect.missing == 0) {
        die("a restored state has no newest tokens, but none was missing");
    }
    s.decode("after restoring", { 0 }, n_recent, 900);
    expect.all_held = true;
    s.decode("a while after restoring", { 0 }, 5, 900);

    llama_memory_clear(s.memory(), true);
    expect.known.clear();
    expect.first_held = true;
    s.decode("after clearing", { 0 }, 50, 77);
    s.decode("after clearing", { 0 }, 1, 77);
}

static void edited(session & s) {
    // other tokens in the same cells
    for (int i = 0; i < 10; ++i) {
        const int n = any(1, 2*n_recent);
        s.decode("before a removal", { 0 }, n + any(1, 10), 100*i);
        s.remove(0, s.next(0) - n, -1);
        expect.all_held = false;
        s.decode("other tokens in the place of removed ones", { 0 }, any(1, 9), 100*i + 50);
        s.decode("and more", { 0 }, n_recent, 100*i + 50);
        expect.all_held = true;
        s.decode("a while after a removal", { 0 }, 1, 100*i);
    }

    // in streams, the copy goes to cells and positions of which others are still held
    while (s.next(1) < s.next(0)) {
        s.decode("a sequence that is replaced", { 1 }, std::min(200, s.next(0) - s.next(1)), 700);
    }
    llama_memory_seq_rm(s.memory(), 1, -1, -1);
    llama_memory_seq_cp(s.memory(), 0, 1, -1, -1);
    expect.known[1] = expect.known[0];
    expect.all_held = expect.first_held = s.unified; // in one stream the copy has the same cells
    s.decode("a copied sequence", { 1 }, 1, 300);
    s.decode("both", { 0, 1 }, any(1, n_recent), 300);
    s.decode("both", { 0, 1 }, n_recent, 300);
    expect.all_held = true;
    s.decode("a while after the copy", { 0, 1 }, 3, 300);

    // drop 30 tokens and move the rest down: keys change, so that none is known as it was computed
    s.remove(0, 10, 40);
    llama_memory_seq_add(s.memory(), 0, 40, -1, -30);
    auto & tokens = expect.known[0];
    std::map<int, std::vector<row_t>> moved;
    for (auto & [pos, rows] : tokens) {
        moved[pos < 40 ? pos : pos - 30] = pos < 40 ? rows : std::vector<row_t>();
    }
    tokens = moved;
    expect.all_held = false;
    s.decode("after a shift", { 0 }, 1, 300);
    s.decode("after a shift", { 0 }, n_recent, 300);
    expect.all_held = true;
    s.decode("a while after a shift", { 0 }, 1, 300);
}

int main(int argc, char ** argv) {
    if (argc != 8) {
        die("usage: kv_recent MODEL TEXT TYPE_K TYPE_V N SEED all|recurrent");
    }
    const ggml_type type_k = type_from_name(argv[3]);
    const ggml_type type_v = type_from_name(argv[4]);
    if (sscanf(argv[5], "%d,%d", &n_recent, &n_first) != 2) {
        die("N,S: how many of the newest and of the first tokens");
    }
    rng.seed(atoi(argv[6]));
    setenv("LLAMA_RQ_RECENT", std::to_string(n_recent).c_str(), 1);
    setenv("LLAMA_RQ_FIRST",  std::to_string(n_first).c_str(), 1);

    load_model_and_text(argv[1], argv[2]);

    for (bool unified : { true, false }) {
        {
            session s(type_k, type_v, unified);
            texts_in_pieces(s);
            saved(s);
        }
        if (strcmp(argv[7], "all") == 0) {
            session s(type_k, type_v, unified);
            edited(s);
        }
    }
    llama_model_free(model);
    printf("{\"checked\": %d}\n", expect.checked);

    return 0;
}

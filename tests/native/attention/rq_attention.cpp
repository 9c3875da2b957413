// The CPU kernels of the rotated cache types in a build of ggml: quantization against the reference, dot products
// against f64, and attention against upstream's own on f32 copies of the same data, over random shapes, strides,
// masks and options, with and without recent rows. Usage: rq_attention [cases] [seed] [max KV rows]

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-rq-types.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

static std::mt19937 rng;

static int any(int lo, int hi) {
    return std::uniform_int_distribution<int>(lo, hi)(rng);
}

static bool maybe(int percent) {
    return any(1, 100) <= percent;
}

template <typename T> static T one_of(std::initializer_list<T> values) {
    return values.begin()[any(0, (int) values.size() - 1)];
}

static std::vector<float> normal(size_t n, float sigma) {
    std::normal_distribution<float> d(0.0f, sigma);
    std::vector<float> x(n);
    for (float & v : x) {
        v = d(rng);
    }
    return x;
}

static ggml_type any_rq() {
    return maybe(60) ? one_of({ GGML_RQ_TYPE_LIST }) : one_of({ GGML_RQ_SIBLING_LIST });
}

static bool is_rq(ggml_type type) {
    return ggml_rq_is_type(type);
}

// a head that whole blocks of the type fill
static int any_head(ggml_type type) {
    return !is_rq(type) ? 32*any(1, 8) : (int) ggml_blck_size(type)*one_of({ 1, 1, 1, 2, 3, 4, 5 });
}

static double nmse(const std::vector<float> & a, const std::vector<float> & b) {
    double err = 0.0;
    double ref = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        err += ((double) a[i] - b[i])*((double) a[i] - b[i]);
        ref += (double) b[i]*b[i];
    }
    return ref > 0.0 ? err/ref : err;
}

// codes

static int test_codes() {
    int failed = 0;
    for (const ggml_type type : { GGML_RQ_TYPE_LIST, GGML_RQ_SIBLING_LIST }) {
        const auto * base = ggml_get_type_traits(type);
        const auto * cpu  = ggml_get_type_traits_cpu(type);
        for (int i = 0; i < 50; ++i) {
            const int n = (int) ggml_blck_size(type)*any(1, 5);
            std::vector<float> x = normal(n, powf(10.0f, any(-9, 5)));
            if (maybe(30)) {
                x[any(0, n - 1)] = one_of<float>({ 0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e30f, 1e-30f });
            }
            std::vector<uint8_t> want(ggml_row_size(type, n));
            std::vector<uint8_t> got(want.size());
            base->from_float_ref(x.data(), want.data(), n);
            cpu->from_float(x.data(), got.data(), n);
            if (want != got) {
                printf("%s: from_float differs from the reference\n", ggml_type_name(type));
                ++failed;
            }

            std::vector<float> y = normal(n, 1.0f);
            std::vector<uint8_t> q8(ggml_row_size(GGML_TYPE_Q8_0, n));
            ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->from_float(y.data(), q8.data(), n);
            ggml_get_type_traits(GGML_TYPE_Q8_0)->to_float(q8.data(), y.data(), n);
            base->to_float(want.data(), x.data(), n);
            double sum = 0.0;
            double abs = 0.0;
            for (int j = 0; j < n; ++j) {
                sum += (double) x[j]*y[j];
                abs += fabs((double) x[j]*y[j]);
            }
            float s;
            cpu->vec_dot(n, &s, 0, want.data(), 0, q8.data(), 0, 1);
            if (!(fabs(s - sum) <= 1e-5*abs)) {
                printf("%s: vec_dot %g, want %g\n", ggml_type_name(type), s, sum);
                ++failed;
            }
        }
    }
    return failed;
}

// attention

struct shape {
    int dk, dv, heads_k, heads_v, heads, nq, kv, ne3, ne3_k;
    ggml_type type_k, type_v;
    int  mask;      // 0 none, 1 random, 2 causal, 3 sliding window
    bool mask_heads, sinks, by_row; // by_row: all heads of a token side by side, as in the KV cache
    int  slack;     // rows of the cache beyond the view
    float max_bias, softcap, sharp;
    int  held;      // recent rows beside those of the queries' own batch, 0: none of either
    int  recent() const { return held > 0 ? held + nq : 0; }
};

static shape any_shape(int max_kv) {
    shape s;
    s.type_k = maybe(70) ? any_rq() : one_of({ GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 });
    s.held   = maybe(50) ? one_of({ 1, 7, 32, 63, 150 }) : 0;
    s.type_v = (!is_rq(s.type_k) && !(s.held > 0 && maybe(30))) || maybe(70) ? any_rq() : one_of({ GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 });
    s.dk = any_head(s.type_k);
    s.dv = any_head(s.type_v);
    const int group = one_of({ 1, 1, 2, 3, 4, 5, 8 });
    s.heads_k = any(1, 3);
    s.heads   = s.heads_k*group;
    s.heads_v = maybe(85) ? s.heads_k : s.heads;
    s.nq      = maybe(50) ? any(1, 4) : maybe(70) ? any(5, 40) : any(41, 200);
    s.kv      = maybe(80) ? any(1, max_kv/4) : any(max_kv/4, max_kv);
    s.ne3     = maybe(80) ? 1 : any(2, 3);
    s.ne3_k   = s.ne3;
    s.mask    = any(0, 3);
    s.mask_heads = maybe(20);
    s.sinks   = maybe(25);
    s.by_row  = maybe(60);
    s.slack   = maybe(50) ? any(1, 64) : 0;
    s.max_bias = maybe(20) && s.mask != 0 ? 8.0f : 0.0f;
    s.softcap  = maybe(20) ? 20.0f : 0.0f;
    s.sharp    = one_of({ 0.1f, 1.0f, 1.0f, 4.0f });
    return s;
}

struct cache {
    std::vector<uint8_t> data; // as the type stores it
    std::vector<float>   f32;  // the same numbers, the same layout
};

// values of [d, rows, heads, ne3], encoded; poisoned rows hold what no encoder writes and must not be looked at
static cache make_cache(ggml_type type, int64_t n, int64_t d, float sigma, const std::vector<bool> & poison) {
    cache c;
    const size_t row = ggml_row_size(type, d);
    c.data.resize(row*(n/d));
    c.f32 = normal(n, sigma);
    for (int64_t r = 0; r < n/d; ++r) {
        float   * x = c.f32.data() + r*d;
        uint8_t * q = c.data.data() + r*row;
        if (poison[r]) {
            std::fill(x, x + d, 0.0f);
            memset(q, is_rq(type) ? 0xff : 0, row); // the scale is a NaN
            continue;
        }
        if (type == GGML_TYPE_F32) {
            memcpy(q, x, row);
            continue;
        }
        ggml_get_type_traits(type)->from_float_ref(x, q, d);
        ggml_get_type_traits(type)->to_float(q, x, d);
    }
    return c;
}

static ggml_tensor * view_cache(ggml_context * ctx, const shape & s, ggml_type type, int64_t d, int64_t heads, const void * data) {
    const int64_t rows = s.kv + s.slack;
    ggml_tensor * t = s.by_row ? ggml_new_tensor_4d(ctx, type, d, heads, rows, s.ne3_k)
                               : ggml_new_tensor_4d(ctx, type, d, rows, heads, s.ne3_k);
    memcpy(t->data, data, ggml_nbytes(t));
    if (s.by_row) {
        t = ggml_permute(ctx, t, 0, 2, 1, 3);
    }
    return ggml_view_4d(ctx, t, d, s.kv, heads, s.ne3_k, t->nb[1], t->nb[2], t->nb[3], 0);
}

struct inputs {
    cache k, v;
    cache k_recent, v_recent; // f16 [d, heads, recent rows, ne3]; the f32 copy serves for the batch's own, too
    std::vector<ggml_fp16_t> recent_mask; // [recent rows, nq, 1, ne3]
    std::vector<float> q, sinks;
    std::vector<ggml_fp16_t> mask;
    int mask_ne2, mask_ne3;
};

static inputs make_inputs(const shape & s) {
    inputs in;
    in.q     = normal((size_t) s.dk*s.nq*s.heads*s.ne3, s.sharp);
    in.sinks = normal(s.heads, 3.0f);
    in.mask_ne2 = s.mask_heads ? s.heads : 1;
    in.mask_ne3 = s.ne3 > 1 && maybe(50) ? s.ne3 : 1;

    const ggml_fp16_t inf = ggml_fp32_to_fp16(-INFINITY);
    std::vector<bool> dead(s.kv, false); // KV rows that no query may see
    if (s.mask == 1) {
        for (int c = 0; c < s.kv; ++c) {
            dead[c] = maybe(20);
        }
    }
    const int from  = any(0, std::max(0, s.kv - s.nq));
    const int width = any(1, s.kv);
    for (int i = 0; i < in.mask_ne2*in.mask_ne3; ++i) {
        const bool none = maybe(5); // a row that sees nothing
        for (int r = 0; r < s.nq; ++r) {
            for (int c = 0; c < s.kv; ++c) {
                const int past = from + r - c;
                const bool hidden = s.mask == 1 ? dead[c] || maybe(30) : past < 0 || (s.mask == 3 && past >= width);
                const float bias  = s.max_bias > 0.0f ? -(float) std::abs(past)/16.0f : s.mask == 1 ? any(-8, 8)/8.0f : 0.0f;
                in.mask.push_back(hidden || (none && r == 0) ? inf : ggml_fp32_to_fp16(bias));
            }
        }
    }
    const int  n_recent = s.recent();
    const int  reach    = any(1, n_recent + 1);
    std::vector<bool> unseen(n_recent*s.ne3, true);
    for (int i = 0; i < s.ne3; ++i) {
        const bool none = maybe(10); // a row that sees no recent row
        const bool band = maybe(50); // the newest up to the query, as the cache has them, or any
        for (int r = 0; r < s.nq; ++r) {
            for (int c = 0; c < n_recent; ++c) {
                const int  past   = s.held + r - c;
                const bool hidden = (none && r == s.nq/2) || (band ? past < 0 || past >= reach : maybe(70));
                in.recent_mask.push_back(hidden ? inf : ggml_fp32_to_fp16(s.max_bias > 0.0f ? -(float) std::abs(past)/16.0f : 0.0f));
                unseen[i*n_recent + c] = unseen[i*n_recent + c] && hidden;
            }
        }
    }
    if (n_recent > 0 && s.mask && maybe(20)) { // queries that see recent rows alone
        std::fill(in.mask.begin(), in.mask.begin() + (ptrdiff_t) s.kv*any(1, s.nq), inf);
    }
    for (int pass = 0; n_recent > 0 && pass < 2; ++pass) {
        const int heads = pass == 0 ? s.heads_k : s.heads_v;
        const int64_t d = pass == 0 ? s.dk : s.dv;
        std::vector<bool> poison(heads*n_recent*s.ne3);
        for (size_t r = 0; r < poison.size(); ++r) {
            poison[r] = unseen[r/heads];
        }
        cache & c = pass == 0 ? in.k_recent : in.v_recent;
        c = make_cache(GGML_TYPE_F16, d*heads*n_recent*s.ne3, d, 1.0f, std::vector<bool>(poison.size(), false));
        for (size_t r = 0; r < poison.size(); ++r) {
            if (poison[r]) {
                memset(c.data.data() + r*d*sizeof(ggml_fp16_t), 0xff, d*sizeof(ggml_fp16_t)); // NaN
            }
        }
    }
    for (int pass = 0; pass < 2; ++pass) {
        const int heads = pass == 0 ? s.heads_k : s.heads_v;
        const int64_t d = pass == 0 ? s.dk : s.dv;
        const int64_t rows = s.kv + s.slack;
        std::vector<bool> poison(heads*rows*s.ne3_k);
        for (size_t r = 0; r < poison.size(); ++r) {
            const int64_t c = s.by_row ? (int64_t) r/heads % rows : (int64_t) r % rows;
            poison[r] = c >= s.kv || (s.mask == 1 && dead[c]);
        }
        (pass == 0 ? in.k : in.v) = make_cache(pass == 0 ? s.type_k : s.type_v, d*heads*rows*s.ne3_k, d, 1.0f, poison);
    }
    return in;
}

// rows [from, from + n) of recent [d, heads, rows, ne3] as a source of the op; slack: a row behind them, as a cache has it
static ggml_tensor * recent_rows(ggml_context * ctx, const shape & s, const cache & c, ggml_type type, int64_t d, int64_t heads, int64_t from, int64_t n, int64_t slack) {
    ggml_tensor * t = ggml_new_tensor_4d(ctx, type, d, heads, n + slack, s.ne3);
    memset(t->data, 0xff, ggml_nbytes(t));
    const size_t size = ggml_type_size(type)*d*heads;
    for (int64_t i = 0; i < s.ne3; ++i) {
        const size_t o = (i*s.recent() + from)*d*heads;
        const char * x = type == GGML_TYPE_F32 ? (const char *) (c.f32.data() + o) : (const char *) c.data.data() + o*sizeof(ggml_fp16_t);
        memcpy((char *) t->data + i*t->nb[3], x, size*n);
    }
    return ggml_permute(ctx, ggml_view_4d(ctx, t, d, heads, n, s.ne3, t->nb[1], t->nb[2], t->nb[3], 0), 0, 2, 1, 3);
}

// the same as s and in, with the recent rows behind those of K and V
static void append_recent(shape & s, inputs & in) {
    const int n_recent = s.recent();
    const auto join = [&](const cache & c, const cache & recent, int64_t d, int64_t heads) {
        const int64_t rows = s.kv + s.slack;
        cache res;
        for (int i = 0; i < s.ne3; ++i) {
            for (int64_t r = 0; r < s.kv + n_recent; ++r) {
                for (int64_t h = 0; h < heads; ++h) {
                    const float * x = r >= s.kv ? recent.f32.data() + ((i*n_recent + r - s.kv)*heads + h)*d
                                    : c.f32.data() + (s.by_row ? ((i*rows + r)*heads + h)*d : ((i*heads + h)*rows + r)*d);
                    res.f32.insert(res.f32.end(), x, x + d);
                }
            }
        }
        return res;
    };
    in.k = join(in.k, in.k_recent, s.dk, s.heads_k);
    in.v = join(in.v, in.v_recent, s.dv, s.heads_v);

    std::vector<ggml_fp16_t> mask;
    for (int i = 0; i < s.ne3; ++i) {
        for (int h = 0; h < in.mask_ne2; ++h) {
            for (int r = 0; r < s.nq; ++r) {
                const size_t from = (((size_t) (i % in.mask_ne3)*in.mask_ne2 + h)*s.nq + r)*s.kv;
                for (int c = 0; c < s.kv; ++c) {
                    mask.push_back(s.mask ? in.mask[from + c] : 0);
                }
                const auto * m = in.recent_mask.data() + ((size_t) i*s.nq + r)*n_recent;
                mask.insert(mask.end(), m, m + n_recent);
            }
        }
    }
    in.mask     = mask;
    in.mask_ne3 = s.ne3;
    s.kv       += n_recent;
    s.mask      = 1;
    s.by_row    = true;
    s.slack     = 0;
    s.held      = 0;
}

static std::vector<float> attend(shape s, inputs in, bool as_f32, int threads) {
    if (as_f32 && s.held > 0) {
        append_recent(s, in);
    }
    const size_t bytes = (in.k.f32.size() + in.v.f32.size() + in.q.size() + (size_t) s.dv*s.nq*s.heads*s.ne3)*sizeof(float) +
                         (in.k_recent.f32.size() + in.v_recent.f32.size())*2*sizeof(float) + (s.dk + s.dv)*s.heads*s.ne3*sizeof(float) +
                         in.mask.size()*2 + in.recent_mask.size()*2 + (1 << 16);
    ggml_context * ctx = ggml_init({ bytes, nullptr, false });

    ggml_tensor * q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, s.dk, s.heads, s.nq, s.ne3);
    memcpy(q->data, in.q.data(), ggml_nbytes(q));
    q = ggml_permute(ctx, q, 0, 2, 1, 3);

    ggml_tensor * k = view_cache(ctx, s, as_f32 ? GGML_TYPE_F32 : s.type_k, s.dk, s.heads_k, as_f32 ? (const void *) in.k.f32.data() : in.k.data.data());
    ggml_tensor * v = view_cache(ctx, s, as_f32 ? GGML_TYPE_F32 : s.type_v, s.dv, s.heads_v, as_f32 ? (const void *) in.v.f32.data() : in.v.data.data());

    ggml_tensor * mask = nullptr;
    if (s.mask) {
        mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, s.kv, s.nq, in.mask_ne2, in.mask_ne3);
        memcpy(mask->data, in.mask.data(), ggml_nbytes(mask));
    }
    ggml_tensor * out = ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f/sqrtf((float) s.dk), s.max_bias, s.softcap);
    if (s.sinks) {
        ggml_tensor * sinks = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, s.heads);
        memcpy(sinks->data, in.sinks.data(), ggml_nbytes(sinks));
        ggml_flash_attn_ext_add_sinks(out, sinks);
    }

    if (s.held > 0) {
        ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, s.recent(), s.nq, 1, s.ne3);
        memcpy(mask->data, in.recent_mask.data(), ggml_nbytes(mask));
        ggml_rq_flash_attn_ext_add_recent(out,
                recent_rows(ctx, s, in.k_recent, GGML_TYPE_F16, s.dk, s.heads_k, 0, s.held, 1),
                recent_rows(ctx, s, in.v_recent, GGML_TYPE_F16, s.dv, s.heads_v, 0, s.held, 1), mask,
                recent_rows(ctx, s, in.k_recent, GGML_TYPE_F32, s.dk, s.heads_k, s.held, s.nq, 0),
                recent_rows(ctx, s, in.v_recent, GGML_TYPE_F32, s.dv, s.heads_v, s.held, s.nq, 0));
    }

    ggml_cgraph * graph = ggml_new_graph_custom(ctx, 64, false);
    ggml_build_forward_expand(graph, out);
    ggml_cplan plan = ggml_graph_plan(graph, threads, nullptr);
    // exactly as much as planned, in a block of its own: an access beyond it is seen by the address sanitizer
    uint8_t * work = (uint8_t *) malloc(std::max<size_t>(plan.work_size, 1));
    plan.work_data = work;
    if (ggml_graph_compute(graph, &plan) != GGML_STATUS_SUCCESS) {
        abort();
    }
    free(work);
    std::vector<float> result((const float *) out->data, (const float *) out->data + ggml_nelements(out));
    ggml_free(ctx);
    return result;
}

// a NaN or an infinity in one query makes this query's output NaN and touches no other
static int test_broken_queries() {
    int failed = 0;
    for (int i = 0; i < 40; ++i) {
        shape s = any_shape(300);
        s.type_k = any_rq();
        s.dk     = (int) ggml_blck_size(s.type_k)*any(1, 2);
        s.sharp  = 1.0f;
        s.mask   = 0;
        s.held   = 0;
        s.max_bias = 0.0f;
        inputs in = make_inputs(s);
        const auto want = attend(s, in, false, 2);
        const int row = any(0, s.nq*s.heads*s.ne3 - 1);
        in.q[(size_t) row*s.dk + any(0, s.dk - 1)] = one_of<float>({ NAN, INFINITY, -INFINITY });
        const auto got = attend(s, in, false, 2);
        for (size_t j = 0; j < got.size(); ++j) {
            if ((int) (j/s.dv) == row ? !std::isnan(got[j]) : !(fabsf(got[j] - want[j]) <= 1e-4f)) {
                printf("broken query, case %d: row %d, value %zu is %g, was %g\n", i, row, j, got[j], want[j]);
                ++failed;
                break;
            }
        }
    }
    return failed;
}

// our buffer type is asked about operations, and not among those that weights may be put into
static int test_buffer_types() {
    ggml_backend_reg_t reg = ggml_backend_cpu_reg();
    const auto extra = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * type = extra(ggml_backend_reg_dev_get(reg, 0)); *type; ++type) {
        if (strcmp(ggml_backend_buft_name(*type), "CPU_RQ") == 0) {
            printf("weights may be put into CPU_RQ\n");
            return 1;
        }
    }
    return 0;
}

int main(int argc, char ** argv) {
    const int cases  = argc > 1 ? atoi(argv[1]) : 300;
    const int seed   = argc > 2 ? atoi(argv[2]) : 1;
    const int max_kv = argc > 3 ? atoi(argv[3]) : 1024;
    ggml_cpu_init();

    rng.seed(seed);
    int failed = test_codes() + test_broken_queries() + test_buffer_types();
    double worst = 0.0;
    double worst_threads = 0.0;
    for (int i = 0; i < cases; ++i) {
        rng.seed((unsigned) seed*1000003u + i);
        const shape  s  = any_shape(max_kv);
        const inputs in = make_inputs(s);
        const auto want = attend(s, in, true, any(1, 4));
        const auto got  = attend(s, in, false, any(1, 4));
        const auto more = attend(s, in, false, any(1, 9));
        // what an int8 query costs grows with the logits, a 3-bit code costs 3e-2
        const double limit = s.sharp > 1.0f ? 2e-3 : 5e-4;
        const double e  = nmse(got, want);
        const double et = nmse(more, got);
        worst = std::max(worst, e);
        worst_threads = std::max(worst_threads, et);
        if (!(e <= limit) || !(et <= 1e-6)) {
            printf("case %d of seed %d: nmse %.3g, between thread counts %.3g: %s/%s d %d/%d heads %d/%d/%d nq %d kv %d ne3 %d/%d "
                   "mask %d sinks %d bias %g cap %g sharp %g rows %d slack %d held %d\n", i, seed, e, et, ggml_type_name(s.type_k), ggml_type_name(s.type_v),
                   s.dk, s.dv, s.heads, s.heads_k, s.heads_v, s.nq, s.kv, s.ne3, s.ne3_k, s.mask, s.sinks, s.max_bias, s.softcap, s.sharp, s.by_row, s.slack, s.held);
            ++failed;
        }
    }
    printf("%d cases, %d failed, worst nmse %.3g, worst between thread counts %.3g\n", cases, failed, worst, worst_threads);
    return failed != 0;
}

// Random operations through the fake Metal device, against ggml's CPU code.
//
//   driver set_rows|get_rows|cpy TYPE SEED COUNT          our types: bytes must be those of the C code
//   driver store TYPE SEED COUNT                          the same for rows that a rotation or a profile turns before, in one launch
//   driver flash_attn TYPE_K TYPE_V HEAD SEED COUNT [NE]  against doubles, from what the C code decodes; HEAD may be DK/DV; NE rows
//                                                         at once in the vector kernel, else what upstream's host chooses
//   driver recent ...                                     the same with recent rows (ggml-rq-types.h)
//   driver names                                          kernel names that the host side can ask for with our types
//   driver launches                                       how many kernels it takes to store K, see questions.cpp
//   driver supports                                       what ggml_metal_rq_supports_op says
//
// Prints JSON; errors are relative: square of the difference over that of the result, of the worst case.

#include "device.h"
#include "questions.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-metal-tuning.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

static std::mt19937 rng;

static int pick(int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
}

static bool maybe() {
    return pick(0, 1) == 1;
}

static float gauss() {
    return std::normal_distribution<float>()(rng);
}

struct bytes {
    static constexpr size_t ALIGN = 64;

    std::vector<uint8_t> memory;

    static constexpr size_t GUARD = 1 << 16;

    size_t size;

    explicit bytes(size_t size) : memory(size + ALIGN + GUARD, 0xff), size(size) {} // NaN, should anybody read what nobody wrote

    uint8_t * data() {
        return (uint8_t *) (((uintptr_t) memory.data() + ALIGN - 1)/ALIGN*ALIGN);
    }

    // nobody wrote behind the end
    bool is_whole() {
        return std::all_of(data() + size, data() + size + GUARD, [](uint8_t b) { return b == 0xff; });
    }
};

// tensors with memory of their own, as many bytes as the device asks for and no more
struct graph {
    ggml_context * ctx = ggml_init({ 4*1024*1024, nullptr, true });
    ggml_cgraph *  gf  = nullptr;

    std::vector<std::unique_ptr<bytes>> memory;
    std::vector<ggml_backend_buffer_t>  buffers;

    ~graph() {
        for (auto * buffer : buffers) {
            ggml_backend_buffer_free(buffer);
        }
        ggml_free(ctx);
    }

    ggml_tensor * alloc(ggml_tensor * t) {
        const size_t size = fake_metal_alloc_size(t);
        memory.push_back(std::make_unique<bytes>(size));
        buffers.push_back(ggml_backend_cpu_buffer_from_ptr(memory.back()->data(), size));
        t->data   = memory.back()->data();
        t->buffer = buffers.back();
        return t;
    }

    ggml_tensor * tensor(ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1, int64_t ne3 = 1) {
        return alloc(ggml_new_tensor_4d(ctx, type, ne0, ne1, ne2, ne3));
    }

    ggml_tensor * view(ggml_tensor * t) {
        t->buffer = t->view_src->buffer;
        t->data   = (char *) t->view_src->data + t->view_offs;
        return t;
    }

    void build(ggml_tensor * result) {
        gf = ggml_new_graph(ctx);
        ggml_build_forward_expand(gf, result);
    }

    void cpu() {
        ggml_cplan plan = ggml_graph_plan(gf, 1, nullptr);
        std::vector<uint8_t> work(plan.work_size);
        plan.work_data = work.data();
        ggml_graph_compute(gf, &plan);
    }

    void metal() {
        fake_metal_compute(gf);
        for (const auto & m : memory) {
            if (!m->is_whole()) {
                fprintf(stderr, "written behind the end of a tensor\n");
                exit(3);
            }
        }
    }
};

static void random_bytes(ggml_tensor * t) {
    for (size_t i = 0; i < ggml_nbytes(t); i++) {
        ((uint8_t *) t->data)[i] = (uint8_t) rng();
    }
}

// n values that an encoder may get wrong
static void hard_values(float * x, int n, bool hard) {
    const int   kind  = hard ? pick(0, 9) : 0;
    const float scale = hard ? std::ldexp(1.0f, pick(-30, 18)) : 1.0f;
    const float one   = gauss();
    for (int i = 0; i < n; i++) {
        switch (kind) {
            case 0: x[i] = gauss(); break;
            case 1: x[i] = gauss()*scale; break;
            case 2: x[i] = gauss()*(pick(0, 19) ? 1 : 100); break; // outliers
            case 3: x[i] = one*scale*(maybe() ? 1 : -1); break;    // on the border between centroids or near it
            case 4: x[i] = std::ldexp((float) pick(-8, 8), pick(-20, 2)); break;
            case 5: x[i] = pick(0, 19) ? 0.0f : one*scale; break;
            case 6: x[i] = gauss()*std::ldexp(1.0f, pick(-28, -20)); break; // near the smallest scale
            case 7: x[i] = gauss()*1e-40f; break;
            case 8: { // any bit pattern
                const uint32_t bits = rng();
                memcpy(&x[i], &bits, sizeof(bits));
            } break;
            default: {
                static const float special[] = { NAN, -NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-45f, 3e38f, 65504.0f, 64992.25f, -64993.0f };
                x[i] = pick(0, 3) ? gauss() : special[pick(0, 10)];
            }
        }
    }
}

// in blocks of n values
static void random_floats(ggml_tensor * t, int n, bool hard) {
    for (int64_t i = 0; i < ggml_nelements(t)/n; i++) {
        hard_values((float *) t->data + n*i, n, hard);
    }
}

// values of a cache: rows of f32 through the C encoder
static void random_cache(ggml_tensor * t, float scale) {
    const int64_t n = ggml_nelements(t);
    std::vector<float> x(n);
    for (auto & v : x) {
        v = gauss()*scale;
    }
    if (t->type == GGML_TYPE_F32) {
        memcpy(t->data, x.data(), n*sizeof(float));
    } else {
        ggml_get_type_traits(t->type)->from_float_ref(x.data(), t->data, n);
    }
}

template <typename A, typename B> static double relative_error(const std::vector<A> & found, const std::vector<B> & expected) {
    double sum = 0;
    double all = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        const double difference = (double) found[i] - expected[i];
        sum += difference*difference;
        all += (double) expected[i]*expected[i];
    }
    return std::isfinite(sum) ? sum/(all + 1e-30) : std::numeric_limits<double>::infinity();
}

static std::vector<float> decoded(const ggml_tensor * t) {
    std::vector<float> x(ggml_nelements(t));
    if (t->type == GGML_TYPE_F32) {
        memcpy(x.data(), t->data, x.size()*sizeof(float));
    } else {
        ggml_get_type_traits(t->type)->to_float(t->data, x.data(), (int64_t) x.size());
    }
    return x;
}

static bool is_ours(ggml_type type) {
    return type >= GGML_TYPE_PLANAR2 && type <= GGML_TYPE_RQ4_64;
}

// values of a block, or as many as make a row of a type of upstream's
static int block_of(ggml_type type) {
    return is_ours(type) ? (int) ggml_blck_size(type) : 128;
}

// fill `result` by `expect` and on Metal, and all of the tensor that it lies in: the error of the values that differ.
// For our types all bytes must be the same, or the error is infinite.
static double compare(graph & g, ggml_tensor * result, ggml_type type, const std::function<void()> & expect) {
    ggml_tensor * whole = result->view_src ? result->view_src : result;
    uint8_t * data = (uint8_t *) whole->data;

    if (is_ours(type)) {
        random_bytes(whole);
    } else {
        memset(data, 0, ggml_nbytes(whole));
    }
    const std::vector<uint8_t> before(data, data + ggml_nbytes(whole));

    expect();
    const std::vector<uint8_t> expected(data, data + ggml_nbytes(whole));
    const std::vector<float>   values = decoded(whole);

    memcpy(data, before.data(), before.size());
    g.metal();

    if (memcmp(data, expected.data(), expected.size()) == 0) {
        return 0;
    }
    return is_ours(type) ? std::numeric_limits<double>::infinity() : relative_error(decoded(whole), values);
}

static double set_rows(ggml_type type) {
    graph g;
    const int block = block_of(type), n = block*pick(1, 9), rows = pick(1, 5), ne2 = pick(1, 3), ne3 = pick(1, 2), kept = rows + pick(0, 6);
    const bool strided = maybe();

    ggml_tensor * dst = g.tensor(type, n, kept, ne2, ne3);
    ggml_tensor * src = g.tensor(GGML_TYPE_F32, strided ? n + block : n, rows, ne2, ne3);
    random_floats(src, block, is_ours(type));
    if (strided) {
        src = g.view(ggml_view_4d(g.ctx, src, n, rows, ne2, ne3, src->nb[1], src->nb[2], src->nb[3], block*sizeof(float)));
    }
    ggml_tensor * idx = g.tensor(maybe() ? GGML_TYPE_I64 : GGML_TYPE_I32, rows, maybe() ? ne2 : 1, maybe() ? ne3 : 1);
    for (int64_t i3 = 0; i3 < idx->ne[1]*idx->ne[2]; i3++) {
        const int first = pick(0, kept - 1); // each row once
        for (int i = 0; i < rows; i++) {
            const int row = (first + i) % kept;
            if (idx->type == GGML_TYPE_I64) {
                ((int64_t *) idx->data)[i3*rows + i] = row;
            } else {
                ((int32_t *) idx->data)[i3*rows + i] = row;
            }
        }
    }
    g.build(ggml_set_rows(g.ctx, dst, src, idx));
    return compare(g, dst, type, [&] { g.cpu(); });
}

static double get_rows(ggml_type type) {
    graph g;
    const int n = block_of(type)*pick(1, 17), rows = pick(1, 6), ne2 = pick(1, 3), ne3 = pick(1, 2), m = pick(1, 7);

    ggml_tensor * src = g.tensor(type, n, rows, ne2, ne3);
    random_cache(src, 1.0f);
    ggml_tensor * idx = g.tensor(GGML_TYPE_I32, m, ne2, ne3);
    for (int64_t i = 0; i < ggml_nelements(idx); i++) {
        ((int32_t *) idx->data)[i] = pick(0, rows - 1);
    }
    ggml_tensor * dst = g.alloc(ggml_get_rows(g.ctx, src, idx));
    g.build(dst);
    return compare(g, dst, type, [&] { g.cpu(); });
}

// a row of `from` as one of `to`, by the C code
static void convert_row(ggml_type from, const void * x, ggml_type to, void * y, int64_t n) {
    std::vector<float> values(n);
    if (from == GGML_TYPE_F32) {
        memcpy(values.data(), x, n*sizeof(float));
    } else {
        ggml_get_type_traits(from)->to_float(x, values.data(), n);
    }
    if (to == GGML_TYPE_F32) {
        memcpy(y, values.data(), n*sizeof(float));
    } else {
        ggml_get_type_traits(to)->from_float_ref(values.data(), y, n);
    }
}

// not through the CPU's own cpy, which takes fewer layouts
static double cpy(ggml_type type) {
    graph g;
    const int n = block_of(type)*pick(1, 6), ne1 = pick(1, 5), ne2 = pick(1, 3), ne3 = pick(1, 2);

    const bool encode = maybe();
    const ggml_type from = encode ? GGML_TYPE_F32 : type;
    const ggml_type to   = encode ? type : maybe() ? GGML_TYPE_F32 : GGML_TYPE_F16;

    const bool permuted = maybe();
    ggml_tensor * src = permuted ? g.tensor(from, n, ne2, ne1, ne3) : g.tensor(from, n, ne1, ne2, ne3);
    if (encode) {
        random_floats(src, block_of(type), is_ours(type));
    } else {
        random_cache(src, 1.0f);
    }
    if (permuted) {
        src = g.view(ggml_permute(g.ctx, src, 0, 2, 1, 3));
    }
    ggml_tensor * dst;
    switch (pick(0, 2)) {
        case 0:  dst = g.tensor(to, n, ne1, ne2, ne3); break;
        case 1:  dst = g.tensor(to, n*ne1, ne2*ne3);   break;
        default:
            dst = g.tensor(to, n, ne1 + 2, ne2, ne3);
            dst = g.view(ggml_view_4d(g.ctx, dst, n, ne1, ne2, ne3, dst->nb[1], dst->nb[2], dst->nb[3], dst->nb[1]));
    }
    g.build(ggml_cpy(g.ctx, src, dst));

    return compare(g, dst, type, [&] {
        int64_t at = 0;
        for (int i3 = 0; i3 < ne3; i3++) for (int i2 = 0; i2 < ne2; i2++) for (int i1 = 0; i1 < ne1; i1++, at += n) {
            const int64_t row = at/dst->ne[0];
            char * y = (char *) dst->data + at%dst->ne[0]/ggml_blck_size(to)*dst->nb[0] +
                row%dst->ne[1]*dst->nb[1] + row/dst->ne[1]%dst->ne[2]*dst->nb[2] + row/dst->ne[1]/dst->ne[2]*dst->nb[3];
            convert_row(from, (char *) src->data + i1*src->nb[1] + i2*src->nb[2] + i3*src->nb[3], to, y, n);
        }
    });
}

// All values are such that sums are exact in any order. What the graph has is what llama-rq.cpp makes of K and V.
static double store(ggml_type type) {
    graph g;
    const int  head = (int) ggml_blck_size(type)*(maybe() ? 1 : type >= GGML_TYPE_RQ2_64 ? 3 : 2), heads = pick(1, 3), tokens = maybe() ? 1 : pick(2, 32);
    const bool maps = maybe(), mean = maybe();
    const int  n    = maps || maybe() ? head : (int) ggml_blck_size(type);

    const auto fill = [&](ggml_tensor * t, int most, float unit) {
        std::vector<float> x(ggml_nelements(t));
        for (auto & v : x) {
            v = (float) pick(-most, most)*unit;
        }
        if (t->type == GGML_TYPE_F32) {
            memcpy(t->data, x.data(), ggml_nbytes(t));
        } else {
            ggml_get_type_traits(t->type)->from_float_ref(x.data(), t->data, (int64_t) x.size());
        }
        return x;
    };

    // beside other values where a mean comes first, as in a product for Q, K and V
    const int beside = mean && maybe() ? 64 : 0;
    ggml_tensor * wide = g.tensor(GGML_TYPE_F32, head*heads + beside, tokens);
    fill(wide, 8, 1.0f);
    ggml_tensor * k = g.view(ggml_view_3d(g.ctx, wide, head, heads, tokens, head*sizeof(float), wide->nb[1], beside*sizeof(float)));
    ggml_tensor * offset = g.tensor(GGML_TYPE_F32, head, heads);
    const std::vector<float> offsets = fill(offset, 4, 1.0f);
    ggml_tensor * matrix = maps ? g.tensor(maybe() ? GGML_TYPE_F16 : GGML_TYPE_F32, n, n, 1, heads) : g.tensor(GGML_TYPE_F32, n, n);
    const std::vector<float> entries = fill(matrix, 4, 0.25f);

    ggml_tensor * x = mean ? g.alloc(ggml_sub(g.ctx, k, offset)) : k;
    ggml_tensor * y;
    if (maps) {
        x = g.view(ggml_permute(g.ctx, g.view(ggml_reshape_4d(g.ctx, x, n, 1, heads, tokens)), 0, 2, 3, 1));
        y = g.alloc(ggml_mul_mat(g.ctx, matrix, x));
        y->op_params[1] = GGML_RQ_HINT_MAP;
        y = g.view(ggml_permute(g.ctx, g.view(ggml_reshape_3d(g.ctx, y, n, tokens, heads)), 0, 2, 1, 3));
        y = ggml_is_contiguous(y) ? y : g.alloc(ggml_cont(g.ctx, y));
    } else {
        y = g.alloc(ggml_mul_mat(g.ctx, matrix, g.view(ggml_reshape_2d(g.ctx, x, n, ggml_nelements(x)/n))));
        y->op_params[1] = ggml_rq_hint(GGML_RQ_ISO, GGML_RQ_FULL);
    }
    const ggml_tensor * turned = y->view_src ? y->view_src : y;
    y = g.view(ggml_reshape_2d(g.ctx, y, head*heads, tokens));

    ggml_tensor * cells = g.tensor(type, head*heads, tokens + pick(0, 5));
    ggml_tensor * idx   = g.tensor(maybe() ? GGML_TYPE_I64 : GGML_TYPE_I32, tokens);
    const int first = pick(0, (int) cells->ne[1] - 1);
    std::vector<float> expected((size_t) head*heads*tokens);
    std::vector<uint8_t> rows(ggml_nbytes(cells));
    random_bytes(cells);
    memcpy(rows.data(), cells->data, rows.size());
    for (int t = 0; t < tokens; t++) {
        const int row = (int) ((first + t) % cells->ne[1]);
        if (idx->type == GGML_TYPE_I64) {
            ((int64_t *) idx->data)[t] = row;
        } else {
            ((int32_t *) idx->data)[t] = row;
        }
        float * to = expected.data() + (size_t) t*head*heads;
        for (int i = 0; i < head*heads; i++) {
            const int part = i/n;
            double sum = 0;
            for (int j = 0; j < n; j++) {
                const float v = ((const float *) wide->data)[(size_t) t*wide->ne[0] + beside + part*n + j] - (mean ? offsets[part*n + j] : 0.0f);
                sum += (double) v*entries[((size_t) (maps ? part : 0)*n + i%n)*n + j];
            }
            to[i] = (float) sum;
        }
        ggml_get_type_traits(type)->from_float_ref(to, rows.data() + row*cells->nb[1], head*heads);
    }
    g.build(ggml_set_rows(g.ctx, cells, y, idx));

    const size_t before = fake_metal_launched().size();
    g.metal();
    const bool right = fake_metal_launched().size() == before + 1 && memcmp(rows.data(), cells->data, rows.size()) == 0 &&
        memcmp(expected.data(), turned->data, expected.size()*sizeof(float)) == 0;
    return right ? 0 : std::numeric_limits<double>::infinity();
}

static double flash_attn(ggml_type type_k, ggml_type type_v, int head, int head_v, bool recent, double & cpu_error) {
    graph g;
    static const int queries[] = { 1, 1, 1, 2, 3, 5, 7, 20, 23, 32, 33, 40 };
    const bool wide = pick(1, 12) == 1; // many heads and few rows: a row of the cache, not of a head, is what upstream reserves
    const int nq = wide ? 1 : queries[pick(0, 11)], heads_kv = wide ? 18 : pick(1, 2), group = wide ? 1 : pick(1, 3), ne3 = !wide && pick(1, 4) == 1 ? 2 : 1;
    const int heads = heads_kv*group;
    const int nkv   = wide ? pick(33, 63) : maybe() ? pick(1, 200) : pick(1, 4)*64;

    const int held   = recent ? pick(1, 3) == 1 ? pick(34, 150) : pick(1, 33) : 0;
    const int n_all  = nkv + (recent ? held + nq : 0);
    const int masked = recent ? n_all + pick(0, 2)*pick(1, 90) : nkv; // columns of both masks

    const bool  has_mask = recent || pick(0, 3) != 0;
    const float bias     = has_mask && pick(0, 3) == 0 ? 8.0f : 0.0f;
    const float cap      = pick(0, 3) == 0 ? 10.0f : 0.0f;
    const bool  sinks    = pick(0, 3) == 0;

    // as llama.cpp keeps them, all heads of a token in a row, or head by head
    const bool by_token = wide || maybe();
    auto cache = [&](ggml_type type, int size, float scale) {
        ggml_tensor * t = by_token ? g.tensor(type, size, heads_kv, nkv, ne3) : g.tensor(type, size, nkv, heads_kv, ne3);
        random_cache(t, scale);
        return t;
    };
    ggml_tensor * k0 = cache(type_k, head,   1.0f);
    const bool v_in_k = head == 576 || (head == 320 && ggml_rq_is_sibling(type_v)); // MLA
    ggml_tensor * v0 = !v_in_k ? cache(type_v, head_v, 1.0f) :
        g.view(ggml_view_4d(g.ctx, k0, head_v, k0->ne[1], k0->ne[2], k0->ne[3], k0->nb[1], k0->nb[2], k0->nb[3], 0));
    const std::vector<float> kf = decoded(k0);
    const std::vector<float> vf = v_in_k ? kf : decoded(v0);
    const int size_v = v_in_k ? head : head_v;
    auto view = [&](ggml_tensor * t) {
        return by_token ? g.view(ggml_permute(g.ctx, t, 0, 2, 1, 3)) : t;
    };
    ggml_tensor * q = g.tensor(GGML_TYPE_F32, head, nq, heads, ne3);
    for (int64_t i = 0; i < ggml_nelements(q); i++) {
        ((float *) q->data)[i] = gauss()*2.0f;
    }

    ggml_tensor * mask = nullptr;
    if (has_mask) {
        mask = g.tensor(GGML_TYPE_F16, masked, nq, 1, ne3);
        const int kind = pick(0, 2);
        const int only = recent ? pick(0, 7) : 2; // 0: nothing of the cache is seen, 1: no recent rows are
        for (int64_t i = 0; i < ggml_nelements(mask); i++) {
            const int64_t j = i%masked;
            const int64_t r = i/masked%nq;
            bool hidden;
            if (j < nkv) {
                hidden = only == 0 || (kind == 0 ? j > nkv - nq + r && j > 0 : kind == 1 ? j < nkv/2 : pick(0, 4) == 0 && j > 0);
            } else {
                hidden = only == 1 || j >= n_all || (j < nkv + held ? pick(0, 3) == 0 : j - nkv - held > r);
            }
            const float m = hidden ? -INFINITY : bias != 0.0f ? -(float) std::abs(j < nkv ? j - nkv + 1 : j - n_all + 1) : kind == 2 ? gauss() : 0.0f;
            ((ggml_fp16_t *) mask->data)[i] = ggml_fp32_to_fp16(m);
        }
    }

    // recent rows, all heads of a token side by side
    std::vector<ggml_tensor *>      rows;
    std::vector<std::vector<float>> rows_f;
    for (int i = 0; recent && i < 4; i++) {
        rows.push_back(g.tensor(i < 2 ? GGML_TYPE_F16 : GGML_TYPE_F32, i % 2 ? head_v : head, heads_kv, i < 2 ? held : nq, ne3));
        random_cache(rows.back(), 1.0f);
        rows_f.push_back(decoded(rows.back()));
        for (float & x : rows_f.back()) {
            x = ggml_fp16_to_fp32(ggml_fp32_to_fp16(x)); // those of the batch are rounded, too
        }
    }

    const float scale = 1.0f/std::sqrt((float) head);
    ggml_tensor * out = ggml_flash_attn_ext(g.ctx, q, view(k0), view(v0), mask, scale, bias, cap);
    ggml_prec_set_acc(out, GGML_PREC_F32);
    std::vector<float> sink(heads);
    if (sinks) {
        ggml_tensor * t = g.tensor(GGML_TYPE_F32, heads);
        for (int i = 0; i < heads; i++) {
            sink[i] = ((float *) t->data)[i] = gauss()*2.0f;
        }
        ggml_flash_attn_ext_add_sinks(out, t);
    }
    if (recent) {
        const auto columns = [&](int n, int first) {
            return g.view(ggml_view_4d(g.ctx, mask, n, nq, 1, ne3, mask->nb[1], mask->nb[2], mask->nb[3], first*mask->nb[0]));
        };
        out->src[3] = columns(nkv, 0);
        const auto by_head = [&](int i) { return g.view(ggml_permute(g.ctx, rows[i], 0, 2, 1, 3)); };
        ggml_rq_flash_attn_ext_add_recent(out, by_head(0), by_head(1), columns(masked - nkv, nkv), by_head(2), by_head(3));
    }
    g.alloc(out);
    g.build(out);

    const int64_t n = ggml_nelements(out);
    std::vector<double> expected(n);
    const int log2_heads = 1 << (int) std::floor(std::log2((float) heads));
    for (int i3 = 0; i3 < ne3; i3++) for (int h = 0; h < heads; h++) for (int r = 0; r < nq; r++) {
        const int hk = h/group;
        const double slope = bias == 0.0f ? 1.0 : h < log2_heads ?
            std::pow(std::exp2(-bias/log2_heads), h + 1) : std::pow(std::exp2(-bias/2.0f/log2_heads), 2*(h - log2_heads) + 1);
        auto at = [&](int size, int j) {
            return (size_t) size*(by_token ? ((size_t) i3*nkv + j)*heads_kv + hk : ((size_t) i3*heads_kv + hk)*nkv + j);
        };
        // row j of K or V, the recent ones behind those of the cache
        auto row = [&](bool is_v, int j) {
            const int size = is_v ? head_v : head;
            if (j < nkv) {
                return is_v ? vf.data() + at(size_v, j) : kf.data() + at(head, j);
            }
            const bool fresh = j - nkv >= held;
            const int  first = fresh ? nkv + held : nkv, count = fresh ? nq : held;
            return (const float *) rows_f[2*fresh + is_v].data() + (size_t) size*(((size_t) i3*count + j - first)*heads_kv + hk);
        };
        const float * qr = (const float *) q->data + (((int64_t) i3*heads + h)*nq + r)*head;
        std::vector<double> s(n_all);
        double top = sinks ? sink[h] : -INFINITY;
        for (int j = 0; j < n_all; j++) {
            double dot = 0;
            for (int d = 0; d < head; d++) {
                dot += (double) qr[d]*row(false, j)[d];
            }
            dot *= scale;
            dot  = cap != 0.0f ? cap*std::tanh(dot/cap) : dot;
            dot += has_mask ? slope*ggml_fp16_to_fp32(((ggml_fp16_t *) mask->data)[((int64_t) i3*nq + r)*masked + j]) : 0.0;
            s[j] = dot;
            top  = std::max(top, dot);
        }
        double sum = sinks ? std::exp(sink[h] - top) : 0.0;
        double * o = expected.data() + (((int64_t) i3*nq + r)*heads + h)*head_v;
        for (int j = 0; j < n_all; j++) {
            const double p = top == -INFINITY ? 0.0 : std::exp(s[j] - top);
            sum += p;
            for (int d = 0; d < head_v; d++) {
                o[d] += p*row(true, j)[d];
            }
        }
        for (int d = 0; d < head_v; d++) {
            o[d] = sum == 0.0 ? 0.0 : o[d]/sum;
        }
    }

    g.cpu();
    cpu_error = std::max(cpu_error, relative_error(decoded(out), expected));
    random_bytes(out);
    g.metal();
    return relative_error(decoded(out), expected);
}

static ggml_type type_of(const char * name) {
    for (int t = 0; t < GGML_TYPE_COUNT; t++) {
        if (ggml_type_name((ggml_type) t) && strcmp(ggml_type_name((ggml_type) t), name) == 0) {
            return (ggml_type) t;
        }
    }
    fprintf(stderr, "no type %s\n", name);
    exit(2);
}

// JSON has no infinity
static void print(int cases, double worst, double worst_cpu = 0) {
    printf("{\"cases\": %d, \"error\": %g, \"cpu_error\": %g}\n", cases, std::min(worst, 1e9), std::min(worst_cpu, 1e9));
}

int main(int argc, char ** argv) {
    const std::string op = argc > 1 ? argv[1] : "";
    ggml_cpu_init();

    if ((op == "set_rows" || op == "get_rows" || op == "cpy" || op == "store") && argc == 5) {
        const ggml_type type = type_of(argv[2]);
        rng.seed(atoi(argv[3]));
        const int count = atoi(argv[4]);
        double worst = 0;
        for (int i = 0; i < count; i++) {
            worst = std::max(worst, op == "set_rows" ? set_rows(type) : op == "get_rows" ? get_rows(type) : op == "store" ? store(type) : cpy(type));
        }
        print(count, worst);
        return 0;
    }
    if ((op == "flash_attn" || op == "recent") && argc >= 7) {
        rng.seed(atoi(argv[5]));
        if (argc > 7) {
            ggml_metal_tuning::fa_vec_set_override({ 1, (int8_t) atoi(argv[7]) });
        }
        const int    count  = atoi(argv[6]);
        const char * dv     = strchr(argv[4], '/');
        const int    head   = atoi(argv[4]);
        const int    head_v = dv ? atoi(dv + 1) : head;
        double worst = 0;
        double worst_cpu = 0;
        for (int i = 0; i < count; i++) {
            worst = std::max(worst, flash_attn(type_of(argv[2]), type_of(argv[3]), head, head_v, op == "recent", worst_cpu));
        }
        print(count, worst, worst_cpu);
        return 0;
    }
    if (op == "names") {
        print_names();
        return 0;
    }
    if (op == "launches") {
        print_launches();
        return 0;
    }
    if (op == "supports") {
        print_supports();
        return 0;
    }
    fprintf(stderr, "see the comment at the top of driver.cpp\n");
    return 2;
}

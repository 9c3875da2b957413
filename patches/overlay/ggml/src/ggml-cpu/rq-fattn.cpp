// Flash attention for the rq cache types.
//
// The query rows of a head group (all heads that share a K and a V head, all queries of a tile) meet tiles of 64 KV
// rows. K.Q runs in int8: centroids against queries quantized in the blocks of K. P.V runs in int8, too: the weights,
// times the scales of their V rows, are rounded to 14 bits of the tile's largest and split in two planes of 7 bits.
// Both have int32 sums that cannot overflow. A V row whose weights all round to zero is not unpacked: dropping it
// changes the result by less than 2^-15 of the tile's largest contribution, as rounding does for every other row.
// A K or V of another type is converted to f32 and goes through upstream's simd_gemm.
//
// Few queries: every work item is a range of the KV rows, for all heads, and partial results are reduced at the end.
// Many queries: every work item is a tile of rows of one head group, over the whole KV range.
//
// The op may have recent rows (ggml_rq_flash_attn_ext_add_recent), which count as one more tile of the KV range: those
// that some query of the work item sees are gathered, converted to f32 and share its online softmax.

// GCC 12 takes the undefined operands inside its AVX-512 intrinsics for ours (GCC bug 105593)
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "rq.h"
#include "rq-simd.h"
#include "common.h"
#include "ggml-cpu.h"
#include "vec.h"
#include "simd-gemm.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

static constexpr int RQ_KV        = 64;           // KV rows of a tile
static constexpr int RQ_P_MAX     = 127*128 + 127; // largest weight in two planes of 7 bits
static constexpr int RQ_SPLIT_MAX = 32;           // rows per head group up to which the KV range is split
static constexpr int RQ_TILE_MAX  = 128;          // rows of a tile where it is not
static constexpr int RQ_GEMM_MIN  = 8;            // rows from which a K of another type is worth transposing
static constexpr int RQ_GEMM_ROWS = 32;           // query rows that meet a transposed tile of recent rows at a time

static constexpr size_t RQ_ALIGN = 64; // of the work buffer: a cache line

static constexpr size_t RQ_FETCH_FROM = 8 << 20; // bytes of K and V from which rows are fetched ahead: no L2 holds them

// exp(-24) < 2^-34: a tile whose weights all are below this fraction of the largest so far adds less than 2^-28 of it
static constexpr float RQ_NEGLIGIBLE = 24.0f;

static constexpr float RQ_TINY = 1e-30f; // taken for zero: its reciprocal has to be finite

// unpacking

static inline const int8_t * rq_centroids(int bits) {
    return bits == 2 ? ggml_rq2_centroids : bits == 3 ? ggml_rq3_centroids : bits == 4 ? ggml_rq4_centroids : ggml_rq5_centroids;
}

// the centroids of a code plus a bias, to be looked up
template <int BITS>
static inline auto rq_make_table(int bias) {
    int8_t t[32] = { 0 };
    for (int i = 0; i < 1 << BITS; ++i) {
        t[i] = (int8_t) (uint8_t) (rq_centroids(BITS)[i] + bias);
    }
    if constexpr (BITS == 5) {
        return rq_table32(t);
    } else {
        return rq_table(t);
    }
}

// bit `from` of every byte at `to`, beside others
template <int from, int to>
static inline rq_vec rq_move(rq_vec v) {
    if constexpr (from < to) {
        return rq_shl<to - from>(v);
    } else {
        return rq_shr<from - to>(v);
    }
}

// low bits and high bit of the indices, at 2, 3 and 5 bits: vector j = i + s*N/4 has its low bits at 2*s of q[i], at 5 bits
// at 4*(s/2) of q[j % (N/2)], and its high bit is bit j/(N/8) of h[j % (N/8)]; where N is 4, it is bit 2*s of h[0] (rq_upper_bytes)
template <int BITS, int N, int s, typename table_t>
static inline void rq_expand_step(const rq_vec * q, const rq_vec * h, const table_t & table, uint8_t * out, size_t stride) {
    for (int i = 0; i < N/4; ++i) {
        rq_vec idx = BITS == 5 ? rq_and(rq_shr<4*(s/2)>(q[i + s % 2*(N/4)]), rq_set8(15)) : rq_and(rq_shr<2*s>(q[i]), rq_set8(3));
        if (BITS % 2 == 1) {
            const rq_vec b = N < 8 || i < N/8 ? rq_move<2*s, BITS - 1>(h[i]) : rq_move<2*s + 1, BITS - 1>(h[i - N/8]);
            idx = rq_or(idx, rq_and(b, rq_set8(1 << (BITS - 1))));
        }
        rq_store(out + (i + s*(N/4))*stride, rq_lookup(table, idx));
    }
}

// N vectors of centroids from packed vectors, which the caller has arranged by rows (K) or elements (V)
template <int BITS, int N, typename table_t>
static inline void rq_expand(const rq_vec * q, const rq_vec * h, const table_t & table, uint8_t * out, size_t stride) {
    if constexpr (BITS == 4) {
        for (int i = 0; i < N/2; ++i) {
            rq_store(out + i*stride,         rq_lookup(table, rq_and(q[i], rq_set8(15))));
            rq_store(out + (i + N/2)*stride, rq_lookup(table, rq_and(rq_shr<4>(q[i]), rq_set8(15))));
        }
        return;
    }
    rq_expand_step<BITS, N, 0>(q, h, table, out, stride);
    rq_expand_step<BITS, N, 1>(q, h, table, out, stride);
    rq_expand_step<BITS, N, 2>(q, h, table, out, stride);
    rq_expand_step<BITS, N, 3>(q, h, table, out, stride);
}

// a code with blocks of QK values
template <int BITS, int QK> struct rq_code {
    static constexpr int size = 2 + QK*BITS/8;
    static constexpr int n    = BITS < 4 ? QK/4 : QK/2; // bytes of qs
    static constexpr int qs   = 2;     // offset of qs in a block
    static constexpr int qh   = 2 + n; // offset of qh at 3 and 5 bits
    static constexpr int n_qs = n/16;  // pieces of 16 bytes
    // qh is 16 bytes, in a sibling the last 8 of those that are read from there on: none behind the block
    static constexpr int h16  = QK == QK_RQ ? qh : qh - 8;
};
static_assert(rq_code<3, QK_RQ>::size == sizeof(block_rq3) && rq_code<3, QK_RQ_64>::size == sizeof(block_rq3_64), "blocks have no padding");
static_assert(rq_code<5, QK_RQ>::size == sizeof(block_rq5) && rq_code<5, QK_RQ_64>::size == sizeof(block_rq5_64), "blocks have no padding");

// scales of n blocks, one per row, and zeros up to RQ_KV
static inline void rq_steps(const uint8_t * block, size_t nb, int n, float * step) {
    ggml_half d[RQ_KV];
    for (int r = 0; r < n; ++r) {
        memcpy(d + r, block + r*nb, sizeof(ggml_half));
    }
    for (int r = n; r < RQ_KV; ++r) {
        d[r] = 0;
    }
    ggml_cpu_fp16_to_fp32(d, step, RQ_KV);
    for (int r = 0; r < RQ_KV; ++r) {
        step[r] *= 1.0f/128.0f;
    }
}

// one block of n K rows -> out[QK/4][RQ_KV][4] centroids plus RQ_K_BIAS, step[RQ_KV]
template <int BITS, int QK>
static void rq_unpack_k(const uint8_t * k, size_t nb, int n, uint8_t * out, float * step) {
    typedef rq_code<BITS, QK> code;
    const auto table = rq_make_table<BITS>(RQ_K_BIAS);

    rq_steps(k, nb, n, step);
    for (int r = 0; r < RQ_KV; r += RQ_W) {
        const uint8_t * p = k + r*nb;
        size_t stride = nb;
        uint8_t tail[RQ_W*code::size];
        if (r + RQ_W > n) {
            memset(tail, 0, sizeof(tail));
            for (int i = 0; r + i < n; ++i) {
                memcpy(tail + i*code::size, p + i*nb, code::size);
            }
            p = tail;
            stride = code::size;
        }
        rq_vec q[4*code::n_qs];
        rq_vec h[4];
        for (int c = 0; c < code::n_qs; ++c) {
            rq_rows(p + code::qs + 16*c, stride, q + 4*c);
            rq_transpose(q + 4*c);
        }
        if (BITS % 2 == 1) {
            rq_rows(p + code::h16, stride, h);
            rq_transpose(h);
        }
        rq_expand<BITS, QK/4>(q, h + (code::qh - code::h16)/4, table, out + 4*r, 4*RQ_KV);
    }
}

// one block of n V rows -> out[n_group][QK][4] centroids: group[a] = which four rows, the last one again for those behind it
template <int BITS, int QK>
static void rq_unpack_v(const uint8_t * v, size_t nb, int n, const uint8_t * group, int n_group, uint8_t * out) {
    typedef rq_code<BITS, QK> code;
    const auto table = rq_make_table<BITS>(0);

    for (int a = 0; a < n_group; ++a, out += 4*QK) {
        const uint8_t * rows[4];
        for (int i = 0; i < 4; ++i) {
            rows[i] = v + std::min(4*group[a] + i, n - 1)*nb;
        }
        rq_vec q[code::n_qs*16/RQ_W];
        rq_vec h[16/RQ_W];
        for (int c = 0; c < code::n_qs; ++c) {
            rq_interleave(rows, code::qs + 16*c, q + c*16/RQ_W);
        }
        if (BITS % 2 == 1) {
            rq_interleave(rows, code::h16, h);
            if (QK == QK_RQ_64) {
                rq_upper_bytes(h);
            }
        }
        rq_expand<BITS, QK/RQ_W>(q, h, table, out, 4*RQ_W);
    }
}

// products

struct rq_query {
    const int8_t  * q;    // [DK]
    const float   * d;    // [DK/QK], scale of the scores included
    const int32_t * bias; // [DK/QK], -RQ_K_BIAS * sum of q
};

// scores of RM rows with a tile of K: kt[DK/QK][QK/4][RQ_KV][4], step[DK/QK][RQ_KV]
template <int RM, int QK>
static void rq_scores(int nblk, const rq_query & x, const uint8_t * kt, const float * step, float * s) {
    constexpr int RN = RQ_RN_K;
    const int DK = nblk*QK;

    memset(s, 0, RM*RQ_KV*sizeof(float));
    for (int b = 0; b < nblk; ++b, kt += QK*RQ_KV, step += RQ_KV) {
        for (int r = 0; r < RQ_KV; r += RN*RQ_W) {
            rq_vec acc[RM][RN];
            for (int i = 0; i < RM; ++i) {
                for (int j = 0; j < RN; ++j) {
                    acc[i][j] = rq_set32(x.bias[i*nblk + b]);
                }
            }
            for (int g = 0; g < QK/4; ++g) {
                rq_vec k[RN];
                for (int j = 0; j < RN; ++j) {
                    k[j] = rq_load(kt + 4*(g*RQ_KV + r + j*RQ_W));
                }
                for (int i = 0; i < RM; ++i) {
                    const rq_vec q = rq_set32(rq_load32(x.q + i*DK + b*QK + 4*g));
                    for (int j = 0; j < RN; ++j) {
                        acc[i][j] = rq_dot_k(acc[i][j], k[j], q);
                    }
                }
            }
            for (int i = 0; i < RM; ++i) {
                for (int j = 0; j < RN; ++j) {
                    rq_fma(s + i*RQ_KV + r + j*RQ_W, acc[i][j], step + r + j*RQ_W, x.d[i*nblk + b]);
                }
            }
        }
    }
}

// scores of rows with a tile of K: s[rows][RQ_KV]
template <int QK>
static void rq_all_scores(int nblk, rq_query x, const uint8_t * kt, const float * step, int rows, float * s) {
    while (rows > 0) {
        const int n = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
        switch (n) {
            case 4:  rq_scores<4, QK>(nblk, x, kt, step, s); break;
            case 2:  rq_scores<2, QK>(nblk, x, kt, step, s); break;
            default: rq_scores<1, QK>(nblk, x, kt, step, s); break;
        }
        x.q    += n*nblk*QK;
        x.d    += n*nblk;
        x.bias += n*nblk;
        s      += n*RQ_KV;
        rows   -= n;
    }
}

// out[RM][stride] += weights * V for one block: vt[n][QK][4], group[n] = which four rows, high and low [RM][RQ_KV]
template <int RM, int QK>
static void rq_values(int n, const uint8_t * group, const uint8_t * high, const uint8_t * low, const float * scale,
        const uint8_t * vt, float * out, int64_t stride) {
    constexpr int RN = 2;
    for (int v = 0; v < QK/RQ_W; v += RN) {
        rq_vec h[RM][RN];
        rq_vec l[RM][RN];
        for (int i = 0; i < RM; ++i) {
            for (int j = 0; j < RN; ++j) {
                h[i][j] = l[i][j] = rq_zero();
            }
        }
        for (int a = 0; a < n; ++a) {
            rq_vec c[RN];
            for (int j = 0; j < RN; ++j) {
                c[j] = rq_load(vt + 4*(a*QK + (v + j)*RQ_W));
            }
            for (int i = 0; i < RM; ++i) {
                const rq_vec wh = rq_set32(rq_load32(high + i*RQ_KV + 4*group[a]));
                const rq_vec wl = rq_set32(rq_load32(low  + i*RQ_KV + 4*group[a]));
                for (int j = 0; j < RN; ++j) {
                    h[i][j] = rq_dot_w(h[i][j], wh, c[j]);
                    l[i][j] = rq_dot_w(l[i][j], wl, c[j]);
                }
            }
        }
        for (int i = 0; i < RM; ++i) {
            for (int j = 0; j < RN; ++j) {
                rq_fma2(out + i*stride + (v + j)*RQ_W, h[i][j], l[i][j], scale[i]);
            }
        }
    }
}

// the same for all rows: ps[rows], out[rows][stride]
template <int QK>
static void rq_all_values(int n, const uint8_t * group, const uint8_t * high, const uint8_t * low, const float * ps,
        const uint8_t * vt, int rows, float * out, int64_t stride) {
    constexpr int RM = RQ_RM_V;
    int r = 0;
    for (; r + RM <= rows; r += RM) {
        rq_values<RM, QK>(n, group, high + r*RQ_KV, low + r*RQ_KV, ps + r, vt, out + r*stride, stride);
    }
    for (; r < rows; ++r) {
        rq_values<1, QK>(n, group, high + r*RQ_KV, low + r*RQ_KV, ps + r, vt, out + r*stride, stride);
    }
}

// what is the same for all work items

struct rq_fattn {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * mask;
    const ggml_tensor * sinks;
    const ggml_tensor * dst;

    int DK;
    int DV;
    int QK;         // values of a block of K, if it is of our types
    int QV;         // of V
    int group;      // heads that share a K and a V head
    int n_groups;
    int64_t n_kv;

    float scale;
    float max_bias;
    float softcap;

    bool k_gemm;    // K of another type is converted and transposed, otherwise vec_dot as upstream

    const ggml_tensor * recent_k[2]; // recent rows, null without: those that were kept, then those of this batch
    const ggml_tensor * recent_v[2];
    const ggml_tensor * recent_mask; // over all of them

    decltype(&rq_unpack_k<3, QK_RQ>) unpack_k; // null: another type
    decltype(&rq_unpack_v<3, QK_RQ>) unpack_v; // null: another type

    decltype(&rq_all_scores<QK_RQ>) scores;
    decltype(&rq_all_values<QK_RQ>) values;
};

static float rq_slope(const rq_fattn & f, int head) {
    if (f.max_bias <= 0.0f) {
        return 1.0f;
    }
    const int n_log2 = 1 << (int) floorf(log2f((float) f.q->ne[2]));
    return head < n_log2 ? powf(powf(2.0f, -f.max_bias/n_log2), head + 1)
                         : powf(powf(2.0f, -f.max_bias/2.0f/n_log2), 2*(head - n_log2) + 1);
}

// row r of a head group: query r/group, head r%group
static const ggml_fp16_t * rq_mask_row(const ggml_tensor * m, int64_t i3, int head, int64_t i1) {
    return (const ggml_fp16_t *) ((const char *) m->data + i1*m->nb[1] + (head % m->ne[2])*m->nb[2] + (i3 % m->ne[3])*m->nb[3]);
}

// buffers of one thread; with base null they measure
struct rq_buffers {
    char * base;
    size_t size = 0;

    int8_t  * q8;   // queries, int8
    float   * qd;
    int32_t * qb;
    char    * qx;   // queries, for a K of another type
    uint8_t * kt;
    float   * kf;   // K of another type, or recent K, transposed
    float   * step; // scales of K, then of V
    uint8_t * vt;
    float   * vf;   // V of another type, or recent V
    float   * p;    // scores, then weights
    uint8_t * high;
    uint8_t * low;
    float   * ps;   // scale of the rounded weights
    float   * row;  // a converted row
    float   * qr;   // queries that meet recent rows
    float   * slope; // of ALiBi

    template <typename T> void take(T *& p, size_t n) {
        p = base ? (T *) (base + size) : nullptr;
        size += GGML_PAD(n*sizeof(T), 64);
    }

    // rows: of one head group, n: head groups that are in work at the same time
    rq_buffers(const rq_fattn & f, int rows, int n, char * base) : base(base) {
        const size_t nk = f.unpack_k ? f.DK/f.QK : 0;
        const bool recent = f.recent_mask != nullptr;
        take(q8,    nk*f.QK*rows*n);
        take(qd,    nk*rows*n);
        take(qb,    nk*rows*n);
        take(qx,    f.unpack_k ? 0 : (size_t) f.DK*sizeof(float)*rows*n);
        take(kt,    nk*f.QK*RQ_KV);
        take(kf,    f.k_gemm || recent ? (size_t) f.DK*RQ_KV : 0);
        take(step,  RQ_KV*(nk + 1));
        take(vt,    f.unpack_v ? f.QV*RQ_KV : 0);
        take(vf,    f.unpack_v && !recent ? 0 : (size_t) f.DV*RQ_KV);
        take(p,     (size_t) rows*RQ_KV);
        take(high,  f.unpack_v ? rows*RQ_KV : 0);
        take(low,   f.unpack_v ? rows*RQ_KV : 0);
        take(ps,    rows);
        take(row,   f.k_gemm || recent ? f.DK : 0);
        take(qr,    recent ? (size_t) f.DK*std::min(rows, RQ_GEMM_ROWS) : 0);
        take(slope, rows*n);
    }
};

// maximum, sum and unnormalized output of rows
struct rq_state {
    float * M;
    float * S;
    float * out; // [rows][DV]

    static size_t size(const rq_fattn & f, size_t rows) {
        return GGML_PAD(rows*sizeof(float), 64)*2 + GGML_PAD(rows*f.DV*sizeof(float), 64);
    }

    rq_state(const rq_fattn &, size_t rows, char * base) {
        M   = (float *) base;
        S   = (float *) (base + GGML_PAD(rows*sizeof(float), 64));
        out = (float *) (base + GGML_PAD(rows*sizeof(float), 64)*2);
    }
};

static void rq_row_to_f32(ggml_type type, const void * x, float * y, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32:  memcpy(y, x, n*sizeof(float)); break;
        case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) x, y, n); break;
        case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) x, y, n); break;
        default:             ggml_get_type_traits(type)->to_float(x, y, n); break;
    }
}

// queries

// false if the query holds a NaN or an infinity
template <int QK>
static bool rq_quantize_query(const float * x, float scale, int nblk, int8_t * q, float * d, int32_t * bias) {
    for (int b = 0; b < nblk; ++b, x += QK, q += QK) {
        uint32_t top = 0; // largest magnitude, as bits: they are ordered as the values are, infinity and NaN last
        for (int j = 0; j < QK; ++j) {
            uint32_t u;
            memcpy(&u, x + j, sizeof(u));
            top = std::max(top, u & 0x7fffffff);
        }
        if (top >= 0x7f800000) {
            memset(q, 0, (nblk - b)*QK);
            std::fill(d + b, d + nblk, 0.0f);
            std::fill(bias + b, bias + nblk, 0);
            return false;
        }
        float amax;
        memcpy(&amax, &top, sizeof(amax));
        const float inv = amax > RQ_TINY ? 127.0f/amax : 0.0f;
        int32_t sum = 0;
        for (int j = 0; j < QK; ++j) {
            q[j] = (int8_t) (int32_t) (x[j]*inv + (x[j] < 0.0f ? -0.5f : 0.5f));
            sum += q[j];
        }
        d[b]    = amax*(1.0f/127.0f)*scale;
        bias[b] = -RQ_K_BIAS*sum;
    }
    return true;
}

static void rq_load_queries(const rq_fattn & f, const rq_buffers & t, int64_t i3, int grp, int64_t row0, int rows, int slot) {
    const int nblk = f.DK/f.QK;
    const auto quantize = f.QK == QK_RQ_64 ? rq_quantize_query<QK_RQ_64> : rq_quantize_query<QK_RQ>;
    const ggml_type dot_type = ggml_get_type_traits_cpu(f.k->type)->vec_dot_type;

    for (int r = 0; r < rows; ++r) {
        const int64_t i1   = (row0 + r)/f.group;
        const int     head = grp*f.group + (int) ((row0 + r) % f.group);
        const float * x = (const float *) ((const char *) f.q->data + i1*f.q->nb[1] + head*f.q->nb[2] + i3*f.q->nb[3]);
        const size_t  o = (size_t) slot*rows + r;

        t.slope[o] = rq_slope(f, head);
        if (f.unpack_k) {
            if (!quantize(x, f.scale, nblk, t.q8 + o*f.DK, t.qd + o*nblk, t.qb + o*nblk)) {
                t.slope[o] = NAN; // marks the row
            }
        } else if (f.k_gemm || dot_type == GGML_TYPE_F32) {
            memcpy(t.qx + o*f.DK*sizeof(float), x, f.DK*sizeof(float));
        } else {
            ggml_get_type_traits_cpu(dot_type)->from_float(x, t.qx + o*f.DK*sizeof(float), f.DK);
        }
    }
}

// scores of a tile of n KV rows: t.p[rows][RQ_KV], not masked yet

static void rq_tile_scores(const rq_fattn & f, const rq_buffers & t, const char * k, int n, int rows, int slot) {
    const size_t nb = f.k->nb[1];

    if (f.unpack_k) {
        const int nblk = f.DK/f.QK;
        const size_t bs = ggml_type_size(f.k->type);
        for (int b = 0; b < nblk; ++b) {
            f.unpack_k((const uint8_t *) k + b*bs, nb, n, t.kt + b*f.QK*RQ_KV, t.step + b*RQ_KV);
        }
        const size_t o = (size_t) slot*rows;
        f.scores(nblk, { t.q8 + o*f.DK, t.qd + o*nblk, t.qb + o*nblk }, t.kt, t.step, rows, t.p);
        return;
    }

    const char * q = t.qx + (size_t) slot*rows*f.DK*sizeof(float);
    if (f.k_gemm) {
        for (int c = 0; c < n; ++c) {
            rq_row_to_f32(f.k->type, k + c*nb, t.row, f.DK);
            for (int j = 0; j < f.DK; ++j) {
                t.kf[j*RQ_KV + c] = t.row[j];
            }
        }
        for (int j = 0; n < RQ_KV && j < f.DK; ++j) {
            memset(t.kf + j*RQ_KV + n, 0, (RQ_KV - n)*sizeof(float));
        }
        memset(t.p, 0, (size_t) rows*RQ_KV*sizeof(float));
        simd_gemm(t.p, (const float *) q, t.kf, rows, f.DK, RQ_KV);
    } else {
        const ggml_vec_dot_t dot = ggml_get_type_traits_cpu(f.k->type)->vec_dot;
        for (int c = 0; c < n; ++c) {
            for (int r = 0; r < rows; ++r) {
                dot(f.DK, t.p + r*RQ_KV + c, 0, k + c*nb, 0, q + r*f.DK*sizeof(float), 0, 1);
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < n; ++c) {
            t.p[r*RQ_KV + c] *= f.scale;
        }
    }
}

// true if no row of the tile sees any of its KV rows
static bool rq_tile_masked(const rq_fattn & f, int64_t i3, int grp, int64_t row0, int rows, int64_t ic, int n) {
    if (!f.mask) {
        return false;
    }
    const int heads = f.mask->ne[2] == 1 ? 1 : f.group; // distinct masks per query
    for (int64_t i1 = (row0 + rows - 1)/f.group; i1 >= row0/f.group; --i1) {
        for (int h = 0; h < heads; ++h) {
            const ggml_fp16_t * m = rq_mask_row(f.mask, i3, grp*f.group + h, i1) + ic;
            for (int c = 0; c < n; ++c) {
                if (m[c] != 0xfc00) {
                    return false;
                }
            }
        }
    }
    return true;
}

// online softmax of a tile: t.p becomes weights relative to the maximum so far; false if all of them are negligible.
// Column c of the tile has its mask in column ic + c of tmask, or with cols in column cols[c].
static bool rq_tile_softmax(const rq_fattn & f, const rq_buffers & t, rq_state s, int64_t i3, int grp,
        int64_t row0, int rows, const ggml_tensor * tmask, int64_t ic, const int32_t * cols, int n, int slot) {
    bool any = false;
    float mf[RQ_KV];

    int64_t i1 = row0/f.group; // query and head of row r
    int     h  = (int) (row0 % f.group);
    for (int r = 0; r < rows; ++r, h = h + 1 < f.group ? h + 1 : 0, i1 += h == 0) {
        float * p = t.p + r*RQ_KV;
        const float slope = t.slope[slot*rows + r];
        if (tmask && (r == 0 || h == 0 || tmask->ne[2] > 1)) {
            const ggml_fp16_t * m = rq_mask_row(tmask, i3, grp*f.group + h, i1);
            ggml_fp16_t mc[RQ_KV];
            for (int c = 0; cols && c < n; ++c) {
                mc[c] = m[cols[c]];
            }
            ggml_cpu_fp16_to_fp32(cols ? mc : m + ic, mf, n);
        }
        if (std::isnan(slope)) { // a broken query: its output is NaN
            memset(p, 0, RQ_KV*sizeof(float));
            s.M[r] = 0.0f;
            s.S[r] = NAN;
            continue;
        }
        if (f.softcap != 0.0f) {
            ggml_vec_tanh_f32(n, p, p);
            ggml_vec_scale_f32(n, p, f.softcap);
        }
        if (tmask) {
            for (int c = 0; c < n; ++c) {
                p[c] = mf[c] == -INFINITY ? -INFINITY : p[c] + slope*mf[c];
            }
        }
        for (int c = n; c < RQ_KV; ++c) {
            p[c] = -INFINITY;
        }

        const float max = rq_max(p, RQ_KV);
        if (max == -INFINITY || max < s.M[r] - RQ_NEGLIGIBLE) {
            memset(p, 0, RQ_KV*sizeof(float));
            continue;
        }
        any = true;
        if (max > s.M[r]) {
            const float ms = expf(s.M[r] - max);
            s.S[r] *= ms;
            s.M[r]  = max;
            ggml_vec_scale_f32(f.DV, s.out + (size_t) r*f.DV, ms);
        }
        s.S[r] += rq_exp(p, RQ_KV, s.M[r]);
    }
    return any;
}

// weights times scales of the V rows as two planes of 7 bits; bits of used[] are set where one is not zero
static float rq_round_weights(const float * p, const float * step, uint8_t * high, uint8_t * low, uint8_t * used) {
    float w[RQ_KV];
    for (int c = 0; c < RQ_KV; ++c) {
        w[c] = p[c] > 0.0f ? p[c]*step[c] : 0.0f;
    }
    const float max = rq_max(w, RQ_KV);
    if (!(max > RQ_TINY)) {
        memset(high, 0, RQ_KV);
        memset(low,  0, RQ_KV);
        return 0.0f;
    }
    const float inv = RQ_P_MAX/max;
    for (int c = 0; c < RQ_KV; ++c) {
        const int32_t i = std::min((int32_t) (w[c]*inv + 0.5f), RQ_P_MAX);
        const uint8_t h = (uint8_t) (i >> 7);
        const uint8_t l = (uint8_t) (i & 127);
        high[c] = h;
        low[c]  = l;
        used[c] |= h | l;
    }
    return max/RQ_P_MAX;
}

static void rq_tile_values(const rq_fattn & f, const rq_buffers & t, rq_state s, const char * v, int n, int rows) {
    const size_t nb = f.v->nb[1];

    if (!f.unpack_v) {
        for (int c = 0; c < RQ_KV; ++c) {
            bool used = false;
            for (int r = 0; r < rows && !used && c < n; ++r) {
                used = t.p[r*RQ_KV + c] > 0.0f;
            }
            if (used) {
                rq_row_to_f32(f.v->type, v + c*nb, t.vf + (size_t) c*f.DV, f.DV);
            } else {
                memset(t.vf + (size_t) c*f.DV, 0, f.DV*sizeof(float));
            }
        }
        simd_gemm(s.out, t.p, t.vf, rows, RQ_KV, f.DV);
        return;
    }

    const size_t bs = ggml_type_size(f.v->type);
    for (int b = 0; b < f.DV/f.QV; ++b) {
        const uint8_t * vb = (const uint8_t *) v + b*bs;
        rq_steps(vb, nb, n, t.step);
        uint8_t used[RQ_KV] = { 0 };
        for (int r = 0; r < rows; ++r) {
            t.ps[r] = rq_round_weights(t.p + r*RQ_KV, t.step, t.high + r*RQ_KV, t.low + r*RQ_KV, used);
        }
        uint8_t group[RQ_KV/4];
        int n_used = 0;
        for (int g = 0; g < RQ_KV/4; ++g) {
            if (rq_load32(used + 4*g) != 0) {
                group[n_used++] = (uint8_t) g;
            }
        }
        f.unpack_v(vb, nb, n, group, n_used, t.vt);
        f.values(n_used, group, t.high, t.low, t.ps, t.vt, rows, s.out + b*f.QV, f.DV);
    }
}

// fetch the rows of the tile after this one: rows of one head lie too far apart for the hardware to guess
static inline void rq_prefetch(const char * p, size_t nb, int n, size_t row) {
#if defined(__GNUC__)
    for (int c = 0; c < n; ++c, p += nb) {
        for (size_t o = 0; o < row; o += 64) {
            __builtin_prefetch(p + o);
        }
        __builtin_prefetch(p + row - 1);
    }
#else
    GGML_UNUSED(p); GGML_UNUSED(nb); GGML_UNUSED(n); GGML_UNUSED(row);
#endif
}

// recent row c of a head as f32: those of this batch are rounded to f16, too, so that batches of any size see the same
static void rq_recent_row(const ggml_tensor * const src[2], int64_t c, int head, int64_t i3, float * y) {
    const bool          held = c < src[0]->ne[1];
    const ggml_tensor * t    = src[held ? 0 : 1];
    const char *        x    = (const char *) t->data + (held ? c : c - src[0]->ne[1])*t->nb[1] + head*t->nb[2] + i3*t->nb[3];

    if (held) {
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) x, y, t->ne[0]);
        return;
    }
    ggml_fp16_t h[QK_RQ];
    for (int64_t j = 0; j < t->ne[0]; j += QK_RQ) {
        const int64_t n = std::min<int64_t>(QK_RQ, t->ne[0] - j);
        ggml_cpu_fp32_to_fp16((const float *) x + j, h, n);
        ggml_cpu_fp16_to_fp32(h, y + j, n);
    }
}

// rows row0.. of head groups grp0.. against n recent rows
static void rq_attend_recent(const rq_fattn & f, const rq_buffers & t, char * states, int64_t i3, int grp0, int n_grp,
        int64_t row0, int rows, const int32_t * cols, int n) {
    const int rk2 = f.q->ne[2]/f.recent_k[0]->ne[2];
    const int rv2 = f.q->ne[2]/f.recent_v[0]->ne[2];

    for (int i = 0; i < n_grp; ++i) {
        const int grp = grp0 + i;
        const rq_state s(f, rows, states + i*rq_state::size(f, rows));
        const auto query = [&](int r) {
            const int64_t row = row0 + r;
            return (const float *) ((const char *) f.q->data + row/f.group*f.q->nb[1] + (grp*f.group + row % f.group)*f.q->nb[2] + i3*f.q->nb[3]);
        };

        const bool gemm = rows >= RQ_GEMM_MIN;
        for (int c = 0; c < n; ++c) {
            rq_recent_row(f.recent_k, cols[c], grp*f.group/rk2, i3, t.row);
            for (int j = 0; gemm && j < f.DK; ++j) {
                t.kf[j*RQ_KV + c] = t.row[j];
            }
            for (int r = 0; !gemm && r < rows; ++r) {
                ggml_vec_dot_f32(f.DK, t.p + r*RQ_KV + c, 0, t.row, 0, query(r), 0, 1);
            }
        }
        if (gemm) {
            for (int j = 0; n < RQ_KV && j < f.DK; ++j) {
                memset(t.kf + j*RQ_KV + n, 0, (RQ_KV - n)*sizeof(float));
            }
            memset(t.p, 0, (size_t) rows*RQ_KV*sizeof(float));
            for (int r0 = 0; r0 < rows; r0 += RQ_GEMM_ROWS) {
                const int nr = std::min(RQ_GEMM_ROWS, rows - r0);
                for (int r = 0; r < nr; ++r) {
                    memcpy(t.qr + (size_t) r*f.DK, query(r0 + r), f.DK*sizeof(float));
                }
                simd_gemm(t.p + r0*RQ_KV, t.qr, t.kf, nr, f.DK, RQ_KV);
            }
        }
        for (int r = 0; r < rows; ++r) {
            ggml_vec_scale_f32(n, t.p + r*RQ_KV, f.scale);
        }

        if (!rq_tile_softmax(f, t, s, i3, grp, row0, rows, f.recent_mask, 0, cols, n, i)) {
            continue;
        }
        for (int c = 0; c < n; ++c) {
            rq_recent_row(f.recent_v, cols[c], grp*f.group/rv2, i3, t.vf + (size_t) c*f.DV);
        }
        for (int r = 1; r < rows; ++r) { // side by side, without the padding
            memmove(t.p + (size_t) r*n, t.p + (size_t) r*RQ_KV, n*sizeof(float));
        }
        simd_gemm(s.out, t.p, t.vf, rows, n, f.DV);
    }
}

// rows row0.. of head groups grp0.. against those recent rows that any of their queries sees
static void rq_attend_all_recent(const rq_fattn & f, const rq_buffers & t, char * states, int64_t i3, int grp0, int n_grp,
        int64_t row0, int rows) {
    const int64_t n_recent = f.recent_k[0]->ne[1] + f.recent_k[1]->ne[1];

    int32_t cols[RQ_KV];
    int n_cols = 0;
    for (int64_t c0 = 0; c0 < n_recent; c0 += RQ_KV) {
        const int n = (int) std::min<int64_t>(RQ_KV, n_recent - c0);
        uint16_t seen[RQ_KV] = { 0 };
        for (int64_t i1 = row0/f.group; i1 <= (row0 + rows - 1)/f.group; ++i1) {
            const ggml_fp16_t * m = rq_mask_row(f.recent_mask, i3, 0, i1) + c0;
            for (int c = 0; c < n; ++c) {
                seen[c] |= m[c] ^ 0xfc00;
            }
        }
        for (int c = 0; c < n; ++c) {
            if (seen[c]) {
                cols[n_cols++] = (int32_t) (c0 + c);
            }
            if (n_cols == RQ_KV) {
                rq_attend_recent(f, t, states, i3, grp0, n_grp, row0, rows, cols, n_cols);
                n_cols = 0;
            }
        }
    }
    if (n_cols > 0) {
        rq_attend_recent(f, t, states, i3, grp0, n_grp, row0, rows, cols, n_cols);
    }
}

// rows row0.. of head groups grp0.. against the KV rows ic0 to ic1, and the recent rows; states[i]: of head group grp0 + i
static void rq_attend(const rq_fattn & f, const rq_buffers & t, char * states, int64_t i3, int grp0, int n_grp,
        int64_t row0, int rows, int64_t ic0, int64_t ic1, bool recent) {
    const size_t state_size = rq_state::size(f, rows);
    const int rk2 = f.q->ne[2]/f.k->ne[2];
    const int rv2 = f.q->ne[2]/f.v->ne[2];
    const int64_t ik3 = i3/(f.q->ne[3]/f.k->ne[3]);
    const int64_t iv3 = i3/(f.q->ne[3]/f.v->ne[3]);

    const size_t k_row = ggml_row_size(f.k->type, f.DK);
    const size_t v_row = ggml_row_size(f.v->type, f.DV);
    const bool   fetch = n_grp > 1 && (size_t) (f.n_kv*n_grp)*(k_row + v_row) > RQ_FETCH_FROM;

    for (int i = 0; i < n_grp; ++i) {
        const rq_state s(f, rows, states + i*state_size);
        std::fill(s.M, s.M + rows, -INFINITY);
        std::fill(s.S, s.S + rows, 0.0f);
        memset(s.out, 0, (size_t) rows*f.DV*sizeof(float));
        rq_load_queries(f, t, i3, grp0 + i, row0, rows, i);
    }

    for (int64_t ic = ic0; ic < ic1; ic += RQ_KV) {
        const int n = (int) std::min<int64_t>(RQ_KV, ic1 - ic);
        for (int i = 0; i < n_grp; ++i) {
            const int grp = grp0 + i;
            if (rq_tile_masked(f, i3, grp, row0, rows, ic, n)) {
                continue;
            }
            const char * k = (const char *) f.k->data + ic*f.k->nb[1] + (grp*f.group/rk2)*f.k->nb[2] + ik3*f.k->nb[3];
            const char * v = (const char *) f.v->data + ic*f.v->nb[1] + (grp*f.group/rv2)*f.v->nb[2] + iv3*f.v->nb[3];
            const rq_state s(f, rows, states + i*state_size);
            if (fetch) {
                const int next = (int) std::min<int64_t>(RQ_KV, ic1 - ic - n);
                rq_prefetch(k + n*f.k->nb[1], f.k->nb[1], next, k_row);
                rq_prefetch(v + n*f.v->nb[1], f.v->nb[1], next, v_row);
            }
            rq_tile_scores(f, t, k, n, rows, i);
            if (rq_tile_softmax(f, t, s, i3, grp, row0, rows, f.mask, ic, nullptr, n, i)) {
                rq_tile_values(f, t, s, v, n, rows);
            }
        }
    }
    if (recent) {
        rq_attend_all_recent(f, t, states, i3, grp0, n_grp, row0, rows);
    }
}

// sink, normalization and store of one row
static void rq_finish(const rq_fattn & f, int64_t i3, int grp, int64_t row, float M, float S, float * out) {
    const int64_t i1   = row/f.group;
    const int     head = grp*f.group + (int) (row % f.group);
    float scale = 1.0f;
    if (f.sinks) {
        const float sink = ((const float *) f.sinks->data)[head];
        if (sink > M) {
            scale = expf(M - sink);
            S = S*scale + 1.0f;
        } else {
            S += expf(sink - M);
        }
    }
    ggml_vec_scale_f32(f.DV, out, S == 0.0f ? 0.0f : scale/S);
    memcpy((char *) f.dst->data + ((i3*f.dst->ne[2] + i1)*f.dst->ne[1] + head)*f.dst->nb[1], out, f.DV*sizeof(float));
}

static int rq_gcd(int a, int b) {
    return b == 0 ? a : rq_gcd(b, a % b);
}

static rq_fattn rq_make_fattn(const ggml_tensor * dst) {
    rq_fattn f;
    f.q     = dst->src[0];
    f.k     = dst->src[1];
    f.v     = dst->src[2];
    f.mask  = dst->src[3];
    f.sinks = dst->src[4];
    f.dst   = dst;

    f.recent_mask = dst->src[GGML_RQ_RECENT_MASK];
    f.recent_k[0] = dst->src[GGML_RQ_RECENT_K];
    f.recent_k[1] = dst->src[GGML_RQ_RECENT_K_NEW];
    f.recent_v[0] = dst->src[GGML_RQ_RECENT_V];
    f.recent_v[1] = dst->src[GGML_RQ_RECENT_V_NEW];

    typedef decltype(f.unpack_k) unpack_k_t;
    typedef decltype(f.unpack_v) unpack_v_t;
    const unpack_k_t unpack_k[][4] = {
        { rq_unpack_k<2, QK_RQ>,    rq_unpack_k<3, QK_RQ>,    rq_unpack_k<4, QK_RQ>,    rq_unpack_k<5, QK_RQ>    },
        { rq_unpack_k<2, QK_RQ_64>, rq_unpack_k<3, QK_RQ_64>, rq_unpack_k<4, QK_RQ_64>, rq_unpack_k<5, QK_RQ_64> },
    };
    const unpack_v_t unpack_v[][4] = {
        { rq_unpack_v<2, QK_RQ>,    rq_unpack_v<3, QK_RQ>,    rq_unpack_v<4, QK_RQ>,    rq_unpack_v<5, QK_RQ>    },
        { rq_unpack_v<2, QK_RQ_64>, rq_unpack_v<3, QK_RQ_64>, rq_unpack_v<4, QK_RQ_64>, rq_unpack_v<5, QK_RQ_64> },
    };
    const bool k_sibling = ggml_rq_is_sibling(f.k->type);
    const bool v_sibling = ggml_rq_is_sibling(f.v->type);

    f.unpack_k = ggml_rq_is_type(f.k->type) ? unpack_k[k_sibling][ggml_rq_type_bits(f.k->type) - 2] : nullptr;
    f.unpack_v = ggml_rq_is_type(f.v->type) ? unpack_v[v_sibling][ggml_rq_type_bits(f.v->type) - 2] : nullptr;
    f.scores   = k_sibling ? rq_all_scores<QK_RQ_64> : rq_all_scores<QK_RQ>;
    f.values   = v_sibling ? rq_all_values<QK_RQ_64> : rq_all_values<QK_RQ>;
    f.QK       = ggml_rq_type_block(f.k->type);
    f.QV       = ggml_rq_type_block(f.v->type);

    f.DK       = (int) f.k->ne[0];
    f.DV       = (int) f.v->ne[0];
    f.n_kv     = f.k->ne[1];
    f.group    = rq_gcd((int) (f.q->ne[2]/f.k->ne[2]), (int) (f.q->ne[2]/f.v->ne[2]));
    f.n_groups = (int) f.q->ne[2]/f.group;
    f.scale    = ggml_get_op_params_f32(dst, 0);
    f.max_bias = ggml_get_op_params_f32(dst, 1);
    f.softcap  = ggml_get_op_params_f32(dst, 2);
    if (f.softcap != 0.0f) {
        f.scale /= f.softcap;
    }
    f.k_gemm = !f.unpack_k && f.q->ne[1]*f.group >= RQ_GEMM_MIN;
    return f;
}

// how the work is cut into items, and where these lie in the work buffer: one scratch per thread, then the states
struct rq_plan {
    int64_t n_rows;  // of a head group
    int64_t n_tiles; // of the KV range; all recent rows count as the last

    bool    split;   // an item is a range of the KV rows, otherwise a tile of rows of a head group
    int64_t n_items;
    size_t  scratch;

    int64_t n_chunks; // split: ranges
    size_t  state;    // split: bytes of a head group's state in one of them

    int     tile;        // no split: rows at most
    int64_t n_row_tiles; // no split: of a head group

    // the whole work of a split into n chunks
    size_t split_size(const rq_fattn & f, int nth, int64_t n) const {
        return rq_buffers(f, (int) n_rows, f.n_groups, nullptr).size*nth + rq_state::size(f, n_rows)*f.n_groups*f.q->ne[3]*n;
    }

    // scratch for tiles of so many rows
    static size_t tile_size(const rq_fattn & f, int tile) {
        return rq_buffers(f, tile, 1, nullptr).size + rq_state::size(f, tile);
    }

    rq_plan(const rq_fattn & f, int nth, size_t wsize) {
        n_rows  = f.q->ne[1]*f.group;
        n_tiles = (f.n_kv + RQ_KV - 1)/RQ_KV + (f.recent_mask ? 1 : 0);

        n_chunks = 0;
        if (n_rows <= RQ_SPLIT_MAX && split_size(f, nth, 1) <= wsize) {
            const size_t none = split_size(f, nth, 0);
            n_chunks = std::min<int64_t>(n_tiles, (wsize - none)/(split_size(f, nth, 1) - none));
            n_chunks = std::min<int64_t>(n_chunks, 4*nth);
        }
        split = n_chunks >= std::min<int64_t>(n_tiles, nth) && n_chunks > 0;

        const int64_t ne3 = f.q->ne[3];
        if (split) {
            scratch     = rq_buffers(f, (int) n_rows, f.n_groups, nullptr).size;
            state       = rq_state::size(f, n_rows);
            n_items     = ne3*n_chunks;
            tile        = 0;
            n_row_tiles = 0;
            return;
        }

        // the largest tile of rows that fits and gives every thread something to do
        tile = RQ_TILE_MAX;
        while (tile > 1 && (tile_size(f, tile)*nth > wsize ||
                (tile > 16 && ne3*f.n_groups*((n_rows + tile - 1)/tile) < 2*nth))) {
            tile /= 2;
        }
        scratch     = tile_size(f, tile);
        state       = 0;
        n_row_tiles = (n_rows + tile - 1)/tile;
        n_items     = ne3*f.n_groups*n_row_tiles;
        GGML_ASSERT(scratch*nth <= wsize);
    }
};

bool ggml_rq_flash_attn_ext_work_size(int n_threads, const ggml_tensor * dst, size_t & size) {
    if (!dst->src[GGML_RQ_RECENT_MASK]) {
        return false;
    }
    // all that a plan can make use of
    const rq_fattn f = rq_make_fattn(dst);
    const rq_plan  p(f, n_threads, SIZE_MAX);
    size = RQ_ALIGN + (p.split ? p.split_size(f, n_threads, p.n_chunks) : rq_plan::tile_size(f, RQ_TILE_MAX)*n_threads);
    return true;
}

// a range of the KV rows, for all rows
static void rq_item_of_split(const rq_fattn & f, const rq_plan & p, int64_t item, char * scratch, char * states) {
    const int64_t i3  = item/p.n_chunks;
    const int64_t ic  = item % p.n_chunks;
    const int64_t ic0 = p.n_tiles*ic/p.n_chunks*RQ_KV;
    const int64_t ic1 = std::min(p.n_tiles*(ic + 1)/p.n_chunks*RQ_KV, f.n_kv);

    const rq_buffers t(f, (int) p.n_rows, f.n_groups, scratch);
    rq_attend(f, t, states + item*f.n_groups*p.state, i3, 0, f.n_groups, 0, (int) p.n_rows, ic0, ic1, f.recent_mask && ic == p.n_chunks - 1);
}

// a tile of rows of one head group, for the whole KV range
static void rq_item_of_rows(const rq_fattn & f, const rq_plan & p, int64_t item, char * scratch) {
    // the last queries of a causal mask have the most to do: first
    const int64_t i3   = item/(f.n_groups*p.n_row_tiles);
    const int64_t rest = item % (f.n_groups*p.n_row_tiles);
    const int     grp  = (int) (rest % f.n_groups);
    const int64_t row0 = (p.n_row_tiles - 1 - rest/f.n_groups)*p.tile;
    const int     rows = (int) std::min<int64_t>(p.tile, p.n_rows - row0);

    const rq_buffers t(f, rows, 1, scratch);
    char * const state = scratch + t.size;
    rq_attend(f, t, state, i3, grp, 1, row0, rows, 0, f.n_kv, f.recent_mask != nullptr);

    const rq_state s(f, rows, state);
    for (int r = 0; r < rows; ++r) {
        rq_finish(f, i3, grp, row0 + r, s.M[r], s.S[r], s.out + (size_t) r*f.DV);
    }
}

// reduce the chunks of row i of all into the first
static void rq_reduce(const rq_fattn & f, const rq_plan & p, int64_t i, char * states) {
    const int64_t i3  = i/(f.n_groups*p.n_rows);
    const int64_t grp = i/p.n_rows % f.n_groups;
    const int64_t row = i % p.n_rows;

    char * const first = states + (i3*p.n_chunks*f.n_groups + grp)*p.state;
    const rq_state s(f, p.n_rows, first);
    float * out = s.out + row*f.DV;
    for (int64_t c = 1; c < p.n_chunks; ++c) {
        const rq_state o(f, p.n_rows, first + c*f.n_groups*p.state);
        if (o.M[row] == -INFINITY) {
            continue;
        }
        const float M  = std::max(s.M[row], o.M[row]);
        const float ms = expf(s.M[row] - M);
        const float mo = expf(o.M[row] - M);
        ggml_vec_scale_f32(f.DV, out, ms);
        ggml_vec_mad_f32(f.DV, out, o.out + row*f.DV, mo);
        s.M[row] = M;
        s.S[row] = s.S[row]*ms + o.S[row]*mo;
    }
    rq_finish(f, i3, (int) grp, row, s.M[row], s.S[row], out);
}

// false if the op is left to upstream's attention, which knows of no recent rows
static bool rq_is_ours(const ggml_compute_params * params, const ggml_tensor * dst) {
    // to measure and to debug
    static const bool off = getenv("GGML_RQ_UPSTREAM_FATTN") != nullptr;

    if (dst->src[GGML_RQ_RECENT_MASK]) {
        GGML_ASSERT(dst->src[0]->type == GGML_TYPE_F32);
        return true;
    }
    return !off && !params->use_ref && dst->src[0]->type == GGML_TYPE_F32 &&
        (ggml_rq_is_type(dst->src[1]->type) || ggml_rq_is_type(dst->src[2]->type));
}

bool ggml_compute_forward_rq_flash_attn_ext(const ggml_compute_params * params, ggml_tensor * dst) {
    if (!rq_is_ours(params, dst)) {
        return false;
    }
    const rq_fattn f = rq_make_fattn(dst);

    GGML_ASSERT(f.q->nb[0] == sizeof(float));
    GGML_ASSERT(f.k->nb[0] == ggml_type_size(f.k->type));
    GGML_ASSERT(f.v->nb[0] == ggml_type_size(f.v->type));
    GGML_ASSERT(dst->nb[0] == sizeof(float) && dst->nb[1] == dst->ne[0]*sizeof(float));
    GGML_ASSERT(dst->type == GGML_TYPE_F32);

    const int ith = params->ith;
    const int nth = params->nth;

    // the work buffer, from a cache line on
    char * const wdata = (char *) GGML_PAD((uintptr_t) params->wdata, RQ_ALIGN);
    const rq_plan p(f, nth, params->wsize - (size_t) (wdata - (char *) params->wdata));

    char * const scratch = wdata + p.scratch*ith;
    char * const states  = wdata + p.scratch*nth;

    if (ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, nth);
    }
    ggml_barrier(params->threadpool);

    for (int64_t item = ith; item < p.n_items; item = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        if (p.split) {
            rq_item_of_split(f, p, item, scratch, states);
        } else {
            rq_item_of_rows(f, p, item, scratch);
        }
    }

    if (p.split) {
        ggml_barrier(params->threadpool);
        for (int64_t i = ith; i < f.q->ne[3]*f.n_groups*p.n_rows; i += nth) {
            rq_reduce(f, p, i, states);
        }
    }
    return true;
}

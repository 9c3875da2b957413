#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "rq.h"

#include "ggml-impl.h"
#include "simd-mappings.h"

#include <cassert>
#include <cstring>

void quantize_row_rq2(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    ggml_rq_native_quantize_row_rq2(x, (block_rq2 *) y, k);
}

void quantize_row_rq3(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    ggml_rq_native_quantize_row_rq3(x, (block_rq3 *) y, k);
}

void quantize_row_rq4(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    ggml_rq_native_quantize_row_rq4(x, (block_rq4 *) y, k);
}

void quantize_row_rq5(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    ggml_rq_native_quantize_row_rq5(x, (block_rq5 *) y, k);
}

void quantize_row_rq2_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    ggml_rq_native_quantize_row_rq2_64(x, (block_rq2_64 *) y, k);
}

void quantize_row_rq3_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    ggml_rq_native_quantize_row_rq3_64(x, (block_rq3_64 *) y, k);
}

void quantize_row_rq4_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    ggml_rq_native_quantize_row_rq4_64(x, (block_rq4_64 *) y, k);
}

void quantize_row_rq5_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    ggml_rq_native_quantize_row_rq5_64(x, (block_rq5_64 *) y, k);
}

// A block is four groups of 32 values (two in a sibling), each of which meets one q8_0 block. ggml_rq_dot() adds up the
// integer dot products of the groups with their 32 int8 activations.

template <typename block_t> static constexpr int ggml_rq_groups = QK_RQ/32;

template <> constexpr int ggml_rq_groups<block_rq2_64> = QK_RQ_64/32;
template <> constexpr int ggml_rq_groups<block_rq3_64> = QK_RQ_64/32;
template <> constexpr int ggml_rq_groups<block_rq4_64> = QK_RQ_64/32;
template <> constexpr int ggml_rq_groups<block_rq5_64> = QK_RQ_64/32;

#if defined(__AVX2__)

// up to 32 centroids, 16 of them in each lane of a vector
struct ggml_rq_table_avx2 {
    __m256i low;
    __m256i high;

    ggml_rq_table_avx2(const int8_t * centroids, int n) {
        int8_t t[32] = { 0 };
        memcpy(t, centroids, n);
        low  = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) t));
        high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (t + 16)));
    }
};

// sum of c[i]*y[i] in eight int32 lanes
static inline __m256i ggml_rq_mul_sum_avx2(__m256i c, const int8_t * y) {
    const __m256i vy = _mm256_loadu_si256((const __m256i *) y);
    const __m256i a  = _mm256_abs_epi8(c);
    const __m256i b  = _mm256_sign_epi8(vy, c);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), a, b);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), a, b);
#else
    return _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)); // two products fit: |c| <= 127
#endif
}

static inline float ggml_rq_hsum_avx2(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
}

// all ones where the high bit of a value of group g is set, at 3 and 5 bits
static inline __m256i ggml_rq_high_avx2(const uint8_t (& qh)[QK_RQ/8], int g) {
    const __m256i bits = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) qh));
    const __m256i bit  = _mm256_set_m128i(_mm_set1_epi8((char) (2 << 2*g)), _mm_set1_epi8((char) (1 << 2*g)));
    return _mm256_cmpeq_epi8(_mm256_and_si256(bits, bit), bit);
}

static inline __m256i ggml_rq_high_avx2(const uint8_t (& qh)[QK_RQ_64/8], int g) {
    const __m256i bits = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *) qh));
    const __m256i low  = _mm256_set_epi64x(0x0808080808080808, 0x0404040404040404, 0x0202020202020202, 0x0101010101010101);
    const __m256i bit  = g == 0 ? low : _mm256_slli_epi16(low, 4);
    return _mm256_cmpeq_epi8(_mm256_and_si256(bits, bit), bit);
}

// one of 32 centroids: idx has the low bits, high the mask of the highest
static inline __m256i ggml_rq_lookup_avx2(const ggml_rq_table_avx2 & table, __m256i idx, __m256i high) {
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(table.low, idx), _mm256_shuffle_epi8(table.high, idx), high);
}

// centroids of group g, one function per code
static inline __m256i ggml_rq_unpack_avx2(const block_rq2 & x, const ggml_rq_table_avx2 & table, int g) {
    const __m256i qs = _mm256_loadu_si256((const __m256i *) x.qs);
    return _mm256_shuffle_epi8(table.low, _mm256_and_si256(_mm256_srli_epi16(qs, 2*g), _mm256_set1_epi8(3)));
}

static inline __m256i ggml_rq_unpack_avx2(const block_rq3 & x, const ggml_rq_table_avx2 & table, int g) {
    const __m256i qs   = _mm256_loadu_si256((const __m256i *) x.qs);
    const __m256i high = _mm256_and_si256(ggml_rq_high_avx2(x.qh, g), _mm256_set1_epi8(4));
    const __m256i low  = _mm256_and_si256(_mm256_srli_epi16(qs, 2*g), _mm256_set1_epi8(3));
    return _mm256_shuffle_epi8(table.low, _mm256_or_si256(low, high));
}

static inline __m256i ggml_rq_unpack_avx2(const block_rq4 & x, const ggml_rq_table_avx2 & table, int g) {
    const __m256i qs = _mm256_loadu_si256((const __m256i *) (x.qs + 32*(g & 1)));
    return _mm256_shuffle_epi8(table.low, _mm256_and_si256(_mm256_srli_epi16(qs, 4*(g >> 1)), _mm256_set1_epi8(15)));
}

static inline __m256i ggml_rq_unpack_avx2(const block_rq5 & x, const ggml_rq_table_avx2 & table, int g) {
    const __m256i qs = _mm256_loadu_si256((const __m256i *) (x.qs + 32*(g & 1)));
    return ggml_rq_lookup_avx2(table, _mm256_and_si256(_mm256_srli_epi16(qs, 4*(g >> 1)), _mm256_set1_epi8(15)), ggml_rq_high_avx2(x.qh, g));
}

// siblings: low bits of 32 values, 16 of them side by side
static inline __m256i ggml_rq_low_avx2(const uint8_t * p, int g) {
    const __m128i qs = _mm_loadu_si128((const __m128i *) p);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(qs, 4*g + 2), _mm_srli_epi16(qs, 4*g)), _mm256_set1_epi8(3));
}

static inline __m256i ggml_rq_unpack_avx2(const block_rq2_64 & x, const ggml_rq_table_avx2 & table, int g) {
    return _mm256_shuffle_epi8(table.low, ggml_rq_low_avx2(x.qs, g));
}

static inline __m256i ggml_rq_unpack_avx2(const block_rq3_64 & x, const ggml_rq_table_avx2 & table, int g) {
    const __m256i high = _mm256_and_si256(ggml_rq_high_avx2(x.qh, g), _mm256_set1_epi8(4));
    return _mm256_shuffle_epi8(table.low, _mm256_or_si256(ggml_rq_low_avx2(x.qs, g), high));
}

static inline __m256i ggml_rq_unpack_avx2(const block_rq4_64 & x, const ggml_rq_table_avx2 & table, int g) {
    const __m256i qs = _mm256_loadu_si256((const __m256i *) x.qs);
    return _mm256_shuffle_epi8(table.low, _mm256_and_si256(_mm256_srli_epi16(qs, 4*g), _mm256_set1_epi8(15)));
}

static inline __m256i ggml_rq_unpack_avx2(const block_rq5_64 & x, const ggml_rq_table_avx2 & table, int g) {
    const __m256i qs = _mm256_loadu_si256((const __m256i *) x.qs);
    return ggml_rq_lookup_avx2(table, _mm256_and_si256(_mm256_srli_epi16(qs, 4*g), _mm256_set1_epi8(15)), ggml_rq_high_avx2(x.qh, g));
}

template <typename block_t>
static inline float ggml_rq_dot(int nb, const block_t * x, const block_q8_0 * y, const int8_t * centroids, int n_centroids) {
    const ggml_rq_table_avx2 table(centroids, n_centroids);

    __m256 sum = _mm256_setzero_ps();
    for (int i = 0; i < nb; ++i, y += ggml_rq_groups<block_t>) {
        const float d = GGML_CPU_FP16_TO_FP32(x[i].d) * (1.0f/128.0f);
        for (int g = 0; g < ggml_rq_groups<block_t>; ++g) {
            const __m256i p  = ggml_rq_mul_sum_avx2(ggml_rq_unpack_avx2(x[i], table, g), y[g].qs);
            const __m256  dd = _mm256_set1_ps(d*GGML_CPU_FP16_TO_FP32(y[g].d));
            sum = _mm256_add_ps(_mm256_mul_ps(dd, _mm256_cvtepi32_ps(p)), sum);
        }
    }
    return ggml_rq_hsum_avx2(sum);
}

#elif defined(__ARM_NEON) && (defined(__aarch64__) || defined(_M_ARM64))

// up to 32 centroids
static inline int8x16x2_t ggml_rq_table_neon(const int8_t * centroids, int n) {
    int8_t t[32] = { 0 };
    memcpy(t, centroids, n);
    return { { vld1q_s8(t), vld1q_s8(t + 16) } };
}

// v >> n in every byte
static inline uint8x16_t ggml_rq_shift_neon(const uint8_t * v, int n) {
    return vshlq_u8(vld1q_u8(v), vdupq_n_s8((int8_t) -n));
}

// high bits of half h of group g, at 3 and 5 bits
static inline uint8x16_t ggml_rq_high_neon(const uint8_t (& qh)[QK_RQ/8], int g, int h) {
    return vandq_u8(ggml_rq_shift_neon(qh, 2*g + h), vdupq_n_u8(1));
}

static inline uint8x16_t ggml_rq_high_neon(const uint8_t (& qh)[QK_RQ_64/8], int g, int h) {
    const int s = 4*g + 2*h;
    const uint8x8_t bits = vld1_u8(qh);
    const uint8x16_t both = vcombine_u8(vshl_u8(bits, vdup_n_s8((int8_t) -s)), vshl_u8(bits, vdup_n_s8((int8_t) -(s + 1))));
    return vandq_u8(both, vdupq_n_u8(1));
}

// centroids of half h of group g, one function per code
static inline int8x16_t ggml_rq_unpack_neon(const block_rq2 & x, const int8x16x2_t & table, int g, int h) {
    return vqtbl1q_s8(table.val[0], vandq_u8(ggml_rq_shift_neon(x.qs + 16*h, 2*g), vdupq_n_u8(3)));
}

static inline int8x16_t ggml_rq_unpack_neon(const block_rq3 & x, const int8x16x2_t & table, int g, int h) {
    const uint8x16_t low = vandq_u8(ggml_rq_shift_neon(x.qs + 16*h, 2*g), vdupq_n_u8(3));
    return vqtbl1q_s8(table.val[0], vorrq_u8(low, vshlq_n_u8(ggml_rq_high_neon(x.qh, g, h), 2)));
}

static inline int8x16_t ggml_rq_unpack_neon(const block_rq4 & x, const int8x16x2_t & table, int g, int h) {
    return vqtbl1q_s8(table.val[0], vandq_u8(ggml_rq_shift_neon(x.qs + 32*(g & 1) + 16*h, 4*(g >> 1)), vdupq_n_u8(15)));
}

static inline int8x16_t ggml_rq_unpack_neon(const block_rq5 & x, const int8x16x2_t & table, int g, int h) {
    const uint8x16_t low = vandq_u8(ggml_rq_shift_neon(x.qs + 32*(g & 1) + 16*h, 4*(g >> 1)), vdupq_n_u8(15));
    return vqtbl2q_s8(table, vorrq_u8(low, vshlq_n_u8(ggml_rq_high_neon(x.qh, g, h), 4)));
}

static inline int8x16_t ggml_rq_unpack_neon(const block_rq2_64 & x, const int8x16x2_t & table, int g, int h) {
    return vqtbl1q_s8(table.val[0], vandq_u8(ggml_rq_shift_neon(x.qs, 4*g + 2*h), vdupq_n_u8(3)));
}

static inline int8x16_t ggml_rq_unpack_neon(const block_rq3_64 & x, const int8x16x2_t & table, int g, int h) {
    const uint8x16_t low = vandq_u8(ggml_rq_shift_neon(x.qs, 4*g + 2*h), vdupq_n_u8(3));
    return vqtbl1q_s8(table.val[0], vorrq_u8(low, vshlq_n_u8(ggml_rq_high_neon(x.qh, g, h), 2)));
}

static inline int8x16_t ggml_rq_unpack_neon(const block_rq4_64 & x, const int8x16x2_t & table, int g, int h) {
    return vqtbl1q_s8(table.val[0], vandq_u8(ggml_rq_shift_neon(x.qs + 16*h, 4*g), vdupq_n_u8(15)));
}

static inline int8x16_t ggml_rq_unpack_neon(const block_rq5_64 & x, const int8x16x2_t & table, int g, int h) {
    const uint8x16_t low = vandq_u8(ggml_rq_shift_neon(x.qs + 16*h, 4*g), vdupq_n_u8(15));
    return vqtbl2q_s8(table, vorrq_u8(low, vshlq_n_u8(ggml_rq_high_neon(x.qh, g, h), 4)));
}

template <typename block_t>
static inline float ggml_rq_dot(int nb, const block_t * x, const block_q8_0 * y, const int8_t * centroids, int n_centroids) {
    const int8x16x2_t table = ggml_rq_table_neon(centroids, n_centroids);

    float32x4_t sum = vdupq_n_f32(0.0f);
    for (int i = 0; i < nb; ++i, y += ggml_rq_groups<block_t>) {
        const float d = GGML_CPU_FP16_TO_FP32(x[i].d) * (1.0f/128.0f);
        for (int g = 0; g < ggml_rq_groups<block_t>; ++g) {
            int32x4_t p = ggml_vdotq_s32(vdupq_n_s32(0), ggml_rq_unpack_neon(x[i], table, g, 0), vld1q_s8(y[g].qs));
            p = ggml_vdotq_s32(p, ggml_rq_unpack_neon(x[i], table, g, 1), vld1q_s8(y[g].qs + 16));
            sum = vmlaq_n_f32(sum, vcvtq_f32_s32(p), d*GGML_CPU_FP16_TO_FP32(y[g].d));
        }
    }
    return vaddvq_f32(sum);
}

#else

static inline int ggml_rq_index(const block_rq2 & x, int j) {
    return (x.qs[j % 32] >> 2*(j / 32)) & 3;
}

static inline int ggml_rq_index(const block_rq3 & x, int j) {
    return ((x.qs[j % 32] >> 2*(j / 32)) & 3) | ((x.qh[j % 16] >> (j / 16)) & 1) << 2;
}

static inline int ggml_rq_index(const block_rq4 & x, int j) {
    return (x.qs[j % 64] >> 4*(j / 64)) & 15;
}

static inline int ggml_rq_index(const block_rq5 & x, int j) {
    return ((x.qs[j % 64] >> 4*(j / 64)) & 15) | ((x.qh[j % 16] >> (j / 16)) & 1) << 4;
}

static inline int ggml_rq_index(const block_rq2_64 & x, int j) {
    return (x.qs[j % 16] >> 2*(j / 16)) & 3;
}

static inline int ggml_rq_index(const block_rq3_64 & x, int j) {
    return ((x.qs[j % 16] >> 2*(j / 16)) & 3) | ((x.qh[j % 8] >> (j / 8)) & 1) << 2;
}

static inline int ggml_rq_index(const block_rq4_64 & x, int j) {
    return (x.qs[j % 32] >> 4*(j / 32)) & 15;
}

static inline int ggml_rq_index(const block_rq5_64 & x, int j) {
    return ((x.qs[j % 32] >> 4*(j / 32)) & 15) | ((x.qh[j % 8] >> (j / 8)) & 1) << 4;
}

template <typename block_t>
static inline float ggml_rq_dot(int nb, const block_t * x, const block_q8_0 * y, const int8_t * centroids, int n_centroids) {
    GGML_UNUSED(n_centroids);

    float sum = 0.0f;
    for (int i = 0; i < nb; ++i, y += ggml_rq_groups<block_t>) {
        float sum_block = 0.0f;
        for (int g = 0; g < ggml_rq_groups<block_t>; ++g) {
            int32_t p = 0;
            for (int j = 0; j < 32; ++j) {
                p += centroids[ggml_rq_index(x[i], 32*g + j)]*y[g].qs[j];
            }
            sum_block += GGML_CPU_FP16_TO_FP32(y[g].d)*p;
        }
        sum += sum_block*GGML_CPU_FP16_TO_FP32(x[i].d)*(1.0f/128.0f);
    }
    return sum;
}

#endif

#define GGML_RQ_VEC_DOT(CODE, N, BITS) \
    void ggml_vec_dot_rq##CODE##_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) { \
        assert(n % N == 0); \
        assert(nrc == 1); \
        GGML_UNUSED(nrc); GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by); \
        *s = ggml_rq_dot(n/N, (const block_rq##CODE *) vx, (const block_q8_0 *) vy, ggml_rq##BITS##_centroids, 1 << BITS); \
    }

GGML_RQ_VEC_DOT(2, QK_RQ, 2)
GGML_RQ_VEC_DOT(3, QK_RQ, 3)
GGML_RQ_VEC_DOT(4, QK_RQ, 4)
GGML_RQ_VEC_DOT(5, QK_RQ, 5)

GGML_RQ_VEC_DOT(2_64, QK_RQ_64, 2)
GGML_RQ_VEC_DOT(3_64, QK_RQ_64, 3)
GGML_RQ_VEC_DOT(4_64, QK_RQ_64, 4)
GGML_RQ_VEC_DOT(5_64, QK_RQ_64, 5)

// rows r0 up to r1 of nr are this thread's
static void ggml_rq_rows_of_thread(const ggml_compute_params * params, int64_t nr, int64_t & r0, int64_t & r1) {
    const int64_t dr = (nr + params->nth - 1)/params->nth;
    r0 = MIN(dr*params->ith, nr);
    r1 = MIN(r0 + dr, nr);
}

void ggml_compute_forward_rq_get_rows(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1]; // which rows

    GGML_TENSOR_BINARY_OP_LOCALS

    GGML_ASSERT(src1->type == GGML_TYPE_I32 && dst->type == GGML_TYPE_F32);
    GGML_ASSERT(ne0 == ne00 && nb0 == sizeof(float) && nb00 == ggml_type_size(src0->type));
    GGML_ASSERT(ne02 == ne11 && ne03 == ne12);

    const ggml_to_float_t to_float = ggml_get_type_traits(src0->type)->to_float;

    int64_t r0, r1;
    ggml_rq_rows_of_thread(params, ggml_nelements(src1), r0, r1);
    for (int64_t r = r0; r < r1; ++r) {
        const int64_t i2 = r/(ne10*ne11);
        const int64_t i1 = r/ne10 % ne11;
        const int64_t i0 = r % ne10;
        const int64_t row = *(const int32_t *) ((const char *) src1->data + i0*nb10 + i1*nb11 + i2*nb12);
        GGML_ASSERT(row >= 0 && row < ne01);

        to_float((const char *) src0->data + row*nb01 + i1*nb02 + i2*nb03, (float *) ((char *) dst->data + i0*nb1 + i1*nb2 + i2*nb3), ne00);
    }
}

void ggml_compute_forward_rq_rotate(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[1]; // the rows; dst->src[0] is the matrix

    GGML_TENSOR_UNARY_OP_LOCALS

    const int32_t hint = ggml_get_op_params_i32(dst, 1);
    const auto  family = ggml_rq_hint_family(hint);
    const auto  mode   = ggml_rq_hint_mode(hint);

    GGML_ASSERT(src0->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32);
    GGML_ASSERT(nb00 == sizeof(float) && nb0 == sizeof(float));
    GGML_ASSERT(ne00 == QK_RQ_64 || ne00 == QK_RQ || ne00 == 2*QK_RQ);

    int64_t r0, r1;
    ggml_rq_rows_of_thread(params, ne01*ne02*ne03, r0, r1);
    for (int64_t r = r0; r < r1; ++r) {
        const int64_t i3 = r/(ne02*ne01);
        const int64_t i2 = (r - i3*ne02*ne01)/ne01;
        const int64_t i1 = r - i3*ne02*ne01 - i2*ne01;

        ggml_rq_native_rotate_row(family, mode,
                (const float *) ((const char *) src0->data + i1*nb01 + i2*nb02 + i3*nb03),
                (float *) ((char *) dst->data + i1*nb1 + i2*nb2 + i3*nb3), ne00);
    }
}

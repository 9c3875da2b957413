#version 450

#extension GL_EXT_control_flow_attributes : require
#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_shader_explicit_arithmetic_types_int16 : require

// Encoding, the same as in ggml-rq.c but for floats: they are taken apart as bit patterns, so that neither fast math nor flushed
// denormals can change a byte, and what needs 64 bits is done in two words. Only the scale that keeps the inner product is here
// (LLAMA_RQ_SCALE=inner). A workgroup encodes 32 blocks, each by as many threads as it has 16 values. Sums are exact, so that
// their order does not matter: threads add to words that they share.

#if defined(SET_ROWS)
#include "generic_binary_head.glsl"
#else
#include "generic_unary_head.glsl"
#endif
#include "rq_decode.glsl"

layout (local_size_x_id = 1, local_size_y = 1, local_size_z = 1) in;

layout (constant_id = 2) const uint RQ_BITS = 3;
layout (constant_id = 3) const uint RQ_N    = 128;

const uint HALF  = 1u << (RQ_BITS - 1u); // magnitudes
const uint LANES = RQ_N/16u;

#define BLOCKS 32u
#define ROUNDS 5   // choices of indices: three starts, the best of them refined, the last one

#define RQ_BITS_INF 0x7f800000u // magnitudes above this are NaN
#define RQ_BITS_MAX 0x477de040u // 64992.25 = 65504*127/128, the largest magnitude that a block holds
#define RQ_BITS_MIN 0x33800000u // 2^-24: blocks that stay below this become zero

shared uint sh_max[BLOCKS];
shared uint sh_num[ROUNDS*BLOCKS];  // sums of a*c
shared uint sh_den[ROUNDS*BLOCKS];  // sums of c*c
shared uint sh_low[BLOCKS];         // sums of a*a, of its low 16 bits and of the others
shared uint sh_high[BLOCKS];

uint block;   // of the workgroup
uint a[16];   // magnitudes of this thread's values, scaled by 2^(14 - e)
uint t[15];   // magnitudes above t[k] take a level beyond k

// the magnitude with bit pattern u, scaled by 2^(14 - e) and truncated
uint scaled(uint u, int e) {
    const int shift = 9 + e + 127 - int(u >> 23);

    return shift < 32 ? ((u & 0x7fffffu) | 0x800000u) >> shift : 0u;
}

// s: scale in units of 2^-11 of a per centroid unit, s < 2^24
void thresholds(uint s) {
    [[unroll]] for (uint k = 0; k < 15; ++k) {
        t[k] = k < HALF - 1u ? min((s*rq_byte(rq_mid2(RQ_BITS), k, RQ_BITS)) >> 12, 32767u) : 32767u;
    }
}

uint level(uint v) {
    uint res = 0;
    [[unroll]] for (uint k = 0; k < 15; ++k) {
        res += k < HALF - 1u && v > t[k] ? 1u : 0u;
    }
    return res;
}

// adds what this thread has to the sums of a round, for the centroids that the thresholds choose
void add(uint round) {
    uint num = 0;
    uint den = 0;
    [[unroll]] for (uint j = 0; j < 16; ++j) {
        const uint c = rq_byte(rq_magnitudes(RQ_BITS), level(a[j]), RQ_BITS);
        num += a[j]*c;
        den += c*c;
    }
    atomicAdd(sh_num[round*BLOCKS + block], num);
    atomicAdd(sh_den[round*BLOCKS + block], den);
}

// the least-squares scale of a round: num/den in units of 2^-11, rounded down; num < 2^30, den < 2^21
uint ratio(uint round) {
    const uint num = sh_num[round*BLOCKS + block];
    const uint den = max(sh_den[round*BLOCKS + block], 1u);
    const uint q = num/den;
    const uint r = num - q*den;

    return (q << 11) + (r << 11)/den;
}

// (high*2^32 + low)/den, rounded down; high < den < 2^31
uint divided(uint high, uint low, uint den) {
    uint q = 0;
    uint r = high;
    for (int i = 31; i >= 0; --i) {
        r = r << 1 | (low >> i & 1u);
        q <<= 1;
        if (r >= den) {
            r -= den;
            q |= 1u;
        }
    }
    return q;
}

// the scale with which the inner product of the block with what is decoded from it is that with itself: sum(a*a)*2^11/sum(a*c)
uint inner(uint round) {
    const uint num = sh_num[round*BLOCKS + block];
    if (num == 0) {
        return 0;
    }
    uint carry;
    const uint low  = uaddCarry(sh_high[block] << 16, sh_low[block], carry);
    const uint high = (sh_high[block] >> 16) + carry;

    return divided(high << 11 | low >> 21, low << 11, num);
}

// s*2^(e - 18) in fp16, rounded to nearest even, at most 65504; s < 2^24, e >= -24
uint stored(uint s, int e) {
    if (s == 0) {
        return 0;
    }

    const int msb      = findMSB(s);
    const int exponent = msb + e - 18;
    const int shift    = max(msb - 10, -(e + 6)); // the last bit is worth 2^(shift + e - 18), at least 2^-24

    uint m;
    if (shift > 0) {
        const uint rest     = s & ((1u << shift) - 1u);
        const uint half_way = 1u << (shift - 1);
        m = s >> shift;
        m += rest > half_way || (rest == half_way && (m & 1u) != 0u) ? 1u : 0u;
    } else {
        m = s << -shift;
    }

    const int bits = exponent < -14 ? int(m) : ((exponent + 14) << 10) + int(m); // a carry goes into the exponent

    return uint(min(bits, 0x7bff));
}

// d*2^(18 - e), truncated
uint units(uint d, int e) {
    const int  exponent = max(int(d >> 10), 1);
    const uint m        = (d & 0x3ffu) | ((d >> 10) != 0u ? 0x400u : 0u);
    const int  shift    = exponent - 7 - e;

    return shift >= 0 ? m << shift : -shift < 32 ? m >> -shift : 0u;
}

// value j of the thread in its block: two neighbours of each eighth, so that the thread has whole halves of all planes
uint place(uint lane, uint j) {
    return 2u*lane + j % 2u + RQ_N/8u*(j/2u);
}

void main() {
    const uint tid  = gl_LocalInvocationID.x;
    const uint lane = tid % LANES;
    block = tid/LANES;

    for (uint i = tid; i < ROUNDS*BLOCKS; i += gl_WorkGroupSize.x) {
        sh_num[i] = 0;
        sh_den[i] = 0;
        if (i < BLOCKS) {
            sh_max [i] = 0;
            sh_low [i] = 0;
            sh_high[i] = 0;
        }
    }
    barrier();

    // as upstream's shaders divide the blocks among workgroups; a thread without a block goes along, for the barriers
#if defined(SET_ROWS)
    const uint ib = (gl_WorkGroupID.z*262144u + gl_WorkGroupID.y*512u + gl_WorkGroupID.x)*BLOCKS + block;
#else
    const uint ib = gl_WorkGroupID.z*262144u + gl_WorkGroupID.y*512u + gl_WorkGroupID.x*BLOCKS + block;
#endif
    const bool there = ib < p.ne/RQ_N;

    uint to = 0;
#if defined(SET_ROWS)
    uint from = 0;
    if (there) {
        uint i00, i01, i02, i03;
        get_indices(ib*RQ_N, i00, i01, i02, i03);
        const uint row = data_b[src1_idx(i01, fastmod(i02, p.ne11), fastmod(i03, p.ne12), 0) + get_boffset()] DATA_B_SWIZZLE;
        from = src0_idx(i00, i01, i02, i03) + get_aoffset();
        to   = dst_idx(i00/RQ_N, row, i02, i03) + get_doffset();
    }
#define FROM(i) (from + (i)*p.nb00)
#else
    if (there) {
        to = dst_idx_quant(ib*RQ_N, RQ_N) + get_doffset();
    }
#define FROM(i) (src0_idx(ib*RQ_N + (i)) + get_aoffset())
#endif

    uint neg  = 0;
    uint umax = 0;
    [[unroll]] for (uint j = 0; j < 16; ++j) {
        const uint w = there ? data_a[FROM(place(lane, j))] : 0u;
        const uint v = w & 0x7fffffffu;
        a[j] = v > RQ_BITS_INF ? 0u : min(v, RQ_BITS_MAX);
        neg |= v > RQ_BITS_INF ? 0u : (w >> 31) << j;
        umax = max(umax, a[j]);
    }
    atomicMax(sh_max[block], umax);
    barrier();

    umax = sh_max[block];
    const bool empty = umax < RQ_BITS_MIN;
    const int  e     = empty ? 0 : int(umax >> 23) - 127;
    const uint amax  = empty ? 0u : scaled(umax, e);

    uint low  = 0;
    uint high = 0;
    [[unroll]] for (uint j = 0; j < 16; ++j) {
        a[j] = empty ? 0u : scaled(a[j], e);
        low  += a[j]*a[j] & 0xffffu;
        high += a[j]*a[j] >> 16;
    }
    atomicAdd(sh_low [block], low);
    atomicAdd(sh_high[block], high);

    // least squares: three starts between a clipped and a full range, the best of them refined once
    for (uint i = 0; i < 3; ++i) {
        thresholds((amax*rq_byte(rq_starts(RQ_BITS), i, RQ_BITS)) >> 3);
        add(i);
    }
    barrier();

    uint s = 0;
    uint best_high = 0;
    uint best_low  = 0;
    for (uint i = 0; i < 3; ++i) {
        const uint r = ratio(i);
        uint gain_high, gain_low;
        umulExtended(r, sh_num[i*BLOCKS + block], gain_high, gain_low);
        if (gain_high > best_high || (gain_high == best_high && gain_low > best_low)) {
            s         = r;
            best_high = gain_high;
            best_low  = gain_low;
        }
    }
    thresholds(s);
    add(3);
    barrier();

    // the indices are those of this scale in fp16
    s = units(stored(ratio(3), e), e);
    thresholds(s);
    add(4);
    barrier();

    const uint d = empty || s == 0 ? 0u : stored(inner(4), e);
    if (!there) {
        return;
    }

    uint words[4] = uint[4](0u, 0u, 0u, 0u); // of the indices, or of all but their highest bit
    uint word_high = 0;
    [[unroll]] for (uint j = 0; j < 16; ++j) {
        const uint i     = HALF + level(a[j]);
        const uint idx   = ((neg >> j & 1u) != 0u ? ~i : i) & (2u*HALF - 1u); // the complement for negative values
        const uint shift = 8u*(j % 2u);
        const uint k     = j/2u;
        if (RQ_BITS >= 4u) {
            words[k % 4u] |= (idx & 15u) << (shift + 4u*(k/4u));
        } else {
            words[k % 2u] |= (idx & 3u) << (shift + 2u*(k/2u));
        }
        word_high |= (idx >> (RQ_BITS - 1u)) << (shift + k);
    }

    const uint at = to*(1u + RQ_N*RQ_BITS/16u);
    if (lane == 0) {
        data_d[at] = uint16_t(d);
    }
    [[unroll]] for (uint k = 0; k < 4; ++k) {
        if (RQ_BITS >= 4u || k < 2u) {
            data_d[at + 1u + lane + LANES*k] = uint16_t(d == 0u ? 0u : words[k]);
        }
    }
    if ((RQ_BITS & 1u) != 0u) {
        data_d[at + 1u + (RQ_BITS == 5u ? RQ_N/4u : RQ_N/8u) + lane] = uint16_t(d == 0u ? 0u : word_high);
    }
}

// One query of each head over blocks, for mx.fast.metal_kernel, which writes the signature around what follows the line
// "// body": a simdgroup takes one head and one part of the cells, and keeps a running softmax. Written for Apple's GPUs and
// run by an emulator alone; no Mac has run or measured it yet.

// value `at` of a row of blocks, in its basis
template <int BITS, int BLOCK>
float rq_value(const device uchar * row, int at, const device float * centroids) {
    const int bytes = 2 + BITS*BLOCK/8;
    const int j     = at % BLOCK;

    const device uchar * p = row + at/BLOCK*bytes;
    const float step = (float) as_type<half>((ushort) (p[0] | p[1] << 8));

    // bits in the low plane, and its bytes; an odd number of bits has one more in the high plane
    const int low  = BITS < 4 ? 2 : 4;
    const int size = BLOCK*low/8;

    int index = p[2 + j % size] >> low*(j/size) & ((1 << low) - 1);
    if (BITS > low) {
        index |= (p[2 + size + j % (BLOCK/8)] >> j/(BLOCK/8) & 1) << low;
    }

    return step*centroids[index]*(1.0f/128.0f);
}

// body
    // q [heads of the batch, DK] in float32; k, v [batch, heads of K, cells, bytes]; places: the first cell, the one behind
    // the last; values [heads of the batch, PARTS, DV]; sums [heads of the batch, PARTS, 2]: the largest score, the sum
    const int lane = (int) thread_index_in_simdgroup;
    const int head = (int) thread_position_in_grid.y;
    const int part = (int) thread_position_in_grid.z;

    const int of_k  = head % HEADS/SHARE;
    const int batch = head/HEADS;

    const int count = (places[1] - places[0] + PARTS - 1)/PARTS;
    const int first = places[0] + part*count;
    const int end   = min(first + count, (int) places[1]);

    const device uchar * ks = k + batch*k_strides[0] + of_k*k_strides[1];
    const device uchar * vs = v + batch*v_strides[0] + of_k*v_strides[1];

    // lane l has values l, l + 32, l + 64, ... of a head
    float own[DK/32];
    for (int i = 0; i < DK/32; ++i) {
        own[i] = q[head*DK + lane + 32*i];
    }
    float acc[DV/32];
    for (int i = 0; i < DV/32; ++i) {
        acc[i] = 0.0f;
    }
    float largest = -1e30f;
    float sum     = 0.0f;

    for (int cell = first; cell < end; ++cell) {
        const device uchar * kr = ks + cell*k_strides[2];
        const device uchar * vr = vs + cell*v_strides[2];

        float score = 0.0f;
        for (int i = 0; i < DK/32; ++i) {
            score += own[i]*rq_value<K_BITS, K_BLOCK>(kr, lane + 32*i, k_centroids);
        }
        score = simd_sum(score);

        const float now    = max(largest, score);
        const float before = exp(largest - now);
        const float weight = exp(score - now);
        for (int i = 0; i < DV/32; ++i) {
            acc[i] = acc[i]*before + weight*rq_value<V_BITS, V_BLOCK>(vr, lane + 32*i, v_centroids);
        }
        sum     = sum*before + weight;
        largest = now;
    }

    for (int i = 0; i < DV/32; ++i) {
        values[(head*PARTS + part)*DV + lane + 32*i] = acc[i];
    }
    if (lane == 0) {
        sums[(head*PARTS + part)*2 + 0] = largest;
        sums[(head*PARTS + part)*2 + 1] = sum;
    }

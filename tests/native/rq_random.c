// Random bit patterns through every function of ggml-rq.h, for the sanitizers. Prints a checksum of the results.
// Buffers are exactly as large as they must be, so that one byte too far is found.

#include "ggml-rq.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state = 88172645463325252u;

static uint32_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t) (state >> 32);
}

static uint64_t hash(uint64_t h, const void * data, size_t size) {
    const unsigned char * p = data;
    for (size_t i = 0; i < size; i++) {
        h = (h ^ p[i]) * 1099511628211u;
    }
    return h;
}

// rotate: results depend on contraction to FMA in the last bit, so they stay out of the checksum
static void rotate(const float * x, int64_t n) {
    float * y = malloc((size_t) n*sizeof(float));
    float * m = malloc((size_t) (n*n)*sizeof(float));
    for (int family = -1; family <= 3; family++) {
        for (int mode = -1; mode <= 4; mode++) {
            const bool valid = (n == 64 || n == 128 || n == 256) && family >= 0 && family <= 2 && mode >= 0 && mode <= 3;
            if (ggml_rq_rotate_row(family, mode, x, y, n) != valid ||
                ggml_rq_rotation_matrix(family, mode, n, m) != valid) {
                fprintf(stderr, "wrong answer for family %d, mode %d\n", family, mode);
                exit(1);
            }
        }
    }
    free(m);
    free(y);
}

#define ROUND(bits, block)                                                                   \
    static uint64_t round##bits(uint64_t h, const float * x, int64_t n) {                    \
        const size_t size = (size_t) (n/block)*sizeof(block_rq##bits);                       \
        block_rq##bits * q = malloc(size);                                                   \
        float * y = malloc((size_t) n*sizeof(float));                                        \
        quantize_row_rq##bits##_ref(x, q, n);                                                \
        h = hash(h, q, size);                                                                \
        dequantize_row_rq##bits(q, y, n);                                                    \
        h = hash(h, y, (size_t) n*sizeof(float));                                            \
        for (size_t i = 0; i < size; i++) { /* blocks that no encoder wrote */               \
            ((unsigned char *) q)[i] = (unsigned char) next();                               \
        }                                                                                    \
        dequantize_row_rq##bits(q, y, n);                                                    \
        free(y);                                                                             \
        free(q);                                                                             \
        return h;                                                                            \
    }

ROUND(2, 128)
ROUND(3, 128)
ROUND(4, 128)
ROUND(5, 128)
ROUND(2_64, 64)
ROUND(3_64, 64)
ROUND(4_64, 64)
ROUND(5_64, 64)

int main(int argc, char ** argv) {
    const int rounds = argc > 1 ? atoi(argv[1]) : 1000;
    uint64_t h = 14695981039346656037u;
    for (int r = 0; r < rounds; r++) {
        const int64_t n = 64*(1 + r % 6);
        float * x = malloc((size_t) n*sizeof(float));
        const uint32_t spread = next() % 33;
        const uint32_t base   = next();
        for (int64_t i = 0; i < n; i++) {
            // from any bit pattern to patterns with a common exponent
            const uint32_t w = spread == 32 ? next() : (base & ~(0xffffffffu >> spread)) | (next() >> spread);
            memcpy(x + i, &w, sizeof(w));
        }
        if (n % 128 == 0) {
            h = round2(h, x, n);
            h = round3(h, x, n);
            h = round4(h, x, n);
            h = round5(h, x, n);
        }
        h = round2_64(h, x, n);
        h = round3_64(h, x, n);
        h = round4_64(h, x, n);
        h = round5_64(h, x, n);
        if (r % 65 == 0) { // which meets every size
            rotate(x, n);
        }
        free(x);
    }
    printf("%016llx\n", (unsigned long long) h);
    return 0;
}

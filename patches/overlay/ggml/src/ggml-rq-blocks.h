#pragma once

// Blocks of the rotated KV cache codes; layout in ggml-rq.h. Metal embeds this file, too.
// Wants ggml-common.h before it, with the ggml_half of the language.

#define QK_RQ    128
#define QK_RQ_64 64 // siblings, for heads that 128 does not divide

typedef struct {
    ggml_half d;           // scale: value = d * centroid / 128
    uint8_t qs[QK_RQ / 4]; // index, 2 bits
} block_rq2;
static_assert(sizeof(block_rq2) == sizeof(ggml_half) + QK_RQ / 4, "wrong rq2 block size/padding");

typedef struct {
    ggml_half d;           // scale
    uint8_t qs[QK_RQ / 4]; // index, low 2 bits
    uint8_t qh[QK_RQ / 8]; // index, high bit
} block_rq3;
static_assert(sizeof(block_rq3) == sizeof(ggml_half) + QK_RQ / 4 + QK_RQ / 8, "wrong rq3 block size/padding");

typedef struct {
    ggml_half d;           // scale
    uint8_t qs[QK_RQ / 2]; // index, 4 bits
} block_rq4;
static_assert(sizeof(block_rq4) == sizeof(ggml_half) + QK_RQ / 2, "wrong rq4 block size/padding");

typedef struct {
    ggml_half d;           // scale
    uint8_t qs[QK_RQ / 2]; // index, low 4 bits
    uint8_t qh[QK_RQ / 8]; // index, high bit
} block_rq5;
static_assert(sizeof(block_rq5) == sizeof(ggml_half) + QK_RQ / 2 + QK_RQ / 8, "wrong rq5 block size/padding");

typedef struct {
    ggml_half d;
    uint8_t qs[QK_RQ_64 / 4];
} block_rq2_64;
static_assert(sizeof(block_rq2_64) == sizeof(ggml_half) + QK_RQ_64 / 4, "wrong rq2_64 block size/padding");

typedef struct {
    ggml_half d;
    uint8_t qs[QK_RQ_64 / 4];
    uint8_t qh[QK_RQ_64 / 8];
} block_rq3_64;
static_assert(sizeof(block_rq3_64) == sizeof(ggml_half) + QK_RQ_64 / 4 + QK_RQ_64 / 8, "wrong rq3_64 block size/padding");

typedef struct {
    ggml_half d;
    uint8_t qs[QK_RQ_64 / 2];
} block_rq4_64;
static_assert(sizeof(block_rq4_64) == sizeof(ggml_half) + QK_RQ_64 / 2, "wrong rq4_64 block size/padding");

typedef struct {
    ggml_half d;
    uint8_t qs[QK_RQ_64 / 2];
    uint8_t qh[QK_RQ_64 / 8];
} block_rq5_64;
static_assert(sizeof(block_rq5_64) == sizeof(ggml_half) + QK_RQ_64 / 2 + QK_RQ_64 / 8, "wrong rq5_64 block size/padding");

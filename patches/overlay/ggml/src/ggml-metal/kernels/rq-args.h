#pragma once

// What the kernels of the rotated cache types that upstream has none of are told, for the host and for Metal.

// K or V as f16, by blocks
typedef struct {
    int32_t  ne0;     // values of a head
    int32_t  ne1;     // rows
    int32_t  ne2;     // heads
    int32_t  rows;    // of the copy, which may have more behind these
    int32_t  nblocks; // in all
    uint64_t nb0;
    uint64_t nb1;
    uint64_t nb2;
    uint64_t nb3;
} ggml_metal_kargs_rq_kv_f16;

// recent rows of K or V (ggml-rq-types.h), by row, head and stream
typedef struct {
    uint64_t held[3];
    uint64_t fresh[3];
} ggml_metal_kargs_rq_rows;

// these behind such a copy
typedef struct {
    ggml_metal_kargs_rq_rows nb;

    int32_t ne0;    // values of a head
    int32_t ne2;    // heads
    int32_t rows;   // of the copy
    int32_t first;  // of them that is written
    int32_t n_held;
    int32_t n;      // with those of this batch; what follows is zero
} ggml_metal_kargs_rq_behind;

// attention to them
typedef struct {
    ggml_metal_kargs_rq_rows k;
    ggml_metal_kargs_rq_rows v;

    uint64_t nb01; // queries
    uint64_t nb02;
    uint64_t nb03;
    uint64_t nb_mask1;
    uint64_t nb_mask3;

    int32_t dk;
    int32_t dv;
    int32_t n_query;
    int32_t n_head;
    int32_t group;   // heads to a KV head
    int32_t ne_mask3;
    int32_t n_held;
    int32_t n;       // with those of this batch
    int32_t n_part;  // parts that the vector kernel has left, a lane each

    float   scale;
    float   max_bias;
    float   m0;
    float   m1;
    float   logit_softcap;
    int32_t n_head_log2;
} ggml_metal_kargs_rq_recent;

// rows of a cache from what a layer computes for it
typedef struct {
    uint64_t nb_token; // of what goes in
    uint64_t nb_part;
    uint64_t nb_idx;
    uint64_t nb1;      // rows of the cache

    int32_t n;         // values that are multiplied together, a part of a token
    int32_t n_part;
    int32_t map_part;  // values from the matrix of a part to that of the next, 0: one for all
    int32_t has_mean;
    int32_t is_i64;    // the indices of rows
} ggml_metal_kargs_rq_store;

#define RQ_STORE_NSG   8   // simdgroups to a part of a token
#define RQ_STORE_MAX_N 512

#define RQ_RECENT_NSG    8   // simdgroups that go through the rows of a query and head
#define RQ_RECENT_MAX_DV 512

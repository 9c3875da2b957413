#pragma once

// Cases of test-backend-ops.cpp for the rotated cache types, which includes this where its own cases are defined

#include "test-rq.h"

// MUL_MAT with one of our rotations and its hint: the fast form of a backend against the dense product of the CPU
struct test_rq_rotation : public test_mul_mat {
    const ggml_rq_family family;
    const ggml_rq_mode   mode;

    test_rq_rotation(ggml_rq_family family, ggml_rq_mode mode, int64_t n, int64_t rows) :
        test_mul_mat(GGML_TYPE_F32, GGML_TYPE_F32, n, rows, n, {1, 1}, {1, 1}), family(family), mode(mode) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * out = test_mul_mat::build_graph(ctx);
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (t->op == GGML_OP_MUL_MAT) {
                t->op_params[1] = ggml_rq_hint(family, mode);
            }
        }
        return out;
    }

    void initialize_tensors(ggml_context * ctx) override {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (strcmp(t->name, "a") == 0) {
                std::vector<float> data(t->ne[0]*t->ne[0]);
                GGML_ASSERT(ggml_rq_rotation_matrix(family, mode, t->ne[0], data.data()));
                ggml_backend_tensor_set(t, data.data(), 0, data.size()*sizeof(float));
            } else if (t->type == GGML_TYPE_F32) {
                init_tensor_uniform(t);
            }
        }
    }

    std::string vars() override {
        return "family=" + std::to_string(family) + ",mode=" + std::to_string(mode) + "," + test_mul_mat::vars();
    }

    std::string op_desc(ggml_tensor *) override {
        return "MUL_MAT_RQ";
    }
};

// MLA: V is the first values of K, in blocks that make up both
static bool rq_v_in_k(int64_t hsk, ggml_type type_V) {
    return hsk == 576 || (hsk == 320 && ggml_rq_is_sibling(type_V));
}

// FLASH_ATTN_EXT with recent rows (ggml-rq-types.h), the two masks behind each other or apart
struct test_rq_recent : public test_flash_attn_ext {
    const int64_t held;  // rows in f16; each query has one in f32
    const bool    apart; // the masks
    const float   lift;  // added to the scores of these rows

    test_rq_recent(std::array<int64_t, 2> hs, int64_t nh, std::array<int64_t, 2> nr23, int64_t kv, int64_t nb, int64_t held, ggml_type type_K, ggml_type type_V,
            bool sinks = false, float max_bias = 0.0f, float logit_softcap = 0.0f, bool apart = false, float lift = 0.0f) :
        test_flash_attn_ext(hs[0], hs[1], nh, nr23, kv, nb, true, sinks, max_bias, logit_softcap, GGML_PREC_F32, type_K, type_V, {0, 2, 1, 3}, true, rq_v_in_k(hs[0], type_V)), held(held), apart(apart), lift(lift) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * out   = test_flash_attn_ext::build_graph(ctx);
        const int64_t first = apart ? 0 : kv; // column of the mask of recent rows
        ggml_tensor * masks = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, GGML_PAD(first + held + nb, 256), nb, 1, nr23[1]);
        ggml_set_name(masks, "masks");

        const auto mask = [&](int64_t n, int64_t from) {
            return ggml_view_4d(ctx, masks, n, nb, 1, nr23[1], masks->nb[1], masks->nb[2], masks->nb[3], from*masks->nb[0]);
        };
        const auto rows = [&](ggml_type type, int64_t hs, int64_t n) {
            return ggml_permute(ctx, ggml_new_tensor_4d(ctx, type, hs, nh, n, nr23[1]), 0, 2, 1, 3);
        };
        const auto values = [&](ggml_tensor * k) {
            return v_is_view_of_k ? ggml_view_4d(ctx, k, hsv, k->ne[1], k->ne[2], k->ne[3], k->nb[1], k->nb[2], k->nb[3], 0) : rows(k->type, hsv, k->ne[1]);
        };
        if (!apart) {
            out->src[3] = mask(kv, 0);
        }
        ggml_tensor * k     = rows(GGML_TYPE_F16, hsk, held);
        ggml_tensor * k_new = rows(GGML_TYPE_F32, hsk, nb);
        ggml_rq_flash_attn_ext_add_recent(out, k, values(k), mask(masks->ne[0] - first, first), k_new, values(k_new));
        return out;
    }

    void initialize_tensors(ggml_context * ctx) override {
        test_flash_attn_ext::initialize_tensors(ctx);
        ggml_tensor * masks = ggml_get_tensor(ctx, "masks");
        init_tensor_kq_mask(masks);

        const int64_t seen = (apart ? 0 : kv) + held + nb;
        std::vector<ggml_fp16_t> hidden(masks->ne[0] - seen, ggml_fp32_to_fp16(-INFINITY));
        for (int64_t row = 0; row < ggml_nrows(masks); ++row) {
            ggml_backend_tensor_set(masks, hidden.data(), row*masks->nb[1] + seen*sizeof(ggml_fp16_t), hidden.size()*sizeof(ggml_fp16_t));

            const size_t at = row*masks->nb[1] + (seen - held - nb)*sizeof(ggml_fp16_t);
            std::vector<ggml_fp16_t> scores(held + nb);
            ggml_backend_tensor_get(masks, scores.data(), at, scores.size()*sizeof(ggml_fp16_t));
            for (ggml_fp16_t & score : scores) {
                score = ggml_fp32_to_fp16(ggml_fp16_to_fp32(score) + lift);
            }
            ggml_backend_tensor_set(masks, scores.data(), at, scores.size()*sizeof(ggml_fp16_t));
        }
    }

    std::string vars() override {
        const std::string res = "recent=" + std::to_string(held) + ",apart=" + std::to_string(apart) + "," + test_flash_attn_ext::vars();
        return lift == 0.0f ? res : res + ",lift=" + std::to_string((int) lift);
    }
};

static void add_rq_recent_tests(std::vector<std::unique_ptr<test_case>> & test_cases) {
    const auto add = [&](int64_t hsk, int64_t hsv, ggml_type type_K, ggml_type type_V, bool apart) {
        for (int nb : { 1, 3, 75 }) {
            test_cases.emplace_back(new test_rq_recent({ hsk, hsv }, 2, { hsk == hsv ? 4 : 8, 1}, 512, nb, 33,   type_K, type_V, false, 0.0f, 0.0f, apart));
            test_cases.emplace_back(new test_rq_recent({ hsk, hsv }, 3, { 1, 2}, 113, nb, 1030, type_K, type_V, true,  8.0f, hsk % 128 == 0 ? 30.0f : 0.0f, apart));
        }
    };
    for (ggml_type type : { GGML_TYPE_PLANAR2, GGML_TYPE_ISO3, GGML_TYPE_ROTOR4, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        add(128, 128, type, type, false);
        add(256, 256, type, type, type == GGML_TYPE_ISO3);
    }
    add(512, 512, GGML_TYPE_ISO3, GGML_TYPE_ISO3,    false);
    add(512, 512, GGML_TYPE_ISO4, GGML_TYPE_PLANAR2, true);
    add(512, 512, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0,    false);
    for (ggml_type type : { GGML_TYPE_RQ2_64, GGML_TYPE_RQ3_64, GGML_TYPE_RQ4_64 }) {
        add( 64,  64, type, type,             false);
        add(192, 128, type, GGML_TYPE_ROTOR4, false);
    }
    add( 64,  64, GGML_TYPE_RQ3_64, GGML_TYPE_Q8_0, true);
    add(192, 128, GGML_TYPE_RQ5_64, GGML_TYPE_ISO5, true);
    add(128, 128, GGML_TYPE_Q4_0,   GGML_TYPE_Q4_0, true);

    for (int nb : { 1, 3, 75 }) { // MLA
        test_cases.emplace_back(new test_rq_recent({576, 512}, 1, {16, 1}, 512, nb, 33, GGML_TYPE_RQ3_64, GGML_TYPE_RQ3_64));
        test_cases.emplace_back(new test_rq_recent({320, 256}, 1, {32, 1}, 512, nb, 33, GGML_TYPE_RQ4_64, GGML_TYPE_RQ4_64));
    }
    // the largest score among these rows, then in the cache: what was summed before has to be scaled in the first case
    for (float lift : { 5.0f, -5.0f }) {
        test_cases.emplace_back(new test_rq_recent({128, 128}, 2, { 4, 1}, 512, 3, 300, GGML_TYPE_ISO3, GGML_TYPE_ISO3, false, 0.0f, 0.0f, false, lift));
    }
    test_cases.emplace_back(new test_rq_recent({128, 128}, 2, { 8, 1}, 256, 1,  33, GGML_TYPE_ISO3, GGML_TYPE_F16));
    test_cases.emplace_back(new test_rq_recent({128, 128}, 2, { 8, 1}, 256, 1,  33, GGML_TYPE_Q8_0, GGML_TYPE_ISO4));
    test_cases.emplace_back(new test_rq_recent({128, 128}, 2, { 8, 1}, 256, 64, 33, GGML_TYPE_F16, GGML_TYPE_ISO3));
}

// V as the first values of K, in blocks that make up both (MLA)
static void add_rq_latent_tests(std::vector<std::unique_ptr<test_case>> & test_cases) {
    const auto add = [&](int64_t hsk, int64_t hsv, int64_t heads, int64_t streams, int64_t kv, int64_t nb, ggml_type type, bool kv_view) {
        test_cases.emplace_back(new test_flash_attn_ext(hsk, hsv, 1, { heads, streams }, kv, nb, true, false, 0, 0, GGML_PREC_F32, type, type, {0, 1, 2, 3}, kv_view, true));
    };
    for (ggml_type type : { GGML_TYPE_RQ2_64, GGML_TYPE_RQ3_64, GGML_TYPE_RQ4_64 }) {
        for (int nb : { 1, 3, 75 }) {
            add(576, 512, 16, 1, 512, nb, type, false);
            add(576, 512, 20, 2, 256, nb, type, true);
            add(320, 256, 32, 1, 256, nb, type, false);
            add(320, 256, 32, 2, 512, nb, type, true);
        }
    }
    add(576, 512,  4, 1, 113, 3, GGML_TYPE_RQ3_64, true);
    add(640, 512, 16, 1, 256, 3, GGML_TYPE_ISO3,   true);
    add(256, 192, 16, 1, 256, 3, GGML_TYPE_RQ3_64, true);
}

static void add_rq_sibling_tests(std::vector<std::unique_ptr<test_case>> & test_cases);

static void add_rq_tests(std::vector<std::unique_ptr<test_case>> & test_cases) {
    add_rq_sibling_tests(test_cases);
    add_rq_recent_tests(test_cases);
    add_rq_latent_tests(test_cases);

    for (ggml_rq_family family : { GGML_RQ_PLANAR, GGML_RQ_ISO, GGML_RQ_ROTOR }) {
        for (ggml_rq_mode mode : { GGML_RQ_BLOCK, GGML_RQ_FULL }) {
            for (int64_t n : { 64, 128, 256 }) {
                for (int64_t rows : { 1, 5, 300 }) {
                    test_cases.emplace_back(new test_rq_rotation(family, mode, n, rows));
                }
            }
        }
    }

    // attention: every pair with each other, with f16 and with q8_0, then shapes and flags
    for (ggml_type type_K : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_RQ_TYPE_LIST }) {
        for (ggml_type type_V : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_RQ_TYPE_LIST }) {
            test_cases.emplace_back(new test_flash_attn_ext(128, 128, 2, {4, 1}, 113, 3, true, false, 0, 0, GGML_PREC_F32, type_K, type_V));
        }
    }
    for (ggml_type type : { GGML_TYPE_PLANAR2, GGML_TYPE_ISO3, GGML_TYPE_ROTOR4, GGML_TYPE_ISO5 }) {
        for (int hs : { 128, 256 }) {
            for (int nb : { 1, 3, 32, 75 }) {
                test_cases.emplace_back(new test_flash_attn_ext(hs, hs, 2, { 8, 1},  512, nb, true,  false, 0,    0,  GGML_PREC_F32, type, type));
                test_cases.emplace_back(new test_flash_attn_ext(hs, hs, 2, { 4, 3},  113, nb, true,  true,  8,    30, GGML_PREC_F32, type, type, {0, 2, 1, 3}));
                test_cases.emplace_back(new test_flash_attn_ext(hs, hs, 4, { 1, 1}, 1025, nb, false, false, 0,    0,  GGML_PREC_F32, type, type));
            }
            // a whole cache as it lies, which a backend may copy for many queries
            test_cases.emplace_back(new test_flash_attn_ext(hs, hs, 2, { 4, 3}, 113, 75, true, true, 8, 30, GGML_PREC_F32, type, type, {0, 2, 1, 3}, false));
        }
    }

    // heads of 512 (Gemma 4), which upstream's kernels for CUDA have in groups and with a padded cache
    for (ggml_type type_K : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_PLANAR2, GGML_TYPE_ISO3, GGML_TYPE_ROTOR4 }) {
        for (ggml_type type_V : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_PLANAR2, GGML_TYPE_ISO3, GGML_TYPE_ROTOR4 }) {
            test_cases.emplace_back(new test_flash_attn_ext(512, 512, 2, { 8, 1}, 256, 2, true, false, 0, 0, GGML_PREC_F32, type_K, type_V));
        }
    }
    for (int nb : { 1, 3, 75 }) {
        test_cases.emplace_back(new test_flash_attn_ext(512, 512, 2, { 8, 2}, 768, nb, true, true, 0, 30, GGML_PREC_F32, GGML_TYPE_ISO3, GGML_TYPE_ISO3, {0, 2, 1, 3}));
        test_cases.emplace_back(new test_flash_attn_ext(320, 256, 1, {32, 1}, 512, nb, true, true, 0, 0, GGML_PREC_F32, GGML_TYPE_RQ3_64, GGML_TYPE_ISO3));
    }
}

// those that store heads of 64, 192 and so on
static void add_rq_sibling_tests(std::vector<std::unique_ptr<test_case>> & test_cases) {
    for (ggml_type type : { GGML_RQ_SIBLING_LIST }) {
        test_cases.emplace_back(new test_get_rows(type, 192, 5, 4, 1, 1, false));
        test_cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 16, 3, 192, {1, 1}, {1, 1}));
        test_cases.emplace_back(new test_cpy(GGML_TYPE_F32, type, {192, 4, 2, 1}));
        test_cases.emplace_back(new test_cpy(type, GGML_TYPE_F32, {192, 4, 2, 1}));
        for (ggml_type type_V : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_RQ_SIBLING_LIST }) {
            for (int hs : { 64, 192, 320 }) {
                for (int nb : { 1, 3, 75 }) {
                    test_cases.emplace_back(new test_flash_attn_ext(hs, hs, 3, { 3, 1}, 113, nb, true, false, 0, 0, GGML_PREC_F32, type, type_V));
                    test_cases.emplace_back(new test_flash_attn_ext(hs, hs, 2, { 4, 3}, 113, nb, true, true, 8, 30, GGML_PREC_F32, type_V, type, {0, 2, 1, 3}));
                }
            }
        }
        test_cases.emplace_back(new test_flash_attn_ext(192, 128, 2, { 4, 1}, 113, 3, true, false, 0, 0, GGML_PREC_F32, type, GGML_TYPE_ISO3));
    }
}

// beside f16, q8_0 and q4_0
static void add_rq_perf_tests(std::vector<std::unique_ptr<test_case>> & test_cases) {
    const std::vector<ggml_type> wide   = { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_ISO2, GGML_TYPE_ISO3, GGML_TYPE_ISO4 };
    const std::vector<ggml_type> narrow = { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_RQ2_64, GGML_TYPE_RQ3_64, GGML_TYPE_RQ4_64 };
    for (int hs : { 64, 128, 256, 512 }) {
        for (int group : { 4, 8 }) {
            for (int kv : { 4096, 32768, 131072 }) {
                for (int nb : { 1, 512 }) {
                    if (kv > 32768 && nb > 1) { continue; }
                    for (ggml_type type : hs % 128 == 0 ? wide : narrow) {
                        test_cases.emplace_back(new test_flash_attn_ext(hs, hs, 32/group, {group, 1}, kv, nb, true, false, 0, 0, GGML_PREC_F32, type, type, {0, 2, 1, 3}));
                    }
                }
            }
        }
    }
    // MLA: one KV head, V the first 512 values of K
    for (int kv : { 4096, 32768 }) {
        for (int nb : { 1, 512 }) {
            for (ggml_type type : narrow) {
                test_cases.emplace_back(new test_flash_attn_ext(576, 512, 1, {16, 1}, kv, nb, true, false, 0, 0, GGML_PREC_F32, type, type, {0, 2, 1, 3}, true, true));
            }
        }
    }
}

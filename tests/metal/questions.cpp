// What the host side can ask of the kernels, and what it says about operations on our types.

#include "questions.h"

#include "device.h"

#include "ggml-metal-rq.h"
#include "ggml-metal-tuning.h"

#include <cstdio>
#include <string>

// of two types of one code, in blocks that their heads take
static void ask_flash_attn(ggml_context * ctx, ggml_metal_library_t lib, ggml_type type_k, ggml_type type_v, int head, int head_v) {
    ggml_tensor * q  = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, head, 1, 1, 1);
    ggml_tensor * k  = ggml_new_tensor_4d(ctx, type_k, head,   32, 1, 1);
    ggml_tensor * v  = ggml_new_tensor_4d(ctx, type_v, head_v, 32, 1, 1);
    ggml_tensor * op = ggml_flash_attn_ext(ctx, q, k, v, nullptr, 1.0f, 0.0f, 0.0f);

    ggml_metal_library_get_pipeline_flash_attn_ext_kv_f16(lib, op);
    ggml_metal_library_get_pipeline_flash_attn_ext(lib, op, true, false, false, false, false, 4, false, 1, 1);
    ggml_metal_library_get_pipeline_flash_attn_ext(lib, op, true, false, false, false, false, 4, true,  1, 1);

    auto ask_vec = [&](ggml_metal_tuning::fa_vec_cfg_t cfg) {
        ggml_metal_library_get_pipeline_flash_attn_ext_vec(lib, op, true, false, false, false, false, false, cfg.Q, cfg.NE, 1, 32, false, 1, 1);
    };
    for (int family = 0; family <= 12; family++) {
        for (int64_t cells = 32; cells <= 65536; cells *= 2) {
            for (int64_t queries = 1; queries < 20; queries++) {
                ask_vec(ggml_metal_tuning::fa_vec_pick(family, type_k, head, head_v, cells, queries));
            }
        }
    }
    ask_vec(ggml_metal_tuning::fa_vec_baseline_cfg(head, head_v));
}

void print_names() {
    ggml_context * ctx = ggml_init({ 4*1024*1024, nullptr, true });
    ggml_metal_library_t lib = ggml_metal_device_get_library(fake_metal_device());

    for (int t = GGML_TYPE_PLANAR2; t <= GGML_TYPE_RQ4_64; t++) {
        const ggml_type type = (ggml_type) t;
        const ggml_type wide = ggml_rq_is_sibling(type) ? (ggml_type) (t - GGML_TYPE_RQ2_64 + GGML_TYPE_PLANAR2) : type;

        for (ggml_type idx : { GGML_TYPE_I32, GGML_TYPE_I64 }) {
            ggml_tensor * dst = ggml_new_tensor_2d(ctx, type, 128, 1);
            ggml_tensor * src = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 128, 1);
            ggml_metal_library_get_pipeline_set_rows(lib, ggml_set_rows(ctx, dst, src, ggml_new_tensor_1d(ctx, idx, 1)));
        }
        ggml_metal_library_get_pipeline_get_rows(lib, type);
        ggml_metal_library_get_pipeline_cpy(lib, GGML_TYPE_F32, type);
        ggml_metal_library_get_pipeline_cpy(lib, type, GGML_TYPE_F32);
        ggml_metal_library_get_pipeline_cpy(lib, type, GGML_TYPE_F16);
        if (type == wide) {
            ask_flash_attn(ctx, lib, type, type, 128, 128);
            ask_flash_attn(ctx, lib, type, type, 256, 256);
        } else {
            ask_flash_attn(ctx, lib, type, type,  64,  64);
            ask_flash_attn(ctx, lib, type, wide, 192, 128);
            ask_flash_attn(ctx, lib, type, wide, 320, 256);
        }
    }
    ggml_free(ctx);

    const char * separator = "[";
    for (const auto & name : fake_metal_looked_up()) {
        printf("%s\"%s\"", separator, name.c_str());
        separator = ", ";
    }
    printf("]\n");
}

void print_supports() {
    ggml_context * ctx = ggml_init({ 4*1024*1024, nullptr, true });

    const char * separator = "{";
    auto say = [&](const std::string & what, const ggml_tensor * op, bool has_simdgroup_mm = true) {
        bool supported;
        const bool decided = ggml_metal_rq_supports_op(op, true, has_simdgroup_mm, &supported);
        printf("%s\"%s\": \"%s\"", separator, what.c_str(), !decided ? "upstream" : supported ? "yes" : "no");
        separator = ", ";
    };
    auto tensor = [&](ggml_type type, int64_t ne0 = 256, int64_t ne1 = 4) {
        return ggml_new_tensor_4d(ctx, type, ne0, ne1, 2, 1);
    };
    auto fa = [&](ggml_type k, ggml_type v, int64_t head, int64_t head_v) {
        return ggml_flash_attn_ext(ctx, tensor(GGML_TYPE_F32, head), tensor(k, head), tensor(v, head_v), nullptr, 1.0f, 0.0f, 0.0f);
    };

    for (ggml_type k : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_PLANAR3, GGML_TYPE_ISO3, GGML_TYPE_ROTOR4 }) {
        for (ggml_type v : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_PLANAR3, GGML_TYPE_ISO3, GGML_TYPE_ROTOR4 }) {
            say(std::string("flash_attn ") + ggml_type_name(k) + "/" + ggml_type_name(v), fa(k, v, 128, 128));
        }
    }
    for (int64_t head : { 256, 384, 512 }) {
        say("flash_attn head " + std::to_string(head), fa(GGML_TYPE_ISO3, GGML_TYPE_ISO3, head, head));
    }
    say("flash_attn rq3_64/rq3_64 64",    fa(GGML_TYPE_RQ3_64, GGML_TYPE_RQ3_64, 64, 64));
    say("flash_attn rq3_64/iso3 192/128", fa(GGML_TYPE_RQ3_64, GGML_TYPE_ISO3, 192, 128));
    say("flash_attn rq4_64/iso4 320/256", fa(GGML_TYPE_RQ4_64, GGML_TYPE_ISO4, 320, 256));
    say("flash_attn rq3_64/rq4_64 64",    fa(GGML_TYPE_RQ3_64, GGML_TYPE_RQ4_64, 64, 64));
    say("flash_attn rq3_64/iso4 192/128", fa(GGML_TYPE_RQ3_64, GGML_TYPE_ISO4, 192, 128));
    say("flash_attn rq3_64/f16 64",       fa(GGML_TYPE_RQ3_64, GGML_TYPE_F16, 64, 64));
    say("flash_attn rq3_64/rq3_64 128",   fa(GGML_TYPE_RQ3_64, GGML_TYPE_RQ3_64, 128, 128));
    say("flash_attn rq3_64/rq3_64 192",   fa(GGML_TYPE_RQ3_64, GGML_TYPE_RQ3_64, 192, 192));
    say("flash_attn heads 256/128", fa(GGML_TYPE_ISO3, GGML_TYPE_ISO3, 256, 128));
    say("flash_attn five bits",     fa(GGML_TYPE_ISO5, GGML_TYPE_ISO5, 128, 128));
    say("flash_attn without matrices", fa(GGML_TYPE_ISO3, GGML_TYPE_ISO3, 128, 128), false);
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_ISO3 }) {
        ggml_tensor * op = fa(type, type, 128, 128);
        op->src[5] = tensor(GGML_TYPE_F32);
        say(std::string("flash_attn more sources ") + ggml_type_name(type), op);
    }

    ggml_tensor * ours = tensor(GGML_TYPE_ISO3);
    ggml_tensor * f32  = tensor(GGML_TYPE_F32);
    ggml_tensor * f16  = tensor(GGML_TYPE_F16);
    ggml_tensor * idx  = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 4, 2);

    say("set_rows",         ggml_set_rows(ctx, ours, f32, idx));
    say("set_rows five bits", ggml_set_rows(ctx, tensor(GGML_TYPE_ISO5), f32, idx));
    say("get_rows five bits", ggml_get_rows(ctx, tensor(GGML_TYPE_ISO5), idx));
    say("cpy f32 -> five bits", ggml_cpy(ctx, f32, tensor(GGML_TYPE_ISO5)));
    say("set_rows f32",     ggml_set_rows(ctx, f32, f32, idx));
    say("get_rows",         ggml_get_rows(ctx, ours, idx));
    say("get_rows f32",     ggml_get_rows(ctx, f32, idx));
    say("cpy f32 -> ours",  ggml_cpy(ctx, f32, ours));
    say("cpy f16 -> ours",  ggml_cpy(ctx, f16, ours));
    say("cpy ours -> f32",  ggml_cpy(ctx, ours, f32));
    say("cpy ours -> f16",  ggml_cpy(ctx, ours, f16));
    say("cpy ours -> bf16", ggml_cpy(ctx, ours, tensor(GGML_TYPE_BF16)));
    say("cpy ours -> ours", ggml_cpy(ctx, ours, tensor(GGML_TYPE_ISO3)));
    say("set_rows rq3_64",  ggml_set_rows(ctx, tensor(GGML_TYPE_RQ3_64, 192), tensor(GGML_TYPE_F32, 192), idx));
    say("get_rows rq3_64",  ggml_get_rows(ctx, tensor(GGML_TYPE_RQ3_64, 192), idx));
    say("cpy f32 -> rq3_64", ggml_cpy(ctx, tensor(GGML_TYPE_F32, 192), tensor(GGML_TYPE_RQ3_64, 192)));
    say("cpy rq3_64 -> f16", ggml_cpy(ctx, tensor(GGML_TYPE_RQ3_64, 192), tensor(GGML_TYPE_F16, 192)));
    say("cpy f32 -> f16",   ggml_cpy(ctx, f32, f16));
    say("cpy transposed",   ggml_cpy(ctx, ggml_transpose(ctx, tensor(GGML_TYPE_F32, 256, 256)), tensor(GGML_TYPE_ISO3, 256, 256)));
    say("cpy other rows",   ggml_cpy(ctx, f32, ggml_view_3d(ctx, tensor(GGML_TYPE_ISO3, 512, 4), 512, 2, 2, ggml_row_size(GGML_TYPE_ISO3, 512), ggml_row_size(GGML_TYPE_ISO3, 512*4), 0)));
    say("mul_mat",          ggml_mul_mat(ctx, ours, f32));
    say("mul_mat f32",      ggml_mul_mat(ctx, f32, f32));
    say("concat",           ggml_concat(ctx, ours, ours, 1));
    say("repeat",           ggml_repeat(ctx, ours, tensor(GGML_TYPE_ISO3, 256, 8)));
    say("view",             ggml_view_1d(ctx, ours, 256, 0));
    say("permute",          ggml_permute(ctx, ours, 0, 2, 1, 3));

    printf("}\n");
    ggml_free(ctx);
}

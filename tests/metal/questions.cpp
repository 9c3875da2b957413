// What the host side can ask of the kernels, and what it says about operations on our types.

#include "questions.h"

#include "device.h"

#include "ggml-cpu.h"
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

    if (head < 512) {
        ggml_metal_library_get_pipeline_flash_attn_ext(lib, op, true, false, false, false, false, 4, false, 1, 1);
    }
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

// a kernel without function constants
static void look_up(ggml_metal_library_t lib, const std::string & name) {
    ggml_metal_library_compile_pipeline(lib, name.c_str(), name.c_str(), nullptr);
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
        for (const char * name : { "kernel_rq_kv_%s_f16", "kernel_rq_store_%s_f16", "kernel_rq_store_%s_f32" }) {
            char text[64];
            snprintf(text, sizeof(text), name, ggml_metal_rq_type_name(type));
            look_up(lib, text);
        }
        if (type == wide) {
            ask_flash_attn(ctx, lib, type, type, 128, 128);
            ask_flash_attn(ctx, lib, type, type, 256, 256);
            ask_flash_attn(ctx, lib, type, type, 512, 512);
        } else {
            ask_flash_attn(ctx, lib, type, type,  64,  64);
            ask_flash_attn(ctx, lib, type, wide, 192, 128);
            ask_flash_attn(ctx, lib, type, wide, 320, 256);
            ask_flash_attn(ctx, lib, type, type, 576, 512);
        }
    }
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0 }) {
        look_up(lib, std::string("kernel_rq_kv_") + ggml_type_name(type) + "_f16"); // where recent rows come behind them
    }
    look_up(lib, "kernel_rq_behind");
    look_up(lib, "kernel_rq_recent");
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
        const bool decided = ggml_metal_rq_supports_op(fake_metal_device(), op, true, has_simdgroup_mm, &supported);
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
    // V as the first values of K, or beside it
    auto latent = [&](ggml_type type, int64_t head, int64_t head_v) {
        ggml_tensor * k = tensor(type, head);
        ggml_tensor * v = ggml_view_4d(ctx, k, head_v, k->ne[1], k->ne[2], k->ne[3], k->nb[1], k->nb[2], k->nb[3], 0);
        return ggml_flash_attn_ext(ctx, tensor(GGML_TYPE_F32, head), k, v, nullptr, 1.0f, 0.0f, 0.0f);
    };
    say("flash_attn V in K 576/512",    latent(GGML_TYPE_RQ3_64, 576, 512));
    say("flash_attn V in K 320/256",    latent(GGML_TYPE_RQ3_64, 320, 256));
    say("flash_attn V in K 640/512",    latent(GGML_TYPE_ISO3, 640, 512));
    say("flash_attn V in K 256/128",    latent(GGML_TYPE_ISO3, 256, 128));
    say("flash_attn V apart 576/512",   fa(GGML_TYPE_RQ3_64, GGML_TYPE_ISO3, 576, 512));
    say("flash_attn heads 256/128", fa(GGML_TYPE_ISO3, GGML_TYPE_ISO3, 256, 128));
    say("flash_attn five bits",     fa(GGML_TYPE_ISO5, GGML_TYPE_ISO5, 128, 128));
    say("flash_attn without matrices", fa(GGML_TYPE_ISO3, GGML_TYPE_ISO3, 128, 128), false);
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_ISO3 }) {
        ggml_tensor * op = fa(type, type, 128, 128);
        op->src[5] = tensor(GGML_TYPE_F32);
        say(std::string("flash_attn more sources ") + ggml_type_name(type), op);
    }
    // with one row held and one of this batch, masks as parts of one tensor, which may be too short
    auto recent = [&](ggml_type k, ggml_type v, int64_t head, int64_t head_v, int64_t masks = 32) {
        ggml_tensor * op = fa(k, v, head, head_v);
        auto rows = [&](ggml_type type, int64_t n) { return ggml_new_tensor_4d(ctx, type, n, 1, 2, 1); };
        ggml_tensor * all = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, masks, 4);
        op->src[3] = ggml_view_2d(ctx, all, 4, 4, all->nb[1], 0);
        ggml_tensor * mask = ggml_view_2d(ctx, all, masks - 4, 4, all->nb[1], 4*all->nb[0]);
        ggml_rq_flash_attn_ext_add_recent(op, rows(GGML_TYPE_F16, head), rows(GGML_TYPE_F16, head_v), mask, rows(GGML_TYPE_F32, head), rows(GGML_TYPE_F32, head_v));
        return op;
    };
    say("recent iso3/iso3 128",       recent(GGML_TYPE_ISO3, GGML_TYPE_ISO3, 128, 128));
    say("recent iso3/planar3 256",    recent(GGML_TYPE_ISO3, GGML_TYPE_PLANAR3, 256, 256));
    say("recent rq3_64/iso3 192/128", recent(GGML_TYPE_RQ3_64, GGML_TYPE_ISO3, 192, 128));
    say("recent q8_0/q8_0 128",       recent(GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, 128, 128));
    say("recent q4_0/q4_0 512",       recent(GGML_TYPE_Q4_0, GGML_TYPE_Q4_0, 512, 512));
    say("recent f16/f16 80",          recent(GGML_TYPE_F16, GGML_TYPE_F16, 80, 80));
    say("recent iso3/iso4 128",       recent(GGML_TYPE_ISO3, GGML_TYPE_ISO4, 128, 128));
    say("recent iso3/iso3 512",       recent(GGML_TYPE_ISO3, GGML_TYPE_ISO3, 512, 512));
    say("recent iso3/iso3 384",       recent(GGML_TYPE_ISO3, GGML_TYPE_ISO3, 384, 384));
    say("recent bf16/bf16 128",       recent(GGML_TYPE_BF16, GGML_TYPE_BF16, 128, 128));
    say("recent f16/f16 72",          recent(GGML_TYPE_F16, GGML_TYPE_F16, 72, 72));
    ggml_tensor * apart = recent(GGML_TYPE_ISO3, GGML_TYPE_ISO3, 128, 128);
    apart->src[7] = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, 28, 4);
    say("recent masks apart", apart);
    ggml_tensor * uneven = recent(GGML_TYPE_ISO3, GGML_TYPE_ISO3, 128, 128);
    uneven->src[8]->nb[2] += 4;
    say("recent uneven rows", uneven);

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

// How many kernels a layer takes to store K, alone and with what a rotation or a profile does before, where something else reads or overwrites what
// these would not write, or reads it later. Nothing is run.
void print_launches() {
    fake_metal_dry_run(true);

    const char * separator = "{";
    const auto say = [&](const std::string & what, bool maps, int tokens, const std::string & beside) {
        ggml_context * ctx = ggml_init({ 4*1024*1024, nullptr, true });
        ggml_cgraph  * gf  = ggml_new_graph(ctx);
        const int n = 128, heads = 2;

        static char memory[32][128*1024];
        int used = 0;
        ggml_backend_buffer_t buffer = ggml_backend_cpu_buffer_from_ptr(memory, sizeof(memory));
        auto placed = [&](ggml_tensor * t) {
            t->buffer = buffer;
            t->data   = t->view_src ? (char *) t->view_src->data + t->view_offs : t->data ? t->data : memory[used++];
            return t;
        };
        auto also = [&](ggml_tensor * t) { // one more node
            ggml_tensor * more = placed(ggml_scale(ctx, t, 2.0f));
            ggml_build_forward_expand(gf, more);
            return more;
        };

        ggml_tensor * k   = placed(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n, heads, tokens));
        ggml_tensor * sub = placed(ggml_sub(ctx, k, placed(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, heads))));
        ggml_tensor * y;
        ggml_tensor * product;
        if (maps) {
            ggml_tensor * matrix = placed(ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n, n, 1, heads));
            product = placed(ggml_mul_mat(ctx, matrix, placed(ggml_permute(ctx, placed(ggml_reshape_4d(ctx, sub, n, 1, heads, tokens)), 0, 2, 3, 1))));
            product->op_params[1] = GGML_RQ_HINT_MAP;
            y = placed(ggml_permute(ctx, placed(ggml_reshape_3d(ctx, product, n, tokens, heads)), 0, 2, 1, 3));
            y = ggml_is_contiguous(y) ? y : placed(ggml_cont(ctx, y));
        } else {
            ggml_tensor * matrix = placed(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n));
            y = product = placed(ggml_mul_mat(ctx, matrix, placed(ggml_reshape_2d(ctx, sub, n, heads*tokens))));
            product->op_params[1] = ggml_rq_hint(GGML_RQ_ISO, GGML_RQ_FULL);
        }
        ggml_tensor * result = y->view_src ? y->view_src : y;
        if (beside == "over") {
            result->data = k->data;
        }
        ggml_build_forward_expand(gf, y);
        if (beside == "mean" || beside == "product" || beside == "result") {
            also(beside == "mean" ? sub : beside == "product" ? product : result);
        } else if (beside == "reused") {
            also(placed(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 16)))->data = k->data;
        } else if (beside == "output") {
            product->flags |= GGML_TENSOR_FLAG_OUTPUT;
        }
        ggml_tensor * cells = placed(ggml_new_tensor_2d(ctx, GGML_TYPE_ISO3, n*heads, 64));
        ggml_build_forward_expand(gf, placed(ggml_set_rows(ctx, cells, placed(ggml_reshape_2d(ctx, y, n*heads, tokens)), placed(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, tokens)))));
        if (beside == "later" || beside == "mean later") {
            also(beside == "later" ? result : sub);
        }
        const size_t before = fake_metal_launched().size();
        fake_metal_compute(gf);
        printf("%s\"%s\": %zu", separator, what.c_str(), fake_metal_launched().size() - before);
        separator = ", ";
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
    };
    for (const bool maps : { false, true }) {
        const std::string what = maps ? "profile" : "rotation";
        say(what + ", 1 token", maps, 1, "");
        say(what + ", 32 tokens", maps, 32, "");
        say(what + ", 33 tokens", maps, 33, "");
        for (const char * beside : { "over", "mean", "product", "result", "reused", "output", "later", "mean later" }) {
            say(what + ", " + beside, maps, 3, beside);
        }
    }
    printf("}\n");
}

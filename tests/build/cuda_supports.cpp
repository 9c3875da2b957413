// What supports_op of the CUDA backend says of nodes with our types (ggml-cuda/rq-supports.h), as JSON.

#include "ggml-cuda/rq-supports.h"

#include "ggml.h"

#include <cstdio>
#include <string>

static ggml_context * ctx;
static const char *   separator = "{";

static void say(const std::string & what, const ggml_tensor * op) {
    bool supported = false;
    const bool decided = ggml_cuda_rq_decides_node(op, supported);
    printf("%s\"%s\": \"%s\"", separator, what.c_str(), !decided ? "upstream" : supported ? "yes" : "no");
    separator = ", ";
}

static ggml_tensor * tensor(ggml_type type, int64_t ne0, int64_t ne1 = 4) {
    return ggml_new_tensor_4d(ctx, type, ne0, ne1, 2, 1);
}

static ggml_tensor * attention(ggml_type k, ggml_type v, int64_t dk, int64_t dv, float softcap = 0.0f) {
    return ggml_flash_attn_ext(ctx, tensor(GGML_TYPE_F32, dk), tensor(k, dk), tensor(v, dv), nullptr, 1.0f, 0.0f, softcap);
}

int main() {
    ctx = ggml_init({ 4*1024*1024, nullptr, true });

    for (ggml_type type : { GGML_TYPE_ISO3, GGML_TYPE_RQ3_64 }) {
        const std::string name = ggml_type_name(type);
        const int64_t     n    = ggml_blck_size(type);
        ggml_tensor * ours = tensor(type, 3*n);
        ggml_tensor * f32  = tensor(GGML_TYPE_F32, 3*n);
        ggml_tensor * idx  = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 4, 2);

        say(name + " set_rows",      ggml_set_rows(ctx, ours, f32, idx));
        say(name + " get_rows",      ggml_get_rows(ctx, ours, idx));
        say(name + " cpy from f32",  ggml_cpy(ctx, f32, ours));
        say(name + " cpy to f32",    ggml_cpy(ctx, ours, f32));
        say(name + " cpy within",    ggml_cpy(ctx, ours, tensor(type, 3*n)));
        say(name + " cpy from f16",  ggml_cpy(ctx, tensor(GGML_TYPE_F16, 3*n), ours));
        say(name + " cpy to planar", ggml_cpy(ctx, ours, tensor(GGML_TYPE_PLANAR3, 384, ggml_nelements(ours)/768)));
        say(name + " cpy of columns", ggml_cpy(ctx, ggml_transpose(ctx, tensor(GGML_TYPE_F32, 3*n, 3*n)), tensor(type, 3*n, 3*n)));
        say(name + " mul_mat",       ggml_mul_mat(ctx, ours, f32));
        for (ggml_type other : { type, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            say(name + "/" + ggml_type_name(other), attention(type, other, n, n));
        }
        say(name + " capped", attention(type, type, n, n, 20.0f));
    }
    say("rq3_64/iso3 192/128",        attention(GGML_TYPE_RQ3_64, GGML_TYPE_ISO3, 192, 128));
    say("rq3_64/iso3 192/128 capped", attention(GGML_TYPE_RQ3_64, GGML_TYPE_ISO3, 192, 128, 20.0f));

    for (int64_t dk : { 576, 320 }) { // MLA
        const int64_t dv = dk - 64;
        ggml_tensor * k = tensor(GGML_TYPE_RQ3_64, dk);
        ggml_tensor * v = ggml_view_4d(ctx, k, dv, k->ne[1], k->ne[2], k->ne[3], k->nb[1], k->nb[2], k->nb[3], 0);
        say("rq3_64 " + std::to_string(dk) + "/" + std::to_string(dv), ggml_flash_attn_ext(ctx, tensor(GGML_TYPE_F32, dk), k, v, nullptr, 1.0f, 0.0f, 0.0f));
    }

    say("f16 64 capped",              attention(GGML_TYPE_F16, GGML_TYPE_F16, 64, 64, 20.0f));

    printf("}\n");
    ggml_free(ctx);
    return 0;
}

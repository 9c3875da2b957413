// llama_rq_device_lacks() on a made-up device that lacks what the first argument says; prints what it finds.
// usage: device_check nothing|set_rows|mixed|prompts|mul_mat|siblings TYPE_K TYPE_V [no-flash-attn|DK/DV]

#include "llama-rq-device.h"

#include "ggml-backend-impl.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

static const char * lacks = "";

static llama_rq_shape shape = { 128, 128, 8, 2 };

static bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    if (op->op == GGML_OP_SET_ROWS && strcmp(lacks, "siblings") == 0) {
        return op->type < GGML_TYPE_RQ2_64;
    }
    if (op->op == GGML_OP_SET_ROWS) {
        return strcmp(lacks, "set_rows") != 0;
    }
    if (op->op == GGML_OP_MUL_MAT) {
        return strcmp(lacks, "mul_mat") != 0;
    }
    if (op->op == GGML_OP_FLASH_ATTN_EXT) {
        const bool mixed = op->src[1]->type != op->src[2]->type;
        const bool right = op->src[1]->ne[0] == shape.n_embd_head_k && op->src[2]->ne[0] == shape.n_embd_head_v && op->src[1]->ne[2] == 2 && op->src[0]->ne[2] == 8 && op->src[3];
        return right && !(mixed && strcmp(lacks, "mixed") == 0) && !(op->src[0]->ne[1] > 8 && strcmp(lacks, "prompts") == 0);
    }
    return false;
}

static ggml_type type_from(const char * name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * other = ggml_type_name((ggml_type) i);
        if (other && strcmp(name, other) == 0) {
            return (ggml_type) i;
        }
    }
    exit(2);
}

int main(int argc, char ** argv) {
    if (argc < 4) {
        return 2;
    }
    lacks = argv[1];
    ggml_backend_device device = {};
    device.iface.supports_op = supports_op;
    const bool flash_attn = argc < 5 || strcmp(argv[4], "no-flash-attn") != 0;
    if (argc > 4 && flash_attn) {
        shape.n_embd_head_k = atoi(argv[4]);
        shape.n_embd_head_v = atoi(strchr(argv[4], '/') + 1);
    }
    printf("%s\n", llama_rq_device_lacks(&device, type_from(argv[2]), type_from(argv[3]), shape, flash_attn).c_str());
    return 0;
}

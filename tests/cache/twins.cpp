// Two devices that count as GPUs and compute on the CPU: each has memory of its own, which no other device reads. What
// GGUFRQ_TWINS_LACK names is not supported: "pairs" (attention over two types of K and V), "recent" (attention to tokens that
// were kept in f16), "set_rows", "siblings" (blocks of 64), "latent" (V as a view of K). As on CUDA, the two masks of attention to
// tokens that were kept in f16 must be parts of one tensor, or the program is ended.
//
// llama.cpp loads the library where GGML_BACKEND_PATH says.

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml-rq-types.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

static constexpr int N = 2;

static ggml_backend_device      devices[N];
static ggml_backend_buffer_type bufts[N];
static char                     names[N][8];

static ggml_backend_dev_t cpu() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

static const char * get_name(ggml_backend_dev_t dev) {
    return names[dev - devices];
}

static void get_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free = *total = size_t(4) << 30;
}

static enum ggml_backend_dev_type get_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

static void get_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name = props->description = get_name(dev);
    props->type = get_type(dev);
    get_memory(dev, &props->memory_free, &props->memory_total);
}

static ggml_status (* compute)(ggml_backend_t backend, ggml_cgraph * graph);

static ggml_status check_and_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    for (int i = 0; i < graph->n_nodes; i++) {
        GGML_ASSERT(!ggml_rq_has_recent(graph->nodes[i]) || ggml_rq_recent_width(graph->nodes[i]) > 0);
    }
    return compute(backend, graph);
}

static ggml_backend_t init_backend(ggml_backend_dev_t dev, const char *) {
    ggml_backend_t backend = ggml_backend_dev_init(cpu(), nullptr);
    auto * set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu()), "ggml_backend_set_n_threads");
    set_n_threads(backend, 1);
    backend->device = dev;
    compute = backend->iface.graph_compute;
    backend->iface.graph_compute = check_and_compute;
    return backend;
}

// as on CUDA, the memory of an attention also has room for K and V in f16
static size_t get_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * t) {
    size_t res = ggml_nbytes(t);
    for (int i = 1; t->op == GGML_OP_FLASH_ATTN_EXT && i <= 2; i++) {
        res += t->src[i]->type == GGML_TYPE_F16 ? 0 : ggml_nelements(t->src[i])*sizeof(ggml_fp16_t);
    }
    return res;
}

static ggml_backend_buffer_type_t get_buffer_type(ggml_backend_dev_t dev) {
    return &bufts[dev - devices];
}

static bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    const char * env = getenv("GGUFRQ_TWINS_LACK");
    const bool lacks = env && ((strcmp(env, "set_rows") == 0 && op->op == GGML_OP_SET_ROWS) ||
                               (strcmp(env, "recent")   == 0 && op->op == GGML_OP_FLASH_ATTN_EXT && op->src[5] != nullptr) ||
                               (strcmp(env, "siblings") == 0 && op->op == GGML_OP_SET_ROWS && op->type >= GGML_TYPE_RQ2_64) ||
                               (strcmp(env, "latent")   == 0 && op->op == GGML_OP_FLASH_ATTN_EXT && op->src[2]->view_src && op->src[2]->view_src == op->src[1]->view_src) ||
                               (strcmp(env, "pairs")    == 0 && op->op == GGML_OP_FLASH_ATTN_EXT && op->src[1]->type != op->src[2]->type));
    return !lacks && ggml_backend_dev_supports_op(cpu(), op);
}

static bool supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    return buft == get_buffer_type(dev);
}

extern "C" ggml_backend_reg_t ggml_backend_init() {
    static ggml_backend_reg reg = { GGML_BACKEND_API_VERSION, {
        [](ggml_backend_reg_t) { return "Twins"; },
        [](ggml_backend_reg_t) { return (size_t) N; },
        [](ggml_backend_reg_t, size_t i) { return &devices[i]; },
        [](ggml_backend_reg_t, const char *) { return (void *) nullptr; },
    }, nullptr };

    for (int i = 0; i < N; i++) {
        snprintf(names[i], sizeof(names[i]), "Twin%d", i);

        bufts[i] = *ggml_backend_dev_buffer_type(cpu());
        bufts[i].iface.get_name = [](ggml_backend_buffer_type_t buft) { return (const char *) names[buft - bufts]; };
        bufts[i].iface.get_alloc_size = get_alloc_size;
        bufts[i].iface.is_host        = nullptr;
        bufts[i].device               = &devices[i];

        devices[i].reg = &reg;
        devices[i].iface.get_name        = get_name;
        devices[i].iface.get_description = get_name;
        devices[i].iface.get_memory      = get_memory;
        devices[i].iface.get_type        = get_type;
        devices[i].iface.get_props       = get_props;
        devices[i].iface.init_backend    = init_backend;
        devices[i].iface.get_buffer_type = get_buffer_type;
        devices[i].iface.supports_op     = supports_op;
        devices[i].iface.supports_buft   = supports_buft;
    }
    return &reg;
}

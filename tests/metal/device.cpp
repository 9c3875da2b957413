// A Metal device without Metal: what ggml-metal-device.m and ggml-metal-context.m do, for upstream's own host code
// (ggml-metal-ops.cpp and its kind) on a machine that is no Mac. Kernels run through the shim, at once.

#include "device.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml-metal-fusion.h"
#include "ggml-metal-rq.h"

#include "shim/kernels.h"

#include <cstring>
#include <set>
#include <string>
#include <vector>

struct ggml_metal_cv {
    std::vector<kernels::value> values;
};

struct ggml_metal_pipeline {
    std::string                 name;
    const kernels::entry *      entry = nullptr;
    std::vector<kernels::value> values;
};

struct ggml_metal_library {
    ggml_metal_device_t    dev;
    ggml_metal_pipelines_t pipelines = ggml_metal_pipelines_init();
};

struct ggml_metal_device {
    ggml_metal_library       library = { this };
    ggml_metal_device_props  props = {};
    ggml_metal_fusion_info * finfo = ggml_metal_fusion_info_init(true, 0);
};

struct ggml_metal_encoder {
    const ggml_metal_pipeline *       pipeline = nullptr;
    kernels::arguments                arguments = {};
    std::vector<std::vector<uint8_t>> bytes = std::vector<std::vector<uint8_t>>(kernels::MAX_BUFFERS);
    size_t                            memory = 0;
};

static std::vector<std::string> launched;
static bool dry_run;

void fake_metal_dry_run(bool dry) {
    dry_run = dry;
}

const std::vector<std::string> & fake_metal_launched() {
    return launched;
}

static std::set<std::string> looked_up;

const std::set<std::string> & fake_metal_looked_up() {
    return looked_up;
}

// function constants

ggml_metal_cv_t ggml_metal_cv_init(void) { return new ggml_metal_cv; }

void ggml_metal_cv_free(ggml_metal_cv_t cv) { delete cv; }

void ggml_metal_cv_set_int16(ggml_metal_cv_t cv, int16_t value, int32_t idx) { cv->values.push_back({ idx, value }); }
void ggml_metal_cv_set_int32(ggml_metal_cv_t cv, int32_t value, int32_t idx) { cv->values.push_back({ idx, value }); }
void ggml_metal_cv_set_bool (ggml_metal_cv_t cv, bool    value, int32_t idx) { cv->values.push_back({ idx, value }); }

// pipelines

ggml_metal_pipeline_t ggml_metal_pipeline_init(void) { return new ggml_metal_pipeline; }

void ggml_metal_pipeline_free(ggml_metal_pipeline_t pipeline) { delete pipeline; }

int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params) { return 1024; }

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    return { ggml_metal_pipelines_get(lib->pipelines, name), 0, 0, 0, 0, false, false };
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t lib, const char * base, const char * name, ggml_metal_cv_t cv) {
    looked_up.insert(base);

    ggml_metal_pipeline_t pipeline = ggml_metal_pipeline_init();
    pipeline->name  = base;
    pipeline->entry = kernels::find(base);
    if (cv) {
        pipeline->values = cv->values;
    }
    ggml_metal_pipelines_add(lib->pipelines, name, pipeline);

    return { pipeline, 0, 0, 0, 0, false, false };
}

ggml_metal_device_t ggml_metal_library_get_device(ggml_metal_library_t lib) { return lib->dev; }

// encoder

ggml_metal_encoder_t ggml_metal_encoder_init(ggml_metal_cmd_buf_t, bool) { return new ggml_metal_encoder; }

void ggml_metal_encoder_free(ggml_metal_encoder_t encoder) { delete encoder; }

void ggml_metal_encoder_debug_group_push(ggml_metal_encoder_t, const char *) {}
void ggml_metal_encoder_debug_group_pop (ggml_metal_encoder_t) {}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t encoder, ggml_metal_pipeline_with_params pipeline) {
    encoder->pipeline = pipeline.pipeline;
    encoder->memory   = 0;
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t encoder, void * data, size_t size, int idx) {
    encoder->bytes[idx].assign((uint8_t *) data, (uint8_t *) data + size);
    encoder->arguments.buffers[idx] = encoder->bytes[idx].data();
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t encoder, ggml_metal_buffer_id buffer, int idx) {
    encoder->arguments.buffers[idx] = (void *) buffer.offs;
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t encoder, size_t size, int idx) {
    GGML_ASSERT(idx == 0);
    GGML_ASSERT(size % 16 == 0 && size <= FAKE_METAL_MEMORY);
    encoder->memory = size;
}

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t encoder, int tg0, int tg1, int tg2, int tptg0, int tptg1, int tptg2) {
    launched.push_back(encoder->pipeline->name);
    if (dry_run) {
        return;
    }
    if (!encoder->pipeline->entry) {
        GGML_ABORT("a kernel that was not compiled is run");
    }
    GGML_ASSERT((int64_t) tptg0*tptg1*tptg2 <= 1024);

    const lanes::grid grid = {
        { (uint32_t) tg0,   (uint32_t) tg1,   (uint32_t) tg2   },
        { (uint32_t) tptg0, (uint32_t) tptg1, (uint32_t) tptg2 },
    };
    const auto & values = encoder->pipeline->values;
    kernels::launch(encoder->pipeline->entry, values.data(), values.size(), grid, encoder->memory, encoder->arguments);
}

void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t) {}
void ggml_metal_encoder_end_encoding  (ggml_metal_encoder_t) {}

// device

ggml_metal_device_t ggml_metal_device_init(int, int) {
    auto * dev = new ggml_metal_device;
    dev->props.max_theadgroup_memory_size = FAKE_METAL_MEMORY;
    dev->props.has_simdgroup_reduction    = true;
    dev->props.has_simdgroup_mm           = true;
    dev->props.gpu_family                 = 9; // has rows in ggml-metal-tuning.cpp
    return dev;
}

void ggml_metal_device_free(ggml_metal_device_t dev) { delete dev; }

const ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t dev) { return &dev->props; }

ggml_metal_library_t ggml_metal_device_get_library(ggml_metal_device_t dev) { return &dev->library; }

ggml_metal_fusion_info * ggml_metal_device_get_fusion_info(ggml_metal_device_t dev) { return dev->finfo; }

// ours; upstream's own answers are in Objective-C
bool ggml_metal_device_supports_op(ggml_metal_device_t dev, const ggml_tensor * op) {
    bool supported;
    return !ggml_metal_rq_supports_op(dev, op, dev->props.has_simdgroup_reduction, dev->props.has_simdgroup_mm, &supported) || supported;
}

ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t, const ggml_tensor * t) {
    return { nullptr, (size_t) t->data };
}

// a graph, one node after the other

ggml_metal_device_t fake_metal_device() {
    static ggml_metal_device_t dev = ggml_metal_device_get(0, 1);
    return dev;
}

void fake_metal_compute(ggml_cgraph * gf) {
    ggml_metal_device_t dev = fake_metal_device();

    ggml_metal_op_t ctx = ggml_metal_op_init(dev, nullptr, gf, dev->finfo, 0, ggml_graph_n_nodes(gf), false, false, 0);
    for (int i = 0; i < ggml_metal_op_n_nodes(ctx);) {
        const int n = ggml_metal_op_encode(ctx, i);
        GGML_ASSERT(n > 0);
        i += n;
    }
    ggml_metal_op_free(ctx);
}

size_t fake_metal_alloc_size(const ggml_tensor * t) {
    size_t size = ggml_nbytes(t);
    if (t->op == GGML_OP_FLASH_ATTN_EXT) {
        ggml_metal_rq_node rq;
        size += ggml_metal_rq_more_pad(t);
        t = ggml_metal_rq_make_node(t, true, &rq);
        size += ggml_metal_op_flash_attn_ext_extra_pad(t);
        size += ggml_metal_op_flash_attn_ext_extra_blk(t);
        size += ggml_metal_op_flash_attn_ext_extra_tmp(t);
        size += ggml_metal_op_flash_attn_ext_extra_kv_f16(t);
        size += ggml_metal_op_flash_attn_ext_extra_idx(t);
    }
    return size;
}

// How the CPU backend comes to what is ours: it asks every extra buffer type whether an operation is for it, and for its
// work size. Ours holds no tensors, and does not ask in which buffer those of an operation are.

#include "rq.h"
#include "ggml-cpu.h"
#include "traits.h"

namespace ggml::cpu::rq {

class tensor_traits : public ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        return op->op == GGML_OP_FLASH_ATTN_EXT && ggml_rq_flash_attn_ext_work_size(n_threads, op, size);
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        switch (op->op) {
            case GGML_OP_GET_ROWS:
                ggml_compute_forward_rq_get_rows(params, op);
                return true;
            case GGML_OP_MUL_MAT:
                if (params->use_ref) {
                    return false; // the dense product
                }
                ggml_compute_forward_rq_rotate(params, op);
                return true;
            default:
                return ggml_compute_forward_rq_flash_attn_ext(params, op);
        }
    }
};

class extra_buffer_type : public ggml::cpu::extra_buffer_type {
    tensor_traits traits;

    bool supports_op(ggml_backend_dev_t, const ggml_tensor *) override {
        return false;
    }

    // every thread asks this about every operation
    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        switch (op->op) {
            case GGML_OP_GET_ROWS:
                return ggml_rq_is_type(op->src[0]->type) ? &traits : nullptr;
            case GGML_OP_MUL_MAT:
                return ggml_rq_hint_is_rotation(ggml_get_op_params_i32(op, 1)) ? &traits : nullptr;
            case GGML_OP_FLASH_ATTN_EXT:
                return ggml_rq_is_type(op->src[1]->type) || ggml_rq_is_type(op->src[2]->type) || op->src[GGML_RQ_RECENT_MASK] ? &traits : nullptr;
            default:
                return nullptr;
        }
    }
};

}  // namespace ggml::cpu::rq

void ggml_backend_cpu_push_rq_buffer_type(std::vector<ggml_backend_buffer_type_t> & types) {
    static ggml::cpu::rq::extra_buffer_type context;

    static ggml_backend_buffer_type type = [] {
        ggml_backend_buffer_type t = *ggml_backend_cpu_buffer_type();
        t.iface.get_name = [](ggml_backend_buffer_type_t) { return "CPU_RQ"; };
        t.context        = &context;
        return t;
    }();

    // Programs that look for buffer types for weights read this list up to the first null: ours is behind it. Those within
    // the backend pass over a null.
    types.push_back(nullptr);
    types.push_back(&type);
}

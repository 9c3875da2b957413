#pragma once

// The rotated cache types in ggml-metal-ops.cpp, of which this is a part: how their rows are stored, with the rotation or the profile that goes
// before in one launch, and what happens before and after upstream's attention, to recent rows (ggml-rq-types.h) beside any type, too.

static ggml_metal_pipeline_with_params ggml_metal_rq_pipeline(ggml_metal_library_t lib, const char * name) {
    ggml_metal_pipeline_with_params res = ggml_metal_library_get_pipeline(lib, name);
    return res.pipeline ? res : ggml_metal_library_compile_pipeline(lib, name, name, nullptr);
}

static ggml_metal_pipeline_with_params ggml_metal_rq_pipeline_kv_f16(ggml_metal_library_t lib, ggml_type type) {
    char name[64];
    snprintf(name, sizeof(name), "kernel_rq_kv_%s_f16", ggml_type_name(type));
    return ggml_metal_rq_pipeline(lib, name);
}

static ggml_metal_kargs_rq_rows ggml_metal_rq_rows(const ggml_tensor * held, const ggml_tensor * fresh) {
    return { { held->nb[1], held->nb[2], held->nb[3] }, { fresh->nb[1], fresh->nb[2], fresh->nb[3] } };
}

size_t ggml_metal_rq_more_pad(const ggml_tensor * op) {
    ggml_metal_rq_node few, many;
    const size_t as_is  = ggml_metal_op_flash_attn_ext_extra_pad(ggml_metal_rq_make_node(op, false, &few));
    const size_t copied = ggml_metal_op_flash_attn_ext_extra_pad(ggml_metal_rq_make_node(op, true, &many));
    return as_is > copied ? as_is - copied : 0;
}

// Lives as long as upstream's function, which runs node in place of the operation
class ggml_metal_rq_flash_attn {
public:
    ggml_metal_rq_flash_attn(ggml_metal_op_t ctx, int idx) : ctx(ctx), op(ctx->node(idx)) {
        // upstream does so from 32 queries on for its own types; recent rows cannot be behind anything else, and for heads of 512 there is no other way
        const bool many = !ggml_metal_op_flash_attn_ext_use_vec(op);
        const bool must = ggml_rq_has_recent(op) || op->src[0]->ne[0] >= 512;
        const bool slow = ggml_metal_rq_must_be_f16(op) && op->src[0]->ne[1] < 32;
        static bool warned = false;
        if (slow && !warned) {
            warned = true;
            GGML_LOG_WARN("%s: no attention kernel for V in K in %s at head_dim 320: they are converted to f16 for every token (slow)\n",
                __func__, ggml_type_name(op->src[1]->type));
        }
        ggml_metal_rq_make_node(op, op->src[0]->ne[1] >= 32 || (many && must) || slow, &as);
        if (as.in_f16) {
            to_f16();
        }
    }

    ~ggml_metal_rq_flash_attn() {
        if (ggml_rq_has_recent(op) && !as.in_f16) {
            attend_recent();
        }
    }

    ggml_metal_rq_flash_attn(const ggml_metal_rq_flash_attn &) = delete; // node points into it
    ggml_metal_rq_flash_attn & operator=(const ggml_metal_rq_flash_attn &) = delete;

    ggml_tensor * node() { return &as.node; }

private:
    ggml_metal_op_t     ctx;
    const ggml_tensor * op;
    ggml_metal_rq_node  as;

    // where upstream's function keeps what its workgroups leave, behind the result
    size_t tmp() const {
        return ggml_nbytes(op) + ggml_metal_op_flash_attn_ext_extra_pad(&as.node) + ggml_metal_op_flash_attn_ext_extra_blk(&as.node);
    }

    void to_f16() {
        as.k.buffer = as.v.buffer = op->view_src ? op->view_src->buffer : op->buffer;
        as.k.data = (char *) op->data + tmp() + ggml_metal_op_flash_attn_ext_extra_tmp(&as.node);
        as.v.data = as.k.data;

        unpack(op->src[1], as.k);
        if (!ggml_rq_v_in_k(op)) {
            as.v.data = (char *) as.k.data + GGML_PAD(ggml_nbytes(&as.k), 16);
            unpack(op->src[2], as.v);
        }
        if (ggml_rq_has_recent(op)) {
            put_behind(op->src[1], op->src[GGML_RQ_RECENT_K], op->src[GGML_RQ_RECENT_K_NEW], as.k);
            put_behind(op->src[2], op->src[GGML_RQ_RECENT_V], op->src[GGML_RQ_RECENT_V_NEW], as.v);
        }
        ggml_metal_op_concurrency_reset(ctx);
    }

    void unpack(const ggml_tensor * from, const ggml_tensor & to) const {
        const auto pipeline = ggml_metal_rq_pipeline_kv_f16(ctx->lib, from->type);
        const int  nth      = std::min(ggml_metal_pipeline_max_theads_per_threadgroup(pipeline), 256);

        // upstream's kernel takes 16 values of f16 at a time, as ours does
        const int64_t size    = std::max<int64_t>(ggml_blck_size(from->type), 16);
        const int64_t nblocks = ggml_nelements(from)/size;
        GGML_ASSERT(nblocks <= INT32_MAX);

        ggml_metal_kargs_rq_kv_f16 args = {
            /*.ne0     =*/ (int32_t) from->ne[0],
            /*.ne1     =*/ (int32_t) from->ne[1],
            /*.ne2     =*/ (int32_t) from->ne[2],
            /*.rows    =*/ (int32_t) to.ne[1],
            /*.nblocks =*/ (int32_t) nblocks,
            /*.nb0     =*/ ggml_row_size(from->type, size),
            /*.nb1     =*/ from->nb[1],
            /*.nb2     =*/ from->nb[2],
            /*.nb3     =*/ from->nb[3],
        };

        ggml_metal_encoder_set_pipeline(ctx->enc, pipeline);
        ggml_metal_encoder_set_bytes   (ctx->enc, &args, sizeof(args), 0);
        ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(from), 1);
        ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(&to),  2);

        ggml_metal_encoder_dispatch_threadgroups(ctx->enc, (nblocks + nth - 1)/nth, 1, 1, nth, 1, 1);
    }

    void put_behind(const ggml_tensor * cells, const ggml_tensor * held, const ggml_tensor * fresh, const ggml_tensor & to) const {
        ggml_metal_kargs_rq_behind args = {
            /*.nb     =*/ ggml_metal_rq_rows(held, fresh),
            /*.ne0    =*/ (int32_t) to.ne[0],
            /*.ne2    =*/ (int32_t) to.ne[2],
            /*.rows   =*/ (int32_t) to.ne[1],
            /*.first  =*/ (int32_t) cells->ne[1],
            /*.n_held =*/ (int32_t) held->ne[1],
            /*.n      =*/ (int32_t) (held->ne[1] + fresh->ne[1]),
        };

        ggml_metal_encoder_set_pipeline(ctx->enc, ggml_metal_rq_pipeline(ctx->lib, "kernel_rq_behind"));
        ggml_metal_encoder_set_bytes   (ctx->enc, &args, sizeof(args), 0);
        ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(held),  1);
        ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(fresh), 2);
        ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(&to),   3);

        ggml_metal_encoder_dispatch_threadgroups(ctx->enc, args.rows - args.first, to.ne[2], to.ne[3], 32, 1, 1);
    }

    void attend_recent() const {
        const ggml_tensor * q     = op->src[0];
        const ggml_tensor * k     = op->src[GGML_RQ_RECENT_K];
        const ggml_tensor * v     = op->src[GGML_RQ_RECENT_V];
        const ggml_tensor * mask  = op->src[GGML_RQ_RECENT_MASK];
        const ggml_tensor * k_new = op->src[GGML_RQ_RECENT_K_NEW];
        const ggml_tensor * v_new = op->src[GGML_RQ_RECENT_V_NEW];

        ggml_metal_kargs_rq_recent args = {};
        args.k        = ggml_metal_rq_rows(k, k_new);
        args.v        = ggml_metal_rq_rows(v, v_new);
        args.nb01     = q->nb[1];
        args.nb02     = q->nb[2];
        args.nb03     = q->nb[3];
        args.nb_mask1 = mask->nb[1];
        args.nb_mask3 = mask->nb[3];
        args.dk       = q->ne[0];
        args.dv       = v->ne[0];
        args.n_query  = q->ne[1];
        args.n_head   = q->ne[2];
        args.group    = q->ne[2]/k->ne[2];
        args.ne_mask3 = mask->ne[3];
        args.n_held   = k->ne[1];
        args.n        = k->ne[1] + k_new->ne[1];
        args.n_part   = 32; // workgroups of upstream's vector kernel

        args.scale         = ggml_get_op_params_f32(op, 0);
        args.max_bias      = ggml_get_op_params_f32(op, 1);
        args.logit_softcap = ggml_get_op_params_f32(op, 2);
        if (args.logit_softcap != 0.0f) {
            args.scale /= args.logit_softcap;
        }
        args.n_head_log2 = 1 << (int) floorf(log2f((float) args.n_head));
        args.m0          = powf(2.0f, -args.max_bias/args.n_head_log2);
        args.m1          = powf(2.0f, -args.max_bias/2.0f/args.n_head_log2);

        // sums and maxima of the workgroups come behind their results
        ggml_metal_buffer_id parts = ggml_metal_get_buffer_id(op);
        parts.offs += tmp() + sizeof(float)*ggml_nelements(op)*args.n_part;

        ggml_metal_op_concurrency_reset(ctx);

        ggml_metal_encoder_set_pipeline(ctx->enc, ggml_metal_rq_pipeline(ctx->lib, "kernel_rq_recent"));
        ggml_metal_encoder_set_bytes   (ctx->enc, &args, sizeof(args), 0);
        ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(q),     1);
        ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(k),     2);
        ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(v),     3);
        ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(k_new), 4);
        ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(v_new), 5);
        ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(mask),  6);
        ggml_metal_encoder_set_buffer  (ctx->enc, parts,                           7);
        ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(op),    8);

        const size_t smem = RQ_RECENT_NSG*(args.dv + 2)*sizeof(float);
        ggml_metal_encoder_set_threadgroup_memory_size(ctx->enc, GGML_PAD(smem, 16), 0);
        ggml_metal_encoder_dispatch_threadgroups(ctx->enc, args.n_query, args.n_head, q->ne[3], 32*RQ_RECENT_NSG, 1, 1);
    }
};

// What a SET_ROWS stores where that comes from a rotation, or from a product with the matrices of a profile: all of it is done where the row is stored,
// so that the nodes before need no launch. Upstream orders nodes anew, and they need not be next to each other.
struct ggml_metal_rq_chain {
    const ggml_tensor * in;      // what goes in, f32
    const ggml_tensor * sub;     // the mean off it, or nullptr
    const ggml_tensor * product;
    const ggml_tensor * cont;    // the heads of a token side by side, or nullptr: they are
    const ggml_tensor * result;  // that or the product, which attention to recent rows may read

    ggml_metal_kargs_rq_store args;

    bool has(const ggml_tensor * t) const { return t == sub || t == product || t == cont; }
};

#define GGML_METAL_RQ_MAX_TOKENS 32 // beyond, upstream's products of matrices are faster
#define GGML_METAL_RQ_MAX_AHEAD  64 // nodes from the first of a chain to its last

static const ggml_tensor * ggml_metal_rq_root(const ggml_tensor * t) {
    return t->view_src ? t->view_src : t;
}

// bytes that a node writes, with what it keeps behind its result
static size_t ggml_metal_rq_written(const ggml_tensor * t) {
    return t->buffer ? ggml_backend_buft_get_alloc_size(ggml_backend_buffer_get_type(t->buffer), t) : ggml_nbytes(t);
}

static bool ggml_metal_rq_overlap(const ggml_tensor * a, const ggml_tensor * b) {
    return (const char *) a->data < (const char *) b->data + ggml_nbytes(b) && (const char *) b->data < (const char *) a->data + ggml_metal_rq_written(a);
}

static bool ggml_metal_rq_reads(const ggml_tensor * node, const ggml_tensor * t) {
    for (int i = 0; t && i < GGML_MAX_SRC; ++i) {
        if (node->src[i] && ggml_metal_rq_root(node->src[i]) == t) {
            return true;
        }
    }
    return false;
}

// the nodes that lead to store, and how to go through them, from their shapes alone
static bool ggml_metal_rq_match(const ggml_tensor * store, ggml_metal_rq_chain & c) {
    c = {};
    if (store->op != GGML_OP_SET_ROWS || !ggml_rq_is_type(store->type)) {
        return false;
    }
    const ggml_tensor * src = store->src[0];
    if (src->type != GGML_TYPE_F32 || !ggml_is_contiguous(src) || src->view_offs != 0 || src->ne[2] != 1 || src->ne[3] != 1 ||
            src->ne[1] > GGML_METAL_RQ_MAX_TOKENS) {
        return false;
    }
    c.result  = ggml_metal_rq_root(src);
    c.product = c.result;
    if (c.result->op == GGML_OP_CONT) {
        c.cont    = c.result;
        c.product = ggml_metal_rq_root(c.cont->src[0]);
    }
    if (c.product->op != GGML_OP_MUL_MAT || c.product->view_src || ggml_nelements(c.product) != ggml_nelements(src) || !ggml_is_contiguous(c.product)) {
        return false;
    }
    const int32_t       hint = ggml_get_op_params_i32(c.product, 1);
    const bool          maps = hint == GGML_RQ_HINT_MAP;
    const ggml_tensor * map  = c.product->src[0];
    const ggml_tensor * x    = c.product->src[1];
    const int64_t       n    = map->ne[0];
    if (!(maps || ggml_rq_hint_is_rotation(hint)) || map->ne[1] != n || !ggml_is_contiguous(map) || x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) ||
            n > RQ_STORE_MAX_N || n % ggml_blck_size(store->type) != 0 || src->ne[0] % n != 0 || ggml_nelements(c.result) != ggml_nelements(src)) {
        return false;
    }
    c.in  = x;
    c.sub = ggml_metal_rq_root(x)->op == GGML_OP_SUB ? ggml_metal_rq_root(x) : nullptr;

    c.args.n      = n;
    c.args.n_part = src->ne[0]/n;
    if (maps) {
        // heads of a token lie side by side as they are where there is one token or one head
        const ggml_tensor * p = c.product;
        if ((map->type != GGML_TYPE_F16 && map->type != GGML_TYPE_F32) || x->ne[2] != 1 || x->ne[3] != c.args.n_part || x->ne[1] != src->ne[1] ||
                (c.cont ? c.cont->ne[0] != n || c.cont->ne[1] != c.args.n_part || c.cont->src[0]->view_offs != 0 || c.cont->src[0]->nb[1] != p->nb[3] ||
                    c.cont->src[0]->nb[2] != p->nb[1] : p->ne[1] != 1 && p->ne[3] != 1)) {
            return false;
        }
        c.args.map_part = n*n;
        c.args.nb_token = x->nb[1];
        c.args.nb_part  = x->nb[3];
    } else {
        if (map->type != GGML_TYPE_F32 || c.cont || !ggml_is_contiguous(x)) {
            return false;
        }
        c.args.nb_token = src->ne[0]*sizeof(float);
        c.args.nb_part  = n*sizeof(float);
    }
    if (c.sub) {
        const ggml_tensor * mean = c.sub->src[1];
        c.in = c.sub->src[0];
        // [head_dim, n_head, n_tokens], of which x is a view that has not been moved about otherwise
        if (c.sub->view_src || x->view_offs != 0 || !ggml_is_contiguous(c.sub) || c.in->type != GGML_TYPE_F32 || c.in->nb[0] != sizeof(float) ||
                mean->type != GGML_TYPE_F32 || !ggml_is_contiguous(mean) || ggml_nelements(mean) != src->ne[0] || c.sub->ne[0]*c.sub->ne[1] != src->ne[0] ||
                c.args.nb_token != c.sub->nb[2] || (maps && c.sub->ne[0] != n) || (c.in->ne[0] != n && c.in->nb[1] != c.in->ne[0]*sizeof(float))) {
            return false;
        }
        c.args.has_mean = true;
        c.args.nb_token = c.in->nb[2];
        c.args.nb_part  = c.in->ne[0] == n ? c.in->nb[1] : n*sizeof(float);
    }
    c.args.nb_idx = store->src[1]->nb[0];
    c.args.nb1    = store->nb[1];
    c.args.is_i64 = store->src[1]->type == GGML_TYPE_I64;

    const size_t four = 4*sizeof(float);
    return c.args.nb_token % four == 0 && c.args.nb_part % four == 0 && c.in->view_offs % four == 0;
}

// the same where the nodes are in this encoder and nothing comes between that would see it
static bool ggml_metal_rq_find_chain(ggml_metal_op_t ctx, int idx, ggml_metal_rq_chain & c) {
    if (!ctx->use_fusion() || !ggml_metal_rq_match(ctx->node(idx), c) || ggml_metal_rq_overlap(c.result, c.in)) {
        return false;
    }
    int left = 1 + (c.sub != nullptr) + (c.cont != nullptr);
    for (int i = idx - 1; left > 0; --i) {
        if (i < 0 || i < idx - GGML_METAL_RQ_MAX_AHEAD) {
            return false;
        }
        const ggml_tensor * node = ctx->node(i);
        if (c.has(node)) {
            if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0 || (node != c.result && (node->flags & GGML_TENSOR_FLAG_OUTPUT) != 0)) {
                return false;
            }
            --left;
            continue;
        }
        // attention keeps things behind its result
        if (node->op == GGML_OP_FLASH_ATTN_EXT || ggml_metal_rq_overlap(node, c.in) || ggml_metal_rq_reads(node, c.result) ||
                ggml_metal_rq_reads(node, c.sub) || ggml_metal_rq_reads(node, c.product)) {
            return false;
        }
    }
    for (int i = idx + 1; i < std::min(ctx->n_nodes(), idx + GGML_METAL_RQ_MAX_AHEAD); ++i) {
        if (ggml_metal_rq_reads(ctx->node(i), c.sub) || (c.cont && ggml_metal_rq_reads(ctx->node(i), c.product))) {
            return false;
        }
    }
    return true;
}

// whether a row is stored further on with all that this node computes
static bool ggml_metal_rq_is_in_chain(ggml_metal_op_t ctx, int idx) {
    const ggml_tensor * node = ctx->node(idx);

    const auto is_product = [](const ggml_tensor * t) {
        const int32_t hint = t->op == GGML_OP_MUL_MAT ? ggml_get_op_params_i32(t, 1) : 0;
        return hint == GGML_RQ_HINT_MAP || ggml_rq_hint_is_rotation(hint);
    };
    if (!(is_product(node) || node->op == GGML_OP_SUB || (node->op == GGML_OP_CONT && is_product(ggml_metal_rq_root(node->src[0]))))) {
        return false;
    }
    for (int i = idx + 1; i < std::min(ctx->n_nodes(), idx + 1 + GGML_METAL_RQ_MAX_AHEAD); ++i) {
        ggml_metal_rq_chain c;
        if (ggml_metal_rq_match(ctx->node(i), c) && c.has(node)) {
            return ggml_metal_rq_find_chain(ctx, i, c);
        }
    }
    return false;
}

// rows of ours, a simdgroup for each block
static void ggml_metal_rq_set_rows(ggml_metal_op_t ctx, const ggml_tensor * op) {
    const ggml_tensor * src = op->src[0];
    const ggml_tensor * ids = op->src[1];

    const int32_t nk0 = src->ne[0]/ggml_blck_size(op->type);

    ggml_metal_kargs_set_rows args = {
        /*.nk0  =*/ nk0,
        /*.ne01 =*/ (int32_t) src->ne[1],
        /*.nb01 =*/ src->nb[1],
        /*.nb02 =*/ src->nb[2],
        /*.nb03 =*/ src->nb[3],
        /*.ne11 =*/ (int32_t) ids->ne[1],
        /*.ne12 =*/ (int32_t) ids->ne[2],
        /*.nb10 =*/ ids->nb[0],
        /*.nb11 =*/ ids->nb[1],
        /*.nb12 =*/ ids->nb[2],
        /*.nb1  =*/ op->nb[1],
        /*.nb2  =*/ op->nb[2],
        /*.nb3  =*/ op->nb[3],
    };

    ggml_metal_encoder_set_pipeline(ctx->enc, ggml_metal_library_get_pipeline_set_rows(ctx->lib, op));
    ggml_metal_encoder_set_bytes   (ctx->enc, &args, sizeof(args), 0);
    ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(src), 1);
    ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(ids), 2);
    ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(op),  3);

    ggml_metal_encoder_dispatch_threadgroups(ctx->enc, src->ne[1], src->ne[2], src->ne[3], 32*std::min(nk0, 4), 1, 1);
}

static void ggml_metal_rq_store(ggml_metal_op_t ctx, const ggml_tensor * op, ggml_metal_rq_chain & c) {
    const ggml_tensor * map = c.product->src[0];

    char name[64];
    snprintf(name, sizeof(name), "kernel_rq_store_%s_%s", ggml_type_name(op->type), ggml_type_name(map->type));

    ggml_metal_encoder_set_pipeline(ctx->enc, ggml_metal_rq_pipeline(ctx->lib, name));
    ggml_metal_encoder_set_bytes   (ctx->enc, &c.args, sizeof(c.args), 0);
    ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(c.in),                           1);
    ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(c.sub ? c.sub->src[1] : c.in),   2);
    ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(map),                            3);
    ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(op->src[1]),                     4);
    ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(op),                             5);
    ggml_metal_encoder_set_buffer  (ctx->enc, ggml_metal_get_buffer_id(c.result),                       6);

    ggml_metal_encoder_set_threadgroup_memory_size(ctx->enc, 2*c.args.n*sizeof(float), 0);
    ggml_metal_encoder_dispatch_threadgroups(ctx->enc, op->src[0]->ne[1], c.args.n_part, 1, 32*RQ_STORE_NSG, 1, 1);
}

// in place of upstream's, which knows none of this
static int ggml_metal_rq_encode(ggml_metal_op_t ctx, int idx) {
    const ggml_tensor * node = ctx->node(idx);
    if (ggml_is_empty(node) || (node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
        return ggml_metal_op_encode_impl(ctx, idx);
    }
    if (ctx->use_fusion() && ggml_metal_rq_is_in_chain(ctx, idx)) {
        return 1;
    }
    if (node->op != GGML_OP_SET_ROWS || !ggml_rq_is_type(node->type)) {
        return ggml_metal_op_encode_impl(ctx, idx);
    }

    ggml_metal_rq_chain c;
    const bool in_chain = ggml_metal_rq_find_chain(ctx, idx, c);

    // what is read and written, for upstream's barriers
    ggml_tensor rows = *node, result = {};
    if (in_chain) {
        rows.src[0] = const_cast<ggml_tensor *>(c.in);
        rows.src[2] = c.product->src[0];
        rows.src[3] = c.sub ? c.sub->src[1] : nullptr;
        result      = *c.result;
        std::fill(result.src, result.src + GGML_MAX_SRC, nullptr);
    }
    if (!ggml_metal_op_concurrency_check(ctx, &rows) || (in_chain && !ggml_metal_op_concurrency_check(ctx, &result))) {
        ggml_metal_op_concurrency_reset(ctx);
    }
    if (in_chain) {
        ggml_metal_rq_store(ctx, node, c);
        ggml_metal_op_concurrency_add(ctx, &result);
    } else {
        ggml_metal_rq_set_rows(ctx, node);
    }
    ggml_metal_op_concurrency_add(ctx, &rows);
    return 1;
}

#pragma once

struct ggml_tensor;
struct llm_graph_context;

// Whether graphs are to sum moments (LLAMA_RQ_MOMENTS), which llama-rq-moments reads as they are computed
bool llama_rq_sums_moments();

// Adds to a graph the sums over its tokens of K, K*K^T and Q*Q^T of each head: before RoPE; where heads are normalized behind it,
// normalized instead before it, without weights; as attention reads them where there is no RoPE. q and k as build_attn_mha has them. The
// nodes are called
//
//   rq_sum_{k,kk,qq}_{rope,norm,plain}-N    f32 [1, head_dim, n_head_kv], [head_dim, head_dim, n_head_kv], [head_dim, head_dim, n_head]
//
// N being the layer that keeps K. Those of K are there once in a graph, those of Q for each layer that reads this K.
void llama_rq_add_moments(const llm_graph_context & graph, ggml_tensor * q, const ggml_tensor * k);

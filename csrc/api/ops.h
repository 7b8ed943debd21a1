// The ops as torch calls them. Shapes, dtypes and errors: vllm_xlayer/ops/.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

namespace xlayer::api {

using torch::stable::Tensor;

// What the extension was built from and for, as JSON.
std::string build_info();

void reshape_and_cache_nvfp4_cpu(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                                 const Tensor& slot_mapping, const Tensor& k_scale, const Tensor& v_scale,
                                 int64_t scale_order, int64_t scale_choice,
                                 const std::optional<Tensor>& newest,
                                 const std::optional<Tensor>& newest_slots, bool rotated_keys);
void gather_nvfp4_cpu(const Tensor& kv_cache, const Tensor& block_table, const Tensor& seq_starts,
                      const Tensor& cu_seqlens, const Tensor& k_scale, const Tensor& v_scale,
                      const Tensor& k_out, const Tensor& v_out, int64_t scale_order, bool rotated_keys,
                      const std::optional<Tensor>& key, const std::optional<Tensor>& value,
                      const std::optional<Tensor>& query_starts, const std::optional<Tensor>& seq_lens,
                      const std::optional<Tensor>& newest, const std::optional<Tensor>& newest_rows,
                      const std::optional<Tensor>& newest_from);
void nvfp4_attention_schedule_cpu(const Tensor& seq_lens, const Tensor& schedule, int64_t q_len,
                                  int64_t num_q_heads, int64_t num_kv_heads, int64_t head_size,
                                  int64_t window, int64_t parts, int64_t split_units,
                                  const std::optional<Tensor>& query_starts, int64_t kernel_q_len,
                                  const std::optional<Tensor>& newest_from);
void nvfp4_paged_attention_cpu(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                               const Tensor& seq_lens, const Tensor& schedule, const Tensor& k_scale,
                               const Tensor& v_scale, const Tensor& out, const std::optional<Tensor>& lse,
                               const std::optional<Tensor>& sinks, const Tensor& workspace, double scale,
                               int64_t q_len, int64_t window, double soft_cap, int64_t scale_order,
                               int64_t parts, int64_t split_units, const std::optional<Tensor>& newest,
                               const std::optional<Tensor>& newest_rows,
                               const std::optional<Tensor>& newest_from,
                               const std::optional<Tensor>& query_starts, int64_t kernel_q_len,
                               bool rotated_keys);
int64_t nvfp4_attention_parts_cpu(const Tensor& like, int64_t head_size, int64_t rows);
int64_t nvfp4_attention_workspace_size_cpu(const Tensor& like, int64_t requests, int64_t max_tokens,
                                           int64_t q_len, int64_t num_q_heads, int64_t num_kv_heads,
                                           int64_t head_size, int64_t parts, int64_t split_units);
void nvfp4_prefix_attention_cpu(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                                const Tensor& lens, const Tensor& query_starts, const Tensor& k_scale,
                                const Tensor& v_scale, const Tensor& out, const Tensor& lse, double scale,
                                int64_t max_query_len, bool rotated_keys);
int64_t nvfp4_prefix_rows_cpu(const Tensor& like, int64_t head_size);
void newest_step_cpu(const Tensor& query_starts, const Tensor& seq_lens, const Tensor& rows,
                     const Tensor& slot_mapping, const Tensor& state, const Tensor& newest_slots,
                     const Tensor& newest_from, int64_t newest_tokens);
void copy_blocks_cpu(const Tensor& src, const Tensor& dst, const Tensor& src_ids, const Tensor& dst_ids,
                     int64_t method);
void land_rows_cpu(const Tensor& rows, const Tensor& pool, const Tensor& blocks,
                   const std::optional<Tensor>& factors, const std::optional<Tensor>& digests);

#if defined(XLAYER_WITH_CUDA)
void reshape_and_cache_nvfp4_cuda(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                                  const Tensor& slot_mapping, const Tensor& k_scale, const Tensor& v_scale,
                                  int64_t scale_order, int64_t scale_choice,
                                  const std::optional<Tensor>& newest,
                                  const std::optional<Tensor>& newest_slots, bool rotated_keys);
void gather_nvfp4_cuda(const Tensor& kv_cache, const Tensor& block_table, const Tensor& seq_starts,
                       const Tensor& cu_seqlens, const Tensor& k_scale, const Tensor& v_scale,
                       const Tensor& k_out, const Tensor& v_out, int64_t scale_order, bool rotated_keys,
                       const std::optional<Tensor>& key, const std::optional<Tensor>& value,
                       const std::optional<Tensor>& query_starts, const std::optional<Tensor>& seq_lens,
                       const std::optional<Tensor>& newest, const std::optional<Tensor>& newest_rows,
                       const std::optional<Tensor>& newest_from);
void nvfp4_attention_schedule_cuda(const Tensor& seq_lens, const Tensor& schedule, int64_t q_len,
                                   int64_t num_q_heads, int64_t num_kv_heads, int64_t head_size,
                                   int64_t window, int64_t parts, int64_t split_units,
                                   const std::optional<Tensor>& query_starts, int64_t kernel_q_len,
                                   const std::optional<Tensor>& newest_from);
void nvfp4_paged_attention_cuda(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                                const Tensor& seq_lens, const Tensor& schedule, const Tensor& k_scale,
                                const Tensor& v_scale, const Tensor& out, const std::optional<Tensor>& lse,
                                const std::optional<Tensor>& sinks, const Tensor& workspace, double scale,
                                int64_t q_len, int64_t window, double soft_cap, int64_t scale_order,
                                int64_t parts, int64_t split_units, const std::optional<Tensor>& newest,
                                const std::optional<Tensor>& newest_rows,
                                const std::optional<Tensor>& newest_from,
                                const std::optional<Tensor>& query_starts, int64_t kernel_q_len,
                                bool rotated_keys);
int64_t nvfp4_attention_parts_cuda(const Tensor& like, int64_t head_size, int64_t rows);
int64_t nvfp4_attention_workspace_size_cuda(const Tensor& like, int64_t requests, int64_t max_tokens,
                                            int64_t q_len, int64_t num_q_heads, int64_t num_kv_heads,
                                            int64_t head_size, int64_t parts, int64_t split_units);
void nvfp4_prefix_attention_cuda(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                                 const Tensor& lens, const Tensor& query_starts, const Tensor& k_scale,
                                 const Tensor& v_scale, const Tensor& out, const Tensor& lse, double scale,
                                 int64_t max_query_len, bool rotated_keys);
int64_t nvfp4_prefix_rows_cuda(const Tensor& like, int64_t head_size);
void newest_step_cuda(const Tensor& query_starts, const Tensor& seq_lens, const Tensor& rows,
                      const Tensor& slot_mapping, const Tensor& state, const Tensor& newest_slots,
                      const Tensor& newest_from, int64_t newest_tokens);
void copy_blocks_cuda(const Tensor& src, const Tensor& dst, const Tensor& src_ids, const Tensor& dst_ids,
                      int64_t method);
void land_rows_cuda(const Tensor& rows, const Tensor& pool, const Tensor& blocks,
                    const std::optional<Tensor>& factors, const std::optional<Tensor>& digests);
#endif

}  // namespace xlayer::api

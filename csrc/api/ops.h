// The ops as torch calls them. Shapes, dtypes and errors: vllm_xlayer/ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace xlayer::api {

using torch::stable::Tensor;

void reshape_and_cache_nvfp4_cpu(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                                 const Tensor& slot_mapping, const Tensor& k_scale, const Tensor& v_scale,
                                 int64_t scale_order, int64_t scale_choice);
void gather_nvfp4_cpu(const Tensor& kv_cache, const Tensor& block_table, const Tensor& seq_starts,
                      const Tensor& cu_seqlens, const Tensor& k_scale, const Tensor& v_scale,
                      const Tensor& k_out, const Tensor& v_out, int64_t scale_order);
void copy_blocks_cpu(const Tensor& src, const Tensor& dst, const Tensor& src_ids, const Tensor& dst_ids);

#if defined(XLAYER_WITH_CUDA)
void reshape_and_cache_nvfp4_cuda(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                                  const Tensor& slot_mapping, const Tensor& k_scale, const Tensor& v_scale,
                                  int64_t scale_order, int64_t scale_choice);
void gather_nvfp4_cuda(const Tensor& kv_cache, const Tensor& block_table, const Tensor& seq_starts,
                       const Tensor& cu_seqlens, const Tensor& k_scale, const Tensor& v_scale,
                       const Tensor& k_out, const Tensor& v_out, int64_t scale_order);
void copy_blocks_cuda(const Tensor& src, const Tensor& dst, const Tensor& src_ids, const Tensor& dst_ids);
#endif

}  // namespace xlayer::api

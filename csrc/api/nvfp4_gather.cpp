#include <torch/csrc/stable/ops.h>

#include "../cpu/nvfp4_gather.h"
#include "checks.h"
#include "ops.h"

#if defined(XLAYER_WITH_CUDA)
#include "../kernels/nvfp4_gather/launch.h"
#include "stream.h"
#endif

namespace xlayer::api {
namespace {

Nvfp4GatherParams check(const Tensor& kv_cache, const Tensor& block_table, const Tensor& seq_starts,
                        const Tensor& cu_seqlens, const Tensor& k_scale, const Tensor& v_scale,
                        const Tensor& k_out, const Tensor& v_out, int64_t scale_order, bool rotated_keys) {
  check_device("block_table", block_table, "kv_cache", kv_cache);
  check_device("seq_starts", seq_starts, "kv_cache", kv_cache);
  check_device("cu_seqlens", cu_seqlens, "kv_cache", kv_cache);
  check_device("k_out", k_out, "kv_cache", kv_cache);
  check_device("v_out", v_out, "kv_cache", kv_cache);
  check_global_scale("k_scale", k_scale, kv_cache);
  check_global_scale("v_scale", v_scale, kv_cache);
  check_dtype("block_table", block_table, {ScalarType::Int});
  check_dtype("seq_starts", seq_starts, {ScalarType::Int});
  check_dtype("cu_seqlens", cu_seqlens, {ScalarType::Int});
  check_dtype("k_out", k_out, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float});
  check_dtype("v_out", v_out, {k_out.scalar_type()});
  const Page page = check_kv_cache(kv_cache);
  check_rank("block_table", block_table, 2, "(requests, blocks)");
  check_rank("seq_starts", seq_starts, 1, "(requests)");
  check_rank("cu_seqlens", cu_seqlens, 1, "(requests + 1)");
  check_rank("k_out", k_out, 3, "(tokens, heads, head_size)");
  check_rank("v_out", v_out, 3, "(tokens, heads, head_size)");
  check_rows("block_table", block_table, false);
  check_dense("seq_starts", seq_starts);
  check_dense("cu_seqlens", cu_seqlens);
  check_rows("k_out", k_out, true);
  check_rows("v_out", v_out, true);
  const int64_t R = block_table.size(0);
  check_size("seq_starts", seq_starts, 0, R, "the requests of block_table");
  check_size("cu_seqlens", cu_seqlens, 0, R + 1, "the requests of block_table and one");
  check_size("k_out", k_out, 1, page.heads, "the heads of kv_cache");
  check_size("k_out", k_out, 2, page.head_size, "the head size of kv_cache");
  check_size("v_out", v_out, 0, k_out.size(0), "the tokens of k_out");
  check_size("v_out", v_out, 1, page.heads, "the heads of kv_cache");
  check_size("v_out", v_out, 2, page.head_size, "K and V head sizes must be equal");

  Nvfp4GatherParams p = {};
  p.cache = static_cast<const uint8_t*>(kv_cache.data_ptr());
  p.block_stride = block_stride_of(kv_cache);
  p.page = page;
  p.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  p.block_table_stride = block_table.stride(0);
  p.max_blocks = block_table.size(1);
  p.seq_starts = static_cast<const int32_t*>(seq_starts.data_ptr());
  p.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  p.num_requests = int(R);
  p.k_scale = static_cast<const float*>(k_scale.data_ptr());
  p.v_scale = static_cast<const float*>(v_scale.data_ptr());
  p.k_out = k_out.data_ptr();
  p.v_out = v_out.data_ptr();
  p.k_stride_t = k_out.stride(0);
  p.k_stride_h = k_out.stride(1);
  p.v_stride_t = v_out.stride(0);
  p.v_stride_h = v_out.stride(1);
  p.num_tokens = k_out.size(0);
  p.dtype = float_dtype(k_out);
  p.v_order = scale_order_of(scale_order, page.head_size);
  p.rotated_keys = rotated_keys;
  return p;
}

// The values in seq_starts, cu_seqlens and block_table, readable only where they are on the host.
void check_indices(const Nvfp4GatherParams& p, int64_t num_blocks) {
  STD_TORCH_CHECK(p.cu_seqlens[0] == 0, "cu_seqlens: expected 0 first, got ", p.cu_seqlens[0]);
  for (int r = 0; r < p.num_requests; ++r) {
    const int64_t length = int64_t(p.cu_seqlens[r + 1]) - p.cu_seqlens[r];
    STD_TORCH_CHECK(length >= 0, "cu_seqlens: expected ascending values, got ", p.cu_seqlens[r], " then ",
                    p.cu_seqlens[r + 1], " for request ", r);
    if (length == 0) continue;
    const int64_t start = p.seq_starts[r];
    STD_TORCH_CHECK(start >= 0, "seq_starts: expected 0 or more, got ", start, " for request ", r);
    const int64_t last = (start + length - 1) / p.page.block_size;
    STD_TORCH_CHECK(last < p.max_blocks, "block_table: expected at least ", last + 1, " blocks for request ",
                    r, " (tokens ", start, " to ", start + length, "), got ", p.max_blocks);
    for (int64_t i = start / p.page.block_size; i <= last; ++i) {
      const int64_t block = p.block_table[r * p.block_table_stride + i];
      STD_TORCH_CHECK(block >= 0 && block < num_blocks, "block_table: expected blocks from 0 to ",
                      num_blocks - 1, ", got ", block, " for request ", r, " at ", i);
    }
  }
  STD_TORCH_CHECK(p.cu_seqlens[p.num_requests] <= p.num_tokens, "cu_seqlens: expected at most ", p.num_tokens,
                  " tokens (the rows of k_out), got ", p.cu_seqlens[p.num_requests]);
}

}  // namespace

void gather_nvfp4_cpu(const Tensor& kv_cache, const Tensor& block_table, const Tensor& seq_starts,
                      const Tensor& cu_seqlens, const Tensor& k_scale, const Tensor& v_scale,
                      const Tensor& k_out, const Tensor& v_out, int64_t scale_order, bool rotated_keys) {
  const Nvfp4GatherParams p =
      check(kv_cache, block_table, seq_starts, cu_seqlens, k_scale, v_scale, k_out, v_out, scale_order,
            rotated_keys);
  check_indices(p, kv_cache.size(0));
  const int64_t tokens = p.cu_seqlens[p.num_requests];
  if (tokens == 0) return;
  const cpu::DecodeTable k_table(*p.k_scale, p.dtype);
  const cpu::DecodeTable v_table(*p.v_scale, p.dtype);
  const int64_t grain = ceil_div(32768, int64_t(p.page.heads) * p.page.head_size);
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    cpu::nvfp4_gather(p, k_table, v_table, begin, end);
  });
}

#if defined(XLAYER_WITH_CUDA)
void gather_nvfp4_cuda(const Tensor& kv_cache, const Tensor& block_table, const Tensor& seq_starts,
                       const Tensor& cu_seqlens, const Tensor& k_scale, const Tensor& v_scale,
                       const Tensor& k_out, const Tensor& v_out, int64_t scale_order, bool rotated_keys) {
  const Nvfp4GatherParams p =
      check(kv_cache, block_table, seq_starts, cu_seqlens, k_scale, v_scale, k_out, v_out, scale_order,
            rotated_keys);
  if (p.num_tokens == 0 || p.num_requests == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(kv_cache.get_device_index());
  check_cuda("gather_nvfp4", launch_nvfp4_gather(p, current_stream(kv_cache)));
}
#endif

}  // namespace xlayer::api

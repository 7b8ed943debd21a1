#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "../cpu/nvfp4_attention.h"
#include "checks.h"
#include "ops.h"

#if defined(XLAYER_WITH_CUDA)
#include "../kernels/nvfp4_prefix/launch.h"
#include "stream.h"
#endif

namespace xlayer::api {
namespace {

constexpr int CPU_ROWS = 128;  // as the CUDA kernel has, so that both are asked alike

Nvfp4AttentionParams check(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                           const Tensor& lens, const Tensor& query_starts, const Tensor& k_scale,
                           const Tensor& v_scale, const Tensor& out, const Tensor& lse, double scale,
                           int64_t max_query_len, bool rotated_keys) {
  check_device("q", q, "kv_cache", kv_cache);
  check_device("block_table", block_table, "kv_cache", kv_cache);
  check_device("lens", lens, "kv_cache", kv_cache);
  check_device("query_starts", query_starts, "kv_cache", kv_cache);
  check_device("out", out, "kv_cache", kv_cache);
  check_device("lse", lse, "kv_cache", kv_cache);
  check_global_scale("k_scale", k_scale, kv_cache);
  check_global_scale("v_scale", v_scale, kv_cache);
  check_dtype("q", q, {ScalarType::BFloat16, ScalarType::Half});
  check_dtype("block_table", block_table, {ScalarType::Int});
  check_dtype("lens", lens, {ScalarType::Int});
  check_dtype("query_starts", query_starts, {ScalarType::Int});
  check_dtype("out", out, {q.scalar_type()});
  check_dtype("lse", lse, {ScalarType::Float});
  const Page page = check_kv_cache(kv_cache);
  check_rank("q", q, 3, "(query tokens, query heads, head_size)");
  check_rank("block_table", block_table, 2, "(requests, blocks)");
  check_rank("lens", lens, 1, "(requests)");
  check_rank("query_starts", query_starts, 1, "(requests + 1)");
  check_rank("out", out, 3, "(query tokens, query heads, head_size)");
  check_rank("lse", lse, 2, "(query heads, query tokens)");
  check_rows("q", q, true);
  check_rows("block_table", block_table, false);
  check_dense("lens", lens);
  check_dense("query_starts", query_starts);
  check_rows("out", out, true);
  check_rows("lse", lse, false);
  const int64_t requests = lens.size(0);
  check_size("block_table", block_table, 0, requests, "the requests of lens");
  check_size("query_starts", query_starts, 0, requests + 1, "the requests of lens and one");
  check_size("q", q, 2, page.head_size, "the head size of kv_cache");
  check_size("out", out, 0, q.size(0), "the tokens of q");
  check_size("out", out, 1, q.size(1), "the heads of q");
  check_size("out", out, 2, q.size(2), "the head size of q");
  check_size("lse", lse, 0, q.size(1), "the heads of q");
  check_size("lse", lse, 1, q.size(0), "the tokens of q");
  STD_TORCH_CHECK(q.size(1) > 0 && q.size(1) % page.heads == 0, "q: expected a multiple of ", page.heads,
                  " (the heads of kv_cache) query heads, got ", q.size(1));
  STD_TORCH_CHECK(std::isfinite(scale) && scale > 0, "scale: expected a positive number, got ", scale);
  STD_TORCH_CHECK(max_query_len >= 0 && max_query_len <= q.size(0), "max_query_len: expected 0 to ",
                  q.size(0), " (the tokens of q), got ", max_query_len);

  Nvfp4AttentionParams p = {};
  p.q = q.data_ptr();
  p.q_stride_t = q.stride(0);
  p.q_stride_h = q.stride(1);
  p.out = out.data_ptr();
  p.out_stride_t = out.stride(0);
  p.out_stride_h = out.stride(1);
  p.lse = static_cast<float*>(lse.data_ptr());
  p.lse_stride_h = lse.stride(0);
  p.dtype = float_dtype(q);
  p.cache = static_cast<const uint8_t*>(kv_cache.data_ptr());
  p.block_stride = block_stride_of(kv_cache);
  p.page = page;
  p.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  p.block_table_stride = block_table.stride(0);
  p.max_blocks = block_table.size(1);
  p.seq_lens = static_cast<const int32_t*>(lens.data_ptr());
  p.num_requests = int(requests);
  p.q_len = int(max_query_len);
  p.query_starts = static_cast<const int32_t*>(query_starts.data_ptr());
  p.num_q_heads = int(q.size(1));
  p.k_scale = static_cast<const float*>(k_scale.data_ptr());
  p.v_scale = static_cast<const float*>(v_scale.data_ptr());
  p.scale = float(scale);
  p.v_order = ScaleOrder::LINEAR;
  p.rotated_keys = rotated_keys;
  p.merges = true;
  return p;
}

// The values in int32 tensors, readable only where they are on the host.
void check_indices(const Nvfp4AttentionParams& p, int64_t num_blocks, int64_t tokens) {
  for (int r = 0; r < p.num_requests; ++r) {
    const Queries queries = queries_of(p, r);
    STD_TORCH_CHECK(queries.begin >= 0 && queries.count >= 0 &&
                        (queries.count <= p.q_len || p.seq_lens[r] == 0) &&
                        queries.begin + queries.count <= tokens,
                    "query_starts: expected 0 to ", p.q_len, " of ", tokens, " query tokens, got ",
                    queries.count, " from ", queries.begin, " on for request ", r);
    const int64_t length = p.seq_lens[r], capacity = p.max_blocks * p.page.block_size;
    STD_TORCH_CHECK(length >= 0 && length <= capacity, "lens: expected 0 to ", capacity, " (", p.max_blocks,
                    " blocks of ", p.page.block_size, " tokens), got ", length, " for request ", r);
    for (int64_t i = 0; i < ceil_div(length, p.page.block_size); ++i) {
      const int64_t block = p.block_table[r * p.block_table_stride + i];
      STD_TORCH_CHECK(block >= 0 && block < num_blocks, "block_table: expected blocks from 0 to ",
                      num_blocks - 1, ", got ", block, " for request ", r, " at ", i);
    }
  }
}

}  // namespace

void nvfp4_prefix_attention_cpu(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                                const Tensor& lens, const Tensor& query_starts, const Tensor& k_scale,
                                const Tensor& v_scale, const Tensor& out, const Tensor& lse, double scale,
                                int64_t max_query_len, bool rotated_keys) {
  const Nvfp4AttentionParams p = check(q, kv_cache, block_table, lens, query_starts, k_scale, v_scale, out,
                                       lse, scale, max_query_len, rotated_keys);
  check_indices(p, kv_cache.size(0), q.size(0));
  torch::stable::parallel_for(0, int64_t(p.num_requests) * p.page.heads, 1,
                              [&p](int64_t begin, int64_t end) { cpu::nvfp4_attention(p, begin, end); });
}

int64_t nvfp4_prefix_rows_cpu(const Tensor&, int64_t) { return CPU_ROWS; }

#if defined(XLAYER_WITH_CUDA)
void nvfp4_prefix_attention_cuda(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                                 const Tensor& lens, const Tensor& query_starts, const Tensor& k_scale,
                                 const Tensor& v_scale, const Tensor& out, const Tensor& lse, double scale,
                                 int64_t max_query_len, bool rotated_keys) {
  const Nvfp4AttentionParams p = check(q, kv_cache, block_table, lens, query_starts, k_scale, v_scale, out,
                                       lse, scale, max_query_len, rotated_keys);
  const torch::stable::accelerator::DeviceGuard guard(kv_cache.get_device_index());
  STD_TORCH_CHECK(
      nvfp4_prefix_rows(p.page.head_size) > 0, "nvfp4_prefix_attention: expected heads of 128 and a ",
      "GPU of compute capability 9.0 that this build has sm_90a for, got heads of ", p.page.head_size);
  if (p.num_requests == 0 || p.q_len == 0) return;
  check_cuda("nvfp4_prefix_attention", launch_nvfp4_prefix(p, current_stream(kv_cache)));
}

int64_t nvfp4_prefix_rows_cuda(const Tensor& like, int64_t head_size) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  return nvfp4_prefix_rows(int(head_size));
}
#endif

}  // namespace xlayer::api

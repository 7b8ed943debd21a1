#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../cpu/nvfp4_gather.h"
#include "checks.h"
#include "ops.h"

#if defined(XLAYER_WITH_CUDA)
#include "../kernels/nvfp4_gather/launch.h"
#include "stream.h"
#endif

namespace xlayer::api {
namespace {

// Tokens that are not read from pages; all may be absent.
struct Sources {
  const std::optional<Tensor>&key, &value, &query_starts, &seq_lens, &newest, &newest_rows, &newest_from;
};

void check_int32(const char* name, const Tensor& tensor, const Tensor& kv_cache, int64_t size,
                 const char* why) {
  check_device(name, tensor, "kv_cache", kv_cache);
  check_dtype(name, tensor, {ScalarType::Int});
  check_rank(name, tensor, 1, "(requests)");
  check_dense(name, tensor);
  check_size(name, tensor, 0, size, why);
}

// The dtype of k_out, or any where that is float32.
void check_source_dtype(const char* name, const Tensor& tensor, const Tensor& k_out) {
  if (k_out.scalar_type() == ScalarType::Float) {
    check_dtype(name, tensor, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float});
  } else {
    check_dtype(name, tensor, {k_out.scalar_type()});
  }
}

void take_own(Nvfp4GatherParams& p, const Tensor& kv_cache, const Tensor& k_out, const Tensor& key,
              const Tensor& value) {
  check_device("key", key, "kv_cache", kv_cache);
  check_device("value", value, "kv_cache", kv_cache);
  check_source_dtype("key", key, k_out);
  check_dtype("value", value, {key.scalar_type()});
  check_rank("key", key, 3, "(tokens, heads, head_size)");
  check_rank("value", value, 3, "(tokens, heads, head_size)");
  check_rows("key", key, false);
  check_rows("value", value, false);
  check_size("key", key, 1, p.page.heads, "the heads of kv_cache");
  check_size("key", key, 2, p.page.head_size, "the head size of kv_cache");
  check_size("value", value, 0, key.size(0), "the tokens of key");
  check_size("value", value, 1, p.page.heads, "the heads of kv_cache");
  check_size("value", value, 2, p.page.head_size, "K and V head sizes must be equal");
  p.key = key.data_ptr();
  p.value = value.data_ptr();
  p.key_stride_t = key.stride(0);
  p.key_stride_h = key.stride(1);
  p.value_stride_t = value.stride(0);
  p.value_stride_h = value.stride(1);
  p.source_dtype = float_dtype(key);
}

void take_sources(Nvfp4GatherParams& p, const Tensor& kv_cache, const Tensor& k_out, const Sources& given) {
  const int64_t R = p.num_requests;
  STD_TORCH_CHECK(given.key.has_value() == given.value.has_value(),
                  "key, value: expected both or neither, got ", given.key ? "key" : "value", " alone");
  STD_TORCH_CHECK(given.query_starts.has_value() == given.seq_lens.has_value(),
                  "query_starts, seq_lens: expected both or neither, got ",
                  given.query_starts ? "query_starts" : "seq_lens", " alone");
  STD_TORCH_CHECK(given.query_starts || !(given.key || given.newest),
                  "query_starts, seq_lens: expected with ", given.key ? "key" : "newest", ", got neither");
  check_newest_pair("newest_rows", given.newest_rows, given.newest);
  check_newest_pair("newest_from", given.newest_from, given.newest);
  if (given.query_starts) {
    check_int32("query_starts", *given.query_starts, kv_cache, R + 1, "the requests of block_table and one");
    check_int32("seq_lens", *given.seq_lens, kv_cache, R, "the requests of block_table");
    p.query_starts = static_cast<const int32_t*>(given.query_starts->data_ptr());
    p.seq_lens = static_cast<const int32_t*>(given.seq_lens->data_ptr());
  }
  if (given.key) take_own(p, kv_cache, k_out, *given.key, *given.value);
  if (given.newest) {
    check_source_dtype("newest", *given.newest, k_out);
    if (given.key) {
      check_newest("key", *given.key, *given.newest, p.page);
    } else {
      check_device("newest", *given.newest, "kv_cache", kv_cache);
      check_newest("newest", *given.newest, *given.newest, p.page);
    }
    check_int32("newest_rows", *given.newest_rows, kv_cache, R, "the requests of block_table");
    check_int32("newest_from", *given.newest_from, kv_cache, R, "the requests of block_table");
    p.newest = given.newest->data_ptr();
    p.newest_rows = static_cast<const int32_t*>(given.newest_rows->data_ptr());
    p.newest_from = static_cast<const int32_t*>(given.newest_from->data_ptr());
    p.newest_tokens = int(given.newest->size(3));
    p.source_dtype = float_dtype(*given.newest);
  }
}

Nvfp4GatherParams check(const Tensor& kv_cache, const Tensor& block_table, const Tensor& seq_starts,
                        const Tensor& cu_seqlens, const Tensor& k_scale, const Tensor& v_scale,
                        const Tensor& k_out, const Tensor& v_out, int64_t scale_order, bool rotated_keys,
                        const Sources& sources) {
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
  p.source_dtype = p.dtype;
  take_sources(p, kv_cache, k_out, sources);
  return p;
}

// The own tokens of request r are tokens of key, and its keys end where its sequence does.
void check_own(const Nvfp4GatherParams& p, int r, int64_t end, int64_t query_tokens) {
  const int64_t first = p.query_starts[r], next = p.query_starts[r + 1];
  STD_TORCH_CHECK(first >= 0 && next >= first && (p.key == nullptr || next <= query_tokens),
                  "query_starts: expected ascending values from 0 to the tokens of key (", query_tokens,
                  "), got ", first, " then ", next, " for request ", r);
  STD_TORCH_CHECK(p.seq_lens[r] >= end && p.seq_lens[r] >= next - first, "seq_lens: expected at least ",
                  std::max(end, next - first), " (request ", r, " is gathered up to token ", end, " and has ",
                  next - first, " own ones), got ", p.seq_lens[r]);
}

// The values in int32 tensors, readable only where they are on the host.
void check_indices(const Nvfp4GatherParams& p, int64_t num_blocks, int64_t query_tokens,
                   int64_t newest_rows) {
  STD_TORCH_CHECK(p.cu_seqlens[0] == 0, "cu_seqlens: expected 0 first, got ", p.cu_seqlens[0]);
  for (int r = 0; r < p.num_requests; ++r) {
    const int64_t length = int64_t(p.cu_seqlens[r + 1]) - p.cu_seqlens[r];
    STD_TORCH_CHECK(length >= 0, "cu_seqlens: expected ascending values, got ", p.cu_seqlens[r], " then ",
                    p.cu_seqlens[r + 1], " for request ", r);
    if (length == 0) continue;
    const int64_t start = p.seq_starts[r];
    STD_TORCH_CHECK(start >= 0, "seq_starts: expected 0 or more, got ", start, " for request ", r);
    if (p.query_starts != nullptr) check_own(p, r, start + length, query_tokens);
    STD_TORCH_CHECK(p.newest == nullptr || p.newest_rows[r] < newest_rows,
                    "newest_rows: expected rows below ", newest_rows, ", got ", p.newest_rows[r],
                    " for request ", r);
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
                      const Tensor& k_out, const Tensor& v_out, int64_t scale_order, bool rotated_keys,
                      const std::optional<Tensor>& key, const std::optional<Tensor>& value,
                      const std::optional<Tensor>& query_starts, const std::optional<Tensor>& seq_lens,
                      const std::optional<Tensor>& newest, const std::optional<Tensor>& newest_rows,
                      const std::optional<Tensor>& newest_from) {
  const Nvfp4GatherParams p =
      check(kv_cache, block_table, seq_starts, cu_seqlens, k_scale, v_scale, k_out, v_out, scale_order,
            rotated_keys, {key, value, query_starts, seq_lens, newest, newest_rows, newest_from});
  check_indices(p, kv_cache.size(0), key ? key->size(0) : 0, newest ? newest->size(0) : 0);
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
                       const Tensor& k_out, const Tensor& v_out, int64_t scale_order, bool rotated_keys,
                       const std::optional<Tensor>& key, const std::optional<Tensor>& value,
                       const std::optional<Tensor>& query_starts, const std::optional<Tensor>& seq_lens,
                       const std::optional<Tensor>& newest, const std::optional<Tensor>& newest_rows,
                       const std::optional<Tensor>& newest_from) {
  const Nvfp4GatherParams p =
      check(kv_cache, block_table, seq_starts, cu_seqlens, k_scale, v_scale, k_out, v_out, scale_order,
            rotated_keys, {key, value, query_starts, seq_lens, newest, newest_rows, newest_from});
  if (p.num_tokens == 0 || p.num_requests == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(kv_cache.get_device_index());
  check_cuda("gather_nvfp4", launch_nvfp4_gather(p, current_stream(kv_cache)));
}
#endif

}  // namespace xlayer::api

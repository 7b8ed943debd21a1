#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <string>

#include "../cpu/nvfp4_attention.h"
#include "../kernels/nvfp4_attention/shapes.h"
#include "checks.h"
#include "ops.h"

#if defined(XLAYER_WITH_CUDA)
#include "../kernels/nvfp4_attention/launch.h"
#include "stream.h"
#endif

namespace xlayer::api {
namespace {

using attention::MAX_GROUP;
using attention::MAX_HEAD_SIZE;
using attention::MAX_Q_LEN;

int int_between(const char* name, int64_t value, int64_t low, int64_t high) {
  STD_TORCH_CHECK(value >= low && value <= high, name, ": expected ", low, " to ", high, ", got ", value);
  return int(value);
}

// Params with what the schedule and the size of the workspace depend on.
Nvfp4AttentionParams check_shape(int64_t q_len, int64_t num_q_heads, int64_t num_kv_heads, int64_t head_size,
                                 int64_t window, int64_t parts, int64_t split_units) {
  Nvfp4AttentionParams p = {};
  p.q_len = p.kernel_q_len = int_between("q_len", q_len, 1, MAX_Q_LEN);
  p.window = int_between("window", window, 0, INT32_MAX);
  p.parts = int_between("parts", parts, 1, INT32_MAX);
  p.split_units = int_between("split_units", split_units, 0, INT32_MAX);
  p.page.heads = int_between("num_kv_heads", num_kv_heads, 1, INT32_MAX / MAX_GROUP);
  STD_TORCH_CHECK(
      num_q_heads > 0 && num_q_heads % num_kv_heads == 0 && num_q_heads / num_kv_heads <= MAX_GROUP,
      "q: expected 1 to ", MAX_GROUP, " query heads a KV head, got ", num_q_heads, " query heads for ",
      num_kv_heads, " KV heads");
  p.num_q_heads = int(num_q_heads);
  STD_TORCH_CHECK(head_size > 0 && head_size % GROUP == 0 && head_size <= MAX_HEAD_SIZE,
                  "head_size: expected a multiple of ", GROUP, " up to ", MAX_HEAD_SIZE, ", got ", head_size);
  p.page.head_size = int(head_size);
  return p;
}

void check_seq_lens(const Tensor& seq_lens) {
  check_rank("seq_lens", seq_lens, 1, "(requests)");
  check_dense("seq_lens", seq_lens);
}

void check_schedule(const Tensor& schedule, int64_t requests, const Nvfp4AttentionParams& p) {
  const int rows = p.q_len * (p.num_q_heads / p.page.heads);
  const int64_t needed = Schedule::size(requests, p.page.heads, rows, p.parts);
  check_rank("schedule", schedule, 1, "(entries)");
  check_dense("schedule", schedule);
  STD_TORCH_CHECK(schedule.size(0) >= needed, "schedule: expected at least ", needed, " entries for ",
                  requests, " requests of this shape, got ", schedule.size(0));
}

// Where q_len is not the same for all requests.
void take_query_starts(Nvfp4AttentionParams& p, const std::optional<Tensor>& query_starts,
                       int64_t kernel_q_len, const Tensor& seq_lens) {
  if (!query_starts) return;
  check_device("query_starts", *query_starts, "seq_lens", seq_lens);
  check_dtype("query_starts", *query_starts, {ScalarType::Int});
  check_rank("query_starts", *query_starts, 1, "(requests + 1)");
  check_dense("query_starts", *query_starts);
  check_size("query_starts", *query_starts, 0, seq_lens.size(0) + 1, "the requests of seq_lens, and one");
  p.kernel_q_len = int_between("kernel_q_len", kernel_q_len, 1, p.q_len);
  p.query_starts = static_cast<const int32_t*>(query_starts->data_ptr());
}

// int32, one a request.
void check_requests(const char* name, const Tensor& tensor, const Tensor& seq_lens) {
  check_device(name, tensor, "seq_lens", seq_lens);
  check_dtype(name, tensor, {ScalarType::Int});
  check_rank(name, tensor, 1, "(requests)");
  check_dense(name, tensor);
  check_size(name, tensor, 0, seq_lens.size(0), "the requests of seq_lens");
}

Nvfp4AttentionParams check_for_schedule(const Tensor& seq_lens, const Tensor& schedule, int64_t q_len,
                                        int64_t num_q_heads, int64_t num_kv_heads, int64_t head_size,
                                        int64_t window, int64_t parts, int64_t split_units,
                                        const std::optional<Tensor>& query_starts, int64_t kernel_q_len,
                                        const std::optional<Tensor>& newest_from) {
  check_device("schedule", schedule, "seq_lens", seq_lens);
  check_dtype("seq_lens", seq_lens, {ScalarType::Int});
  check_dtype("schedule", schedule, {ScalarType::Int});
  check_seq_lens(seq_lens);
  Nvfp4AttentionParams p =
      check_shape(q_len, num_q_heads, num_kv_heads, head_size, window, parts, split_units);
  check_schedule(schedule, seq_lens.size(0), p);
  take_query_starts(p, query_starts, kernel_q_len, seq_lens);
  if (newest_from) {
    check_requests("newest_from", *newest_from, seq_lens);
    p.newest_from = static_cast<const int32_t*>(newest_from->data_ptr());
  }
  p.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  p.num_requests = int(seq_lens.size(0));
  p.schedule = static_cast<int32_t*>(schedule.data_ptr());
  return p;
}

// lse and sinks, which may be absent.
void check_optional(const char* name, const std::optional<Tensor>& tensor, const Tensor& kv_cache) {
  if (!tensor) return;
  check_device(name, *tensor, "kv_cache", kv_cache);
  check_dtype(name, *tensor, {ScalarType::Float});
}

void check_sizes_of_q(const Tensor& q, const Tensor& out, const std::optional<Tensor>& lse,
                      const std::optional<Tensor>& sinks) {
  check_size("out", out, 0, q.size(0), "the tokens of q");
  check_size("out", out, 1, q.size(1), "the heads of q");
  check_size("out", out, 2, q.size(2), "the head size of q");
  if (lse) check_size("lse", *lse, 0, q.size(1), "the heads of q");
  if (lse) check_size("lse", *lse, 1, q.size(0), "the tokens of q");
  if (sinks) check_size("sinks", *sinks, 0, q.size(1), "the heads of q");
}

Nvfp4AttentionParams check(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                           const Tensor& seq_lens, const Tensor& schedule, const Tensor& k_scale,
                           const Tensor& v_scale, const Tensor& out, const std::optional<Tensor>& lse,
                           const std::optional<Tensor>& sinks, const Tensor& workspace, double scale,
                           int64_t q_len, int64_t window, double soft_cap, int64_t scale_order, int64_t parts,
                           int64_t split_units, const std::optional<Tensor>& newest,
                           const std::optional<Tensor>& newest_rows,
                           const std::optional<Tensor>& newest_from,
                           const std::optional<Tensor>& query_starts, int64_t kernel_q_len,
                           bool rotated_keys) {
  check_device("q", q, "kv_cache", kv_cache);
  check_device("block_table", block_table, "kv_cache", kv_cache);
  check_device("seq_lens", seq_lens, "kv_cache", kv_cache);
  check_device("schedule", schedule, "kv_cache", kv_cache);
  check_device("out", out, "kv_cache", kv_cache);
  check_device("workspace", workspace, "kv_cache", kv_cache);
  check_global_scale("k_scale", k_scale, kv_cache);
  check_global_scale("v_scale", v_scale, kv_cache);
  check_optional("lse", lse, kv_cache);
  check_optional("sinks", sinks, kv_cache);
  check_dtype("q", q, {ScalarType::BFloat16, ScalarType::Half});
  check_dtype("out", out, {q.scalar_type()});
  check_dtype("block_table", block_table, {ScalarType::Int});
  check_dtype("seq_lens", seq_lens, {ScalarType::Int});
  check_dtype("schedule", schedule, {ScalarType::Int});
  check_dtype("workspace", workspace, {ScalarType::Float});
  const Page page = check_kv_cache(kv_cache);
  check_rank("q", q, 3, "(query tokens, query heads, head_size)");
  check_rank("out", out, 3, "(query tokens, query heads, head_size)");
  check_rank("block_table", block_table, 2, "(requests, blocks)");
  check_rank("workspace", workspace, 1, "(floats)");
  check_rows("q", q, true);
  check_rows("out", out, true);
  check_rows("block_table", block_table, false);
  check_rows("workspace", workspace, true);
  check_seq_lens(seq_lens);
  if (lse) {
    check_rank("lse", *lse, 2, "(query heads, query tokens)");
    check_rows("lse", *lse, false);
  }
  if (sinks) {
    check_rank("sinks", *sinks, 1, "(query heads)");
    check_dense("sinks", *sinks);
  }
  const int64_t R = seq_lens.size(0);
  check_size("q", q, 2, page.head_size, "the head size of kv_cache");
  Nvfp4AttentionParams p =
      check_shape(q_len, q.size(1), page.heads, page.head_size, window, parts, split_units);
  take_query_starts(p, query_starts, kernel_q_len, seq_lens);
  if (!query_starts) check_size("q", q, 0, R * q_len, "the requests of seq_lens times q_len");
  check_size("block_table", block_table, 0, R, "the requests of seq_lens");
  check_sizes_of_q(q, out, lse, sinks);
  check_schedule(schedule, R, p);
  check_newest_pair("newest_rows", newest_rows, newest);
  check_newest_pair("newest_from", newest_from, newest);
  if (newest) {
    check_newest("q", q, *newest, page);
    check_requests("newest_rows", *newest_rows, seq_lens);
    check_requests("newest_from", *newest_from, seq_lens);
    p.newest = newest->data_ptr();
    p.newest_rows = static_cast<const int32_t*>(newest_rows->data_ptr());
    p.newest_from = static_cast<const int32_t*>(newest_from->data_ptr());
    p.newest_tokens = int(newest->size(3));
  }
  STD_TORCH_CHECK(std::isfinite(scale) && scale > 0, "scale: expected a positive number, got ", scale);
  STD_TORCH_CHECK(std::isfinite(soft_cap) && soft_cap >= 0,
                  "soft_cap: expected 0 (none) or a positive number, got ", soft_cap);

  p.q = q.data_ptr();
  p.q_stride_t = q.stride(0);
  p.q_stride_h = q.stride(1);
  p.out = out.data_ptr();
  p.out_stride_t = out.stride(0);
  p.out_stride_h = out.stride(1);
  p.lse = lse ? static_cast<float*>(lse->data_ptr()) : nullptr;
  p.lse_stride_h = lse ? lse->stride(0) : 0;
  p.dtype = float_dtype(q);
  p.cache = static_cast<const uint8_t*>(kv_cache.data_ptr());
  p.block_stride = block_stride_of(kv_cache);
  p.page = page;
  p.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  p.block_table_stride = block_table.stride(0);
  p.max_blocks = block_table.size(1);
  p.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  p.num_requests = int(R);
  p.k_scale = static_cast<const float*>(k_scale.data_ptr());
  p.v_scale = static_cast<const float*>(v_scale.data_ptr());
  p.sinks = sinks ? static_cast<const float*>(sinks->data_ptr()) : nullptr;
  p.scale = float(scale);
  p.soft_cap = float(soft_cap);
  p.v_order = scale_order_of(scale_order, page.head_size);
  p.rotated_keys = rotated_keys;
  p.schedule = static_cast<int32_t*>(schedule.data_ptr());
  return p;
}

// The values in seq_lens, query_starts and block_table, readable only where they are on the host.
void check_indices(const Nvfp4AttentionParams& p, int64_t num_blocks, int64_t tokens) {
  for (int r = 0; r < p.num_requests; ++r) {
    const Queries queries = queries_of(p, r);
    STD_TORCH_CHECK(queries.begin >= 0 && queries.count >= 0 && queries.count <= p.q_len &&
                        queries.begin + queries.count <= tokens,
                    "query_starts: expected 0 to ", p.q_len, " of ", tokens, " query tokens, got ",
                    queries.count, " from ", queries.begin, " on for request ", r);
    const int64_t length = p.seq_lens[r], capacity = p.max_blocks * p.page.block_size;
    STD_TORCH_CHECK(length >= 0 && length <= capacity, "seq_lens: expected 0 to ", capacity, " (",
                    p.max_blocks, " blocks of ", p.page.block_size, " tokens), got ", length, " for request ",
                    r);
    // Blocks before what the first query sees may be freed already.
    const int64_t first = p.window > 0 ? std::max<int64_t>(0, length - queries.count - p.window + 1) : 0;
    for (int64_t i = first / p.page.block_size; i < ceil_div(length, p.page.block_size); ++i) {
      const int64_t block = p.block_table[r * p.block_table_stride + i];
      STD_TORCH_CHECK(block >= 0 && block < num_blocks, "block_table: expected blocks from 0 to ",
                      num_blocks - 1, ", got ", block, " for request ", r, " at ", i);
    }
  }
}

// Whoever has newest tokens has a row, and no more of them than that holds.
void check_newest_indices(const Nvfp4AttentionParams& p, int64_t rows) {
  for (int r = 0; r < p.num_requests; ++r) {
    if (p.newest_from[r] >= p.seq_lens[r]) continue;
    STD_TORCH_CHECK(p.newest_rows[r] >= 0 && p.newest_rows[r] < rows, "newest_rows: expected rows from 0 to ",
                    rows - 1, ", got ", p.newest_rows[r], " for request ", r);
    const int64_t first = std::max<int64_t>(0, int64_t(p.seq_lens[r]) - p.newest_tokens);
    STD_TORCH_CHECK(p.newest_from[r] >= first, "newest_from: expected at least ", first, " (", p.seq_lens[r],
                    " tokens, of which a row holds ", p.newest_tokens, "), got ", p.newest_from[r],
                    " for request ", r);
  }
}

}  // namespace

// The CPU op has no parts: it checks what the CUDA op would, and leaves the schedule alone.
void nvfp4_attention_schedule_cpu(const Tensor& seq_lens, const Tensor& schedule, int64_t q_len,
                                  int64_t num_q_heads, int64_t num_kv_heads, int64_t head_size,
                                  int64_t window, int64_t parts, int64_t split_units,
                                  const std::optional<Tensor>& query_starts, int64_t kernel_q_len,
                                  const std::optional<Tensor>& newest_from) {
  check_for_schedule(seq_lens, schedule, q_len, num_q_heads, num_kv_heads, head_size, window, parts,
                     split_units, query_starts, kernel_q_len, newest_from);
}

void nvfp4_paged_attention_cpu(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                               const Tensor& seq_lens, const Tensor& schedule, const Tensor& k_scale,
                               const Tensor& v_scale, const Tensor& out, const std::optional<Tensor>& lse,
                               const std::optional<Tensor>& sinks, const Tensor& workspace, double scale,
                               int64_t q_len, int64_t window, double soft_cap, int64_t scale_order,
                               int64_t parts, int64_t split_units, const std::optional<Tensor>& newest,
                               const std::optional<Tensor>& newest_rows,
                               const std::optional<Tensor>& newest_from,
                               const std::optional<Tensor>& query_starts, int64_t kernel_q_len,
                               bool rotated_keys) {
  const Nvfp4AttentionParams p =
      check(q, kv_cache, block_table, seq_lens, schedule, k_scale, v_scale, out, lse, sinks, workspace, scale,
            q_len, window, soft_cap, scale_order, parts, split_units, newest, newest_rows, newest_from,
            query_starts, kernel_q_len, rotated_keys);
  check_indices(p, kv_cache.size(0), q.size(0));
  if (newest) check_newest_indices(p, newest->size(0));
  torch::stable::parallel_for(0, int64_t(p.num_requests) * p.page.heads, 1,
                              [&p](int64_t begin, int64_t end) { cpu::nvfp4_attention(p, begin, end); });
}

int64_t nvfp4_attention_parts_cpu(const Tensor&, int64_t, int64_t) { return 1; }

int64_t nvfp4_attention_workspace_size_cpu(const Tensor&, int64_t, int64_t, int64_t, int64_t, int64_t,
                                           int64_t, int64_t, int64_t) {
  return 0;
}

#if defined(XLAYER_WITH_CUDA)
namespace {

// "64, 80 or 96"
std::string head_sizes() {
  std::set<int> sizes;
#define ADD(head_size, ...) sizes.insert(head_size);
  XLAYER_DECODE_SHAPES(ADD)
#undef ADD
  std::string text;
  for (int size : sizes)
    text += (text.empty() ? "" : size == *sizes.rbegin() ? " or " : ", ") + std::to_string(size);
  return text;
}

void check_head_size(int head_size) {
  STD_TORCH_CHECK(nvfp4_attention_padded_head_size(head_size) > 0, "head_size: expected ", head_sizes(),
                  " on CUDA, got ", head_size);
}

// The partial results: [slots][tile_rows][padded head size] sums, then [slots][tile_rows][2].
struct Workspace {
  int64_t out_floats, ml_floats;
  int64_t floats() const { return out_floats + ml_floats; }
};

// max_tokens: of one request.
Workspace workspace_of(const Nvfp4AttentionParams& p, int64_t requests, int64_t max_tokens) {
  const int group = p.num_q_heads / p.page.heads, rows = p.q_len * group;
  const int64_t tile_rows = nvfp4_attention_tile_rows(p.page.head_size, p.kernel_q_len * group);
  // A part shares at most two (request, head tile) with other parts: where it begins and where it ends.
  int64_t slots = 2 * int64_t(p.parts);
  if (p.split_units > 0) {
    const int64_t splits = ceil_div(ceil_div(max_tokens, SPLIT_UNIT_TOKENS), p.split_units);
    slots = requests * p.page.heads * ceil_div(rows, tile_rows) * splits;
  }
  return {slots * tile_rows * nvfp4_attention_padded_head_size(p.page.head_size), slots * tile_rows * 2};
}

}  // namespace

void nvfp4_attention_schedule_cuda(const Tensor& seq_lens, const Tensor& schedule, int64_t q_len,
                                   int64_t num_q_heads, int64_t num_kv_heads, int64_t head_size,
                                   int64_t window, int64_t parts, int64_t split_units,
                                   const std::optional<Tensor>& query_starts, int64_t kernel_q_len,
                                   const std::optional<Tensor>& newest_from) {
  const Nvfp4AttentionParams p = check_for_schedule(seq_lens, schedule, q_len, num_q_heads, num_kv_heads,
                                                    head_size, window, parts, split_units, query_starts,
                                                    kernel_q_len, newest_from);
  check_head_size(p.page.head_size);
  if (p.num_requests == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(seq_lens.get_device_index());
  check_cuda("nvfp4_attention_schedule", launch_nvfp4_attention_schedule(p, current_stream(seq_lens)));
}

void nvfp4_paged_attention_cuda(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                                const Tensor& seq_lens, const Tensor& schedule, const Tensor& k_scale,
                                const Tensor& v_scale, const Tensor& out, const std::optional<Tensor>& lse,
                                const std::optional<Tensor>& sinks, const Tensor& workspace, double scale,
                                int64_t q_len, int64_t window, double soft_cap, int64_t scale_order,
                                int64_t parts, int64_t split_units, const std::optional<Tensor>& newest,
                                const std::optional<Tensor>& newest_rows,
                                const std::optional<Tensor>& newest_from,
                                const std::optional<Tensor>& query_starts, int64_t kernel_q_len,
                                bool rotated_keys) {
  Nvfp4AttentionParams p =
      check(q, kv_cache, block_table, seq_lens, schedule, k_scale, v_scale, out, lse, sinks, workspace, scale,
            q_len, window, soft_cap, scale_order, parts, split_units, newest, newest_rows, newest_from,
            query_starts, kernel_q_len, rotated_keys);
  check_head_size(p.page.head_size);
  const torch::stable::accelerator::DeviceGuard guard(kv_cache.get_device_index());
  const Workspace needed = workspace_of(p, p.num_requests, p.max_blocks * p.page.block_size);
  STD_TORCH_CHECK(workspace.size(0) >= needed.floats(), "workspace: expected at least ", needed.floats(),
                  " floats for this shape, got ", workspace.size(0));
  STD_TORCH_CHECK(p.block_stride < int64_t(1) << 32, "kv_cache: expected a block stride below 4 GiB, got ",
                  p.block_stride, " bytes");
  if (p.num_requests == 0) return;
  p.partial_out = static_cast<float*>(workspace.data_ptr());
  p.partial_ml = p.partial_out + needed.out_floats;
  check_cuda("nvfp4_paged_attention", launch_nvfp4_attention(p, current_stream(kv_cache)));
}

int64_t nvfp4_attention_parts_cuda(const Tensor& like, int64_t head_size, int64_t rows) {
  check_head_size(int_between("head_size", head_size, 1, MAX_HEAD_SIZE));
  const int checked_rows = int_between("rows", rows, 1, MAX_Q_LEN * MAX_GROUP);
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const int parts = nvfp4_attention_parts(int(head_size), checked_rows);
  STD_TORCH_CHECK(parts > 0,
                  "nvfp4_attention_parts: expected a GPU that this build has kernels for, but they ",
                  "cannot be loaded on it (see build_info()[\"archs\"])");
  return parts;
}

int64_t nvfp4_attention_workspace_size_cuda(const Tensor& like, int64_t requests, int64_t max_tokens,
                                            int64_t q_len, int64_t num_q_heads, int64_t num_kv_heads,
                                            int64_t head_size, int64_t parts, int64_t split_units) {
  const Nvfp4AttentionParams p =
      check_shape(q_len, num_q_heads, num_kv_heads, head_size, 0, parts, split_units);
  check_head_size(p.page.head_size);
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  return workspace_of(p, requests, max_tokens).floats();
}
#endif

}  // namespace xlayer::api

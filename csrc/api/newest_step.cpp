#include <algorithm>

#include "../kernels/newest_step/params.h"
#include "checks.h"
#include "ops.h"

#if defined(XLAYER_WITH_CUDA)
#include "../kernels/newest_step/launch.h"
#include "stream.h"
#endif

namespace xlayer::api {
namespace {

// Dense, of so many entries, on the device of `state`.
void check_entries(const char* name, const Tensor& tensor, ScalarType dtype, int64_t entries, const char* why,
                   const Tensor& state) {
  check_device(name, tensor, "state", state);
  check_dtype(name, tensor, {dtype});
  check_rank(name, tensor, 1, "(entries)");
  check_dense(name, tensor);
  check_size(name, tensor, 0, entries, why);
}

NewestStepParams check(const Tensor& query_starts, const Tensor& seq_lens, const Tensor& rows,
                       const Tensor& slot_mapping, const Tensor& state, const Tensor& newest_slots,
                       const Tensor& newest_from, int64_t newest_tokens) {
  check_dtype("state", state, {ScalarType::Int});
  check_rank("state", state, 2, "(rows, 2)");
  check_dense("state", state);
  check_size("state", state, 1, 2, "first and end");
  check_rank("rows", rows, 1, "(requests)");
  check_rank("slot_mapping", slot_mapping, 1, "(tokens)");
  const int64_t requests = rows.size(0), tokens = slot_mapping.size(0);
  check_entries("rows", rows, ScalarType::Int, requests, "the requests of rows", state);
  check_entries("slot_mapping", slot_mapping, ScalarType::Long, tokens, "the tokens of slot_mapping", state);
  check_entries("query_starts", query_starts, ScalarType::Int, requests + 1, "the requests of rows, and one",
                state);
  check_entries("seq_lens", seq_lens, ScalarType::Int, requests, "the requests of rows", state);
  check_entries("newest_from", newest_from, ScalarType::Int, requests, "the requests of rows", state);
  check_entries("newest_slots", newest_slots, ScalarType::Long, tokens, "the tokens of slot_mapping", state);
  STD_TORCH_CHECK(newest_tokens > 0 && newest_tokens % GROUP == 0 && newest_tokens <= INT32_MAX,
                  "newest_tokens: expected a multiple of ", GROUP, ", got ", newest_tokens);
  NewestStepParams p = {};
  p.query_starts = static_cast<const int32_t*>(query_starts.data_ptr());
  p.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  p.rows = static_cast<const int32_t*>(rows.data_ptr());
  p.slot_mapping = static_cast<const int64_t*>(slot_mapping.data_ptr());
  p.state = static_cast<int32_t*>(state.data_ptr());
  p.newest_slots = static_cast<int64_t*>(newest_slots.data_ptr());
  p.newest_from = static_cast<int32_t*>(newest_from.data_ptr());
  p.num_requests = int(requests);
  p.num_tokens = tokens;
  p.newest_tokens = int(newest_tokens);
  return p;
}

}  // namespace

void newest_step_cpu(const Tensor& query_starts, const Tensor& seq_lens, const Tensor& rows,
                     const Tensor& slot_mapping, const Tensor& state, const Tensor& newest_slots,
                     const Tensor& newest_from, int64_t newest_tokens) {
  const NewestStepParams p =
      check(query_starts, seq_lens, rows, slot_mapping, state, newest_slots, newest_from, newest_tokens);
  int64_t token = 0;
  for (int r = 0; r < p.num_requests; ++r) {
    STD_TORCH_CHECK(p.rows[r] < state.size(0), "rows: expected rows below ", state.size(0), ", got ",
                    p.rows[r], " for request ", r);
    STD_TORCH_CHECK(p.query_starts[r] >= token && p.query_starts[r + 1] >= p.query_starts[r],
                    "query_starts: expected ascending values from 0 on, got ", p.query_starts[r], " and ",
                    p.query_starts[r + 1], " for request ", r);
    const NewestSpan span = newest_span(p, r);
    p.newest_from[r] = advance_newest(p, span);
    const int64_t end = std::min<int64_t>(p.query_starts[r + 1], p.num_tokens);
    for (token = span.begin; token < end; ++token) {
      p.newest_slots[token] = newest_slot(p, span, int(token - span.begin));
    }
  }
  for (; token < p.num_tokens; ++token) p.newest_slots[token] = -1;
}

#if defined(XLAYER_WITH_CUDA)
void newest_step_cuda(const Tensor& query_starts, const Tensor& seq_lens, const Tensor& rows,
                      const Tensor& slot_mapping, const Tensor& state, const Tensor& newest_slots,
                      const Tensor& newest_from, int64_t newest_tokens) {
  const NewestStepParams p =
      check(query_starts, seq_lens, rows, slot_mapping, state, newest_slots, newest_from, newest_tokens);
  const torch::stable::accelerator::DeviceGuard guard(state.get_device_index());
  check_cuda("newest_step", launch_newest_step(p, current_stream(state)));
}
#endif

}  // namespace xlayer::api

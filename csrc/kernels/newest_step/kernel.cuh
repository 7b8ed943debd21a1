// A thread block a request, and one that says -1 for the tokens behind the last request's.
#pragma once

#include "params.h"

namespace xlayer {

constexpr int NEWEST_STEP_THREADS = 128;

__global__ void __launch_bounds__(NEWEST_STEP_THREADS) newest_step_kernel(const NewestStepParams p) {
  const int r = int(blockIdx.x);
  if (r == p.num_requests) {
    for (int64_t i = p.query_starts[r] + int64_t(threadIdx.x); i < p.num_tokens; i += NEWEST_STEP_THREADS) {
      p.newest_slots[i] = -1;
    }
    return;
  }
  const NewestSpan span = newest_span(p, r);
  if (threadIdx.x == 0) p.newest_from[r] = advance_newest(p, span);
  const int64_t end = min(int64_t(p.query_starts[r + 1]), p.num_tokens);
  for (int64_t i = span.begin + threadIdx.x; i < end; i += NEWEST_STEP_THREADS) {
    p.newest_slots[i] = newest_slot(p, span, int(i - span.begin));
  }
}

}  // namespace xlayer

// Cuts a batch into parts of equal work, on the device, from the lengths: a captured graph follows them.
#pragma once

#include "work.cuh"

namespace xlayer::attention {

constexpr int SCHEDULE_THREADS = 256;
constexpr int MIN_TOKENS = 128;  // of a part: below, merging costs more than it spreads

// Where all lines are equally long: a somewhat larger chunk of which each is so many lines, or so many make a
// line. Then no part begins or ends in the middle of a line for nothing: what that costs is in NOTES.md.
__device__ __forceinline__ int whole_lines(int chunk, int line) {
  const int parts_of_line = max(line / chunk, 1);
  const int whole =
      chunk > line ? (chunk + line - 1) / line * line : (line + parts_of_line - 1) / parts_of_line;
  return whole - chunk <= chunk / 16 ? whole : chunk;
}

// One thread block. head_tiles: of all KV heads. unit: tokens. parts: to aim for.
__global__ void __launch_bounds__(SCHEDULE_THREADS)
    schedule_kernel(const int32_t* seq_lens, int32_t* schedule, int requests, int q_len, int window, int unit,
                    int head_tiles, int parts, int split_units) {
  __shared__ int sums[SCHEDULE_THREADS / 32];
  __shared__ int shortest, longest;  // line of a request and head tile, in units
  if (threadIdx.x == 0) shortest = INT32_MAX, longest = 0;
  __syncthreads();
  int32_t* begins = schedule + Schedule::BEGINS;
  int32_t* counters = schedule + Schedule::counters(requests);
  for (int i = threadIdx.x; i < requests * head_tiles; i += SCHEDULE_THREADS) counters[i] = 0;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  int total = 0;
  for (int base = 0; base < requests; base += SCHEDULE_THREADS) {
    const int r = base + threadIdx.x;
    int units = 0;
    if (r < requests) {
      units = line_units(key_range(seq_lens[r], q_len, window, unit).units, split_units);
      if (units > 0) atomicMin(&shortest, units), atomicMax(&longest, units);
      units *= head_tiles;
    }
    int sum = units;  // inclusive prefix sum over the block
    for (int i = 1; i < 32; i *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFFu, sum, i);
      if (lane >= i) sum += other;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    int before = total;
    for (int w = 0; w < SCHEDULE_THREADS / 32; ++w) {
      if (w < warp) before += sums[w];
      total += sums[w];
    }
    if (r < requests) begins[r] = before + sum - units;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    int chunk = split_units > 0 ? split_units : max((total + parts - 1) / parts, max(MIN_TOKENS / unit, 1));
    if (split_units == 0 && shortest == longest) chunk = whole_lines(chunk, longest);
    begins[requests] = total;
    schedule[Schedule::CHUNK] = chunk;
    schedule[Schedule::PARTS] = (total + chunk - 1) / chunk;
    schedule[Schedule::TOTAL] = total;
    schedule[Schedule::BEGINS - 1] = 0;
  }
}

}  // namespace xlayer::attention

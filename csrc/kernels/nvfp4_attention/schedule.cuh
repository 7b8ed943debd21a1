// Cuts a batch into parts of equal work, on the device, from the lengths: a captured graph follows them.
#pragma once

#include "work.cuh"

namespace xlayer::attention {

constexpr int SCHEDULE_THREADS = 256;
constexpr int MIN_TOKENS = 128;  // of a part: below, merging costs more than it spreads

// A tile of newest tokens takes as long as so many of a page: it has 512 bytes a token and head size of 128 in
// place of 144, and nothing is read ahead of it.
constexpr int NEWEST_COST = 4;

// What a part's further runs take: each fills the ring anew, loads queries, and merges its warps' results, while the
// block does nothing else. In units, whatever the block: one of sixteen warps has four times as many tokens a unit
// and takes as long for it.
constexpr int RUN_COST = 5;

// A line may be longer than its request's tokens are: by what its newest tokens cost more, and by RUN_COST where
// lines are not equally long, so that a part may have the ends of many. These units come after the line's own, and
// nobody attends to them: a part that has some has fewer others. Not with a fixed split, whose parts are the same in
// any batch.

// For newest tokens; what is less than a unit is left out.
__device__ __forceinline__ int newest_units(const Nvfp4AttentionParams& p, int request, const Range& keys,
                                            int unit) {
  if (p.newest_from == nullptr || p.split_units > 0) return 0;
  const int end = (keys.last + TILE - 1) / TILE;
  const int tiles = end - max(newest_tile(p, request, keys.last), keys.first / TILE);
  return tiles * (NEWEST_COST - 1) / (unit / TILE);
}

// Of a request's head tile, without RUN_COST.
__device__ __forceinline__ int units_of_line(const Nvfp4AttentionParams& p, int request, int unit) {
  const int q_len = queries_of(p, request).count;
  if (q_len == 0) return 0;
  const Range keys = key_range(p.seq_lens[request], q_len, p.window, unit);
  return line_units(keys.units, p.split_units) + newest_units(p, request, keys, unit);
}

// Where all lines are equally long: a somewhat larger chunk of which each is so many lines, or so many make a
// line. Then no part begins or ends in the middle of a line for nothing: what that costs is in NOTES.md.
__device__ __forceinline__ int whole_lines(int chunk, int line) {
  const int parts_of_line = max(line / chunk, 1);
  const int whole =
      chunk > line ? (chunk + line - 1) / line * line : (line + parts_of_line - 1) / parts_of_line;
  return whole - chunk <= chunk / 16 ? whole : chunk;
}

// One thread block, for a decode kernel with units of so many tokens and head tiles of so many rows. parts: to
// aim for.
__global__ void __launch_bounds__(SCHEDULE_THREADS)
    schedule_kernel(const __grid_constant__ Nvfp4AttentionParams p, int unit, int tile_rows, int parts) {
  __shared__ int sums[SCHEDULE_THREADS / 32];
  __shared__ int shortest, longest;  // line of a request and head tile, in units
  __shared__ int units_of_part;
  if (threadIdx.x == 0) shortest = INT32_MAX, longest = 0;
  __syncthreads();
  int32_t* begins = p.schedule + Schedule::BEGINS;
  int32_t* counters = p.schedule + Schedule::counters(p.num_requests);
  const int counted = p.num_requests * head_tiles_of(p, p.q_len, tile_rows);
  for (int i = threadIdx.x; i < counted; i += SCHEDULE_THREADS) counters[i] = 0;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  int total = 0;
  for (int r = threadIdx.x; r < p.num_requests; r += SCHEDULE_THREADS) {
    const int units = units_of_line(p, r, unit);
    if (units > 0) atomicMin(&shortest, units), atomicMax(&longest, units);
  }
  __syncthreads();
  const bool alike = p.split_units > 0 || shortest >= longest;
  for (int base = 0; base < p.num_requests; base += SCHEDULE_THREADS) {
    const int r = base + threadIdx.x;
    int units = 0;
    if (r < p.num_requests) {
      units = units_of_line(p, r, unit);
      if (units > 0 && !alike) units += RUN_COST;
      units *= head_tiles_of(p, queries_of(p, r).count, tile_rows);
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
    if (r < p.num_requests) begins[r] = before + sum - units;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    int chunk = p.split_units > 0 ? p.split_units : max((total + parts - 1) / parts, max(MIN_TOKENS / unit, 1));
    if (p.split_units == 0 && alike && longest > 0) chunk = whole_lines(chunk, longest);
    begins[p.num_requests] = total;
    p.schedule[Schedule::CHUNK] = chunk;
    p.schedule[Schedule::PARTS] = (total + chunk - 1) / chunk;
    p.schedule[Schedule::TOTAL] = total;
    p.schedule[Schedule::NEWEST] = p.newest_from != nullptr;
    units_of_part = chunk;
  }
  if (p.split_units > 0) return;
  __syncthreads();
  for (int r = threadIdx.x; r < p.num_requests; r += SCHEDULE_THREADS) {
    const int chunk = units_of_part, end = begins[r + 1];
    for (int part = (begins[r] + chunk - 1) / chunk; part * chunk < end; ++part) {
      firsts_of(p)[part] = r;
    }
  }
}

}  // namespace xlayer::attention

// Merges the partial results of (request, head tile) pairs that several parts share.
#pragma once

#include "output.cuh"
#include "work.cuh"

namespace xlayer::attention {

// Grid: (KV head x row tile x row, request). A thread block merges one row: its warps take the parts in turn,
// then add.
template <class C>
__global__ void __launch_bounds__(THREADS) combine_kernel(const __grid_constant__ Nvfp4AttentionParams p) {
  __shared__ float shared[WARPS][C::DP];
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int request = blockIdx.y;
  const int group = p.num_q_heads / p.page.heads;
  const int tiles_per_head = row_tiles(p.q_len, group, C::TILE_ROWS);
  const int head_tile = blockIdx.x / C::TILE_ROWS;
  const int row = blockIdx.x % C::TILE_ROWS;
  const int kv_head = head_tile / tiles_per_head;
  const int tile_row = head_tile % tiles_per_head * C::TILE_ROWS + row;
  if (tile_row >= p.q_len * group) return;

  const int units = key_range(p.seq_lens[request], p.q_len, p.window).units;
  const int line = line_units(units, p.split_units);
  const int chunk = p.schedule[Schedule::CHUNK];
  const int begin = p.schedule[Schedule::BEGINS + request] + head_tile * line, end = begin + units;
  const int first = begin / chunk, last = units == 0 ? first - 1 : (end - 1) / chunk;
  if (first == last) return;  // one part had it all and wrote the output

  const auto slot = [&](int part) {
    const bool starts_in_part = part == first && begin % chunk != 0;
    const int64_t s = p.split_units > 0 ? part : 2 * int64_t(part) + starts_in_part;
    return s * C::TILE_ROWS + row;
  };
  const float2* ml = reinterpret_cast<const float2*>(p.partial_ml);
  float max = EMPTY;
  for (int part = first + lane; part <= last; part += 32) max = fmaxf(max, ml[slot(part)].x);
  for (int i = 1; i < 32; i *= 2) max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFFu, max, i));
  float sum = 0.0f;
  for (int part = first + lane; part <= last; part += 32) {
    const float2 other = ml[slot(part)];
    sum += other.y * exp2f(other.x - max);
  }
  for (int i = 1; i < 32; i *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, i);

  constexpr int PER_LANE = C::DP / 32;
  float x[PER_LANE] = {};
#pragma unroll 4
  for (int part = first + warp; part <= last; part += WARPS) {
    const float weight = exp2f(ml[slot(part)].x - max);
    const float* from = p.partial_out + slot(part) * C::DP;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const int d = lane + 32 * i;
      if (C::EXACT || d < C::D) x[i] += from[d] * weight;
    }
  }
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) shared[warp][lane + 32 * i] = x[i];
  __syncthreads();
  if (threadIdx.x < C::D / 8) {
    const int d = threadIdx.x * 8;
    float y[8] = {};
    for (int w = 0; w < WARPS; ++w) {
#pragma unroll
      for (int j = 0; j < 8; ++j) y[j] += shared[w][d + j];
    }
    const OutputRow to = output_row(p, request, kv_head, tile_row);
    store_out(p, to, d, y, finish_row(p, to, max, sum, threadIdx.x == 0));
  }
}

}  // namespace xlayer::attention

// The results of a (request, head tile) that several parts share. Whichever thread block finishes the last of
// them merges them, in the order of the parts: the bits do not depend on who that is.
#pragma once

#include "../common/ptx.cuh"
#include "output.cuh"
#include "work.cuh"

namespace xlayer::attention {

// Units `begin` to `end` (from the first that a query sees) of one request and head tile, as one part has
// them.
struct Run {
  int request, kv_head, first_row;
  int begin, end;
  int head_tile;
  int first_part, last_part;  // those that have units of this request and head tile
  bool starts_inside;         // the first of them has others before
  int64_t slot;               // of the partial result; unused if one part has all

  __device__ __forceinline__ bool whole() const { return first_part == last_part; }
};

// Where a part's partial result of a run is. A balanced part begins in the middle of at most one run and ends
// in the middle of at most one.
__device__ __forceinline__ int64_t slot_of(const Nvfp4AttentionParams& p, int part, bool starts_inside) {
  return p.split_units > 0 ? part : 2 * int64_t(part) + starts_inside;
}

// Called by all threads of a block, after its partial result is written: true in the block that comes last.
// Then the others' results can be read.
template <class C>
__device__ __forceinline__ bool comes_last(const Nvfp4AttentionParams& p, const Run& run) {
  bool last = false;
  __syncthreads();
  if (threadIdx.x == 0) {
    const int head_tiles = p.page.heads * row_tiles(p.q_len, p.num_q_heads / p.page.heads, C::TILE_ROWS);
    int32_t* counter =
        p.schedule + Schedule::counters(p.num_requests) + int64_t(run.request) * head_tiles + run.head_tile;
    last = ptx::add_acq_rel(counter, 1) == run.last_part - run.first_part;
    if (last) *counter = 0;  // for the next layer
  }
  return ptx::uniform(__syncthreads_or(last)) != 0;
}

// A thread takes 8 dimensions of a row. No branch that lanes could part at (but for loads and stores): the
// decode loop around this needs no code for that then.
template <class C>
__device__ __forceinline__ void combine(const Nvfp4AttentionParams& p, const Run& run, int rows) {
  constexpr int LANES = C::DP / 8;  // a row; a power of two, so that a warp has whole rows
  const float2* ml = reinterpret_cast<const float2*>(p.partial_ml);
  const float2 nothing = make_float2(EMPTY, 0.0f);
  const int lane = threadIdx.x % LANES, d = 8 * lane;
#pragma unroll 1
  for (int first_row = 0; first_row < C::TILE_ROWS; first_row += THREADS / LANES) {
    const int row = first_row + threadIdx.x / LANES;
    const bool there = row < rows && (C::EXACT || d < C::D);  // other rows were not written
    const auto at = [&](int part) {
      return slot_of(p, part, part == run.first_part && run.starts_inside) * C::TILE_ROWS + row;
    };
    float max = EMPTY, sum = 0.0f;
    for (int i = run.first_part; i <= run.last_part; i += LANES) {
      const float2 other = row < rows && i + lane <= run.last_part ? ml[at(i + lane)] : nothing;
      const float top = fmaxf(max, other.x);
      sum = sum * exp2f(max - top) + other.y * exp2f(other.x - top);
      max = top;
    }
#pragma unroll
    for (int lanes = 1; lanes < LANES; lanes *= 2) {
      const float other_max = __shfl_xor_sync(0xFFFFFFFFu, max, lanes);
      const float other_sum = __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
      const float top = fmaxf(max, other_max);
      sum = sum * exp2f(max - top) + other_sum * exp2f(other_max - top);
      max = top;
    }
    float x[8] = {};
#pragma unroll 4
    for (int part = run.first_part; part <= run.last_part; ++part) {
      float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f), b = a;
      float weight = 0.0f;
      if (there) {
        const float4* from = reinterpret_cast<const float4*>(p.partial_out + at(part) * C::DP + d);
        a = from[0], b = from[1];
        weight = exp2f(ml[at(part)].x - max);
      }
      x[0] += a.x * weight, x[1] += a.y * weight, x[2] += a.z * weight, x[3] += a.w * weight;
      x[4] += b.x * weight, x[5] += b.y * weight, x[6] += b.z * weight, x[7] += b.w * weight;
    }
    if (there) {
      const OutputRow to = output_row(p, run.request, run.kv_head, run.first_row + row);
      store_out(p, to, d, x, finish_row(p, to, max, sum, lane == 0));
    }
  }
}

// Requests of which no query sees a key are in nobody's part: their output is 0 and their LSE -inf.
template <class C>
__device__ __forceinline__ void store_empty_requests(const Nvfp4AttentionParams& p) {
  constexpr int CHUNKS = C::D / 8;
  const float zeros[8] = {};
  for (int r = blockIdx.x; r < p.num_requests; r += gridDim.x) {
    if (key_range(p.seq_lens[r], p.q_len, p.window).units > 0) continue;
    for (int i = threadIdx.x; i < p.q_len * p.num_q_heads * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, d = i % CHUNKS * 8;
      const OutputRow to = {int64_t(r) * p.q_len + row / p.num_q_heads, row % p.num_q_heads};
      store_out(p, to, d, zeros, finish_row(p, to, EMPTY, 0.0f, d == 0));
    }
  }
}

}  // namespace xlayer::attention

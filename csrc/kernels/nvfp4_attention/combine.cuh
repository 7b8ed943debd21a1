// The results of a (request, head tile) that several parts share. Whichever team finishes the last of
// them merges them, in the order of the parts: the bits do not depend on who that is.
#pragma once

#include "output.cuh"
#include "team.cuh"
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

// Called by all threads of a team, after its partial result is written: true in the team that comes last.
// Then the others' results can be read.
template <class C>
__device__ __forceinline__ bool comes_last(const Nvfp4AttentionParams& p, const Run& run) {
  bool last = false;
  Team<C>::sync();
  if (Team<C>::thread() == 0) {
    const int head_tiles = head_tiles_of(p, p.q_len, C::TILE_ROWS);
    int32_t* counter =
        p.schedule + Schedule::counters(p.num_requests) + int64_t(run.request) * head_tiles + run.head_tile;
    last = ptx::add_acq_rel(counter, 1) == run.last_part - run.first_part;
    if (last) *counter = 0;  // for the next layer
  }
  return ptx::uniform(Team<C>::any(last)) != 0;
}

// A warp takes a row, a lane four dimensions of it (or twice four). No branch that lanes could part at: the
// decode loop around this needs no code for that then.
template <class C>
__device__ __forceinline__ void combine(const Nvfp4AttentionParams& p, const Run& run, int rows) {
  constexpr int VECTORS = C::DP <= 128 ? 1 : C::DP / 128;
  constexpr int TOGETHER = 8 / VECTORS;  // parts read at a time: their latencies overlap
  const int lane = threadIdx.x & 31;
  const int count = run.last_part - run.first_part + 1;
  const float2* ml = reinterpret_cast<const float2*>(p.partial_ml);
#pragma unroll 1
  for (int row = ptx::uniform(Team<C>::warp()); row < ptx::uniform(rows); row += C::WARPS) {
    const auto at = [&](int i) {
      return slot_of(p, run.first_part + i, i == 0 && run.starts_inside) * C::TILE_ROWS + row;
    };
    const auto max_and_sum = [&](int i) { return i < count ? ml[at(i)] : make_float2(EMPTY, 0.0f); };
    float max = EMPTY, sum = 0.0f;
    for (int base = 0; base < count; base += 32) {
      const float2 other = max_and_sum(base + lane);
      const float top = fmaxf(max, other.x);
      sum = sum * exp2f(max - top) + other.y * exp2f(other.x - top);
      max = top;
    }
    float top = max;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, lanes));
    sum *= exp2f(max - top);
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);

    float x[VECTORS][4] = {};
    for (int base = 0; base < count; base += 32) {
      const float weight = exp2f(max_and_sum(base + lane).x - top);
      const int here = min(32, count - base);
#pragma unroll 1
      for (int first = 0; first < here; first += TOGETHER) {
        float4 y[TOGETHER][VECTORS];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {  // beyond the last part: that one again, times 0
          const float* from = p.partial_out + at(min(base + first + i, count - 1)) * C::DP;
#pragma unroll
          for (int v = 0; v < VECTORS; ++v) {
            y[i][v] = *reinterpret_cast<const float4*>(from + min(4 * lane + 128 * v, C::D - 4));
          }
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
          const float shared_weight = __shfl_sync(0xFFFFFFFFu, weight, first + i);
          const float w = first + i < here ? shared_weight : 0.0f;
#pragma unroll
          for (int v = 0; v < VECTORS; ++v) {
            x[v][0] += y[i][v].x * w, x[v][1] += y[i][v].y * w;
            x[v][2] += y[i][v].z * w, x[v][3] += y[i][v].w * w;
          }
        }
      }
    }
    const OutputRow to = output_row(p, queries_of(p, run.request).begin, run.kv_head, run.first_row + row);
    const float factor = finish_row(p, to, top, sum, lane == 0);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int d = 4 * lane + 128 * v;
      if (d < C::D) store_out(p, to, d, x[v], factor);
    }
  }
}

// Requests of which no query sees a key are in nobody's part: their output is 0 and their LSE -inf.
template <class C>
__device__ __forceinline__ void store_empty_requests(const Nvfp4AttentionParams& p) {
  constexpr int CHUNKS = C::D / 8;
  const float zeros[8] = {};
  for (int r = blockIdx.x; r < p.num_requests; r += gridDim.x) {
    const Queries queries = queries_of(p, r);
    if (key_range(p.seq_lens[r], queries.count, p.window, C::UNIT_TOKENS).units > 0) continue;
    for (int i = threadIdx.x; i < queries.count * p.num_q_heads * CHUNKS; i += C::THREADS) {
      const int row = i / CHUNKS, d = i % CHUNKS * 8;
      const OutputRow to = {int64_t(queries.begin) + row / p.num_q_heads, row % p.num_q_heads};
      store_out(p, to, d, zeros, finish_row(p, to, EMPTY, 0.0f, d == 0));
    }
  }
}

}  // namespace xlayer::attention

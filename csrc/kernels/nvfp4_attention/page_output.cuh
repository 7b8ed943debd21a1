// The result of a warp that has a KV head to itself, from its registers: to the output, or to the workspace
// and from there merged with the other parts' by whichever warp finishes the last of them. No other warp of
// the block takes part.
//
// The workspace has, for each slot (two a part), [HEADS][TILE_ROWS] rows of DP floats, and of two (maximum,
// sum).
#pragma once

#include "../common/ptx.cuh"
#include "output.cuh"
#include "page_work.cuh"
#include "tile.cuh"

namespace xlayer::attention {

// First row of what a part has of a request and row tile that it shares: of at most one such it has not the
// first tile, of at most one the first, but not the last.
template <class C>
__device__ __forceinline__ int64_t page_slot(int part, bool has_first_tile, int head) {
  return ((2 * int64_t(part) + has_first_tile) * C::HEADS + head) * C::TILE_ROWS;
}

// rows: of the head tile that exist.
template <class C>
__device__ __forceinline__ void store_whole(const Nvfp4AttentionParams& p, const WarpState<C>& state,
                                            int first_token, int head, int first_row, int rows) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float sum = state.sum[0][j];
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
    if (2 * t + j < rows) {
      const OutputRow to = output_row(p, first_token, head, first_row + 2 * t + j);
      const float factor = finish_row(p, to, state.max[0][j], sum, g == 0);
#pragma unroll
      for (int d = 0; d < C::DP / 8; d += 8) {
        float x[8];  // dimensions 2 m and 2 m + 1 are in MMA tile m's first and second row
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = state.out[0][(d + i) / 2][i % 2 * 2 + j];
        store_out(p, to, g * (C::DP / 8) + d, x, factor);
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void store_partial(const Nvfp4AttentionParams& p, const WarpState<C>& state,
                                              int64_t slot, int rows) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float sum = state.sum[0][j];
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
    if (2 * t + j < rows) {
      const int64_t row = slot + 2 * t + j;
      float* out = p.partial_out + row * C::DP + g * (C::DP / 8);
#pragma unroll
      for (int m = 0; m < C::M_TILES; m += 2) {
        *reinterpret_cast<float4*>(out + 2 * m) = make_float4(
            state.out[0][m][j], state.out[0][m][2 + j], state.out[0][m + 1][j], state.out[0][m + 1][2 + j]);
      }
      if (g == 0) reinterpret_cast<float2*>(p.partial_ml)[row] = make_float2(state.max[0][j], sum);
    }
  }
}

// Called by a whole warp after store_partial: true if the other parts have written theirs, which can be read
// then.
__device__ __forceinline__ bool comes_last_of(int32_t* counter, int parts) {
  __syncwarp();
  int last = 0;
  if ((threadIdx.x & 31) == 0) {
    last = ptx::add_acq_rel(counter, 1) == parts - 1;
    if (last) *counter = 0;  // for the next layer
  }
  last = __shfl_sync(0xFFFFFFFFu, last, 0);
  __syncwarp();
  return ptx::uniform(last) != 0;
}

// Adds up the parts' results, in the order of the parts. Four rows at a time, four dimensions of each a lane:
// so sixteen loads are under way at once.
template <class C>
__device__ __forceinline__ void combine_parts(const Nvfp4AttentionParams& p, int first_part, int count,
                                              int first_token, int head, int first_row, int rows) {
  constexpr int TOGETHER = 4;  // rows, and parts
  static_assert(C::DP == 4 * 32);
  const int lane = threadIdx.x & 31;
  const auto at = [&](int i) { return page_slot<C>(first_part + i, i == 0, head); };
#pragma unroll 1
  for (int begin = 0; begin < rows; begin += TOGETHER) {
    const auto max_and_sum = [&](int i, int r) {
      return i < count && begin + r < rows ? reinterpret_cast<const float2*>(p.partial_ml)[at(i) + begin + r]
                                           : make_float2(EMPTY, 0.0f);
    };
    float top[TOGETHER], sum[TOGETHER], x[TOGETHER][4] = {};
#pragma unroll
    for (int r = 0; r < TOGETHER; ++r) top[r] = EMPTY, sum[r] = 0.0f;
    for (int base = 0; base < count; base += 32) {
#pragma unroll
      for (int r = 0; r < TOGETHER; ++r) {
        const float2 other = max_and_sum(base + lane, r);
        const float higher = fmaxf(top[r], other.x);
        sum[r] = sum[r] * exp2f(top[r] - higher) + other.y * exp2f(other.x - higher);
        top[r] = higher;
      }
    }
#pragma unroll
    for (int r = 0; r < TOGETHER; ++r) {
      const float mine = top[r];
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2)
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xFFFFFFFFu, top[r], lanes));
      sum[r] *= exp2f(mine - top[r]);
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) sum[r] += __shfl_xor_sync(0xFFFFFFFFu, sum[r], lanes);
    }
#pragma unroll 1
    for (int base = 0; base < count; base += 32) {
      float weight[TOGETHER];
#pragma unroll
      for (int r = 0; r < TOGETHER; ++r) weight[r] = exp2f(max_and_sum(base + lane, r).x - top[r]);
      const int here = min(32, count - base);
#pragma unroll 1
      for (int first = 0; first < here; first += TOGETHER) {
        float4 y[TOGETHER][TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
          const float* from =
              p.partial_out + (at(base + min(first + i, here - 1)) + begin) * C::DP + 4 * lane;
#pragma unroll
          for (int r = 0; r < TOGETHER; ++r) {
            y[i][r] = first + i < here && begin + r < rows
                          ? *reinterpret_cast<const float4*>(from + r * C::DP)
                          : make_float4(0, 0, 0, 0);
          }
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
#pragma unroll
          for (int r = 0; r < TOGETHER; ++r) {
            const float w = __shfl_sync(0xFFFFFFFFu, weight[r], first + i);
            x[r][0] += y[i][r].x * w, x[r][1] += y[i][r].y * w;
            x[r][2] += y[i][r].z * w, x[r][3] += y[i][r].w * w;
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < TOGETHER; ++r) {
      if (begin + r < rows) {
        const OutputRow to = output_row(p, first_token, head, first_row + begin + r);
        store_out(p, to, 4 * lane, x[r], finish_row(p, to, top[r], sum[r], lane == 0));
      }
    }
  }
}

}  // namespace xlayer::attention

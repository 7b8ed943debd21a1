// A head tile's query rows as MMA fragments.
#pragma once

#include <cuda_bf16.h>

#include "team.cuh"
#include "tile.cuh"

namespace xlayer::attention {

__device__ __forceinline__ float2 to_float2(uint32_t bits, Dtype dtype) {
  if (dtype == Dtype::F16) return __half22float2(__half2(__builtin_bit_cast(__half2_raw, bits)));
  return __bfloat1622float2(__nv_bfloat162(__builtin_bit_cast(__nv_bfloat162_raw, bits)));
}

// A lane's N elements of a row, which meet rotated keys, and lanes side by side have the next.
template <class C, int N>
__device__ __forceinline__ void rotate_query(float (&x)[N]) {
  constexpr int BLOCK = rotation_block(C::D), HERE = N < BLOCK ? N : BLOCK;
#pragma unroll
  for (int first = 0; first < N; first += HERE) butterflies<HERE>(x + first);
#pragma unroll
  for (int lanes = 1; HERE * lanes < BLOCK; lanes *= 2) butterfly_of_lanes(x, lanes, ~0u);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] *= rotation_back(BLOCK);
}

// The power of two that a row is multiplied by, and its inverse: the row's largest element comes to [128, 256).
// So a bf16 row keeps all its bits where they matter, and no logit overflows.
struct RowScale {
  float up, down;

  __device__ __forceinline__ explicit RowScale(float amax) {
    // From 40 on: `down` times the scales stays a normal number, also for a row of zeros.
    const uint32_t exponent = min(max(float_bits(amax) >> 23, 40u), 254u);
    up = bits_float((127 + 127 + 7 - exponent) << 23);
    down = bits_float((exponent - 7) << 23);
  }
  __device__ __forceinline__ uint32_t pair(float a, float b) const {
    return __builtin_bit_cast(uint32_t, __half2_raw(__floats2half2_rn(a * up, b * up)));
  }
};

// The query of head-tile row `row` (of all the request's), if it is there.
template <class C>
__device__ __forceinline__ const uint16_t* query_row(const Nvfp4AttentionParams& p, const Queries& queries,
                                                     int kv_head, int row) {
  const int group = p.num_q_heads / p.page.heads;
  const int query = row / group;
  return static_cast<const uint16_t*>(p.q) + (int64_t(queries.begin) + query) * p.q_stride_t +
         (kv_head * group + row - query * group) * p.q_stride_h;
}

// N elements of it from d on; zeros beyond the head and where there is no row.
template <class C, int N>
__device__ __forceinline__ void load_elements(const Nvfp4AttentionParams& p, const uint16_t* q, int d,
                                              bool row_is_there, float* x) {
  const bool there = row_is_there && (C::EXACT || d < C::D);
  uint32_t bits[N / 2];
  if constexpr (N == 8) {
    const uint4 raw = there ? __ldg(reinterpret_cast<const uint4*>(q + d)) : make_uint4(0, 0, 0, 0);
    bits[0] = raw.x, bits[1] = raw.y, bits[2] = raw.z, bits[3] = raw.w;
  } else {
    static_assert(N == 4);
    const uint2 raw = there ? __ldg(reinterpret_cast<const uint2*>(q + d)) : make_uint2(0, 0);
    bits[0] = raw.x, bits[1] = raw.y;
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float2 two = to_float2(bits[i], p.dtype);
    x[2 * i] = two.x, x[2 * i + 1] = two.y;
  }
}

// All warps of a team together, into shared memory: a thread has some elements of one row, and all threads wait.
template <class C>
__device__ __forceinline__ void load_shared_query(WarpState<C>& state, const Nvfp4AttentionParams& p,
                                                  const Queries& queries, int kv_head, int first_row,
                                                  float common) {
  constexpr int N = C::TILE_ROWS * C::DP / C::TEAM_THREADS, LANES = C::DP / N, STEP = N < 8 ? N : 8;
  static_assert(LANES <= 32 && N % STEP == 0);
  const int in_tile = Team<C>::thread() / LANES, first = Team<C>::thread() % LANES * N;
  const int row = first_row + in_tile;
  const bool there = row < queries.count * (p.num_q_heads / p.page.heads);
  const uint16_t* q = query_row<C>(p, queries, kv_head, row);
  float x[N];
#pragma unroll
  for (int i = 0; i < N; i += STEP) load_elements<C, STEP>(p, q, first + i, there, x + i);
  if (p.rotated_keys) rotate_query<C>(x);
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) amax = fmaxf(amax, fabsf(x[i]));
#pragma unroll
  for (int lanes = 1; lanes < LANES; lanes *= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, lanes));
  }
  const RowScale scale(amax);
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    // Which half of which word of which lane's: the inverse of k_dim.
    const int d = first + i, t = C::k_lane(d), w = C::k_word(d), half = d % 8 / 4;
    const int lane = 4 * (in_tile % ROWS) + t;
    // The order in which Tile::multiply_k takes a word's elements: 0 2 | 4 6, then 1 3 | 5 7.
    state.q.store(lane, in_tile / ROWS, w, half, scale.pair(x[i], x[i + 2]));
    state.q.store(lane, in_tile / ROWS, w, 2 + half, scale.pair(x[i + 1], x[i + 3]));
  }
  if (first == 0) state.q.store_factor(in_tile, common * scale.down);
  Team<C>::sync();
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int stat = 0; stat < C::STATS; ++stat) {
    state.factor[stat] = state.q.load_factor(Held<C>::row(0, lane >> 2, lane & 3, stat));
  }
}

// Fills state.q and state.factor: rows are halves times a power of two (RowScale).
template <class C>
__device__ __forceinline__ void load_query(WarpState<C>& state, const Nvfp4AttentionParams& p,
                                           const Queries& queries, int kv_head, int first_row) {
  const float common = p.scale * LOG2E * UNSCALE * *p.k_scale;
  if constexpr (C::SHARED_Q) {
    load_shared_query(state, p, queries, kv_head, first_row, common);
    return;
  } else {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int rows = queries.count * (p.num_q_heads / p.page.heads);
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
      const int row = first_row + n * ROWS + g;
      const uint16_t* q = query_row<C>(p, queries, kv_head, row);
      float x[8 * C::WORDS];  // this lane's elements of the row
#pragma unroll
      for (int w = 0; w < C::WORDS; ++w) load_elements<C, 8>(p, q, C::k_dim(t, w), row < rows, x + 8 * w);
      if (p.rotated_keys) rotate_query<C>(x);
      float amax = 0.0f;
#pragma unroll
      for (int i = 0; i < 8 * C::WORDS; ++i) amax = fmaxf(amax, fabsf(x[i]));
      amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 1));
      amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 2));
      const RowScale scale(amax);
#pragma unroll
      for (int w = 0; w < C::WORDS; ++w) {
        const float* e = x + 8 * w;
        // The order in which Tile::multiply_k takes a word's elements: 0 2 | 4 6, then 1 3 | 5 7.
        state.q.store(n, w, {scale.pair(e[0], e[2]), scale.pair(e[4], e[6]), scale.pair(e[1], e[3]),
                             scale.pair(e[5], e[7])});
      }
      if constexpr (C::ROWS_M) {
        state.factor[n] = common * scale.down;
      } else {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          state.factor[2 * n + j] = common * __shfl_sync(0xFFFFFFFFu, scale.down, 4 * (2 * t + j));
        }
      }
    }
  }
}

}  // namespace xlayer::attention

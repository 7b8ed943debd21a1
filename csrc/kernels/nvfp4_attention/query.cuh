// A head tile's query rows as MMA fragments.
#pragma once

#include <cuda_bf16.h>

#include "tile.cuh"

namespace xlayer::attention {

__device__ __forceinline__ float2 to_float2(uint32_t bits, Dtype dtype) {
  if (dtype == Dtype::F16) return __half22float2(__half2(__builtin_bit_cast(__half2_raw, bits)));
  return __bfloat1622float2(__nv_bfloat162(__builtin_bit_cast(__nv_bfloat162_raw, bits)));
}

// A lane's elements of a row, which meet rotated keys. Its words are neighbours: a block of 32 is one lane's, or
// with heads of 64 that of two lanes.
template <class C>
__device__ __forceinline__ void rotate_query(float (&x)[8 * C::WORDS]) {
  constexpr int BLOCK = rotation_block(C::D), HERE = C::DP == 64 ? 16 : BLOCK;
#pragma unroll
  for (int first = 0; first < 8 * C::WORDS; first += HERE) butterflies<HERE>(x + first);
  if constexpr (HERE < BLOCK) butterfly_of_lanes(x, 1, ~0u);
#pragma unroll
  for (int i = 0; i < 8 * C::WORDS; ++i) x[i] *= rotation_back(BLOCK);
}

// Fills state.q and state.factor. Rows become halves times a power of two that brings their largest element
// to [128, 256): a bf16 row keeps all its bits where they matter, and no logit overflows.
template <class C>
__device__ __forceinline__ void load_query(WarpState<C>& state, const Nvfp4AttentionParams& p,
                                           const Queries& queries, int kv_head, int first_row) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int group = p.num_q_heads / p.page.heads;
  const int rows = queries.count * group;
  const float common = p.scale * LOG2E * UNSCALE * *p.k_scale;
#pragma unroll
  for (int n = 0; n < C::NT; ++n) {
    const int row = first_row + n * ROWS + g;
    const int query = row / group;
    const uint16_t* q = static_cast<const uint16_t*>(p.q) +
                        (int64_t(queries.begin) + query) * p.q_stride_t +
                        (kv_head * group + row - query * group) * p.q_stride_h;
    float x[8 * C::WORDS];  // this lane's elements of the row
#pragma unroll
    for (int w = 0; w < C::WORDS; ++w) {
      const int d = C::k_dim(t, w);
      const bool there = row < rows && (C::EXACT || d < C::D);
      const uint4 raw = there ? __ldg(reinterpret_cast<const uint4*>(q + d)) : make_uint4(0, 0, 0, 0);
      const uint32_t bits[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 two = to_float2(bits[i], p.dtype);
        x[8 * w + 2 * i] = two.x, x[8 * w + 2 * i + 1] = two.y;
      }
    }
    if (p.rotated_keys) rotate_query<C>(x);
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 8 * C::WORDS; ++i) amax = fmaxf(amax, fabsf(x[i]));
    amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 1));
    amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 2));
    // From 40 on: `down` times the scales stays a normal number, also for a row of zeros.
    const uint32_t exponent = min(max(float_bits(amax) >> 23, 40u), 254u);
    const float up = bits_float((127 + 127 + 7 - exponent) << 23);
    const float down = bits_float((exponent - 7) << 23);
#pragma unroll
    for (int w = 0; w < C::WORDS; ++w) {
      const float* e = x + 8 * w;
      const auto pair = [up](float a, float b) {
        return __builtin_bit_cast(uint32_t, __half2_raw(__floats2half2_rn(a * up, b * up)));
      };
      // The order in which Tile::multiply_k takes a word's elements: 0 2 | 4 6, then 1 3 | 5 7.
      state.q.store(n, w, {pair(e[0], e[2]), pair(e[4], e[6]), pair(e[1], e[3]), pair(e[5], e[7])});
    }
    if constexpr (C::ROWS_M) {
      state.factor[n] = common * down;
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        state.factor[2 * n + j] = common * __shfl_sync(0xFFFFFFFFu, down, 4 * (2 * t + j));
      }
    }
  }
  state.q.stored();
}

}  // namespace xlayer::attention

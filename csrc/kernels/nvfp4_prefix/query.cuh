// Query rows as an operand in shared memory, in the order and rotation of K's elements.
#pragma once

#include <cuda_bf16.h>

#include "../common/ptx.cuh"
#include "../nvfp4/rotate.cuh"
#include "../nvfp4_attention/params.h"
#include "shared.cuh"

namespace xlayer::prefix {

// UNSCALE: halves of pages are 2^-14 of what they stand for.
constexpr float UNSCALE = 16384.0f, LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float2 to_float2(uint32_t bits, bool f16) {
  if (f16) return __half22float2(__half2(__builtin_bit_cast(__half2_raw, bits)));
  return __bfloat1622float2(__nv_bfloat162(__builtin_bit_cast(__nv_bfloat162_raw, bits)));
}
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return __builtin_bit_cast(uint32_t, __half2_raw(__floats2half2_rn(low, high)));
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  return __builtin_bit_cast(uint32_t, __nv_bfloat162_raw(__floats2bfloat162_rn(low, high)));
}

// A row of queries, by two threads: thread `part` has 64 elements. Halves times a power of two, and rotated
// like K.
__device__ __forceinline__ void load_query(const Nvfp4AttentionParams& p, uint32_t shared, int row, int part,
                                           const uint16_t* q, bool there) {
  float x[64];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint4 raw =
        there ? __ldg(reinterpret_cast<const uint4*>(q + 64 * part) + i) : make_uint4(0, 0, 0, 0);
    const uint32_t bits[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 two = to_float2(bits[j], p.dtype == Dtype::F16);
      x[8 * i + 2 * j] = two.x, x[8 * i + 2 * j + 1] = two.y;
    }
  }
  float amax = 0.0f;
  if (p.rotated_keys) {
    butterflies<32>(x);
    butterflies<32>(x + 32);
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i] *= rotation_back(32);
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) amax = fmaxf(amax, fabsf(x[i]));
  amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 1));
  const uint32_t exponent = min(max(float_bits(amax) >> 23, 40u), 254u);
  const float up = bits_float((127 + 127 + 7 - exponent) << 23), down = bits_float((exponent - 7) << 23);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float* e = x + 8 * i;
    const uint32_t halves[4] = {pack(e[0] * up, e[2] * up), pack(e[1] * up, e[3] * up),
                                pack(e[4] * up, e[6] * up), pack(e[5] * up, e[7] * up)};
    ptx::store_shared(shared + part * PANEL + row * 128 + 16 * (i ^ (row & 7)), halves);
  }
  if (part == 0) {
    const float factor = p.scale * LOG2E * UNSCALE * *p.k_scale * down;
    ptx::store_shared(shared + FACTORS_AT + 4 * row, float_bits(factor));
  }
}

}  // namespace xlayer::prefix

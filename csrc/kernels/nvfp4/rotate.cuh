// K may be kept rotated: every block of 32 elements of a head (of 16, where 32 does not divide the head size)
// times a Hadamard matrix, before it is quantised; queries rotated alike give the same scores. NVFP4's error is
// in proportion to the value, and channels that are large in K are large in the queries: rotated, the error is
// spread over the block. docs/accuracy.md has what that gains.
//
//   kept K = H k / 4      query = H q * r      k = H (kept K) * r      r = 4 / n, n the block: H H = n I
//
// All factors are powers of two. H x is made of butterflies (a, b) -> (a + b, a - b) of elements 1, 2, 4, 8 and
// 16 apart, in that order, each sum rounded to float32: the same bits wherever it is computed.
#pragma once

#include "page.cuh"

namespace xlayer {

constexpr float KEPT_KEY = 0.25f;
constexpr int MAX_ROTATION_BLOCK = 32;

XLAYER_HD constexpr int rotation_block(int head_size) { return head_size % 32 == 0 ? 32 : 16; }

// r above.
XLAYER_HD constexpr float rotation_back(int block) { return 4.0f / float(block); }

// Butterflies of elements 1, 2, 4, ... and N / 2 apart, among N that one thread has.
template <int N>
XLAYER_HD void butterflies(float* x) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int apart = 1; apart < N; apart *= 2) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int i = 0; i < N; ++i) {
      if ((i & apart) != 0) continue;
      const float a = x[i], b = x[i + apart];
      x[i] = add_rn(a, b);
      x[i + apart] = add_rn(a, -b);
    }
  }
}

// A block in one thread, then times factor.
XLAYER_HD void rotate_block(float* x, int block, float factor) {
  if (block == 32) {
    butterflies<32>(x);
  } else {
    butterflies<16>(x);
  }
  for (int i = 0; i < block; ++i) x[i] *= factor;
}

#if defined(__CUDACC__) || defined(XLAYER_EMULATED)
// One butterfly of a thread's elements with those of the lane so many lanes away, in both. mask: the lanes that
// take part.
template <int N>
__device__ __forceinline__ void butterfly_of_lanes(float (&x)[N], int lanes_apart, uint32_t mask) {
  const bool upper = (threadIdx.x & lanes_apart) != 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float other = __shfl_xor_sync(mask, x[i], lanes_apart);
    x[i] = add_rn(upper ? other : x[i], upper ? -x[i] : other);
  }
}
#endif

}  // namespace xlayer

// A thread's elements of K or V: out of memory, out of a page's words, rotated back, and into memory.
//
// They are CHUNKS chunks of 8 of a rotation block, every second one; the thread beside it has the others. So
// of the butterflies only those of elements 8 apart need another lane, and yet two lanes write 32 bytes side
// by side in one instruction (16-bit output):
//
//   block of 32:  | chunk 0 | chunk 1 | chunk 2 | chunk 3 |      of 16:  | chunk 0 | chunk 1 |
//           lane:    even      odd       even      odd                      even      odd
#pragma once

#include <type_traits>

#include "../common/convert.cuh"
#include "../nvfp4/dequantise.cuh"
#include "params.h"

namespace xlayer {

constexpr int CHUNK = 8;

template <int CHUNKS>
using Elements = float[CHUNKS][CHUNK];

// An element is a product of e2m1 and its block scale, times the global scale, and, where it was rotated,
// times the rotation's factor in the end; each result is rounded once to float32. That factor and the 2^14
// that dequantised halves lack (dequantise.cuh) are powers of two: in the global scale they give the same
// bits, if nothing on the way overflows or is denormal. So it is under a usual global scale: |e2m1 * e4m3| is
// 0 or from 2^-10 to 2688, sums of 32 of them are below 2^17, and all are multiples of 2^-33 of the global
// scale.
__device__ __forceinline__ bool is_usual(float global) {
  const float magnitude = std::fabs(global);
  return magnitude > 1e-27f && magnitude < 1e27f;
}
constexpr float HALVES = 16384.0f;

template <int CHUNKS>
__device__ __forceinline__ void times(Elements<CHUNKS>& x, float factor) {
#pragma unroll
  for (int i = 0; i < CHUNKS * CHUNK; ++i) x[i / CHUNK][i % CHUNK] = mul_rn(x[i / CHUNK][i % CHUNK], factor);
}

// Elements times their block scales times 2^-14, exactly. scales: of the chunks, which are of different
// groups.
template <int CHUNKS>
__device__ __forceinline__ void decode(const uint32_t (&words)[CHUNKS], __half2 scales, Elements<CHUNKS>& x) {
  const auto put = [](uint32_t pair, float& low, float& high) {
    const float2 both = __half22float2(__half2(__builtin_bit_cast(__half2_raw, pair)));
    low = both.x;
    high = both.y;
  };
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const Places places(words[c], Shifts());
    const __half2 s = c == 0 ? __low2half2(scales) : __high2half2(scales);
    put(places.times(0, s), x[c][0], x[c][2]);
    put(places.times(1, s), x[c][1], x[c][3]);
    put(places.times(2, s), x[c][4], x[c][6]);
    put(places.times(3, s), x[c][5], x[c][7]);
  }
}

// A rotation block's butterflies. All lanes of the warp: a shuffle among a mask of some that differs from
// lane to lane compares the masks first, with MATCH and REDUX.
template <int CHUNKS>
__device__ __forceinline__ void rotate_lanes(Elements<CHUNKS>& x) {
  const float sign = threadIdx.x % 2 == 0 ? 1.0f : -1.0f;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    butterflies<CHUNK>(x[c]);
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      const float other = __shfl_xor_sync(~0u, x[c][i], 1);
      x[c][i] = fma_rn(x[c][i], sign, other);  // the sum, or the difference in the odd lane: rounded once
    }
  }
  if constexpr (CHUNKS == 2) {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      const float a = x[0][i], b = x[1][i];
      x[0][i] = add_rn(a, b);
      x[1][i] = add_rn(a, -b);
    }
  }
}

__device__ __forceinline__ void store_chunk(float* out, const float (&x)[CHUNK]) {
  reinterpret_cast<float4*>(out)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(out)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ void store_chunk(__half* out, const float (&x)[CHUNK]) {
  alignas(16) __half2 y[CHUNK / 2];
#pragma unroll
  for (int i = 0; i < CHUNK / 2; ++i) y[i] = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
  *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(y);
}

__device__ __forceinline__ void store_chunk(__nv_bfloat16* out, const float (&x)[CHUNK]) {
  alignas(16) __nv_bfloat162 y[CHUNK / 2];
#pragma unroll
  for (int i = 0; i < CHUNK / 2; ++i) y[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
  *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(y);
}

template <int CHUNKS, typename T>
__device__ __forceinline__ void store(T* out, const Elements<CHUNKS>& x) {
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) store_chunk(out + 2 * c * CHUNK, x[c]);
}

// A chunk as it lies in memory.
template <typename S>
struct alignas(16) Raw {
  S x[CHUNK];
};

// wide: the address is a multiple of 16 bytes.
template <typename S>
__device__ __forceinline__ Raw<S> load_raw(const S* from, bool wide) {
  constexpr int WORDS = sizeof(Raw<S>) / sizeof(uint4);
  Raw<S> raw;
  if (wide) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      reinterpret_cast<uint4*>(&raw)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) raw.x[i] = __ldg(from + i);
  }
  return raw;
}

template <typename S>
__device__ __forceinline__ void to_floats(const Raw<S>& raw, float (&x)[CHUNK]) {
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) x[i] = to_float(raw.x[i]);
}

// The same bits where the dtype is the same, a NaN's too.
template <typename T, typename S>
__device__ __forceinline__ void store_raw(T* out, const Raw<S>& raw) {
  if constexpr (std::is_same_v<T, S>) {
    constexpr int WORDS = sizeof(Raw<S>) / sizeof(uint4);
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
      reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(&raw)[i];
  } else {
    float x[CHUNK];
    to_floats(raw, x);
    store_chunk(out, x);
  }
}

}  // namespace xlayer

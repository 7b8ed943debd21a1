// A thread's elements of K or V: out of memory, out of a page's nibbles, rotated back, and into memory.
//
// They are CHUNKS chunks of 8 of a rotation block; the thread beside it has the others.
//
// Lines: 8 lanes have 128 elements that follow each other in the output, 256 bytes, which are two lines of
// the caches. A lane rotates two chunks side by side, so of the butterflies only those of elements 16 apart
// need another lane. Then it gives one of them, in 16 bits an element, to the lane 4 away, and gets one. So
// each of two store instructions writes a line, and the same chunks of V, which is not rotated, are read as
// they are stored:
//
//   lane                0      1      2      3      4      5      6      7
//   chunks, rotated    0  1   2  3   4  5   6  7   8  9  10 11  12 13  14 15
//   stored first       0      2      4      6      1      3      5      7
//   stored then        8     10     12     14      9     11     13     15
//
// Otherwise (float32, a head size or a number of heads that does not allow it, heads apart in the output) a
// lane has every second chunk of its block from beginning to end: those of elements 8 apart need another
// lane, and two lanes write 32 bytes side by side in one instruction (16-bit output):
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

// Which chunks a share has. Elements are counted through all heads of a token.
template <int ROTATION_BLOCK, bool OF_LINES>
struct Cut {
  static constexpr int BLOCK = ROTATION_BLOCK, CHUNKS = BLOCK / (2 * CHUNK);
  static constexpr bool LINES = OF_LINES;
  static constexpr int KEY_APART = LINES ? CHUNK : 2 * CHUNK;  // elements from one to the next, rotated
  static constexpr int OUT_APART = LINES ? LINE_LANES * CHUNK : 2 * CHUNK;  // as they are stored

  // The first element of the first chunk.
  static __device__ __forceinline__ unsigned key(unsigned share) {
    return LINES ? share * (2 * CHUNK) : out(share);
  }
  static __device__ __forceinline__ unsigned out(unsigned share) {
    if (!LINES) return share / 2 * BLOCK + share % 2 * CHUNK;
    const unsigned lane = share % LINE_LANES;
    return share / LINE_LANES * (2 * LINE_LANES * CHUNK) + (lane % 4 * 2 + lane / 4) * CHUNK;
  }
};

// Lines: whether a lane keeps its second chunk, and gives the first.
__device__ __forceinline__ bool keeps_second() { return threadIdx.x & (LINE_LANES / 2); }

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

// Elements times their block scales times 2^-14, exactly. scales: of the chunks' groups; ONE_GROUP: of all.
template <int CHUNKS, bool ONE_GROUP>
__device__ __forceinline__ void decode(const uint32_t (&words)[CHUNKS], __half2 scales, Elements<CHUNKS>& x) {
  const uint32_t two = 2, sixteen = 16;
  const auto put = [](uint32_t pair, float& low, float& high) {
    const float2 both = __half22float2(__half2(__builtin_bit_cast(__half2_raw, pair)));
    low = both.x;
    high = both.y;
  };
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const HighBytes bytes = high_bytes(words[c], {two, sixteen});
    const __half2 s = c == 0 || ONE_GROUP ? __low2half2(scales) : __high2half2(scales);
    put(scaled_pair<0, 1>(bytes.even, s), x[c][0], x[c][2]);
    put(scaled_pair<2, 3>(bytes.even, s), x[c][4], x[c][6]);
    put(scaled_pair<0, 1>(bytes.odd, s), x[c][1], x[c][3]);
    put(scaled_pair<2, 3>(bytes.odd, s), x[c][5], x[c][7]);
  }
}

// The butterfly of elements that the lane beside it has: the sum, or the difference in the odd lane, rounded
// once. All lanes of the warp: a shuffle among a mask of some that differs from lane to lane compares the
// masks first, with MATCH and REDUX.
__device__ __forceinline__ void butterfly_beside(float (&x)[CHUNK]) {
  const float sign = threadIdx.x % 2 == 0 ? 1.0f : -1.0f;
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) {
    const float other = __shfl_xor_sync(~0u, x[i], 1);
    x[i] = fma_rn(x[i], sign, other);
  }
}

// A rotation block's butterflies. All lanes of the warp. Lines: a lane that keeps its second chunk has it in
// x[0] then.
template <typename CUT>
__device__ __forceinline__ void rotate_lanes(Elements<CUT::CHUNKS>& x) {
  constexpr int CHUNKS = CUT::CHUNKS;
  constexpr bool LINES = CUT::LINES;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    butterflies<CHUNK>(x[c]);
    if constexpr (!LINES) butterfly_beside(x[c]);
  }
  if constexpr (CHUNKS == 2) {
    const float order = LINES && keeps_second() ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      const float a = x[0][i], b = x[1][i];
      x[0][i] = LINES ? fma_rn(b, order, a) : add_rn(a, b);
      x[1][i] = LINES ? fma_rn(b, -order, a) : add_rn(a, -b);
    }
  }
  if constexpr (LINES) {
    butterfly_beside(x[0]);
    butterfly_beside(x[1]);
  }
}

template <typename T>
__device__ __forceinline__ uint4 packed(const float (&x)[CHUNK]) {
  uint4 y;
  uint32_t* words = reinterpret_cast<uint32_t*>(&y);
#pragma unroll
  for (int i = 0; i < CHUNK / 2; ++i) {
    if constexpr (std::is_same_v<T, __half>) {
      words[i] = __builtin_bit_cast(uint32_t, __half2_raw(__floats2half2_rn(x[2 * i], x[2 * i + 1])));
    } else {
      words[i] =
          __builtin_bit_cast(uint32_t, __nv_bfloat162_raw(__floats2bfloat162_rn(x[2 * i], x[2 * i + 1])));
    }
  }
  return y;
}

template <typename T>
__device__ __forceinline__ void store_chunk(T* out, const float (&x)[CHUNK]) {
  *reinterpret_cast<uint4*>(out) = packed<T>(x);
}
__device__ __forceinline__ void store_chunk(float* out, const float (&x)[CHUNK]) {
  reinterpret_cast<float4*>(out)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(out)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

template <typename CUT, typename T>
__device__ __forceinline__ void store(T* out, const Elements<CUT::CHUNKS>& x) {
#pragma unroll
  for (int c = 0; c < CUT::CHUNKS; ++c) store_chunk(out + c * CUT::OUT_APART, x[c]);
}

// A share of K. Lines: x[0] is the chunk that the lane keeps, and x[1] the one that it gives. All lanes of
// the warp, of which those store that are to.
template <typename CUT, typename T>
__device__ __forceinline__ void store_key(bool is_to_store, T* out, const Elements<CUT::CHUNKS>& x) {
  if constexpr (CUT::LINES) {
    const uint4 kept = packed<T>(x[0]), given = packed<T>(x[1]);
    const auto exchange = [](uint32_t word) { return __shfl_xor_sync(~0u, word, LINE_LANES / 2); };
    const uint4 got = make_uint4(exchange(given.x), exchange(given.y), exchange(given.z), exchange(given.w));
    if (!is_to_store) return;
    *reinterpret_cast<uint4*>(out) = keeps_second() ? got : kept;
    *reinterpret_cast<uint4*>(out + CUT::OUT_APART) = keeps_second() ? kept : got;
  } else {
    if (is_to_store) store<CUT>(out, x);
  }
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

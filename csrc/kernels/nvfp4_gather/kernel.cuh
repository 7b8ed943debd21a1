// Gathers tokens into dense K and V: from NVFP4 pages, from the step's own K and V, and from the newest
// tokens' memory (params.h says which).
//
// Thread map: one warp a token, so that a warp has one source. A lane takes 8 elements of K and the same 8 of
// V at a time, so that a warp reads and writes contiguous memory:
//
//   chunk c of a token:  | h=0: D/8 chunks | h=1: D/8 chunks | ...      lane = c % 32
//
// From a page 4 bytes of data and one block scale in, else as many as come out: 16 bytes (16-bit output) or
// 32 (float32).
#pragma once

#include <type_traits>

#include "../common/convert.cuh"
#include "params.h"

namespace xlayer {

constexpr int GATHER_WARPS = 8;
constexpr int CHUNK = 8;

// 8 nibbles of `word` times scale times global, each product rounded once to float32.
__device__ __forceinline__ void decode_chunk(uint32_t word, uint8_t scale, float global, float (&x)[CHUNK]) {
  // A nibble's magnitude bits, moved to bits 11..9 of an fp16, stand for the value times 2^-14.
  const float s = e4m3_decode(scale) * 16384.0f;
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) {
    const uint32_t nibble = word >> (4 * i);
    const uint32_t half_bits = ((nibble & 7u) << 9) | ((nibble & 8u) << 12);
    x[i] = mul_rn(mul_rn(__half2float(__ushort_as_half(uint16_t(half_bits))), s), global);
  }
}

// A chunk of K, rotated back with the other or the other three of its block, which are in the neighbouring
// lanes.
__device__ __forceinline__ void rotate_back(float (&x)[CHUNK], int block) {
  const int lane = threadIdx.x % 32;
  butterflies<CHUNK>(x);
  butterfly_of_lanes(x, 1, 3u << (lane & ~1));
  if (block == 32) butterfly_of_lanes(x, 2, 15u << (lane & ~3));  // a head is a multiple of four chunks then
  const float factor = rotation_back(block);
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) x[i] *= factor;
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

// The request whose output range holds `token`: the last r with cu_seqlens[r] <= token.
__device__ __forceinline__ int find_request(const int32_t* cu_seqlens, int num_requests, int64_t token) {
  int lo = 0, hi = num_requests;
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    if (__ldg(cu_seqlens + mid) <= token) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  return lo;
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
    for (int i = 0; i < CHUNK; ++i) raw.x[i] = from[i];
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

// What a warp does for its token: where K and V go, and the chunks of its lanes.
template <typename T>
struct GatherTask {
  const Nvfp4GatherParams& p;
  T *k_out, *v_out;

  // each(chunk, head, first element of the head) for the chunks of this lane.
  template <class Each>
  __device__ __forceinline__ void chunks(Each each) const {
    const int per_head = p.page.head_size / CHUNK;
    const int count = p.page.heads * per_head;
#pragma unroll 2
    for (int c = threadIdx.x % 32; c < count; c += 32) {
      const int h = c / per_head;
      each(h, (c - h * per_head) * CHUNK);
    }
  }
  __device__ __forceinline__ T* k(int h, int d) const { return k_out + h * p.k_stride_h + d; }
  __device__ __forceinline__ T* v(int h, int d) const { return v_out + h * p.v_stride_h + d; }

  // From token n of a block.
  __device__ __forceinline__ void page(int64_t block, int n) const {
    const uint8_t* page = p.cache + block * p.block_stride;
    const float k_global = *p.k_scale;
    const float v_global = *p.v_scale;
    const int block_of_rotation = rotation_block(p.page.head_size);
    chunks([&](int h, int d) {
      const int j = d / CHUNK, s = d / GROUP;
      const uint32_t k_word =
          __ldg(reinterpret_cast<const uint32_t*>(page + p.page.data_offset(false, h, n)) + j);
      const uint32_t v_word =
          __ldg(reinterpret_cast<const uint32_t*>(page + p.page.data_offset(true, h, n)) + j);
      const uint8_t k_s =
          __ldg(page + p.page.scale_base(false, h) + p.page.scale_index(ScaleOrder::LINEAR, n, s));
      const uint8_t v_s = __ldg(page + p.page.scale_base(true, h) + p.page.scale_index(p.v_order, n, s));
      float x[CHUNK];
      decode_chunk(k_word, k_s, k_global, x);
      if (p.rotated_keys) rotate_back(x, block_of_rotation);
      store_chunk(k(h, d), x);
      decode_chunk(v_word, v_s, v_global, x);
      store_chunk(v(h, d), x);
    });
  }

  // The step's own token. wide: all chunks of key and value start at multiples of 16 bytes.
  template <typename S>
  __device__ __forceinline__ void own(int64_t token, bool wide) const {
    const S* key = static_cast<const S*>(p.key) + token * p.key_stride_t;
    const S* value = static_cast<const S*>(p.value) + token * p.value_stride_t;
    chunks([&](int h, int d) {
      store_raw(k(h, d), load_raw(key + h * p.key_stride_h + d, wide));
      store_raw(v(h, d), load_raw(value + h * p.value_stride_h + d, wide));
    });
  }

  template <typename S>
  __device__ __forceinline__ void newest(int row, int64_t place) const {
    const S* memory = static_cast<const S*>(p.newest);
    const int block_of_rotation = rotation_block(p.page.head_size);
    chunks([&](int h, int d) {
      const Raw<S> key =
          load_raw(memory + newest_offset(p.page, p.newest_tokens, row, false, h, place) + d, true);
      const Raw<S> value =
          load_raw(memory + newest_offset(p.page, p.newest_tokens, row, true, h, place) + d, true);
      if (p.rotated_keys) {
        float x[CHUNK];
        to_floats(key, x);
        rotate_back(x, block_of_rotation);
        store_chunk(k(h, d), x);
      } else {
        store_raw(k(h, d), key);
      }
      store_raw(v(h, d), value);
    });
  }
};

// T: dtype of the output. S: of the own and the newest tokens. 64 registers are enough, for half of an SM's
// warps.
template <typename T, typename S>
__global__ void __launch_bounds__(GATHER_WARPS * 32, 4)
    nvfp4_gather_kernel(const Nvfp4GatherParams p, bool wide) {
  const int64_t token = int64_t(blockIdx.x) * GATHER_WARPS + threadIdx.x / 32;
  if (token >= p.num_tokens || token < p.cu_seqlens[0] || token >= p.cu_seqlens[p.num_requests]) return;
  const int r = find_request(p.cu_seqlens, p.num_requests, token);
  const int64_t position = p.seq_starts[r] + (token - p.cu_seqlens[r]);
  const int64_t logical_block = position / p.page.block_size;
  // Asked for before it is known whether the token is read from its page: one wait, not two.
  const int64_t block = p.block_table[r * p.block_table_stride + logical_block];
  const TokenSource source = source_of(p, r, position);
  const GatherTask<T> task = {p, static_cast<T*>(p.k_out) + token * p.k_stride_t,
                              static_cast<T*>(p.v_out) + token * p.v_stride_t};
  switch (source.kind) {
    case Source::PAGE: return task.page(block, int(position - logical_block * p.page.block_size));
    case Source::OWN: return task.template own<S>(source.at, wide);
    case Source::NEWEST: return task.template newest<S>(source.row, source.at);
  }
}

}  // namespace xlayer

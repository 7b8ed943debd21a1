// Decodes tokens of NVFP4 pages into dense K and V.
//
// Thread map: one warp a token. A lane takes 8 elements of K and the same 8 of V at a time, so that a
// warp reads and writes contiguous memory:
//
//   chunk c of a token:  | h=0: D/8 chunks | h=1: D/8 chunks | ...      lane = c % 32
//
// 4 bytes of data and one block scale in; 16 bytes (16-bit output) or 32 bytes (float32) out.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

// A chunk of K, rotated back with the other or the other three of its block, which are in the neighbouring lanes.
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

template <typename T>
__global__ void __launch_bounds__(GATHER_WARPS * 32) nvfp4_gather_kernel(const Nvfp4GatherParams p) {
  const int64_t token = int64_t(blockIdx.x) * GATHER_WARPS + threadIdx.x / 32;
  if (token >= p.num_tokens || token < p.cu_seqlens[0] || token >= p.cu_seqlens[p.num_requests]) return;
  const int r = find_request(p.cu_seqlens, p.num_requests, token);
  const int64_t position = p.seq_starts[r] + (token - p.cu_seqlens[r]);
  const int64_t logical_block = position / p.page.block_size;
  const int n = int(position - logical_block * p.page.block_size);
  const int64_t block = p.block_table[r * p.block_table_stride + logical_block];
  const uint8_t* page = p.cache + block * p.block_stride;
  const float k_global = *p.k_scale;
  const float v_global = *p.v_scale;

  const int chunks_per_head = p.page.head_size / CHUNK;
  const int chunks = p.page.heads * chunks_per_head;
  const int block_of_rotation = rotation_block(p.page.head_size);
#pragma unroll 2
  for (int c = threadIdx.x % 32; c < chunks; c += 32) {
    const int h = c / chunks_per_head;
    const int j = c - h * chunks_per_head;
    const int s = j / (GROUP / CHUNK);
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
    store_chunk(static_cast<T*>(p.k_out) + token * p.k_stride_t + h * p.k_stride_h + j * CHUNK, x);
    decode_chunk(v_word, v_s, v_global, x);
    store_chunk(static_cast<T*>(p.v_out) + token * p.v_stride_t + h * p.v_stride_h + j * CHUNK, x);
  }
}

}  // namespace xlayer

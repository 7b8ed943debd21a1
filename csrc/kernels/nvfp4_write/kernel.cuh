// The NVFP4 cache writer.
//
// Thread map: one thread a group of 16 elements. A token has 2*H*S groups (S = D/16), K's first:
//
//   group g of a token:  | K h=0 s=0..S-1 | K h=1 ... | V h=0 s=0..S-1 | V h=1 ... |
//
// A thread block takes `tokens_per_block` tokens (small heads) or a part of one token (blockIdx.y).
// Each thread: 16 elements by 16-byte loads, one 8-byte data store. Four neighbours hold four
// neighbouring scales of one token and head when S % 4 == 0: they store them as one word.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

namespace xlayer {

constexpr int WRITE_THREADS = 128;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// 16 elements times inv into x. `wide`: p is 16-byte aligned.
template <typename T>
__device__ __forceinline__ void load_group(const T* p, bool wide, float inv, float (&x)[GROUP]) {
  alignas(16) T raw[GROUP];
  if (wide) {
    constexpr int WORDS = GROUP * sizeof(T) / 16;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      reinterpret_cast<uint4*>(raw)[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) raw[i] = p[i];
  }
#pragma unroll
  for (int i = 0; i < GROUP; ++i) x[i] = mul_rn(to_float(raw[i]), inv);
}

template <typename T, ScaleChoice CHOICE>
__global__ void __launch_bounds__(WRITE_THREADS)
    nvfp4_write_kernel(const Nvfp4WriteParams p, int tokens_per_block, bool wide) {
  const int S = p.page.scales();
  const int k_groups = p.page.heads * S;
  const int work = blockIdx.y * WRITE_THREADS + threadIdx.x;
  const int local_token = work / (2 * k_groups);
  const int64_t token = int64_t(blockIdx.x) * tokens_per_block + local_token;
  if (local_token >= tokens_per_block || token >= p.num_slots) return;
  const int64_t slot = p.slots[token];
  if (slot < 0) return;

  int g = work - local_token * 2 * k_groups;
  const bool is_v = g >= k_groups;
  if (is_v) g -= k_groups;
  const int h = g / S;
  const int s = g - h * S;

  const T* in = static_cast<const T*>(is_v ? p.value : p.key) +
                token * (is_v ? p.value_stride_t : p.key_stride_t) +
                h * (is_v ? p.value_stride_h : p.key_stride_h) + s * GROUP;
  float x[GROUP];
  load_group(in, wide, div_rn(1.0f, is_v ? *p.v_scale : *p.k_scale), x);
  const Group group = encode_group<CHOICE>(x);

  const int64_t block = slot / p.page.block_size;
  const int n = int(slot - block * p.page.block_size);
  uint8_t* page = p.cache + block * p.block_stride;
  reinterpret_cast<uint64_t*>(page + p.page.data_offset(is_v, h, n))[s] = group.data;

  uint8_t* scales = page + p.page.scale_base(is_v, h);
  const ScaleOrder order = is_v ? p.v_order : ScaleOrder::LINEAR;
  if (S % 4 == 0 && order == ScaleOrder::LINEAR) {
    // The four threads of a quad agree on token, K or V, and head, so they are here together.
    const int lane = threadIdx.x & 31;
    const unsigned quad = 0xFu << (lane & ~3);
    uint32_t word = uint32_t(group.scale) << (8 * (lane & 3));
    word |= __shfl_xor_sync(quad, word, 1);
    word |= __shfl_xor_sync(quad, word, 2);
    if ((lane & 3) == 0) *reinterpret_cast<uint32_t*>(scales + n * S + s) = word;
  } else {
    scales[p.page.scale_index(order, n, s)] = group.scale;
  }
}

}  // namespace xlayer

// The NVFP4 cache writer.
//
// Thread map: LANES threads a group of 16 elements. A token has 2*H*S groups (S = D/16), K's first:
//
//   group g of a token:  | K h=0 s=0..S-1 | K h=1 ... | V h=0 s=0..S-1 | V h=1 ... |
//
// A thread block takes `tokens_per_block` tokens (small heads) or a part of one token (blockIdx.y).
// LANES is 1: 16-byte loads; or, for the search over few tokens, when there would be fewer warps than
// schedulers, 4: each searches with 4 of the elements, to the same bits (NOTES.md has the calculation).
// One 8-byte data store a group. Four neighbouring groups have four neighbouring scales of one token and head
// when S % 4 == 0: they store them as one word.
#pragma once

#include "../common/convert.cuh"
#include "params.h"

namespace xlayer {

constexpr int WRITE_THREADS = 128;

// What the host works out for a launch.
struct WriteLaunch {
  dim3 blocks;
  int tokens_per_block;
  // Integer divisions are 20 to 30 instructions for the GPU. Instead of them a product with 1 / S, and the
  // upper half of one with 2^64 / N, rounded up.
  float inv_scales;
  uint64_t inv_block_size;
};
inline WriteLaunch write_launch(const Nvfp4WriteParams& p, int lanes) {
  const int threads = 2 * p.page.heads * p.page.scales() * lanes;  // of a token
  const int tokens = threads >= WRITE_THREADS ? 1 : WRITE_THREADS / threads;
  return {{unsigned(ceil_div(p.num_slots, tokens)), unsigned(ceil_div(threads * tokens, WRITE_THREADS)), 1},
          tokens,
          1.0f / float(p.page.scales()),
          ~uint64_t(0) / uint64_t(p.page.block_size) + 1};
}

// The elements of a group that this thread of LANES has, into x. `wide`: p is 16-byte aligned.
template <int LANES, typename T>
__device__ __forceinline__ void load_group(const T* p, int lane, bool wide, float (&x)[GROUP / LANES]) {
  alignas(16) T raw[GROUP / LANES];
  if (LANES == 1 && wide) {
    constexpr int WORDS = GROUP * sizeof(T) / 16;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      reinterpret_cast<uint4*>(raw)[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < GROUP / LANES; ++i) raw[i] = p[i * LANES + lane];
  }
#pragma unroll
  for (int i = 0; i < GROUP / LANES; ++i) x[i] = to_float(raw[i]);
}

// A group of K as it is kept: rotated with the other of its block, whose threads are the next or the last LANES
// of the warp. All lanes of the warp are here.
template <int LANES>
__device__ __forceinline__ void rotate_group(float (&x)[GROUP / LANES], bool is_k, int block) {
  float y[GROUP / LANES];
#pragma unroll
  for (int i = 0; i < GROUP / LANES; ++i) y[i] = x[i];
#pragma unroll
  for (int apart = 1; apart < LANES; apart *= 2) butterfly_of_lanes(y, apart, ~0u);
  butterflies<GROUP / LANES>(y);
  if (block == 2 * GROUP) butterfly_of_lanes(y, LANES, ~0u);
#pragma unroll
  for (int i = 0; i < GROUP / LANES; ++i) x[i] = is_k ? y[i] * KEPT_KEY : x[i];
}

// This thread's part of a group to the token's place among the newest.
template <int LANES, typename T>
__device__ __forceinline__ void store_newest(const Nvfp4WriteParams& p, int64_t token, bool is_v, int h,
                                             int s, int lane, const float (&x)[GROUP / LANES]) {
  const int64_t slot = p.newest_slots[token];
  if (slot < 0) return;
  const int64_t row = slot / p.newest_tokens;
  T* out = static_cast<T*>(p.newest) +
           newest_offset(p.page, p.newest_tokens, row, is_v, h, slot - row * p.newest_tokens) + s * GROUP;
  alignas(16) T y[GROUP / LANES];
#pragma unroll
  for (int i = 0; i < GROUP / LANES; ++i) y[i] = from_float<T>(x[i]);
  if constexpr (LANES == 1) {
    constexpr int WORDS = GROUP * int(sizeof(T)) / 16;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(y)[i];
  } else {
#pragma unroll
    for (int i = 0; i < GROUP / LANES; ++i) out[i * LANES + lane] = y[i];
  }
}

template <typename T, ScaleChoice CHOICE, int LANES>
__global__ void __launch_bounds__(WRITE_THREADS)
    nvfp4_write_kernel(const Nvfp4WriteParams p, const WriteLaunch launch, bool wide) {
  const int S = p.page.scales();
  const int k_groups = p.page.heads * S;
  const int work = (blockIdx.y * WRITE_THREADS + threadIdx.x) / LANES;
  const int lane = threadIdx.x % LANES;  // of the group's
  const int local_token = launch.tokens_per_block == 1 ? 0 : work / (2 * k_groups);
  const int64_t token = int64_t(blockIdx.x) * launch.tokens_per_block + local_token;
  int g = work - local_token * 2 * k_groups;
  const bool in_range = local_token < launch.tokens_per_block && g < 2 * k_groups && token < p.num_slots;
  const bool is_v = g >= k_groups;
  if (is_v) g -= k_groups;
  const int h = int((float(g) + 0.5f) * launch.inv_scales);  // half a step from the next: right for g < 2^21
  const int s = g - h * S;

  // The elements are asked for before it is known whether the token has a slot: one wait, not two.
  int64_t slot = -1;
  float x[GROUP / LANES] = {}, global_scale = 1.0f;
  if (in_range) {
    slot = p.slots[token];
    const T* in = static_cast<const T*>(is_v ? p.value : p.key) +
                  token * (is_v ? p.value_stride_t : p.key_stride_t) +
                  h * (is_v ? p.value_stride_h : p.key_stride_h) + s * GROUP;
    load_group<LANES>(in, lane, wide, x);
    global_scale = is_v ? *p.v_scale : *p.k_scale;
  }
  const bool active = slot >= 0;
  if (!__any_sync(~0u, active)) return;  // else the whole warp stays: its lanes shuffle
  if (p.rotated_keys && __any_sync(~0u, !is_v)) rotate_group<LANES>(x, !is_v, rotation_block(p.page.head_size));
  uint32_t inv_bits = float_bits(div_rn(1.0f, global_scale));
  ptx::pin(inv_bits);  // nvcc would divide again after the search
  const Group group = encode_group<CHOICE, LANES>(x, bits_float(inv_bits), lane);

  // A branch that all threads take or none: the writer waits for memory, and one variant is enough.
  if (p.newest != nullptr && active) store_newest<LANES, T>(p, token, is_v, h, s, lane, x);

  const auto block = int64_t(__umul64hi(uint64_t(slot), launch.inv_block_size));  // for slot * N < 2^64
  const int n = int(slot - block * p.page.block_size);
  uint8_t* page = p.cache + block * p.block_stride;
  uint8_t* scales = page + p.page.scale_base(is_v, h);
  if (active && lane == 0) {
    reinterpret_cast<uint64_t*>(page + p.page.data_offset(is_v, h, n))[s] = group.data;
  }
  const ScaleOrder order = is_v ? p.v_order : ScaleOrder::LINEAR;
  if (S % 4 == 0) {
    // Four neighbouring groups agree on token, K or V, and head.
    const int neighbour = threadIdx.x / LANES % 4;
    uint32_t word = uint32_t(group.scale) << (8 * neighbour);
    word |= __shfl_xor_sync(~0u, word, LANES);
    word |= __shfl_xor_sync(~0u, word, 2 * LANES);
    if (order == ScaleOrder::LINEAR) {
      if (active && neighbour == 0 && lane == 0) *reinterpret_cast<uint32_t*>(scales + n * S + s) = word;
      return;
    }
  }
  if (active && lane == 0) scales[p.page.scale_index(order, n, s)] = group.scale;
}

}  // namespace xlayer

// Four or eight floats of an output row, and what a query's row is called in the output.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "config.cuh"

namespace xlayer::attention {

// Where a head tile's row goes.
struct OutputRow {
  int64_t token;  // of the batch
  int head;
};

// first_token: of the request.
__device__ __forceinline__ OutputRow output_row(const Nvfp4AttentionParams& p, int first_token, int kv_head,
                                                int row) {
  const int group = p.num_q_heads / p.page.heads;
  return {int64_t(first_token) + row / group, kv_head * group + row % group};
}

// x times `scale` to elements d .. d + N - 1 of a row, 4 or 8.
template <int N>
__device__ __forceinline__ void store_out(const Nvfp4AttentionParams& p, OutputRow row, int d,
                                          const float (&x)[N], float scale) {
  uint32_t words[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float low = x[2 * i] * scale, high = x[2 * i + 1] * scale;
    words[i] = p.dtype == Dtype::F16
                   ? __builtin_bit_cast(uint32_t, __half2_raw(__floats2half2_rn(low, high)))
                   : __builtin_bit_cast(uint32_t, __nv_bfloat162_raw(__floats2bfloat162_rn(low, high)));
  }
  uint16_t* out = static_cast<uint16_t*>(p.out) + row.token * p.out_stride_t + row.head * p.out_stride_h + d;
  if constexpr (N == 8) {
    *reinterpret_cast<uint4*>(out) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    *reinterpret_cast<uint2*>(out) = make_uint2(words[0], words[1]);
  }
}

// The factor of a row's unnormalised output, from its running maximum (base 2) and sum; also stores the LSE.
// `writes`: this thread is the one that stores it.
__device__ __forceinline__ float finish_row(const Nvfp4AttentionParams& p, OutputRow row, float max,
                                            float sum, bool writes) {
  // A query that does not exist sees no key: its output is 0 and its LSE -inf, with a sink or without.
  const bool exists = sum != 0.0f;
  float weight = 1.0f;
  if (exists && p.sinks != nullptr) {
    const float sink = p.sinks[row.head] * LOG2E, top = fmaxf(max, sink);
    weight = exp2f(max - top);
    sum = sum * weight + exp2f(sink - top);
    max = top;
  }
  if (writes && p.lse != nullptr) {
    p.lse[row.head * p.lse_stride_h + row.token] = exists ? (max + log2f(sum)) * LN2 : -INFINITY;
  }
  return exists ? weight * UNSCALE * *p.v_scale / sum : 0.0f;
}

}  // namespace xlayer::attention

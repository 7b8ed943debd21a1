// Copies equal-sized pieces inside one device's memory.
//
// Thread map: blockIdx.y is the pair; each thread block copies TILE consecutive elements of the
// piece, a thread UNROLL of them with all loads in flight before the first store.
#pragma once

#include "params.h"

namespace xlayer {

constexpr int COPY_THREADS = 256;
constexpr int COPY_UNROLL = 4;
constexpr int COPY_TILE = COPY_THREADS * COPY_UNROLL;
constexpr int COPY_PAIRS = 224;  // pairs of one launch: 3,584 bytes of the 4,096 a kernel may be given

struct CopyPairs {
  int64_t src[COPY_PAIRS];
  int64_t dst[COPY_PAIRS];
};

// WORD: uint4 where everything is 16-byte aligned, else uint8_t. Strides and length in WORDs.
template <typename WORD>
__global__ void __launch_bounds__(COPY_THREADS)
    block_copy_kernel(const WORD* src, WORD* dst, int64_t src_stride, int64_t dst_stride, int64_t length,
                      const __grid_constant__ CopyPairs pairs) {
  const WORD* from = src + pairs.src[blockIdx.y] * src_stride;
  WORD* to = dst + pairs.dst[blockIdx.y] * dst_stride;
  const int64_t first = int64_t(blockIdx.x) * COPY_TILE + threadIdx.x;
  WORD words[COPY_UNROLL];
#pragma unroll
  for (int i = 0; i < COPY_UNROLL; ++i) {
    const int64_t at = first + i * COPY_THREADS;
    if (at < length) words[i] = from[at];
  }
#pragma unroll
  for (int i = 0; i < COPY_UNROLL; ++i) {
    const int64_t at = first + i * COPY_THREADS;
    if (at < length) to[at] = words[i];
  }
}

}  // namespace xlayer

// Copies equal-sized pieces between any two memories that the device reaches.
//
// Thread map: the pieces, one after the other, are cut into tiles of COPY_TILE words; a tile may begin and
// end inside a piece, so that a few thread blocks are evenly busy with pieces of any size.
//
//   pieces   |      0      |      1      |      2      |
//   tiles    |   0   |   1   |   2   |   3   |   4   |      thread block b: tiles b, b + gridDim.x, ...
//
// A thread has COPY_UNROLL words of a tile, COPY_THREADS apart, and all its loads in flight before the first
// store. 12 thread blocks then have 384 KiB in flight: several times what a PCIe link needs to be full. No
// cache hints: streaming ones gain nothing on the link and lose inside the device.
#pragma once

#include "params.h"

namespace xlayer {

constexpr int COPY_THREADS = 512;
constexpr int COPY_UNROLL = 4;
constexpr int COPY_TILE = COPY_THREADS * COPY_UNROLL;

// Pairs that travel with a launch. What it is given is written again for each: so as few bytes as will do.
constexpr int COPY_FEW = 448;    // 3,584 of the 4,096 bytes that any CUDA takes
constexpr int COPY_MANY = 4080;  // 32,640 of the 32,764 of CUDA 12.1, whose driver must be as new: R530

template <int COUNT>
struct LaunchPairs {
  CopyPair at[COUNT];
};

// WORD: uint4 where everything is 16-byte aligned, else uint8_t.
// Strides in bytes. length: WORDs of a piece; total: of all pieces, at most 2^30.
// COUNT: COPY_FEW or COPY_MANY.
// uploaded: [total / length] in device memory, or nullptr: the pairs came with the launch.
template <typename WORD, int COUNT>
__global__ void __launch_bounds__(COPY_THREADS)
    block_copy_kernel(const uint8_t* src, uint8_t* dst, int64_t src_stride, int64_t dst_stride,
                      uint32_t length, uint32_t total, const CopyPair* uploaded,
                      const __grid_constant__ LaunchPairs<COUNT> with_launch) {
  const CopyPair* pairs = uploaded != nullptr ? uploaded : with_launch.at;
  for (uint32_t tile = blockIdx.x; tile * COPY_TILE < total; tile += gridDim.x) {
    const uint32_t first = tile * COPY_TILE + threadIdx.x;
    const WORD* from[COPY_UNROLL];
    WORD* to[COPY_UNROLL];
    WORD words[COPY_UNROLL];
#pragma unroll
    for (int i = 0; i < COPY_UNROLL; ++i) {
      // Past the end: the last word, so that no load waits for a branch.
      const uint32_t word = min(first + i * COPY_THREADS, total - 1);
      const uint32_t piece = word / length;
      const CopyPair pair = pairs[piece];
      from[i] = reinterpret_cast<const WORD*>(src + pair.src * src_stride) + (word - piece * length);
      to[i] = reinterpret_cast<WORD*>(dst + pair.dst * dst_stride) + (word - piece * length);
    }
#pragma unroll
    for (int i = 0; i < COPY_UNROLL; ++i) words[i] = *from[i];
#pragma unroll
    for (int i = 0; i < COPY_UNROLL; ++i) {
      if (first + i * COPY_THREADS < total) *to[i] = words[i];
    }
  }
}

}  // namespace xlayer

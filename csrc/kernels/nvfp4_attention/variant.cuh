// What an instantiation of the kernels offers to launch.cu. CMake makes a file for each.
#pragma once

#include <cuda_runtime.h>

#include "config.cuh"

namespace xlayer::attention {

struct Variant {
  int head_size, tile_rows, padded_head_size, warps, unit_tokens, shared_bytes;
  int page_heads;  // KV heads that a line has, each with its warp, in pages of unit_tokens; 0: one head of
                   // any page
  // Thread blocks of this one that run at once where `parts` blocks of four warps do.
  int blocks(int parts) const { return parts * 4 / warps > 0 ? parts * 4 / warps : 1; }
  // Heads that have lines of their own, and places for partial results of a batch.
  int line_heads(int heads) const { return page_heads > 0 ? 1 : heads; }
  int64_t slots(int parts) const {
    return page_heads > 0 ? 2 * int64_t(blocks(parts)) * page_heads : 2 * int64_t(parts);
  }
  cudaError_t (*launch)(const Nvfp4AttentionParams&, cudaStream_t);
  int (*blocks_per_sm)();
};

template <class C>
Variant variant();

}  // namespace xlayer::attention

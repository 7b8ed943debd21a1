// What an instantiation of the kernels offers to launch.cu. CMake makes a file for each.
#pragma once

#include <cuda_runtime.h>

#include "config.cuh"

namespace xlayer::attention {

struct Variant {
  int head_size, tile_rows, padded_head_size, warps, unit_tokens, shared_bytes;
  // Thread blocks of this one that run at once where `parts` blocks of four warps do.
  int blocks(int parts) const { return parts * 4 / warps > 0 ? parts * 4 / warps : 1; }
  cudaError_t (*launch)(const Nvfp4AttentionParams&, cudaStream_t);
  int (*blocks_per_sm)();
};

template <class C>
Variant variant();

// The kernel of page_decode.cuh for pages of so many heads.
struct PageVariant {
  int head_size, heads, shared_bytes;
  int blocks(int parts) const { return parts * 4 / heads > 0 ? parts * 4 / heads : 1; }
  cudaError_t (*launch)(const Nvfp4AttentionParams&, cudaStream_t);
  bool (*runs)();  // on the current device: code for it was compiled, and an SM has room
};

// Null if there is none.
const PageVariant* find_page_variant(int head_size, int heads);

}  // namespace xlayer::attention

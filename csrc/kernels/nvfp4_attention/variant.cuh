// What an instantiation of the kernels offers to launch.cu. CMake makes a file for each.
#pragma once

#include <cuda_runtime.h>

#include "config.cuh"

namespace xlayer::attention {

struct Variant {
  int head_size, tile_rows, padded_head_size;
  int warps, teams;  // of a team, of a thread block
  int unit_tokens, shared_bytes;
  // Thread blocks of this one that run at once where `parts` blocks of four warps do, and their teams.
  int blocks(int parts) const { return parts * 4 > warps * teams ? parts * 4 / (warps * teams) : 1; }
  int all_teams(int parts) const { return blocks(parts) * teams; }
  cudaError_t (*launch)(const Nvfp4AttentionParams&, cudaStream_t);
  int (*blocks_per_sm)();
};

template <class C>
Variant variant();

}  // namespace xlayer::attention

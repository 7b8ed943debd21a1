#pragma once

#include "decode.cuh"
#include "variant.cuh"

namespace xlayer::attention {

template <class C>
cudaError_t prepare() {
  return cudaFuncSetAttribute(decode_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::SHARED_BYTES);
}

template <class C>
cudaError_t launch(const Nvfp4AttentionParams& p, cudaStream_t stream) {
  if (const cudaError_t error = prepare<C>(); error != cudaSuccess) return error;
  decode_kernel<C><<<variant<C>().blocks(p.parts), C::THREADS, C::SHARED_BYTES, stream>>>(p);
  return cudaGetLastError();
}

template <class C>
int blocks_per_sm() {
  int blocks = 0;
  if (prepare<C>() != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, decode_kernel<C>, C::THREADS, C::SHARED_BYTES) !=
          cudaSuccess) {
    return 0;
  }
  return blocks;
}

template <class C>
Variant variant() {
  return {C::D, C::TILE_ROWS, C::DP, C::WARPS, C::UNIT_TOKENS, C::SHARED_BYTES, launch<C>, blocks_per_sm<C>};
}

}  // namespace xlayer::attention

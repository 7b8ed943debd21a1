#pragma once

#include "decode.cuh"
#include "variant.cuh"

namespace xlayer::attention {

template <class C, bool NEWEST>
cudaError_t prepare() {
  return cudaFuncSetAttribute(decode_kernel<C, NEWEST>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              C::SHARED_BYTES);
}

template <class C, bool NEWEST>
cudaError_t launch_variant(const Nvfp4AttentionParams& p, cudaStream_t stream) {
  if (const cudaError_t error = prepare<C, NEWEST>(); error != cudaSuccess) return error;
  decode_kernel<C, NEWEST><<<variant<C>().blocks(p.parts), C::THREADS, C::SHARED_BYTES, stream>>>(p);
  return cudaGetLastError();
}

template <class C>
cudaError_t launch(const Nvfp4AttentionParams& p, cudaStream_t stream) {
  return p.newest == nullptr ? launch_variant<C, false>(p, stream) : launch_variant<C, true>(p, stream);
}

// Of the variant without newest tokens; the other is held to as many (__launch_bounds__).
template <class C>
int blocks_per_sm() {
  int blocks = 0;
  if (prepare<C, false>() != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, decode_kernel<C, false>, C::THREADS,
                                                    C::SHARED_BYTES) != cudaSuccess) {
    return 0;
  }
  return blocks;
}

template <class C>
Variant variant() {
  return {C::D,           C::TILE_ROWS,    C::DP,     C::WARPS,        C::TEAMS,
          C::UNIT_TOKENS, C::SHARED_BYTES, launch<C>, blocks_per_sm<C>};
}

}  // namespace xlayer::attention

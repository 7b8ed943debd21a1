// A page's words (packed.cuh) to half2, in registers.
//
// An e2m1 value s|xyz is the half s|000xy|z000000000 times 2^14: sign to bit 15, the other three to bits 11 to
// 9. The 2^14 goes into a later factor (the softmax scale, the output, the global scale). Times an e4m3 block
// scale the product has at most 6 significant bits and is a multiple of 2^-24, the smallest half: exact.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "packed.cuh"

namespace xlayer {

// The elements of a word's four places times 2^-14, lane 0's in the lower half.
struct Places {
  uint32_t pair[4];

  __device__ __forceinline__ Places(uint32_t w, const Shifts& shift) {
    constexpr uint32_t HALVES = 0x8E008E00u;
    pair[0] = w & HALVES;
    pair[1] = ((w * shift.by_1) ^ (w * shift.by_9)) & HALVES;
    pair[2] = ((w * shift.by_2) ^ (w * shift.by_6)) & HALVES;
    pair[3] = (w * shift.by_3) & HALVES;
  }
  // Those of a place times s.
  __device__ __forceinline__ uint32_t times(int place, __half2 s) const {
    const __half2 product = __hmul2(__half2(__builtin_bit_cast(__half2_raw, pair[place])), s);
    return __builtin_bit_cast(uint32_t, __half2_raw(product));
  }
};

}  // namespace xlayer

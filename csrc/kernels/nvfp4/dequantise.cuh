// e2m1 pairs to half2, in registers.
//
// An e2m1 value s|ee|m is the half s|000ee|m000000000 times 2^14: sign to bit 15, the other three to bits
// 11..9, all within the high byte. So four elements become four high bytes with three or four logic
// instructions, and one PRMT places two of them over zero low bytes. The 2^14 goes into a later factor (the
// softmax scale, the output, the global scale). Times an e4m3 block scale the product has at most 6
// significant bits and is a multiple of 2^-24, the smallest half: exact.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace xlayer {

struct HighBytes {
  uint32_t even;  // elements 0, 2, 4, 6 of a word
  uint32_t odd;   // elements 1, 3, 5, 7
};

// 2 and 16. In attention not known at compile time: nvcc then leaves the left shifts multiplications, which
// run beside the logic pipe. That one is full there.
struct Shifts {
  const uint32_t& two;
  const uint32_t& sixteen;
};

__device__ __forceinline__ HighBytes high_bytes(uint32_t w, Shifts by) {
  constexpr uint32_t SIGN = 0x80808080u, REST = 0x0E0E0E0Eu;
  return {((w * by.sixteen) & SIGN) | ((w * by.two) & REST), (w & SIGN) | ((w >> 3) & REST)};
}

// Bytes I and J of x, each as the high byte of a half, times s.
template <int I, int J>
__device__ __forceinline__ uint32_t scaled_pair(uint32_t x, __half2 s) {
  const uint32_t pair = __byte_perm(x, 0, 0x0404u | (I << 4) | (J << 12));
  const __half2 product = __hmul2(__half2(__builtin_bit_cast(__half2_raw, pair)), s);
  return __builtin_bit_cast(uint32_t, __half2_raw(product));
}

}  // namespace xlayer

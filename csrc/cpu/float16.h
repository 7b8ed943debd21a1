// fp16 and bf16 conversions in plain C++, as exact bit operations (the host may lack the instructions,
// and flush-to-zero modes must not change results).
#pragma once

#include "../kernels/common/host_device.h"

namespace xlayer::cpu {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BF16 x) { return bits_float(uint32_t(x.bits) << 16); }

inline float to_float(F16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t mag = x.bits & 0x7FFFu;
  const uint32_t normal = (mag << 13) + (112u << 23);                                   // bias 15 -> 127
  const uint32_t special = (mag << 13) | 0x7F800000u;                                   // Inf and NaN
  const uint32_t subnormal = float_bits(float(int32_t(mag)) * 5.9604644775390625e-8f);  // 2^-24
  return bits_float(sign | (mag < 0x400u ? subnormal : mag < 0x7C00u ? normal : special));
}

template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

// Round to nearest even; NaN stays NaN.
template <>
inline BF16 from_float<BF16>(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return {uint16_t((u >> 16) | 0x40u)};
  return {uint16_t((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}

template <>
inline F16 from_float<F16>(float x) {
  const uint32_t u = float_bits(x);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  const uint32_t mag = u & 0x7FFFFFFFu;
  if (mag > 0x7F800000u) return {uint16_t(sign | 0x7E00u)};
  if (mag >= 0x477FF000u) return {uint16_t(sign | 0x7C00u)};  // 65520 and above: Inf
  if (mag < 0x38800000u) {
    // Subnormal: 0.5 has fp16's smallest step, 2^-24, as its ulp, so the addition rounds.
    return {uint16_t(sign | (float_bits(bits_float(mag) + 0.5f) - float_bits(0.5f)))};
  }
  return {uint16_t(sign | ((mag - (112u << 23) + 0xFFFu + ((mag >> 13) & 1u)) >> 13))};
}

}  // namespace xlayer::cpu

// The one e2m1/e4m3 codec, shared by the CPU and the CUDA kernels: same operations, same bits.
//
// Rounding is defined, not incidental (tests/reference/nvfp4_ref.py states it a second time):
//   scale of divisor d: e4m3(float32(amax / d)), round to nearest even, saturating at 448
//   data: the e2m1 nearest to x/scale in exact arithmetic, ties to the even code, saturating at 6
//   scale 0: data 0.  A NaN in the group: scale NaN, data 0.  Inf: scale 448, data +-6.
// No instruction newer than sm_80 is needed.
#pragma once

#include "page.cuh"

namespace xlayer {

enum class ScaleChoice : int { AMAX_6 = 0, FOUR_OVER_SIX = 1, BEST_OF_9 = 2 };

constexpr uint8_t E4M3_NAN = 0x7F;
constexpr uint8_t E4M3_MAX = 0x7E;  // 448

// a >= 0, may be Inf, not NaN. Returns the e4m3 byte, round to nearest even, saturating.
XLAYER_HD uint8_t e4m3_encode(float a) {
  if (a < 0.015625f) {
    // Subnormals: adding 2^14, whose ulp is e4m3's 2^-9, rounds in hardware.
    return uint8_t(float_bits(add_rn(a, 16384.0f)) - float_bits(16384.0f));
  }
  const uint32_t u = float_bits(a);
  const uint32_t rounded = (u + 0x7FFFFu + ((u >> 20) & 1u)) >> 20;  // keeps 3 mantissa bits
  const uint32_t code = rounded - (120u << 3);                       // bias 127 -> 7
  return uint8_t(code > E4M3_MAX ? E4M3_MAX : code);
}

// Any e4m3 byte to the float it stands for.
XLAYER_HD float e4m3_decode(uint8_t b) {
  const uint32_t mag = b & 0x7Fu;
  const uint32_t sign = uint32_t(b & 0x80u) << 24;
  if (mag == E4M3_NAN) return bits_float(0x7FC00000u | sign);
  if (mag < 8) return bits_float(float_bits(float(mag) * 0.001953125f) | sign);  // 2^-9
  return bits_float(((mag << 20) + (120u << 23)) | sign);
}

// Nibble to float: 0, 0.5, 1, 1.5, 2, 3, 4, 6, bit 3 the sign.
XLAYER_HD float e2m1_decode(uint32_t nibble) {
  const uint32_t mag = nibble & 7u;
  const uint32_t sign = (nibble & 8u) << 28;
  const uint32_t bits = mag >= 2 ? (mag << 22) + (126u << 23) : (mag ? 0x3F000000u : 0u);
  return bits_float(bits | sign);
}

// e2m1 magnitude code of a/s, a >= 0, s > 0 an e4m3 value. Compares with the midpoints times s
// instead of dividing: a midpoint has at most 3 significant bits and s has 4, so the products are
// exact and so is the result. (>= where the tie goes up to the even code.)
XLAYER_HD uint32_t e2m1_magnitude(float a, float s) {
  return uint32_t(a > 0.25f * s) + uint32_t(a >= 0.75f * s) + uint32_t(a > 1.25f * s) +
         uint32_t(a >= 1.75f * s) + uint32_t(a > 2.5f * s) + uint32_t(a >= 3.5f * s) + uint32_t(a > 5.0f * s);
}

// Squared error of a group with block scale s, in float32: four partial sums (elements i % 4), each in
// order of i, then (p0 + p1) + (p2 + p3). Fixed, so that CPU and GPU choose the same scale.
XLAYER_HD float group_error(const float (&a)[GROUP], float s) {
  const float r = s > 0.0f ? div_rn(1.0f, s) : 0.0f;
  float squares[GROUP];
  XLAYER_LANES
  for (int i = 0; i < GROUP; ++i) {
    float y = mul_rn(a[i], r);
    y = y < 6.0f ? y : 6.0f;
    // Round y to e2m1: its grid is 0.5 below 2, 1 in [2, 4), 2 above. Adding 1.5 * 2^22 times the
    // power of two under y (at least 1) leaves exactly that many fraction bits.
    const float pow2 = bits_float(float_bits(y) & 0x7F800000u);
    const float magic = mul_rn(pow2 > 1.0f ? pow2 : 1.0f, 6291456.0f);
    const float q = add_rn(add_rn(y, magic), -magic);
    const float e = add_rn(a[i], -mul_rn(q, s));
    squares[i] = mul_rn(e, e);
  }
  float p[4];
  for (int j = 0; j < 4; ++j) {
    p[j] = add_rn(add_rn(add_rn(squares[j], squares[4 + j]), squares[8 + j]), squares[12 + j]);
  }
  return add_rn(add_rn(p[0], p[1]), add_rn(p[2], p[3]));
}

struct Group {
  uint64_t data;  // 16 nibbles, element 0 lowest
  uint8_t scale;  // e4m3
};

// x: 16 elements, already multiplied by 1/global scale.
template <ScaleChoice CHOICE>
XLAYER_HD Group encode_group(const float (&x)[GROUP]) {
  // The bits of |x|: as integers they compare like the floats, with Inf below every NaN.
  float a[GROUP];
  int32_t max_bits = 0;
  for (int i = 0; i < GROUP; ++i) {
    const auto bits = int32_t(float_bits(x[i]) & 0x7FFFFFFFu);
    a[i] = bits_float(uint32_t(bits));
    max_bits = bits > max_bits ? bits : max_bits;
  }
  if (max_bits > 0x7F800000) return {0, E4M3_NAN};
  const float amax = bits_float(uint32_t(max_bits));

  uint8_t scale = e4m3_encode(div_rn(amax, 6.0f));
  if constexpr (CHOICE == ScaleChoice::FOUR_OVER_SIX) {
    const uint8_t other = e4m3_encode(div_rn(amax, 4.0f));
    if (group_error(a, e4m3_decode(other)) < group_error(a, e4m3_decode(scale))) scale = other;
  }
  if constexpr (CHOICE == ScaleChoice::BEST_OF_9) {
    // 6 first, then 3, 3.5, ..., 7; only a strictly smaller error replaces what is there.
    float best = group_error(a, e4m3_decode(scale));
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
    for (int i = 6; i <= 14; ++i) {
      if (i == 12) continue;
      const uint8_t candidate = e4m3_encode(div_rn(amax, 0.5f * float(i)));
      const float error = group_error(a, e4m3_decode(candidate));
      if (error < best) {
        best = error;
        scale = candidate;
      }
    }
  }

  if (scale == 0) return {0, 0};
  const float s = e4m3_decode(scale);
  uint32_t nibbles[GROUP];
  XLAYER_LANES
  for (int i = 0; i < GROUP; ++i) {
    nibbles[i] = e2m1_magnitude(a[i], s) | ((float_bits(x[i]) >> 28) & 8u);
  }
  uint32_t words[2] = {0, 0};
  for (int i = 0; i < GROUP; ++i) words[i / 8] |= nibbles[i] << (4 * (i % 8));
  return {uint64_t(words[0]) | (uint64_t(words[1]) << 32), scale};
}

}  // namespace xlayer

// The one e2m1/e4m3 codec, shared by the CPU and the CUDA kernels: same definition, same bits.
//
// Rounding is defined, not incidental (tests/reference/nvfp4_ref.py states it a second time):
//   scale of divisor d: e4m3(float32(amax / d)), round to nearest even, saturating at 448
//   choice: the least group_error (below); on equal errors divisor 6, then the smallest divisor
//   data: the e2m1 nearest to x/scale in exact arithmetic, ties to the even code, saturating at 6
//   scale 0: data 0.  A NaN in the group: scale NaN, data 0.  Inf: scale 448, data +-6.
//
// CPU and GPU mostly get there by the same operations. Where they don't (the CPU divides and compares; for
// the GPU fma is cheap and both of those are dear), both forms stand side by side, and give the same bits:
// the definition's. tests/ops/test_nvfp4_write_emulated.py runs the GPU's form on a CPU. No instruction newer
// than sm_80 is needed.
#pragma once

#include "packed.cuh"
#include "page.cuh"
#if defined(__CUDACC__) || defined(XLAYER_EMULATED)
#include "../common/ptx.cuh"
#endif

namespace xlayer {

enum class ScaleChoice : int { AMAX_6 = 0, FOUR_OVER_SIX = 1, BEST_OF_9 = 2 };

constexpr uint8_t E4M3_NAN = 0x7F;

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

// Rounds y >= 0 (finite) to a float of MANTISSA bits whose least normal number is `normal`, ties to even.
//
// m * BIG, m = y or just above `normal`, is a float whose ulp is the step of the small format at y, and which
// an even number of steps separates from 0 wherever y is a tie. So subtracting it rounds y, and adding it
// again is exact. (Subtracting first, not adding: m * BIG + y has twice the ulp where y is just below a power
// of two, and m * BIG - y has half of it just above one, where that does no harm. "Just above normal" keeps
// the difference from falling below that of `normal` itself.)
template <int MANTISSA>
XLAYER_HD float round_to_mantissa(float y, float normal) {
  constexpr float BIG = float(1 << (23 - MANTISSA));
  const float m = max_or(y, normal * (1.0f + 1.0f / (1 << 18)));
  return add_exact_product(m, BIG, add_exact_product(m, -BIG, y));
}

XLAYER_HD float round_to_e2m1(float y) { return round_to_mantissa<1>(y, 1.0f); }

// The e4m3 value (>= 0, as a float) for a group whose largest magnitude is amax, under a divisor d from 3 to
// 7. inv_d is 1 / d in float32.
XLAYER_HD float e4m3_scale(float amax, float d, float inv_d) {
  amax = min_or(amax, 4096.0f);  // beyond 448 * 7 all saturate; keeps Inf out of the arithmetic
#if XLAYER_DEVICE_CODE
  // The correctly rounded quotient (P. Markstein's correction of a product with the reciprocal). For amax so
  // small that the remainder is not exact, the scale is 0 however the quotient is rounded.
  const float product = mul_rn(amax, inv_d);
  const float quotient = fma_rn(fma_rn(-product, d, amax), inv_d, product);
#else
  (void)inv_d;
  const float quotient = amax / d;
#endif
  return min_or(round_to_mantissa<3>(quotient, 0.015625f), 448.0f);
}

// The byte of an e4m3 value >= 0.
XLAYER_HD uint8_t e4m3_byte(float s) {
  // Subnormals: 2^14 has e4m3's smallest step, 2^-9, as its ulp.
  if (s < 0.015625f) return uint8_t(float_bits(add_rn(s, 16384.0f)) - float_bits(16384.0f));
  return uint8_t((float_bits(s) >> 20) - (120u << 3));  // bias 127 -> 7
}

// 1 / s in float32, correctly rounded, for an e4m3 value s > 0. For 0: Inf or NaN.
XLAYER_HD float reciprocal(float s) {
#if XLAYER_DEVICE_CODE
  // One Newton step is right for each of the 126 values, from any start within 4 ulps.
  const float r = ptx::rcp_approx(s);
  return fma_rn(r, fma_rn(-s, r, 1.0f), r);
#else
  return 1.0f / s;
#endif
}

// On the GPU 1 or 4 threads (LANES) share a group: thread `lane` has elements lane, LANES + lane, 2 * LANES +
// lane, ... Sum, maximum and union over them, in each of them:
template <int LANES>
XLAYER_HD float sum_of_lanes(float x) {
#if XLAYER_DEVICE_CODE
  for (int i = 1; i < LANES; i *= 2) x = add_rn(x, __shfl_xor_sync(~0u, x, i));
#endif
  return x;
}
template <int LANES>
XLAYER_HD int32_t max_of_lanes(int32_t x) {
#if XLAYER_DEVICE_CODE
  for (int i = 1; i < LANES; i *= 2) {
    const int32_t other = __shfl_xor_sync(~0u, x, i);
    x = other > x ? other : x;
  }
#endif
  return x;
}
template <int LANES>
XLAYER_HD uint32_t union_of_lanes(uint32_t x) {
#if XLAYER_DEVICE_CODE
  for (int i = 1; i < LANES; i *= 2) x |= __shfl_xor_sync(~0u, x, i);
#endif
  return x;
}

// Squared error of a group with block scale s, in float32: four partial sums (elements i % 4), each in
// order of i, then (p0 + p1) + (p2 + p3). Fixed, so that CPU and GPU choose the same scale, however many
// threads share the group. Under s = 0, y is Inf or NaN and q is 6: the error is the group's energy, as it
// should be.
template <int LANES>
XLAYER_HD float group_error(const float (&a)[GROUP / LANES], float s) {
  static_assert(LANES == 1 || LANES == 4);
  constexpr int N = GROUP / LANES, SUMS = 4 / LANES;
  const float r = reciprocal(s);
  float squares[N];
  XLAYER_LANES
  for (int i = 0; i < N; ++i) {
    const float q = round_to_e2m1(min_or(mul_rn(a[i], r), 6.0f));
    const float e = add_exact_product(-q, s, a[i]);
    squares[i] = mul_rn(e, e);
  }
  float p[SUMS];
  for (int j = 0; j < SUMS; ++j) {
    p[j] =
        add_rn(add_rn(add_rn(squares[j], squares[SUMS + j]), squares[2 * SUMS + j]), squares[3 * SUMS + j]);
  }
  if constexpr (LANES == 1) return add_rn(add_rn(p[0], p[1]), add_rn(p[2], p[3]));
  return sum_of_lanes<LANES>(p[0]);
}

// A divisor and 1 / d. Best of 9: 6 comes first, then the others in order; only a strictly smaller error
// replaces what is there.
struct Divisor {
  float d, inverse;
};
XLAYER_CONSTANT Divisor OTHER_DIVISORS[8] = {
    {3.0f, 1 / 3.0f}, {3.5f, 1 / 3.5f}, {4.0f, 1 / 4.0f}, {4.5f, 1 / 4.5f},
    {5.0f, 1 / 5.0f}, {5.5f, 1 / 5.5f}, {6.5f, 1 / 6.5f}, {7.0f, 1 / 7.0f},
};

// The scale that CHOICE picks for a group of magnitudes a.
template <ScaleChoice CHOICE, int LANES>
XLAYER_HD float choose_scale(const float (&a)[GROUP / LANES], float amax) {
  float scale = e4m3_scale(amax, 6.0f, 1 / 6.0f);
  if constexpr (CHOICE != ScaleChoice::AMAX_6) {
    float best = group_error<LANES>(a, scale);
    const auto try_divisor = [&](float d, float inv_d) {
      const float candidate = e4m3_scale(amax, d, inv_d);
      const float error = group_error<LANES>(a, candidate);
      scale = error < best ? candidate : scale;
      best = min_or(error, best);
    };
    if constexpr (CHOICE == ScaleChoice::FOUR_OVER_SIX) {
      try_divisor(4.0f, 0.25f);
    } else {
      XLAYER_UNROLL(LANES == 1 ? 2 : 4)
      for (int i = 0; i < 8; ++i) try_divisor(OTHER_DIVISORS[i].d, OTHER_DIVISORS[i].inverse);
    }
  }
  return scale;
}

struct Group {
  uint64_t data;  // two words (packed.cuh), elements 0 to 7 the lower one
  uint8_t scale;  // e4m3
};

#if XLAYER_DEVICE_CODE

// The e2m1 code of a/s, at bits 22 to 24; a >= 0, s > 0 an e4m3 value, r = reciprocal(s).
__device__ __forceinline__ uint32_t e2m1_code_at_22(float a, float s, float r) {
  // The correctly rounded quotient. For each s and each midpoint it is the midpoint only where a/s is, so
  // rounding it rounds a/s. Inf: NaN here, so 6.
  const float product = mul_rn(a, r);
  const float quotient = fma_rn(fma_rn(-product, s, a), r, product);
  // Times 2^-126: e2m1's two exponent bits and one fraction bit are what a float has there, 0.5 a denormal.
  return float_bits(mul_rn(round_to_e2m1(min_or(quotient, 6.0f)), 1.17549435e-38f));
}

// The data of magnitudes a with the signs of raw, all of it in each thread. s > 0.
template <int LANES>
__device__ __forceinline__ uint64_t encode_data(const float (&a)[GROUP / LANES],
                                                const float (&raw)[GROUP / LANES], float s, int lane) {
  const float r = reciprocal(s);
  uint32_t code[GROUP / LANES];
  XLAYER_LANES
  for (int i = 0; i < GROUP / LANES; ++i) code[i] = e2m1_code_at_22(a[i], s, r);
  uint32_t words[2];
  XLAYER_LANES
  for (int w = 0; w < 2; ++w) {
    if constexpr (LANES == 1) {
      // What packed.cuh draws, with fewer instructions than element by element.
      const uint32_t* c = code + 8 * w;
      const float* x = raw + 8 * w;
      const auto signs = [&](int i) {  // of a lane's four elements
        uint32_t bits = float_bits(x[i]) >> 31;
        bits = __funnelshift_l(float_bits(x[i + 1]), bits, 1);
        bits = __funnelshift_l(float_bits(x[i + 4]), bits, 1);
        return __funnelshift_l(float_bits(x[i + 5]), bits, 1);
      };
      words[w] = change(signs(0) << 12 | signs(2) << 28 | c[0] >> 13 | c[2] << 3 |
                        (c[1] + c[4] * 8 + c[5] * 64) >> 22 | (c[3] + c[6] * 8 + c[7] * 64) >> 6);
    } else {
      const auto put = [&](int i, int element) {
        const int at = lane_of(element), place = place_of(element);
        return code[i] >> 22 << (at + code_bit(place)) | float_bits(raw[i]) >> 31 << (at + sign_bit(place));
      };
      words[w] = change(union_of_lanes<LANES>(put(2 * w, lane) | put(2 * w + 1, 4 + lane)));
    }
  }
  return uint64_t(words[0]) | (uint64_t(words[1]) << 32);
}

#else

// e2m1 magnitude code of a/s, a >= 0, s > 0 an e4m3 value. Compares with the midpoints times s instead of
// dividing: a midpoint has at most 3 significant bits and s has 4, so the products are exact and so is the
// result. (>= where the tie goes up to the even code.)
XLAYER_HD uint32_t e2m1_magnitude(float a, float s) {
  return uint32_t(a > 0.25f * s) + uint32_t(a >= 0.75f * s) + uint32_t(a > 1.25f * s) +
         uint32_t(a >= 1.75f * s) + uint32_t(a > 2.5f * s) + uint32_t(a >= 3.5f * s) + uint32_t(a > 5.0f * s);
}

template <int LANES>
XLAYER_HD uint64_t encode_data(const float (&a)[GROUP], const float (&raw)[GROUP], float s, int) {
  uint32_t nibbles[GROUP];
  XLAYER_LANES
  for (int i = 0; i < GROUP; ++i) nibbles[i] = e2m1_magnitude(a[i], s) | ((float_bits(raw[i]) >> 28) & 8u);
  uint32_t words[2] = {0, 0};
  for (int i = 0; i < GROUP; ++i) words[i / 8] |= nibbles[i] << (4 * (i % 8));
  return uint64_t(pack(words[0])) | (uint64_t(pack(words[1])) << 32);
}

#endif

// raw: a thread's elements; inv: 1/global scale, which multiplies them. Each thread of a group gets all of
// it.
template <ScaleChoice CHOICE, int LANES = 1>
XLAYER_HD Group encode_group(const float (&raw)[GROUP / LANES], float inv, int lane = 0) {
  // The bits of |x|: as integers they compare like the floats, with Inf below every NaN.
  float a[GROUP / LANES];
  int32_t max_bits = 0;
  for (int i = 0; i < GROUP / LANES; ++i) {
    a[i] = abs_product(raw[i], inv);
    const auto bits = int32_t(float_bits(a[i]));
    max_bits = bits > max_bits ? bits : max_bits;
  }
  max_bits = max_of_lanes<LANES>(max_bits);
  const bool is_nan = max_bits > 0x7F800000;
  if (LANES == 1 && is_nan) return {0, E4M3_NAN};  // with more lanes the whole warp goes on: they shuffle

  const float s = choose_scale<CHOICE, LANES>(a, bits_float(uint32_t(max_bits)));
  const uint64_t negated = (float_bits(inv) >> 31) * (uint64_t(SIGNS) << 32 | SIGNS);
  const uint64_t data = encode_data<LANES>(a, raw, s, lane) ^ negated;
  if (is_nan) return {0, E4M3_NAN};
  return {s > 0.0f ? data : 0, e4m3_byte(s)};
}

}  // namespace xlayer

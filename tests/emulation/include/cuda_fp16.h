// The part of CUDA's header that the kernels use, for the host compiler. One rounding an operation, as on the
// GPU.
#pragma once

#include "simt.h"

using __half = _Float16;
inline float __half2float(__half x) { return float(x); }
inline __half __float2half_rn(float a) { return __half(a); }
inline __half __ushort_as_half(uint16_t bits) { return __builtin_bit_cast(__half, bits); }

struct __half2_raw {
  uint16_t x, y;
};

struct __half2 {
  _Float16 x, y;
  __half2() = default;
  __half2(_Float16 a, _Float16 b) : x(a), y(b) {}
  explicit __half2(__half2_raw r)
      : x(__builtin_bit_cast(_Float16, r.x)), y(__builtin_bit_cast(_Float16, r.y)) {}
  explicit operator __half2_raw() const {
    return {__builtin_bit_cast(uint16_t, x), __builtin_bit_cast(uint16_t, y)};
  }
};

inline __half2 __hmul2(__half2 a, __half2 b) { return {_Float16(a.x * b.x), _Float16(a.y * b.y)}; }
inline __half2 __low2half2(__half2 a) { return {a.x, a.x}; }
inline __half2 __high2half2(__half2 a) { return {a.y, a.y}; }
inline __half2 __float2half2_rn(float a) { return {_Float16(a), _Float16(a)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {_Float16(a), _Float16(b)}; }
inline float2 __half22float2(__half2 a) { return {float(a.x), float(a.y)}; }

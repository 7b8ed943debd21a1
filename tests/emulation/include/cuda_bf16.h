// The part of CUDA's header that the kernels use, for the host compiler.
#pragma once

#include <cuda_fp16.h>

#include <cstring>

struct __nv_bfloat162_raw {
  uint16_t x, y;
};

struct __nv_bfloat162 {
  uint16_t x, y;
  __nv_bfloat162() = default;
  __nv_bfloat162(uint16_t a, uint16_t b) : x(a), y(b) {}
  explicit __nv_bfloat162(__nv_bfloat162_raw r) : x(r.x), y(r.y) {}
  explicit operator __nv_bfloat162_raw() const { return {x, y}; }
};

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float emulated_bf16_to_float(uint16_t x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
inline uint16_t emulated_float_to_bf16(float x) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  if (x != x) return 0x7FFF;
  return uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);  // to nearest, ties to even
}
inline float2 __bfloat1622float2(__nv_bfloat162 a) {
  return {emulated_bf16_to_float(a.x), emulated_bf16_to_float(a.y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {emulated_float_to_bf16(a), emulated_float_to_bf16(b)};
}
inline __nv_bfloat16 __float2bfloat16_rn(float a) { return {emulated_float_to_bf16(a)}; }
inline float __bfloat162float(__nv_bfloat16 x) { return emulated_bf16_to_float(x.bits); }

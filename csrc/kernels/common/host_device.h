// Helpers that let one header serve nvcc and the host compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define XLAYER_HD __host__ __device__ __forceinline__
#else
#define XLAYER_HD inline __attribute__((always_inline))
#endif

// Where the GPU's form of a computation is compiled. XLAYER_EMULATED: on a CPU, to test it there.
#if defined(__CUDA_ARCH__) || defined(XLAYER_EMULATED)
#define XLAYER_DEVICE_CODE 1
#else
#define XLAYER_DEVICE_CODE 0
#endif

// Before a short loop over a group's elements: registers on the device, vector instructions on the host
// (which would otherwise unroll such a loop completely, and then not find the vectors).
#if defined(__CUDA_ARCH__)
#define XLAYER_LANES _Pragma("unroll")
#elif defined(__CUDACC__)
#define XLAYER_LANES  // nvcc's host pass: never run
#else
#define XLAYER_LANES _Pragma("omp simd")
#endif

// How far the device unrolls a loop whose iterations should overlap; the host decides for itself.
#if defined(__CUDA_ARCH__)
#define XLAYER_UNROLL_TEXT(text) _Pragma(#text)
#define XLAYER_UNROLL(n) XLAYER_UNROLL_TEXT(unroll n)
#else
#define XLAYER_UNROLL(n)
#endif

// A table that device code reads by a variable index.
#if defined(__CUDACC__)
#define XLAYER_CONSTANT static __constant__ const
#else
#define XLAYER_CONSTANT constexpr
#endif

namespace xlayer {

enum class Dtype : int { BF16, F16, F32 };

constexpr int64_t dtype_bytes(Dtype dtype) { return dtype == Dtype::F32 ? 4 : 2; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

XLAYER_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
#endif
}

XLAYER_HD float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
#endif
}

// Single-rounding arithmetic. nvcc would otherwise fuse a multiply and an add into one FMA, and the
// GPU would round differently from the CPU (which is compiled with -ffp-contract=off).
XLAYER_HD float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

XLAYER_HD float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

XLAYER_HD float div_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// a * b + c, rounded once. In the GPU's form of a computation only: x86-64's first CPUs cannot do it.
XLAYER_HD float fma_rn(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// a * b + c where a * b is exact: the same bits with and without an fma instruction.
XLAYER_HD float add_exact_product(float a, float b, float c) {
#if XLAYER_DEVICE_CODE
  return fma_rn(a, b, c);
#else
  return a * b + c;
#endif
}

// |a * b|. Not a NaN with a sign.
XLAYER_HD float abs_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(fabsf(a), fabsf(b));  // no instructions for the two; NaN results are positive
#else
  return std::fabs(a * b);
#endif
}

// The smaller and the larger; `limit` where x is NaN.
XLAYER_HD float min_or(float x, float limit) {
#if defined(__CUDA_ARCH__)
  return fminf(x, limit);
#else
  return x < limit ? x : limit;
#endif
}

XLAYER_HD float max_or(float x, float limit) {
#if defined(__CUDA_ARCH__)
  return fmaxf(x, limit);
#else
  return x > limit ? x : limit;
#endif
}

}  // namespace xlayer

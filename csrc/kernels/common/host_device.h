// Helpers that let one header serve nvcc and the host compiler.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define XLAYER_HD __host__ __device__ __forceinline__
#else
#define XLAYER_HD inline __attribute__((always_inline))
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

}  // namespace xlayer

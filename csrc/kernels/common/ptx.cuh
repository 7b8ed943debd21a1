// Thin wrappers of single PTX instructions, sm_80 and newer.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

// Shared memory whose size is given at launch.
#if !defined(XLAYER_EMULATED)
#define XLAYER_DYNAMIC_SHARED(name) extern __shared__ __align__(128) uint8_t name[]
#endif

// Which instructions the code may use. XLAYER_FORCE_SM80 builds the oldest path for any GPU, to test it
// there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890 && !defined(XLAYER_FORCE_SM80)
#define XLAYER_HAS_CVT_E4M3 1
#else
#define XLAYER_HAS_CVT_E4M3 0
#endif

#if defined(XLAYER_EMULATED)
#include <emulated_ptx.h>  // tests/emulation: the kernels on a CPU, lane by lane
#else
namespace xlayer::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// 4 bytes that nobody writes meanwhile. The L2 is to fetch the other 124 around them, too.
__device__ __forceinline__ uint32_t load_of_line(uint64_t address) {
  uint32_t word;
  asm("ld.global.nc.L2::128B.b32 %0, [%1];" : "=r"(word) : "l"(address));
  return word;
}

// BYTES (4, 8 or 16) from shared memory, in one instruction.
template <int BYTES>
__device__ __forceinline__ void load_shared(uint32_t at, uint32_t* words) {
  if constexpr (BYTES == 16) {
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(at));
  } else if constexpr (BYTES == 8) {
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(at));
  } else {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(words[0]) : "r"(at));
  }
}
__device__ __forceinline__ void store_shared(uint32_t at, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(word) : "memory");
}
__device__ __forceinline__ uint32_t load_shared_u8(uint32_t at) {
  uint32_t byte;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(at));
  return byte;
}
__device__ __forceinline__ uint32_t load_shared_u16(uint32_t at) {
  uint32_t bytes;
  asm volatile("ld.shared.u16 %0, [%1];" : "=r"(bytes) : "r"(at));
  return bytes;
}

// BYTES (8 or 16) from global memory, in one instruction that is not repeated, however often they are used.
template <int BYTES>
__device__ __forceinline__ void load_global(const void* from, uint64_t* words) {
  if constexpr (BYTES == 16) {
    asm volatile("ld.global.v2.b64 {%0,%1}, [%2];" : "=l"(words[0]), "=l"(words[1]) : "l"(from));
  } else {
    asm volatile("ld.global.b64 %0, [%1];" : "=l"(words[0]) : "l"(from));
  }
}

// Keeps a value in its register: where registers are short, nvcc would compute it anew in every iteration.
__device__ __forceinline__ void pin(uint32_t& x) { asm volatile("" : "+r"(x)); }

// threadIdx.x, read where it is asked for.
__device__ __forceinline__ unsigned thread_index() {
  unsigned x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// A value that is the same in all lanes, in a register that the compiler knows to be so (REDUX ends in one):
// loops and branches on it then need no code for lanes that part.
__device__ __forceinline__ int uniform(int x) { return __reduce_max_sync(0xFFFFFFFFu, x); }

// Asynchronous copies of BYTES (4, 8 or 16) to shared memory; 16-byte ones do not pass through L1.
template <int BYTES>
__device__ __forceinline__ void cp_async(uint32_t dst, const void* src) {
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(dst), "l"(src), "n"(BYTES) : "memory");
  }
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Barrier `id` (1 to 15) of so many of the block's threads: they wait for each other.
__device__ __forceinline__ void barrier(int id, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// ... and learn whether one of them says so.
__device__ __forceinline__ bool barrier_or(int id, int threads, bool says) {
  int one_says;
  asm volatile(
      "{\n\t.reg .pred p, q;\n\tsetp.ne.s32 p, %3, 0;\n\tbarrier.cta.red.or.aligned.pred q, %1, %2, p;\n\t"
      "selp.s32 %0, 1, 0, q;\n\t}"
      : "=r"(one_says)
      : "r"(id), "r"(threads), "r"(int(says))
      : "memory");
  return one_says != 0;
}

// c += a * b, 16 x 8 x 16, halves with float sums.
__device__ __forceinline__ void mma_16816(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transposes an 8 x 8 matrix of halves held in row-pair fragments.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t a) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// Adds and returns what was there. Orders memory: what a block wrote before (and a barrier) is seen by a
// block that comes later, after a barrier.
__device__ __forceinline__ int add_acq_rel(int* counter, int x) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(x)
               : "memory");
  return before;
}

// Two floats as halves; what is beyond a half's range as its largest, a NaN as one.
__device__ __forceinline__ uint32_t saturated_halves(float low, float high) {
  uint32_t halves;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
  return halves;
}

// 1 / x to within one ulp.
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace xlayer::ptx
#endif

namespace xlayer::ptx {

// Two e4m3 bytes (low one first) to two halves, exactly; NaN stays NaN.
__device__ __forceinline__ __half2 e4m3x2_to_half2(uint32_t bytes) {
  uint32_t h;
#if XLAYER_HAS_CVT_E4M3
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"(uint16_t(bytes)));
#else
  const uint32_t wide = __byte_perm(bytes, 0, 0x4140);
  const uint32_t magnitude = wide & 0x007F007Fu;
  // Exponent and mantissa where a half has them: the value times 2^-8.
  const __half2 small = __half2(__builtin_bit_cast(__half2_raw, magnitude << 7));
  const __half2 value = __hmul2(small, __float2half2_rn(256.0f));
  h = __builtin_bit_cast(uint32_t, __half2_raw(value)) | ((wide & 0x00800080u) << 8);
  if ((magnitude & 0xFFFFu) == 0x7Fu) h |= 0x7FFFu;
  if ((magnitude >> 16) == 0x7Fu) h |= 0x7FFF0000u;
#endif
  return __half2(__builtin_bit_cast(__half2_raw, h));
}

}  // namespace xlayer::ptx

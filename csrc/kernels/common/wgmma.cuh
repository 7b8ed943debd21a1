// Hopper's warpgroup products: what `wgmma.mma_async` is told, and of the barriers beside it. sm_90a only.
#pragma once

#include <cstdint>

namespace xlayer::wgmma {

// Descriptor of an operand in shared memory, in rows of 128 bytes whose 16-byte chunks are permuted (chunk c
// of row r is at c ^ (r % 8)). PTX ISA, "Matrix Descriptor": address, leading and stride byte offset, each /
// 16; bits 62, 63: 1 is the permutation of 128 bytes.
//
// By K (contiguous along the sum): stride is from 8 rows to the next 8; leading is not used. By MN
// (contiguous across it): leading is from 64 columns to the next 64, stride from 8 of the sum to the next 8.
__device__ __forceinline__ uint64_t descriptor(uint32_t shared, uint32_t leading, uint32_t stride) {
  return uint64_t((shared & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         1ull << 62;
}

#if defined(XLAYER_EMULATED)
}  // namespace xlayer::wgmma
#include <emulated_wgmma.h>
#else

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define XLAYER_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define XLAYER_D16(d, i) XLAYER_D4(d, i), XLAYER_D4(d, i + 4), XLAYER_D4(d, i + 8), XLAYER_D4(d, i + 12)
#define XLAYER_D64(d) XLAYER_D16(d, 0), XLAYER_D16(d, 16), XLAYER_D16(d, 32), XLAYER_D16(d, 48)
#define XLAYER_D64_NAMES                                                                                     \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"  \
  "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53," \
  "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"

// Until all but the last N groups of products are there: d, which one of those before them has.
template <int N>
__device__ __forceinline__ void wait(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;" : XLAYER_D64(d) : "n"(N) : "memory");
}

// d [64 x 128] (+)= a [64 x 16] b [16 x 128], halves to float32; both in shared memory, contiguous along the
// sum.
__device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, bool adds) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " XLAYER_D64_NAMES
      ", %64, %65, p, 1, 1, 0, 0;\n}\n"
      : XLAYER_D64(d)
      : "l"(a), "l"(b), "r"(int(adds)));
}

// d += a b with a in registers, b contiguous across the sum. Until `wait`, a's registers are read: they must
// not change.
__device__ __forceinline__ void multiply_add(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " XLAYER_D64_NAMES
      ", {%64,%65,%66,%67}, %68, p, 1, 1, 1;\n}\n"
      : XLAYER_D64(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// mbarriers, by shared address.
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\nbra again;\nover:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// An arrival, and so many bytes of `copy` that the barrier waits for, too.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Copies a multiple of 16 bytes, from and to multiples of 16, while the thread goes on.
__device__ __forceinline__ void copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Barriers that a thread has made are seen by the others, after they have met.
__device__ __forceinline__ void barriers_are_seen() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// What this thread has stored to shared memory is seen by products that other threads ask for after a
// barrier.
__device__ __forceinline__ void stores_are_seen() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void give_back_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

}  // namespace xlayer::wgmma
#endif

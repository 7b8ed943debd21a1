// What a thread block of nvfp4_prefix has in shared memory, and who waits for whom there.
#pragma once

#include <cstdint>

#include "../common/host_device.h"
#include "../nvfp4/page.cuh"

namespace xlayer::prefix {

constexpr int D = 128, GROUP_ROWS = 64, ROWS = 2 * GROUP_ROWS, KEYS = 128, STAGES = 2, TILE = 16;
// Four warpgroups: K's producer, V's producer, two consumers.
constexpr int GROUP_THREADS = 128, GROUP_WARPS = 4, THREADS = 4 * GROUP_THREADS;

// Operands of the products are panels of 64 halves of 128 rows: queries, K's stages, V's stages. Then what
// the rows' dot products are multiplied by, and the bytes of pages that the producers' warps have copied.
constexpr int PANEL = 128 * 128, OPERAND = D / 64 * PANEL;  // bytes
constexpr int K_AT = OPERAND, V_AT = K_AT + STAGES * OPERAND, FACTORS_AT = V_AT + STAGES * OPERAND;
constexpr int WARP_TOKENS = KEYS / GROUP_WARPS, TOKEN_DATA = D / 2, TOKEN_SCALES = D / GROUP;
constexpr int COPIED_AT = FACTORS_AT + ROWS * 4, WARP_COPIED = WARP_TOKENS * (TOKEN_DATA + TOKEN_SCALES),
              STAGE_COPIED = 2 * GROUP_WARPS * WARP_COPIED;
constexpr int BARRIERS_AT = COPIED_AT + STAGES * STAGE_COPIED;

// mbarriers of each stage, by shared address.
struct Barriers {
  static constexpr int KINDS = 4 + 2 * GROUP_WARPS;
  uint32_t at;
  // K or V is there; the consumers have multiplied it.
  __device__ __forceinline__ uint32_t full(bool v, int stage) const { return of(v, stage); }
  __device__ __forceinline__ uint32_t empty(bool v, int stage) const { return of(2 + v, stage); }
  // A producer's warp (0 to 7) has its tokens' bytes.
  __device__ __forceinline__ uint32_t copied(int warp, int stage) const { return of(4 + warp, stage); }

 private:
  __device__ __forceinline__ uint32_t of(int kind, int stage) const {
    return at + 8 * (kind * STAGES + stage);
  }
};

constexpr int SHARED_BYTES =
    BARRIERS_AT + 8 * Barriers::KINDS * STAGES + 1024;  // aligned to 1024 in the kernel

}  // namespace xlayer::prefix

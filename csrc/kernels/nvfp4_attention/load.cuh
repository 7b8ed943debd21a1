// Tiles from the cache to a warp's ring of stages in shared memory, by cp.async.
#pragma once

#include "../common/ptx.cuh"
#include "config.cuh"

namespace xlayer::attention {

// The tiles of one warp in a run of units of one (request, KV head): tile i is tokens 16 (4 (unit + i) + warp).
template <class C>
class TileLoader {
 public:
  __device__ __forceinline__ TileLoader(const Nvfp4AttentionParams& p, uint32_t ring)
      : p_(p), ring_(ring), scale_offset_(p.page.data_bytes()), v_offset_(p.page.data_bytes() + p.page.scale_bytes()) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const int piece = lane + 32 * i;
      const int n = piece / PIECES_PER_TOKEN, c = piece % PIECES_PER_TOKEN;
      const int row = row_of_token(n);
      if constexpr (C::EXACT) {
        k_at_[i] = row * C::ROW + 16 * C::k_chunk(row, c);
        v_at_[i] = C::V_DATA + n * C::ROW + 16 * C::v_chunk(n, c);
      } else {
        k_at_[i] = row * C::ROW + 16 * C::k_chunk(row, c / 2) + 8 * (c % 2);
        v_at_[i] = C::V_DATA + n * C::ROW + 16 * C::v_chunk(n, c / 2) + 8 * (c % 2);
      }
    }
  }

  // count: tiles this warp has, from tile `first_tile` on, WARPS apart.
  __device__ __forceinline__ void start(int request, int kv_head, int first_tile, int count) {
    table_ = p_.block_table + request * p_.block_table_stride;
    head_tokens_ = kv_head * p_.page.block_size;
    first_tile_ = first_tile;
    count_ = count;
  }

  // Issues tile i (if there is one) into a stage, as one group.
  __device__ __forceinline__ void load(int i, int stage) {
    if (i % 32 == 0) look_up(i);
    if (i < count_) {
      const int block = __shfl_sync(0xFFFFFFFFu, block_, i % 32);
      const int token = head_tokens_ + __shfl_sync(0xFFFFFFFFu, token_, i % 32);
      const uint8_t* page = p_.cache + int64_t(block) * p_.block_stride;
      const uint8_t* k = page + token * (C::D / 2);
      const uint32_t at = ring_ + stage * C::STAGE_BYTES;
      const int lane = threadIdx.x & 31;
#pragma unroll
      for (int j = 0; j < PIECES; ++j) {
        const int piece = lane + 32 * j;
        if (TOTAL % 32 == 0 || piece < TOTAL) {
          ptx::cp_async<PIECE>(at + k_at_[j], k + piece * PIECE);
          ptx::cp_async<PIECE>(at + v_at_[j], k + v_offset_ + piece * PIECE);
        }
      }
      if (lane < 2 * C::S) {
        const bool is_v = lane >= C::S;
        const uint8_t* scales = page + scale_offset_ + token * C::S + (is_v ? v_offset_ : 0);
        ptx::cp_async<16>(at + C::K_SCALE + 16 * lane, scales + 16 * (is_v ? lane - C::S : lane));
      }
    }
    ptx::cp_async_commit();
  }

 private:
  static constexpr int PIECE = C::EXACT ? 16 : 8;
  static constexpr int PIECES_PER_TOKEN = C::D / 2 / PIECE;
  static constexpr int TOTAL = TILE * PIECES_PER_TOKEN;
  static constexpr int PIECES = (TOTAL + 31) / 32;

  // Blocks of the next 32 tiles, one a lane.
  __device__ __forceinline__ void look_up(int i) {
    const int mine = i + int(threadIdx.x & 31);
    if (mine < count_) {
      const int tiles_per_page = p_.page.block_size / TILE;
      const int tile = first_tile_ + mine * WARPS;
      const int logical = tiles_per_page == 1 ? tile : tile / tiles_per_page;
      block_ = table_[logical];
      token_ = (tile - logical * tiles_per_page) * TILE;
    }
  }

  const Nvfp4AttentionParams& p_;
  const uint32_t ring_;
  const int64_t scale_offset_, v_offset_;
  const int32_t* table_ = nullptr;
  int head_tokens_ = 0, first_tile_ = 0, count_ = 0;
  int block_ = 0, token_ = 0;
  uint32_t k_at_[PIECES], v_at_[PIECES];
};

}  // namespace xlayer::attention

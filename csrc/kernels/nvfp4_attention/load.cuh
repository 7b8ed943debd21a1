// Tiles from the cache to a warp's ring of stages in shared memory, by cp.async.
#pragma once

#include "../common/ptx.cuh"
#include "config.cuh"

namespace xlayer::attention {

// The tiles of one warp in a run of units of one (request, KV head): tile i is tokens 16 (4 (unit + i) +
// warp).
//
// A tile's K data is contiguous, and so are V's data and the scales: a lane copies pieces `lane`, `lane +
// 32`, ... of each. Where a piece goes in shared memory is permuted (config.cuh), but the same for all tiles.
template <class C>
class TileLoader {
 public:
  __device__ __forceinline__ TileLoader(const Nvfp4AttentionParams& p, uint32_t ring) : p_(p) { aim(ring); }

  // Where pieces go in shared memory. If that is said again, it need not stay in registers until then.
  __device__ __forceinline__ void aim(uint32_t ring) {
    const int lane = threadIdx.x & 31;
    v_offset_ = uint32_t(p_.page.data_bytes() + p_.page.scale_bytes());
#pragma unroll
    for (int j = 0; j < ADDRESSES; ++j) {
      const int piece = lane + 32 * j;
      const int n = piece / PIECES_PER_TOKEN, c = piece % PIECES_PER_TOKEN;
      const int row = C::row_of_token(n);
      // 16-byte chunk and the byte in it.
      const int chunk = C::EXACT ? c : c / 2, byte = C::EXACT ? 0 : 8 * (c % 2);
      k_to_[j] = ring + row * C::ROW + 16 * C::k_chunk(row, chunk) + byte;
      v_to_[j] = ring + C::V_DATA + n * C::ROW + 16 * C::v_chunk(n, chunk) + byte;
      ptx::pin(k_to_[j]);
      ptx::pin(v_to_[j]);
    }
    scale_to_ = ring + C::K_SCALE + SCALE_PIECE * lane;
    ptx::pin(scale_to_);
  }

  // count: tiles this warp has (a uniform value), from tile `first_tile` on, WARPS apart. Blocks before that
  // of tile `seen_from`, the first that a query sees, may be anything, also in the table: another is loaded
  // in their place, and masked. The first tiles are issued.
  __device__ __forceinline__ void start(int request, int kv_head, int first_tile, int count, int seen_from) {
    const int lane = threadIdx.x & 31;
    table_ = p_.block_table + request * p_.block_table_stride;
    first_tile_ = first_tile;
    seen_from_ = seen_from;
    count_ = count;
    // Pages of 16, 32 and 64 tokens: a warp's tiles have the same place in all of them.
    const int tiles_per_page = p_.page.block_size / TILE;
    wanders_ = C::WARPS % tiles_per_page != 0;
    place_ = first_tile % tiles_per_page;
    const int token = kv_head * p_.page.block_size + place_ * TILE;
    const bool is_v = lane >= SCALE_LANES / 2;
    k_from_ = p_.cache + (token * (C::D / 2) + lane * PIECE);
    v_from_ = k_from_ + v_offset_;
    scale_from_ = p_.cache + (p_.page.data_bytes() + token * C::S) +
                  (is_v ? v_offset_ + SCALE_PIECE * (lane - SCALE_LANES / 2) : SCALE_PIECE * lane);
#pragma unroll
    for (int i = 0; i < C::STAGES - 1; ++i) load(i, i * C::STAGE_BYTES);
  }

  // Issues tile i (if there is one) into the stage `offset` bytes into the ring, as one group.
  __device__ __forceinline__ void load(int i, uint32_t offset) {
    if (i % 32 == 0) look_up(i);
    if (i < count_) {
      if (wanders_) move_to(__shfl_sync(0xFFFFFFFFu, looked_up_place_, i % 32));
      const int block = __shfl_sync(0xFFFFFFFFu, block_, i % 32);
      const uint64_t block_at = uint64_t(uint32_t(block)) * uint32_t(p_.block_stride);
      const uint8_t* k = k_from_ + block_at;
      const uint8_t* v = v_from_ + block_at;
      const uint8_t* scales = scale_from_ + block_at;
      const int lane = threadIdx.x & 31;
#pragma unroll
      for (int j = 0; j < PIECES; ++j) {
        if (TOTAL % 32 == 0 || lane + 32 * j < TOTAL) {
          ptx::cp_async<PIECE>(to(k_to_, j, 8) + offset, k + 32 * j * PIECE);
          ptx::cp_async<PIECE>(to(v_to_, j, 8) + offset, v + 32 * j * PIECE);
        }
      }
      if (SCALE_LANES == 32 || lane < SCALE_LANES) ptx::cp_async<SCALE_PIECE>(scale_to_ + offset, scales);
    }
    ptx::cp_async_commit();
  }

 private:
  static constexpr int PIECE = C::EXACT ? 16 : 8;
  static constexpr int PIECES_PER_TOKEN = C::D / 2 / PIECE;
  static constexpr int TOTAL = TILE * PIECES_PER_TOKEN;
  static constexpr int PIECES = (TOTAL + 31) / 32;
  // Of scales all lanes take a piece, if there is a copy of that size: no branch.
  static constexpr int SCALE_PIECE = C::S == 4 || C::S == 8 ? C::S : 16;
  static constexpr int SCALE_LANES = 2 * TILE * C::S / SCALE_PIECE;
  // Of the pieces 8 tokens further on, a lane's place is that of the first ones, 8 rows further on.
  static constexpr int PERIOD = C::EXACT && 8 * PIECES_PER_TOKEN >= 32 ? 8 * PIECES_PER_TOKEN / 32 : PIECES;
  static constexpr int ADDRESSES = PERIOD < PIECES ? PERIOD : PIECES;

  __device__ __forceinline__ static uint32_t to(const uint32_t (&at)[ADDRESSES], int j, int rows) {
    return at[j % ADDRESSES] + j / ADDRESSES * rows * C::ROW;
  }

  // Blocks of the next 32 tiles, one a lane.
  __device__ __forceinline__ void look_up(int i) {
    const int mine = i + int(threadIdx.x & 31);
    if (mine < count_) {
      const int tiles_per_page = p_.page.block_size / TILE;
      const int tile = first_tile_ + mine * C::WARPS;
      const int logical = tiles_per_page == 1 ? tile : tile / tiles_per_page;
      block_ = table_[max(logical, seen_from_ / tiles_per_page)];
      looked_up_place_ = tile - logical * tiles_per_page;
    }
  }

  // To another place in the page, in tiles.
  __device__ __forceinline__ void move_to(int place) {
    const int tokens = (place - place_) * TILE;
    k_from_ += tokens * (C::D / 2);
    v_from_ += tokens * (C::D / 2);
    scale_from_ += tokens * C::S;
    place_ = place;
  }

  const Nvfp4AttentionParams& p_;
  const int32_t* table_ = nullptr;
  int first_tile_ = 0, seen_from_ = 0, count_ = 0;
  int block_ = 0, looked_up_place_ = 0;  // of the tile this lane looked up
  bool wanders_ = false;                 // tiles lie at different places of their pages
  int place_ = 0;                        // ... and `from` is at this one
  uint32_t v_offset_;                    // from K to V in a page
  // What this lane copies of block 0.
  const uint8_t* k_from_ = nullptr;
  const uint8_t* v_from_ = nullptr;
  const uint8_t* scale_from_ = nullptr;
  uint32_t k_to_[ADDRESSES], v_to_[ADDRESSES], scale_to_;
};

}  // namespace xlayer::attention

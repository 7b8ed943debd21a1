// Compile-time shape of the kernel that works on whole pages (page_decode.cuh), and where things are in
// shared memory.
#pragma once

#include "config.cuh"

namespace xlayer::attention {

// D: head size. HEADS: KV heads of a page, each of which has a warp. A page has one tile of each.
template <int D_, int HEADS_>
struct PageConfig {
  static constexpr int HEADS = HEADS_;
  static constexpr int WARPS = HEADS;
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int UNIT_TOKENS = TILE;
  static constexpr int D = D_;
  static constexpr int DP = D;
  static constexpr bool EXACT = true;
  static constexpr int NT = 1;
  static constexpr int TILE_ROWS = ROWS;
  static constexpr int S = D / GROUP;
  static constexpr int ROW = D / 2;  // bytes of a token's data
  static constexpr int WORDS = D / 32;
  static constexpr int V_WORDS = D / 64;
  static constexpr int M_TILES = D / 16;
  static constexpr bool SHARED_Q = false, NEWEST_FIRST = false;
  static_assert(D == 128, "expected a head size of 128: rows of 64 bytes, of which two meet all banks");

  // A stage is a page as it is in memory (nvfp4/page.cuh), or a part of a tile of newest tokens: K and V, 16
  // tokens each, of as many heads as there is room for.
  static constexpr int HEAD_DATA = TILE * ROW, HEAD_SCALES = TILE * S;
  static constexpr int K_SCALE = HEADS * HEAD_DATA;
  static constexpr int V_DATA = HEADS * (HEAD_DATA + HEAD_SCALES);
  static constexpr int V_SCALE = V_DATA + HEADS * HEAD_DATA;
  static constexpr int STAGE_BYTES = 2 * V_DATA;
  static constexpr int NEWEST_BYTES = TILE * D * 2;  // of K or V of one head
  static constexpr int NEWEST_HEADS = STAGE_BYTES / (2 * NEWEST_BYTES);
  static constexpr int NEWEST_STAGES = HEADS / NEWEST_HEADS;  // of a tile of newest tokens
  static_assert(NEWEST_HEADS > 0 && HEADS % NEWEST_HEADS == 0);
  static_assert(STAGE_BYTES % 128 == 0, "v_data_of and v_scale_of change bits of an address");

  // Blocks that an SM is to hold: sixteen warps of 128 registers, as decode_kernel's.
  static constexpr int BLOCKS = 16 / WARPS;
  static constexpr int STAGES = 6;
  // A stage is filled anew so many pages after a warp has left it. The others will have left it, too: who
  // fills it does not wait for them.
  static constexpr int LAG = 2;
  // Behind each stage are its two barriers, of 8 bytes: one address for all three.
  static constexpr int FULL = STAGE_BYTES, EMPTY_BARRIER = FULL + 8;
  static constexpr int STAGE_PITCH = STAGE_BYTES + 128;
  static constexpr int RING_BYTES = STAGES * STAGE_PITCH;
  static constexpr int NOTES_OFFSET = RING_BYTES;  // PageNotes of each warp
  static constexpr int NOTES_BYTES = 64;
  static constexpr int SHARED_BYTES = NOTES_OFFSET + WARPS * NOTES_BYTES;
  static_assert(BLOCKS * (SHARED_BYTES + 1024) <= 228 * 1024, "expected rings that fit an SM");

  static XLAYER_HD int k_chunk(int, int c) { return c; }
  static XLAYER_HD int v_chunk(int, int c) { return c; }
  static XLAYER_HD int k_dim(int t, int w) { return 32 * t + 8 * w; }
  // 0 1 3 2 4 5 7 6. Rows are 64 bytes apart and not moved on their way here, so tokens 2 i and 2 i + 1 meet
  // all banks: those are neighbouring rows of S^T, for K's loads; and of V, half of the lanes ask for an even
  // token, half for an odd one. (In any order V's loads meet a bank twice: a quarter of a row is all that a
  // half-warp reads of it.)
  static XLAYER_HD constexpr int token_of_row(int row) { return row ^ (row >> 1 & 1); }
  static XLAYER_HD constexpr int v_token(int t, int i) { return token_of_row(2 * t + i % 2 + i / 2 * 8); }
  static XLAYER_HD constexpr int k_place(int row) { return token_of_row(row); }
  static constexpr bool PAIRED = true;
  static XLAYER_HD uint32_t v_scale_flip(ScaleOrder order) { return order == ScaleOrder::LINEAR ? S : 1; }
};

}  // namespace xlayer::attention

// Shape of the decode kernel for pages of 16 tokens (pages.cuh), and where things are in its shared memory.
#pragma once

#include "config.cuh"

namespace xlayer::attention {

// HEADS: of the page, each of which has a warp; one more warp loads. Heads of 128, head tiles of 8 rows.
template <int HEADS>
struct PageConfig : Config<128, 1, HEADS> {
  using Base = Config<128, 1, HEADS>;
  static constexpr int PAGE_TOKENS = TILE;
  static constexpr int THREADS = 32 * (HEADS + 1);
  static constexpr int UNIT_TOKENS = TILE;
  static constexpr int TILE_STEP = 1;
  static constexpr bool LINE_OF_ALL_HEADS = true;
  static constexpr bool NEWEST_FIRST = true;  // pages are copied meanwhile, by another warp
  static constexpr int STAGES = 5;  // pages in flight or in use a block
  static constexpr int BLOCKS = 16 / HEADS;

  // A stage is a page as it is (../nvfp4/page.cuh).
  static constexpr int HEAD_DATA = TILE * Base::ROW, HEAD_SCALES = TILE * Base::S;
  static constexpr int K_SCALE = HEADS * HEAD_DATA;
  static constexpr int V_DATA = K_SCALE + HEADS * HEAD_SCALES;
  static constexpr int V_SCALE = V_DATA + HEADS * HEAD_DATA;
  static constexpr int STAGE_BYTES = V_SCALE + HEADS * HEAD_SCALES;
  static_assert(STAGE_BYTES % 128 == 0);  // stages are aligned as the first is
  static constexpr int BARRIERS = STAGES * STAGE_BYTES;
  static constexpr int SHARED_BYTES = BARRIERS + 2 * 8 * STAGES;

  // Nothing is swizzled: rows of K and V are 64 bytes, one after the other. Rows 2t and 2t + 1 of S^T are
  // tokens next to each other, so eight lanes read 128 bytes of K in a row: no bank twice. Of V, sixteen
  // lanes read 32 bytes of each of four tokens. Two of these are even and two odd: no bank more than twice,
  // and no order has fewer, since a lane's four neighbours in t have the same dimensions.
  static XLAYER_HD constexpr int v_token(int t, int i) { return (2 * t | t >> 1) ^ (i & 1); }
  static XLAYER_HD constexpr int v_rows_on(int i) { return i / 2 * 8; }
  static XLAYER_HD constexpr int token_of_row(int row) { return (row & 8) | v_token(row >> 1 & 3, row & 1); }
};

}  // namespace xlayer::attention

// Compile-time shape of the decode kernel, and where things are in shared memory.
#pragma once

#include "params.h"

namespace xlayer::attention {

constexpr int TILE = 16;             // tokens a warp works on at a time
constexpr int ROWS = 8;              // query rows of one MMA
constexpr float EMPTY = -1e30f;      // running maximum of no key; finite, so that exp2(x - EMPTY) has no NaN
// P is a half, relative to the running maximum: beside a key that has nearly all of the mass, as a model's first
// token often does, all others' P together is what the output is made of. So the maximum's P is 2^HEADROOM, and
// what is 2^-26 of it (e^-18) is still a normal half.
constexpr float HEADROOM = 12.0f;
// P may reach 2^(HEADROOM + LAZY) = MOST_P before the accumulators are rescaled: just what a half has.
constexpr float LAZY = 3.9f, MOST_P = 61147.0f;
static_assert(MOST_P < 65504.0f);
constexpr float UNSCALE = 16384.0f;  // dequantised values are 2^-14 of what they stand for
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// D: head size of the cache. NT: query rows of a head tile / 8. WARPS: of a team, which takes a part of the
// schedule. Teams of sixteen fill an SM each: a fourth as many share the keys of a head, and a fourth as many
// results are merged. With four, a team that begins or ends a run holds up only a fourth of an SM. TEAMS: of a
// thread block, none of which waits for another. An SM favours the warps of its oldest thread block, so where it
// has four the last of them is alone at the end; four teams of one block go on side by side.
template <int D_, int NT_, int WARPS_ = 4, int TEAMS_ = 1>
struct Config {
  static constexpr int WARPS = WARPS_;
  static constexpr int TEAMS = TEAMS_;
  static constexpr int TEAM_THREADS = 32 * WARPS;
  static constexpr int THREADS = TEAM_THREADS * TEAMS;
  static constexpr int UNIT_TOKENS = WARPS * TILE;  // see Schedule
  static constexpr int D = D_;
  static constexpr int DP = D <= 64 ? 64 : D <= 128 ? 128 : 256;  // what the fragments are cut for
  static constexpr bool EXACT = D == DP;
  static constexpr int NT = NT_;
  static constexpr int STAGES = DP == 256 ? 2 : 3;  // tiles in flight or in use a warp
  static constexpr int TILE_ROWS = NT * ROWS;
  // Which side of an MMA has sixteen: query rows, where there are as many (rows_as_a.cuh), else
  // tokens (rows_as_b.cuh).
  static constexpr bool ROWS_M = NT % 2 == 0;
  static constexpr int STATS = ROWS_M ? NT : 2 * NT;  // query rows that a lane has logits of
  static constexpr int S = D / GROUP;      // block scales a token
  static constexpr int ROW = DP / 2;       // bytes of a token's data in shared memory
  static constexpr int WORDS = DP / 32;    // 8-element words of one token a lane has of K
  static constexpr int V_WORDS = DP / 64;  // ... and of V, for each of its four tokens
  static constexpr int M_TILES = DP / 16;  // 16-row MMA tiles of the transposed output

  // One stage: K data, V data (rows of ROW bytes, swizzled), K scales, V scales (as in the page).
  static constexpr int V_DATA = TILE * ROW;
  static constexpr int K_SCALE = 2 * TILE * ROW;
  static constexpr int V_SCALE = K_SCALE + TILE * S;
  static constexpr int STAGE_BYTES = K_SCALE + 2 * TILE * S;

  // For merging the warps' results: in the ring, which is read by then. Not where the ring has padding that must
  // stay zero.
  static constexpr int OUT_STRIDE = DP + (ROWS_M ? 16 : 4);  // floats; padding spreads rows over the banks
  static constexpr int MERGE_FLOATS = WARPS * TILE_ROWS * (OUT_STRIDE + 2);
  static constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
  static constexpr bool MERGES_IN_RING = EXACT;
  static constexpr int MERGE_OFFSET = MERGES_IN_RING ? 0 : RING_BYTES;
  static constexpr int MERGE_END = MERGE_OFFSET + MERGE_FLOATS * 4;

  // Large head tiles have their queries in shared memory, once for all warps: 32 registers less, for a block more
  // on an SM.
  static constexpr bool SHARED_Q = NT * DP == 256;
  static constexpr int Q_WORD = 32 * 16;  // bytes: of all lanes, what Q has for eight rows and a word of K
  static constexpr int Q_BYTES = SHARED_Q ? NT * WORDS * Q_WORD : 0;
  // Behind the ring: where results are merged, queries are read by then.
  static constexpr int Q_OFFSET = MERGES_IN_RING ? RING_BYTES : MERGE_END;
  static constexpr int Q_FACTORS = Q_OFFSET + Q_BYTES;  // a float a row
  static constexpr int Q_END = SHARED_Q ? Q_FACTORS + TILE_ROWS * 4 : Q_OFFSET;
  // Of a run with newest tokens these come before its pages, and where pages are copied to is worked out after them:
  // the other way round nvcc puts away what the pages' loop then reads in every tile. Smaller tiles have registers
  // enough, and better begin with the copies of pages.
  static constexpr bool NEWEST_FIRST = SHARED_Q;
  static constexpr int TEAM_BYTES = ((Q_END > MERGE_END ? Q_END : MERGE_END) + 127) / 128 * 128;
  static constexpr int SHARED_BYTES = TEAMS * TEAM_BYTES;
  static_assert(Q_OFFSET % 16 == 0);

  // Thread blocks an SM should hold, by registers (64K) and shared memory (227 KB on sm_90).
  static constexpr int BLOCKS = (NT == 4 || D == 192 ? 3 : 4) * 4 / (WARPS * TEAMS);

  // Which 16-byte chunk of a row chunk c is put at, so that the fragment loads meet no bank twice.
  static XLAYER_HD int k_chunk(int row, int c) {
    return DP == 256 ? c ^ ((row & 1) << 2) : c;
  }
  static XLAYER_HD int v_chunk(int row, int c) {
    return DP == 256 ? c ^ ((row & 3) << 1) : DP == 128 ? c ^ (row & 2) : c;
  }
  // Where dimension d of a row of results is in the merge buffer. With ROWS_M lanes t = 0 to 3 have DP / 4
  // each, which would begin in the same bank.
  static XLAYER_HD int out_place(int d) { return ROWS_M ? d + d / (DP / 4) * 4 : d; }
  // First dimension of a lane's K word w (lane % 4 = t): 16-byte chunks t (and t + 4 of a row of 128 bytes).
  static XLAYER_HD int k_dim(int t, int w) {
    return DP == 64 ? 16 * t + 8 * w : 32 * t + 8 * (w % 4) + 128 * (w / 4);
  }
  // Dimension d is in word k_word(d) of the lanes that have t = k_lane(d).
  static XLAYER_HD int k_lane(int d) { return DP == 64 ? d / 16 : d % 128 / 32; }
  static XLAYER_HD int k_word(int d) { return DP == 64 ? d % 16 / 8 : d % 32 / 8 + d / 128 * 4; }
};

// Rows of S^T = K Q^T are tokens in this order, so that P^T, which takes them as its k index (a lane has k =
// 2t, 2t + 1, 2t + 8, 2t + 9), meets V's tokens t, t + 4, t + 8, t + 12, which are loaded without conflicts.
XLAYER_HD constexpr int token_of_row(int row) {
  return (row & 8) | ((row & 7) >> 1) | ((row & 1) << 2);
}
XLAYER_HD constexpr int row_of_token(int n) { return (n & 8) | ((n & 3) << 1) | ((n >> 2) & 1); }

// What lane 4 g + t has of S, of the maxima and of O: S is s[NT][4], the output out[NT][M_TILES][4].
template <class C>
struct Held {
  // Its row, among those the lane has, of s[n][i] and of out[n][..][i].
  static XLAYER_HD constexpr int stat(int n, int i) { return C::ROWS_M ? n / 2 * 2 + i / 2 : 2 * n + i % 2; }
  // That row, if the head tile begins with row `first`.
  static XLAYER_HD constexpr int row(int first, int g, int t, int stat) {
    return C::ROWS_M ? first + stat * ROWS + g : first + stat / 2 * ROWS + 2 * t + stat % 2;
  }
  // The token of s[n][i], if the tile begins with token `first`.
  static XLAYER_HD constexpr int token(int first, int g, int t, int n, int i) {
    return C::ROWS_M ? first + token_of_row(2 * t + i % 2) + n % 2 * 8 : first + token_of_row(g) + i / 2 * 8;
  }
  // A row is in the lanes so many apart, up to so many.
  static constexpr int LANES = C::ROWS_M ? 1 : 4, LANES_END = C::ROWS_M ? 4 : 32;
};

}  // namespace xlayer::attention

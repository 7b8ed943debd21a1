// Which keys a part of the schedule stands for.
#pragma once

#include "config.cuh"

namespace xlayer::attention {

// Keys of one request that some query sees: tokens [first, last), in units of `unit` tokens from begin_unit
// on.
struct Range {
  int first, last;
  int begin_unit, units;
};

__device__ __forceinline__ Range key_range(int seq_len, int q_len, int window, int unit) {
  Range r;
  r.last = seq_len;
  r.first = window > 0 ? max(0, seq_len - q_len - window + 1) : 0;
  r.begin_unit = r.first / unit;
  r.units = seq_len > 0 ? (seq_len + unit - 1) / unit - r.begin_unit : 0;
  return r;
}

// Units that a request's head tile takes on the schedule's line: with a fixed split, whole parts.
__device__ __forceinline__ int line_units(int units, int split_units) {
  return split_units > 0 ? (units + split_units - 1) / split_units * split_units : units;
}

// The first of a request's tiles that are read from its newest tokens. If there is none, one past its last tile.
__device__ __forceinline__ int newest_tile(const Nvfp4AttentionParams& p, int request, int seq_len) {
  const int from = p.newest_from[request];
  return ((from < seq_len ? from : seq_len) + TILE - 1) / TILE;
}

// Head tiles: a KV head's q_len * group query rows, TILE_ROWS at a time.
__host__ __device__ inline int row_tiles(int q_len, int group, int tile_rows) {
  return (q_len * group + tile_rows - 1) / tile_rows;
}

// Those of all KV heads of a request.
__host__ __device__ inline int head_tiles_of(const Nvfp4AttentionParams& p, int q_len, int tile_rows) {
  return p.page.heads * row_tiles(q_len, p.num_q_heads / p.page.heads, tile_rows);
}

// The request whose units hold position `pos`: begins[r] <= pos < begins[r + 1]. Called by whole warps.
__device__ __forceinline__ int find_request(const int32_t* begins, int requests, int pos) {
  constexpr int EACH = 4;  // that a lane looks at together: one wait for up to 128 requests
  int low = 0, count = requests;  // the answer is in [low, low + count)
  const int lane = threadIdx.x & 31;
  // begins ascends, so those that are at `pos` or before come first; begins[low] always is.
  while (count > 32 * EACH) {
    const int step = (count + 31) / 32;
    const bool before = lane * step < count && begins[low + lane * step] <= pos;
    const int last = 31 - __clz(__ballot_sync(0xFFFFFFFFu, before));
    low += last * step;
    count = min(step, count - last * step);
  }
  int before = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = 32 * i + lane;
    before += at < count && begins[low + at] <= pos;
  }
  return low + __reduce_add_sync(0xFFFFFFFFu, before) - 1;
}

}  // namespace xlayer::attention

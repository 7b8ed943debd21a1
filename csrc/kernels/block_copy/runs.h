// Which pairs of a copy are one copy.
#pragma once

#include "params.h"

namespace xlayer {

// Pieces that lie one behind the other at both ends.
struct CopyRun {
  int64_t src;  // the lowest ids
  int64_t dst;
  int64_t num_pairs;
};

// The run of pairs that begins with pair `begin`, up to pair `end`: ids that go up by one at both ends, or
// down, as blocks that were freed together are given out again. One pair where pieces have gaps, and else.
inline CopyRun run_from(const BlockCopyParams& p, int64_t begin, int64_t end) {
  int64_t last = begin;
  if (p.src_stride == p.piece_bytes && p.dst_stride == p.piece_bytes && begin + 1 < end) {
    const int64_t step = p.src_ids[begin + 1] - p.src_ids[begin];
    if (step == 1 || step == -1) {
      while (last + 1 < end && p.src_ids[last + 1] - p.src_ids[last] == step &&
             p.dst_ids[last + 1] - p.dst_ids[last] == step) {
        ++last;
      }
    }
  }
  const int64_t lowest = p.src_ids[last] < p.src_ids[begin] ? last : begin;
  return {p.src_ids[lowest], p.dst_ids[lowest], last - begin + 1};
}

}  // namespace xlayer

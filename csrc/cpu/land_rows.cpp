#include "land_rows.h"

#include <algorithm>

namespace xlayer::cpu {
namespace {

constexpr int64_t PIECE = 16 << 10;  // bytes that are still in the L1 cache when they are digested

}  // namespace

void land_rows(const LandRowsParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* from = p.rows + row * p.row_bytes;
    uint8_t* to = p.pool + p.blocks[row] * p.pool_stride;
    uint64_t sum = 0;
    for (int64_t at = 0; at < p.row_bytes; at += PIECE) {
      const int64_t bytes = std::min(PIECE, p.row_bytes - at);
      std::memcpy(to + at, from + at, size_t(bytes));
      if (p.digests == nullptr) continue;
      // What was stored, not what was read: that may have changed since.
      const auto* words = reinterpret_cast<const uint64_t*>(to + at);
      const int64_t* factors = p.factors + at / 8;
      for (int64_t i = 0; i < bytes / 8; ++i) sum += words[i] * uint64_t(factors[i]);
    }
    if (p.digests != nullptr) p.digests[row] = int64_t(sum);
  }
}

}  // namespace xlayer::cpu

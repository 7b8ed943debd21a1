#include "block_copy.h"

namespace xlayer::cpu {

void block_copy(const BlockCopyParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    // memmove: a piece copied onto itself is allowed.
    std::memmove(p.dst + p.dst_ids[i] * p.dst_stride, p.src + p.src_ids[i] * p.src_stride,
                 size_t(p.piece_bytes));
  }
}

}  // namespace xlayer::cpu

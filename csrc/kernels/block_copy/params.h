// copy_blocks: what its implementations are given.
#pragma once

#include "../common/host_device.h"

namespace xlayer {

enum class CopyMethod : int { ENGINE, KERNEL };

struct BlockCopyParams {
  const uint8_t* src;  // [n] pieces
  uint8_t* dst;        // [m] pieces
  int64_t src_stride;  // bytes from a piece to the next
  int64_t dst_stride;
  int64_t piece_bytes;
  const int64_t* src_ids;  // [num_pairs] on the host
  const int64_t* dst_ids;  // [num_pairs] on the host
  int64_t num_pairs;
};

// Where one piece lies: bytes from `src` and from `dst`.
struct alignas(16) CopyPair {
  int64_t src;
  int64_t dst;
};

}  // namespace xlayer

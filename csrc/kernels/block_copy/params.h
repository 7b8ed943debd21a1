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

// Ids of one pair, as the kernel reads them: half of what the caller's take, since they cross the link first.
struct alignas(8) CopyPair {
  int32_t src;
  int32_t dst;
};

}  // namespace xlayer

#pragma once

#include "../kernels/block_copy/params.h"

namespace xlayer::cpu {

// Copies pairs [begin, end) inside host memory.
void block_copy(const BlockCopyParams& params, int64_t begin, int64_t end);

}  // namespace xlayer::cpu

#pragma once

#include "../kernels/nvfp4_write/params.h"

namespace xlayer::cpu {

// Writes tokens [begin, end) of params. Tokens are independent, so callers may split them over threads.
void nvfp4_write(const Nvfp4WriteParams& params, int64_t begin, int64_t end);

}  // namespace xlayer::cpu

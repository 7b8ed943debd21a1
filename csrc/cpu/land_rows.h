#pragma once

#include "../kernels/land_rows/params.h"

namespace xlayer::cpu {

// Rows [begin, end); all blocks are of the pool.
void land_rows(const LandRowsParams& params, int64_t begin, int64_t end);

}  // namespace xlayer::cpu

#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace xlayer {

// Launches on `stream` of the current device, which the digests are zeroed on as well; returns the first
// error.
cudaError_t launch_land_rows(const LandRowsParams& params, cudaStream_t stream);

}  // namespace xlayer

#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace xlayer {

// Launches on `stream` of the current device; returns the launch's error.
cudaError_t launch_newest_step(const NewestStepParams& params, cudaStream_t stream);

}  // namespace xlayer

#pragma once

#include <cuda_runtime_api.h>

#include "../nvfp4_attention/params.h"

namespace xlayer {

// Query rows of a thread block on the current device, 0 if there is no kernel for it.
int nvfp4_prefix_rows(int head_size);

// Launches on `stream` of the current device; returns the launch's error.
cudaError_t launch_nvfp4_prefix(const Nvfp4AttentionParams& params, cudaStream_t stream);

}  // namespace xlayer

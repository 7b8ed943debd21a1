#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace xlayer {

// launch_block_copy with pairs in device memory, which are brought there while `stream` still does what it
// was given before. Thread-safe; never waits for the device. Not while `stream` is captured.
cudaError_t upload_and_launch_block_copy(const BlockCopyParams& params, bool touches_host,
                                         cudaStream_t stream);

}  // namespace xlayer

#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace xlayer {

// Device to device by a kernel, on `stream` of the current device. May be captured in a CUDA graph:
// the ids travel as kernel parameters.
cudaError_t launch_block_copy(const BlockCopyParams& params, cudaStream_t stream);

// Device to host or host to device by the copy engine, on `stream`: one submission for all pairs, or one a
// pair on the legacy default stream, for pageable memory and with CUDA before 13. Asynchronous for pinned
// host memory.
cudaError_t submit_block_copy(const BlockCopyParams& params, cudaMemcpyKind kind, cudaStream_t stream);

}  // namespace xlayer

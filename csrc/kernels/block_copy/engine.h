#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace xlayer {

// By the copy engine, on `stream`: runs of pairs (runs.h) in a few batches; or pair by pair on the legacy
// default stream, for pageable memory and with CUDA before 13. Asynchronous for pinned host memory.
cudaError_t submit_block_copy(const BlockCopyParams& params, cudaMemcpyKind kind, cudaStream_t stream);

}  // namespace xlayer

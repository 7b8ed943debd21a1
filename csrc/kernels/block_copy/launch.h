#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace xlayer {

// The address by which the current device reaches host memory; nullptr where it does not (pageable memory).
uint8_t* device_address(const uint8_t* host);

// Whether the pairs of this copy travel with the launch. Those of others should be in device memory: without,
// they travel with many launches.
bool pairs_fit_launch(const BlockCopyParams& params);

void write_pairs(const BlockCopyParams& params, CopyPair* pairs);

// By a kernel, on `stream` of the current device. src and dst are addresses on the device, a piece has at
// most 2^30 bytes, an id 31 bits. touches_host: with few thread blocks, which fill the link and leave the
// rest to the model. pairs: [num_pairs] in device memory, until the stream has got there; or nullptr.
// Without, the launch may be captured in a CUDA graph.
cudaError_t launch_block_copy(const BlockCopyParams& params, bool touches_host, const CopyPair* pairs,
                              cudaStream_t stream);

}  // namespace xlayer

#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace xlayer {

// On `stream` of the current device; each returns the launch's error.
cudaError_t launch_nvfp4_attention_schedule(const Nvfp4AttentionParams& params, cudaStream_t stream);
cudaError_t launch_nvfp4_attention(const Nvfp4AttentionParams& params, cudaStream_t stream);

// Parts to cut a batch into: thread blocks that run at once on the current device. rows: query tokens times
// query heads a KV head. 0 if the device cannot be asked.
int nvfp4_attention_parts(int head_size, int rows);
// Query rows of one head tile: 8, 16 or 32.
int nvfp4_attention_tile_rows(int head_size, int rows);
// The head size the kernel works with: 64, 128 or 256; 0 if head_size has no kernel.
int nvfp4_attention_padded_head_size(int head_size);

}  // namespace xlayer

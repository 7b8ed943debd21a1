#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace xlayer {

// Both launch on `stream` of the current device and return the launch's error. The schedule is computed
// on the device, so that a captured CUDA graph follows the lengths it is replayed with.
cudaError_t launch_nvfp4_attention_schedule(const Nvfp4AttentionParams& params, cudaStream_t stream);
cudaError_t launch_nvfp4_attention(const Nvfp4AttentionParams& params, cudaStream_t stream);

// rows: query rows of one KV head, q_len * query heads a KV head.
int nvfp4_attention_parts(int head_size, int rows);      // that run at once on the current device
int nvfp4_attention_tile_rows(int head_size, int rows);  // query rows of one head tile: 8, 16 or 32
int nvfp4_attention_padded_head_size(int head_size);     // 64, 128 or 256

}  // namespace xlayer

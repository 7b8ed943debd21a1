// gather_nvfp4: what the CPU and the CUDA kernel are given.
#pragma once

#include "../nvfp4/codec.cuh"
#include "../nvfp4/rotate.cuh"

namespace xlayer {

struct Nvfp4GatherParams {
  const uint8_t* cache;  // [B] pages
  int64_t block_stride;  // bytes
  Page page;
  const int32_t* block_table;  // [R][M]
  int64_t block_table_stride;  // elements from a request's row to the next
  int64_t max_blocks;          // M
  const int32_t* seq_starts;   // [R] first token of each request to decode
  const int32_t* cu_seqlens;   // [R + 1] where each request's tokens go in the output
  int num_requests;            // R
  const float* k_scale;        // [1] global decode scale
  const float* v_scale;        // [1]
  void* k_out;                 // [T][H][D] of dtype, D dense
  void* v_out;
  int64_t k_stride_t;  // elements
  int64_t k_stride_h;
  int64_t v_stride_t;
  int64_t v_stride_h;
  int64_t num_tokens;  // T; tokens at and after cu_seqlens[R] are left as they are
  Dtype dtype;
  ScaleOrder v_order;
  bool rotated_keys;  // as they were written; k_out is K itself
};

}  // namespace xlayer

// reshape_and_cache_nvfp4: what the CPU and the CUDA kernel are given.
#pragma once

#include "../nvfp4/codec.cuh"
#include "../nvfp4/rotate.cuh"

namespace xlayer {

struct Nvfp4WriteParams {
  const void* key;       // [T][H][D] of dtype, D dense
  const void* value;     // [T][H][D]
  int64_t key_stride_t;  // elements
  int64_t key_stride_h;
  int64_t value_stride_t;
  int64_t value_stride_h;
  Dtype dtype;
  uint8_t* cache;        // [B] pages
  int64_t block_stride;  // bytes from a block's page to the next block's
  Page page;
  const int64_t* slots;  // [num_slots] block * N + offset; negative: skip
  int64_t num_slots;     // <= T: no token beyond is read
  void* newest;                 // [rows][2: K, V][H][newest_tokens][D] of dtype, dense, or null; K as it is quantised
  const int64_t* newest_slots;  // [num_slots] row * newest_tokens + place; negative: to the page only
  int newest_tokens;
  const float* k_scale;  // [1] global decode scale
  const float* v_scale;  // [1]
  ScaleOrder v_order;
  ScaleChoice choice;
  bool rotated_keys;  // see rotate.cuh
};

}  // namespace xlayer

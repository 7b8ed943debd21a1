// What the attention kernels are given when they run on the CPU.
#pragma once

#include "simt.h"

#include "kernels/nvfp4_attention/params.h"

// All of eight bytes, so that Python can mirror it: tests/reference/emulated.py.
struct Args {
  const void* q;
  int64_t q_stride_t, q_stride_h;
  void* out;
  int64_t out_stride_t, out_stride_h;
  float* lse;
  int64_t lse_stride_h, is_f16;
  const uint8_t* cache;
  int64_t block_stride, heads, block_size, head_size;
  const int32_t* block_table;
  int64_t block_table_stride, max_blocks;
  const int32_t* seq_lens;
  int64_t num_requests, q_len, num_q_heads;
  const float *k_scale, *v_scale, *sinks;
  double scale, soft_cap;
  int64_t window, swizzled, parts, split_units, late_copies, warps, teams;
  const void* newest;
  const int32_t *newest_rows, *newest_from;
  int64_t newest_tokens;
  const int32_t* query_starts;
  int64_t kernel_q_len, rotated_keys;
};

inline xlayer::Nvfp4AttentionParams params_of(const Args* a) {
  xlayer::Nvfp4AttentionParams p = {};
  p.q = a->q;
  p.q_stride_t = a->q_stride_t;
  p.q_stride_h = a->q_stride_h;
  p.out = a->out;
  p.out_stride_t = a->out_stride_t;
  p.out_stride_h = a->out_stride_h;
  p.lse = a->lse;
  p.lse_stride_h = a->lse_stride_h;
  p.dtype = a->is_f16 ? xlayer::Dtype::F16 : xlayer::Dtype::BF16;
  p.cache = a->cache;
  p.block_stride = a->block_stride;
  p.page = {int(a->heads), int(a->block_size), int(a->head_size)};
  p.block_table = a->block_table;
  p.block_table_stride = a->block_table_stride;
  p.max_blocks = a->max_blocks;
  p.seq_lens = a->seq_lens;
  p.num_requests = int(a->num_requests);
  p.q_len = int(a->q_len);
  p.num_q_heads = int(a->num_q_heads);
  p.k_scale = a->k_scale;
  p.v_scale = a->v_scale;
  p.sinks = a->sinks;
  p.scale = float(a->scale);
  p.soft_cap = float(a->soft_cap);
  p.window = int(a->window);
  p.v_order = a->swizzled ? xlayer::ScaleOrder::SWIZZLED : xlayer::ScaleOrder::LINEAR;
  p.parts = int(a->parts);
  p.split_units = int(a->split_units);
  p.newest = a->newest;
  p.newest_rows = a->newest_rows;
  p.newest_from = a->newest_from;
  p.newest_tokens = int(a->newest_tokens);
  p.query_starts = a->query_starts;
  p.rotated_keys = a->rotated_keys != 0;
  p.kernel_q_len = int(a->query_starts == nullptr ? a->q_len : a->kernel_q_len);
  simt::machine().late_copies = a->late_copies != 0;
  return p;
}

// gather_nvfp4: what the CPU and the CUDA kernel are given, and where a token is read from.
#pragma once

#include <algorithm>

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
  const int32_t* seq_starts;   // [R] first token of each request to gather
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
  bool rotated_keys;  // as they were written, in pages and among the newest; k_out is K itself

  // What is read instead of a page, see source_of.
  const int32_t*
      query_starts;         // [R + 1] where each request's own tokens begin in key, or null: none are known
  const int32_t* seq_lens;  // [R] tokens of each request, its own included; with query_starts
  const void* key;          // [Q][H][D] of source_dtype, D dense, or null: own tokens are in pages
  const void* value;
  int64_t key_stride_t;  // elements
  int64_t key_stride_h;
  int64_t value_stride_t;
  int64_t value_stride_h;
  const void* newest;          // [rows][2: K, V][H][newest_tokens][D] of source_dtype, dense, or null
  const int32_t* newest_rows;  // [R]; negative: none
  const int32_t* newest_from;  // [R] first token that may be read from its place
  int newest_tokens;
  Dtype source_dtype;  // dtype, or any where that is F32
};

enum class Source : int { PAGE, OWN, NEWEST };

struct TokenSource {
  Source kind;
  int64_t at;  // OWN: token of key; NEWEST: place in the row
  int row;     // NEWEST
};

// Where a token of a request is read from. Its own tokens are the last of its sequence that this step
// computes: they are at hand. Before them come the newest, as far as its row has them in whole tiles; then
// what is only in pages.
XLAYER_HD TokenSource source_of(const Nvfp4GatherParams& p, int r, int64_t position) {
  if (p.query_starts == nullptr) return {Source::PAGE, 0, 0};
  const int64_t first = p.query_starts[r], end = p.seq_lens[r];
  const int64_t own_from = end - (p.query_starts[r + 1] - first);
  if (position >= own_from) {
    if (p.key == nullptr) return {Source::PAGE, 0, 0};
    return {Source::OWN, first + (position - own_from), 0};
  }
  if (p.newest == nullptr || position < end - p.newest_tokens) return {Source::PAGE, 0, 0};
  const int row = p.newest_rows[r];
  if (row < 0 || position / NEWEST_TILE * NEWEST_TILE < p.newest_from[r]) return {Source::PAGE, 0, 0};
  return {Source::NEWEST, position % p.newest_tokens, row};
}

// How the work is cut. The threads of a token have half a rotation block of a head each (chunk.cuh), their
// share; where a token has more `shares` than a thread block threads, `rounds` blocks have the same tokens. A
// block works on `slots` tokens at a time, with `lanes` threads each, and each thread goes through `each`
// consecutive tokens.
struct GatherPlan {
  int shares, rounds, lanes, slots, each, threads;
  int64_t k_step, v_step;  // bytes from a token to the next in the output
  unsigned v_apart;        // lines: bytes of a page from a thread's first chunk of V to its second

  XLAYER_HD int tokens() const { return slots * each; }  // of a thread block
};

constexpr int GATHER_THREADS = 256, GATHER_SLOTS = 32, GATHER_EACH = 8;  // at most
constexpr int GATHER_PLACES = (GATHER_SLOTS + 1) * (GATHER_EACH + 1);

// Whether LINE_LANES threads of a token have LINE_ELEMENTS that follow each other in the output, and store
// them so (chunk.cuh): of one head, or of whole heads side by side.
constexpr int LINE_LANES = 8, LINE_ELEMENTS = 128;
inline bool in_lines(const Nvfp4GatherParams& p) {
  const int size = p.page.head_size;
  if (dtype_bytes(p.dtype) != 2 || rotation_block(size) != 32) return false;
  if (size % LINE_ELEMENTS == 0) return true;
  return LINE_ELEMENTS % size == 0 && p.page.heads * size % LINE_ELEMENTS == 0 && p.k_stride_h == size &&
         p.v_stride_h == size;
}

// at_once: thread blocks that the device holds. All take as long, so a launch takes as long as its waves of
// them. A token counts 2, and finding out where tokens are 1. Of equals, more tokens a block.
inline GatherPlan gather_plan(const Nvfp4GatherParams& p, int at_once) {
  GatherPlan plan;
  plan.shares = p.page.heads * (p.page.head_size / rotation_block(p.page.head_size)) * 2;
  plan.rounds = int(ceil_div(plan.shares, GATHER_THREADS));
  const int together = in_lines(p) ? LINE_LANES : 2;
  plan.lanes = int(ceil_div(plan.shares / together, plan.rounds)) * together;
  plan.slots = std::min(GATHER_THREADS / plan.lanes, GATHER_SLOTS);
  const auto cost = [&](int each) {
    const int64_t blocks = ceil_div(p.num_tokens, int64_t(plan.slots) * each) * plan.rounds;
    return ceil_div(blocks, int64_t(std::max(at_once, 1))) * (2 * each + 1);
  };
  plan.each = GATHER_EACH;
  for (int each = GATHER_EACH - 1; each > 0; --each) {
    if (cost(each) < cost(plan.each)) plan.each = each;
  }
  plan.threads = int(ceil_div(plan.slots * plan.lanes, 32)) * 32;
  plan.k_step = p.k_stride_t * dtype_bytes(p.dtype);
  plan.v_step = p.v_stride_t * dtype_bytes(p.dtype);
  plan.v_apart = LINE_ELEMENTS / 4 * (p.page.head_size < LINE_ELEMENTS ? p.page.block_size : 1);
  return plan;
}

// Whether all chunks of 8 elements of key and value start at multiples of 16 bytes.
inline bool own_is_wide(const Nvfp4GatherParams& p) {
  const int64_t bytes = dtype_bytes(p.source_dtype);
  const auto aligned = [bytes](const void* base, int64_t stride_t, int64_t stride_h) {
    return (int64_t(reinterpret_cast<uintptr_t>(base)) | stride_t * bytes | stride_h * bytes) % 16 == 0;
  };
  return aligned(p.key, p.key_stride_t, p.key_stride_h) &&
         aligned(p.value, p.value_stride_t, p.value_stride_h);
}

}  // namespace xlayer

// nvfp4_paged_attention: what the CPU and the CUDA kernels are given.
#pragma once

#include "../nvfp4/codec.cuh"
#include "../nvfp4/rotate.cuh"

namespace xlayer {

// Split-KV schedule. A unit is 64 tokens (256 for teams of 16 warps) of one request and head tile;
// all units of a batch, request by request and head tile by head tile, are one line of `total` units, cut
// into parts of `chunk`:
//
//   | request 0                         | request 1      | ...
//   | head 0        | head 1        |...| head 0 | head 1| ...
//   |--part 0--|--part 1--|--part 2--|--part 3--|--part 4--| ...
//
// A part that holds a (request, head) whole writes its output; the others write partial results, which
// the last of them to finish merges in the order of the parts. Nothing depends on which warps take a part.
constexpr int SPLIT_UNIT_TOKENS = 64;  // a fixed split is in these

struct Schedule {
  // int32 [4 + R + 1 + R * T]: chunk, parts, total, 1 if newest tokens are counted; for each request where its
  // units begin, and `total`; for each request and head tile how many parts have finished, 0 between two
  // launches. T: at most one head tile for 8 query rows.
  static constexpr int CHUNK = 0, PARTS = 1, TOTAL = 2, NEWEST = 3, BEGINS = 4;
  XLAYER_HD static constexpr int64_t counters(int64_t requests) { return BEGINS + requests + 1; }
  static constexpr int64_t size(int64_t requests, int heads, int rows) {
    return counters(requests) + requests * heads * ((rows + 7) / 8);
  }
};

struct Nvfp4AttentionParams {
  const void* q;       // [tokens][Hq][D] of dtype, D dense, 16-byte aligned rows
  int64_t q_stride_t;  // elements
  int64_t q_stride_h;
  void* out;  // as q
  int64_t out_stride_t;
  int64_t out_stride_h;
  float* lse;  // [Hq][tokens] natural logarithm, or null
  int64_t lse_stride_h;
  Dtype dtype;  // BF16 or F16

  const uint8_t* cache;  // [B] pages
  int64_t block_stride;  // bytes; on CUDA below 4 GiB
  Page page;
  const int32_t* block_table;  // [R][M]
  int64_t block_table_stride;  // elements
  int64_t max_blocks;          // M
  const int32_t* seq_lens;     // [R] tokens, the q_len new ones included; 0: no request
  int num_requests;            // R
  int q_len;                   // query tokens a request, the last of its tokens; with query_starts the most
  int kernel_q_len;            // for which the kernel is chosen: q_len, or fewer with query_starts
  const int32_t* query_starts;  // [R + 1] where in q each request's query tokens begin, and their end; or null
  int num_q_heads;             // Hq, a multiple of page.heads

  // The newest tokens as they were before they were quantised, or null. Token p of request r is read from
  // place p % newest_tokens of row newest_rows[r], and not from its page, where its tile of 16 tokens begins at
  // newest_from[r] or later.
  const void* newest;          // [rows][2: K, V][H][newest_tokens][D] of dtype, dense
  const int32_t* newest_rows;  // [R] not read where newest_from is past the request's tokens
  const int32_t* newest_from;  // [R] tokens; the schedule's, too, which are to be the same
  int newest_tokens;           // a multiple of 16

  const float* k_scale;  // [1] global decode scale
  const float* v_scale;  // [1]
  const float* sinks;    // [Hq] logits of a key without a value, or null
  float scale;           // of Q K^T
  float soft_cap;        // 0: none
  int window;            // a query sees itself and window - 1 before it; 0: all
  ScaleOrder v_order;
  bool rotated_keys;     // K is kept as rotate.cuh says; so is the newest tokens'
  // nvfp4_prefix_attention, which has none of the above but scales and rotated_keys: every query sees all of
  // seq_lens, and what out and lse hold is attention to other tokens, with which the result is merged.
  bool merges;

  // CUDA only.
  int32_t* schedule;   // see Schedule
  int parts;           // parts to aim for: thread blocks of four warps that run at once on the device
  int split_units;     // > 0: every (request, head) is cut into parts of so many units, whatever the batch
  float* partial_out;  // [slots][tile rows][D padded], unnormalised
  float* partial_ml;   // [slots][tile rows][2] running maximum (base 2), sum
  Shifts shifts;
};

// Query tokens of one request: where they begin in q, and how many.
struct Queries {
  int begin, count;
};

XLAYER_HD Queries queries_of(const Nvfp4AttentionParams& p, int request) {
  if (p.query_starts == nullptr) return {request * p.q_len, p.q_len};
  const int begin = p.query_starts[request];
  return {begin, p.query_starts[request + 1] - begin};
}

}  // namespace xlayer

// Where the gather finds a token: one thread of a block asks, and leaves the place to the others.
#pragma once

#include "params.h"

namespace xlayer {

// Where a token is. Addresses: in a page that of its K data in head 0, and what a thread adds the offsets of
// its scales to; else of K and V in head 0.
struct alignas(16) TokenPlace {
  uint64_t k, k_scale, v;
  int source;  // a Source, or what follows
};
constexpr int NOWHERE = -1;  // not a token of any request: its output is left as it is
constexpr int END = -2;      // after a thread's last token

// The request whose output range holds `token`: the last r with cu_seqlens[r] <= token.
__device__ __forceinline__ int find_request(const int32_t* cu_seqlens, int num_requests, int64_t token) {
  int lo = 0, hi = num_requests;
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    if (__ldg(cu_seqlens + mid) <= token) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  return lo;
}

template <typename S>
__device__ __forceinline__ TokenPlace place_of(const Nvfp4GatherParams& p, int64_t token) {
  const int64_t begin = __ldg(p.cu_seqlens), end = __ldg(p.cu_seqlens + p.num_requests);
  if (token >= p.num_tokens || token < begin || token >= end) return {0, 0, 0, NOWHERE};
  const int r = find_request(p.cu_seqlens, p.num_requests, token);
  const int64_t position = p.seq_starts[r] + (token - p.cu_seqlens[r]);
  const uint32_t logical_block = uint32_t(position) / uint32_t(p.page.block_size);
  // Asked for before it is known whether the token is read from its page: one wait, not two.
  const int64_t block = p.block_table[r * p.block_table_stride + logical_block];
  const TokenSource source = source_of(p, r, position);
  const auto address = [](const void* base, int64_t elements) {
    return reinterpret_cast<uintptr_t>(base) + uint64_t(elements) * sizeof(S);
  };
  switch (source.kind) {
    case Source::OWN:
      return {address(p.key, source.at * p.key_stride_t), 0, address(p.value, source.at * p.value_stride_t),
              int(Source::OWN)};
    case Source::NEWEST: {
      const auto at = [&](bool is_v) {
        return newest_offset(p.page, p.newest_tokens, source.row, is_v, 0, source.at);
      };
      return {address(p.newest, at(false)), 0, address(p.newest, at(true)), int(Source::NEWEST)};
    }
    case Source::PAGE: break;
  }
  const int n = int(position - int64_t(logical_block) * p.page.block_size);
  const uint64_t page = reinterpret_cast<uintptr_t>(p.cache + block * p.block_stride);
  return {page + uint64_t(p.page.data_offset(false, 0, n)),
          page + unsigned(p.page.scale_index(ScaleOrder::LINEAR, n, 0)),
          page + unsigned(p.page.scale_index(p.v_order, n, 0)), int(Source::PAGE)};
}

}  // namespace xlayer

// The one description of where an NVFP4 page's bytes are.
//
// A page is one layer's part of a block: N tokens, H KV heads, head size D, S = D/16 block scales a
// token and head. It is dense, 9D/8 * N * H bytes:
//
//   offset              size         content
//   0                   H*N*D/2      K data    [H][N][D/2]  words of 8 elements, see packed.cuh
//   H*N*D/2             H*N*S        K scale   [H][N][S]    e4m3
//   H*N*(D/2+S)         H*N*D/2      V data    [H][N][D/2]
//   H*N*(D+S)           H*N*S        V scale   [H][N][S]    or swizzled, see v_scale_index
//
// D and N are multiples of 16, so every part starts at a multiple of 16 bytes.
#pragma once

#include "../common/host_device.h"

namespace xlayer {

constexpr int GROUP = 16;  // elements that share a block scale

enum class ScaleOrder : int { LINEAR = 0, SWIZZLED = 1 };

struct Page {
  int heads;       // H
  int block_size;  // N
  int head_size;   // D

  XLAYER_HD int scales() const { return head_size / GROUP; }  // S
  XLAYER_HD int64_t data_bytes() const { return int64_t(heads) * block_size * (head_size / 2); }
  XLAYER_HD int64_t scale_bytes() const { return int64_t(heads) * block_size * scales(); }
  XLAYER_HD int64_t bytes() const { return 2 * (data_bytes() + scale_bytes()); }

  // First data byte of token n, head h. is_v selects the V half of the page.
  XLAYER_HD int64_t data_offset(bool is_v, int h, int n) const {
    return (is_v ? data_bytes() + scale_bytes() : 0) + (int64_t(h) * block_size + n) * (head_size / 2);
  }

  // First block scale of head h.
  XLAYER_HD int64_t scale_base(bool is_v, int h) const {
    return data_bytes() + (is_v ? data_bytes() + scale_bytes() : 0) + int64_t(h) * block_size * scales();
  }

  // Where scale s of token n is, from scale_base. Swizzled (S a multiple of 4): inside each group of
  // four tokens the [4][S] matrix of scales is stored as [4][S/4][4], token index last.
  XLAYER_HD int scale_index(ScaleOrder order, int n, int s) const {
    const int S = scales();
    if (order == ScaleOrder::LINEAR) return n * S + s;
    const int quarter = S / 4;
    return ((n & ~3) + s / quarter) * S + (s % quarter) * 4 + (n & 3);
  }
};

// Where the newest tokens of a running request are kept unquantised: [rows][2: K, V][H][tokens][D] elements,
// dense. Token p of a request has place p % tokens, tokens a multiple of 16: a tile of 16 tokens of a head is
// contiguous, and read from there whole or not at all.
constexpr int NEWEST_TILE = 16;

XLAYER_HD int64_t newest_offset(const Page& page, int tokens, int64_t row, bool is_v, int h, int64_t place) {
  return (((row * 2 + is_v) * page.heads + h) * tokens + place) * page.head_size;
}

}  // namespace xlayer

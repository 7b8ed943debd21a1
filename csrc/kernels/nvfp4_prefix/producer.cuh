// The warpgroups that make operands of pages: tiles of 128 tokens of K or of V, as halves.
#pragma once

#include "../common/ptx.cuh"
#include "../common/wgmma.cuh"
#include "../nvfp4/dequantise.cuh"
#include "../nvfp4_attention/params.h"
#include "shared.cuh"

namespace xlayer::prefix {

// 2^32 / (tokens of a page / 16), rounded up: times a token / 16 and / 2^32 it is the token's page, for 2^24
// tokens.
inline uint64_t per_page(int block_size) {
  const uint64_t tiles = uint64_t(block_size) / TILE;
  return ((uint64_t(1) << 32) + tiles - 1) / tiles;
}

// Each warp copies 32 tokens of a tile as they are, STAGES tiles ahead, and dequantises them. Of the tokens
// i + 8 r (i: lane % 8) a lane has dimensions 32 c to 32 c + 31. In both steps eight lanes that move 16 bytes
// at once meet all banks: their c is (lane / 8 + i / 2) % 4.
class Producer {
 public:
  __device__ __forceinline__ Producer(const Nvfp4AttentionParams& p, uint64_t per_page, uint32_t shared,
                                      const Barriers& barriers, bool v, int request, int kv_head, int len)
      : p_(p),
        per_page_(per_page),
        barriers_(barriers),
        table_(p.block_table + request * p.block_table_stride),
        v_(v),
        len_(len),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        begin_(WARP_TOKENS * (warp_ % GROUP_WARPS)) {
    const int i = lane_ % 8, c = (lane_ / 8 + i / 2) % 4;
    first_ = begin_ + i;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      to_[w] = shared + (v ? V_AT : K_AT) + c / 2 * PANEL + first_ * 128 + 16 * ((c % 2 * 4 + w) ^ i);
    }
    const uint32_t copied = shared + COPIED_AT + warp_ * WARP_COPIED;
    data_from_ = copied + i * TOKEN_DATA + 16 * c;
    scales_from_ = copied + WARP_TOKENS * TOKEN_DATA + i * TOKEN_SCALES + 2 * c;
    // Four lanes copy: data and scales of the first 16 tokens, then of the others.
    piece_ = lane_ / 2 % 2;
    const bool scales = lane_ % 2;
    token_bytes_ = scales ? TOKEN_SCALES : TOKEN_DATA;
    from_ = p.cache + (scales ? p.page.scale_base(v, kv_head) : p.page.data_offset(v, kv_head, 0));
    copied_to_ = copied + scales * WARP_TOKENS * TOKEN_DATA + piece_ * TILE * token_bytes_;
  }

  __device__ __forceinline__ void run(int tiles) {
    look_up(0);
    for (int i = 0; i < STAGES && i < tiles; ++i) {
      copy(i);
      look_up(i + 1);
    }
    for (int i = 0; i < tiles; ++i) {
      const int stage = i % STAGES;
      const uint32_t parity = i / STAGES & 1;
      Loaded now;
      wgmma::barrier_wait(barriers_.copied(warp_, stage), parity);
      load(now, i, stage);
      __syncwarp();
      if (i + STAGES < tiles) {
        copy(i + STAGES);
        look_up(i + STAGES + 1);
      }
      wgmma::barrier_wait(barriers_.empty(v_, stage), parity ^ 1);
      store(now, stage);
      wgmma::stores_are_seen();
      // Each lane for its own stores: faster than lane 0 after a __syncwarp, and racecheck follows only
      // these.
      wgmma::barrier_arrive(barriers_.full(v_, stage));
    }
  }

 private:
  struct Loaded {
    uint32_t data[4][4];
    uint32_t scales[4];  // two e4m3
  };

  // Which of the request's blocks a token is in: pages are multiples of 16 tokens.
  __device__ __forceinline__ int logical(int token) const {
    return int(uint64_t(token / TILE) * per_page_ >> 32);
  }
  __device__ __forceinline__ int copied_token(int tile) const { return tile * KEYS + begin_ + piece_ * TILE; }
  __device__ __forceinline__ void look_up(int tile) {
    block_ = __ldg(table_ + logical(min(copied_token(tile), len_ - 1)));
  }
  __device__ __forceinline__ void copy(int tile) const {
    const int pieces = min(max((len_ - tile * KEYS - begin_ + TILE - 1) / TILE, 0), WARP_TOKENS / TILE),
              stage = tile % STAGES;
    const uint32_t barrier = barriers_.copied(warp_, stage);
    if (lane_ == 0) wgmma::barrier_expect(barrier, pieces * TILE * (TOKEN_DATA + TOKEN_SCALES));
    __syncwarp();
    const int token = copied_token(tile), n = token - logical(token) * p_.page.block_size;
    if (lane_ < 2 * pieces) {
      wgmma::copy(copied_to_ + stage * STAGE_COPIED,
                  from_ + (int64_t(uint32_t(block_)) * p_.block_stride + n * token_bytes_),
                  TILE * token_bytes_, barrier);
    }
  }

  // Tokens past the last have scales of zero: their memory may be anything.
  __device__ __forceinline__ void load(Loaded& to, int tile, int stage) const {
    const uint32_t at = stage * STAGE_COPIED;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      ptx::load_shared<16>(data_from_ + at + r * 8 * TOKEN_DATA, to.data[r]);
      const uint32_t two = ptx::load_shared_u16(scales_from_ + at + r * 8 * TOKEN_SCALES);
      to.scales[r] = tile * KEYS + first_ + 8 * r < len_ ? two : 0u;
    }
  }

  __device__ __forceinline__ void store(const Loaded& from, int stage) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const __half2 scales = ptx::e4m3x2_to_half2(from.scales[r]);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const Places places(from.data[r][w], p_.shifts);
        const __half2 scale = w < 2 ? __low2half2(scales) : __high2half2(scales);
        const uint32_t halves[4] = {places.times(0, scale), places.times(1, scale), places.times(2, scale),
                                    places.times(3, scale)};
        ptx::store_shared(to_[w] + stage * OPERAND + r * 8 * 128, halves);
      }
    }
  }

  const Nvfp4AttentionParams& p_;
  const uint64_t per_page_;
  const Barriers barriers_;
  const int32_t* table_;
  const bool v_;
  int len_, lane_, warp_, begin_, first_, piece_, token_bytes_, block_;
  uint32_t to_[4], data_from_, scales_from_, copied_to_;
  const uint8_t* from_;
};

}  // namespace xlayer::prefix

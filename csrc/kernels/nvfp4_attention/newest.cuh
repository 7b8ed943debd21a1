// A warp's work on one tile of the newest tokens, which are not quantised: straight from global memory, in a
// loop of its own before the pages' tiles or after them (`NEWEST_FIRST`).
//
// Fragments are those of tile.cuh: a lane has of K rows g and g + 8, of V tokens t, t + 4, t + 8 and t + 12, and
// the same dimensions of them. So Q's fragments, the softmax and the output's order are the same. What differs
// is the unit. Pages' values are 2^-14 of what they stand for and leave the global scale to others, which is
// no power of two, nor would that leave halves all their bits. These are as many times a power of two as lies
// below NEWEST_UNIT over the global scale: so they are exact. Scores are brought to the pages' unit; the output
// goes into the other unit before the loop, where there is any, and back after it, as floats.
#pragma once

#include "query.cuh"

namespace xlayer::attention {

// Pages end at 2688 times the global scale: that is still a half, and so is what is 2^-29 of it.
constexpr float NEWEST_UNIT = 16.0f;

template <class C>
class NewestTile {
 public:
  // A row's K and V of one head.
  __device__ __forceinline__ NewestTile(const Nvfp4AttentionParams& p, int row, int kv_head)
      : p_(p),
        k_(static_cast<const uint16_t*>(p.newest) +
           newest_offset(p.page, p.newest_tokens, row, false, kv_head, 0)),
        v_(k_ + int64_t(p.page.heads) * p.newest_tokens * C::D),
        k_unit_(unit(*p.k_scale)),
        v_unit_(unit(*p.v_scale)),
        k_to_pages_(to_pages(k_unit_, *p.k_scale)) {}

  __device__ __forceinline__ void to_newest_unit(WarpState<C>& state) const {
    scale_out(state, UNSCALE * v_unit_ * *p_.v_scale);
  }
  __device__ __forceinline__ void to_page_unit(WarpState<C>& state) const {
    scale_out(state, to_pages(v_unit_, *p_.v_scale));
  }

  __device__ __forceinline__ void attend(WarpState<C>& state, const TileMask& mask) const {
    const int place = mask.first_token % p_.newest_tokens;  // a tile's places are contiguous
    float s[C::NT][4];
    multiply_k(state, place, s);
    if (mask.soft_cap > 0.0f) Tile<C>::cap(s, mask.soft_cap, state);
    Tile<C>::mask_logits(s, mask);
    uint32_t weights[C::NT][2];
    Order<C>::softmax(state, s, weights);
    multiply_v(state, place, weights, mask);
  }

 private:
  __device__ __forceinline__ static float unit(float scale) {
    constexpr uint32_t SIGN_AND_EXPONENT = 0xFF800000u;
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, NEWEST_UNIT / scale) & SIGN_AND_EXPONENT);
  }
  __device__ __forceinline__ static float to_pages(float unit, float scale) {
    return 1.0f / (UNSCALE * unit * scale);
  }

  __device__ __forceinline__ static void scale_out(WarpState<C>& state, float by) {
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
#pragma unroll
      for (int m = 0; m < C::M_TILES; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state.out[n][m][i] *= by;
      }
    }
  }

  // Two elements times `unit` as halves; beyond a half's range, its largest.
  __device__ __forceinline__ uint32_t halves(uint32_t pair, float unit) const {
    const float2 x = to_float2(pair, p_.dtype);
    return ptx::saturated_halves(x.x * unit, x.y * unit);
  }

  __device__ __forceinline__ void multiply_k(const WarpState<C>& state, int place,
                                             float (&s)[C::NT][4]) const {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const uint16_t* rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) rows[half] = k_ + (place + token_of_row(g) + 8 * half) * C::D;
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
    }
    uint4 words[2][C::WORDS];
#pragma unroll
    for (int w = 0; w < C::WORDS; ++w) {
#pragma unroll
      for (int half = 0; half < 2; ++half) words[half][w] = eight(rows[half], C::k_dim(t, w));
    }
#pragma unroll
    for (int w = 0; w < C::WORDS; ++w) {
      uint32_t even[4], odd[4];  // elements 0 2 | 4 6 and 1 3 | 5 7 of a word, as the queries have them
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 x = words[half][w];
        const uint32_t a = halves(x.x, k_unit_), b = halves(x.y, k_unit_);
        const uint32_t c = halves(x.z, k_unit_), d = halves(x.w, k_unit_);
        even[half] = __byte_perm(a, b, 0x5410u), even[2 + half] = __byte_perm(c, d, 0x5410u);
        odd[half] = __byte_perm(a, b, 0x7632u), odd[2 + half] = __byte_perm(c, d, 0x7632u);
      }
      Order<C>::multiply_k_word(state, w, even, odd, s);
    }
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= k_to_pages_;
    }
  }

  __device__ __forceinline__ void multiply_v(WarpState<C>& state, int place,
                                             const uint32_t (&weights)[C::NT][2],
                                             const TileMask& mask) const {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const uint16_t* rows[4];
    bool there[4];  // the weight is 0 elsewhere, but 0 times what was never written, which may be NaN, is not
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rows[i] = v_ + (place + t + 4 * i) * C::D;
      const int token = mask.first_token + t + 4 * i;
      there[i] = token >= mask.first && token < mask.last;
    }
#pragma unroll
    for (int chunk = 0; chunk < C::DP / 64; ++chunk) {  // eight of a lane's DP / 8 dimensions
      uint4 words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = there[i] ? eight(rows[i], g * (C::DP / 8) + 8 * chunk) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // two dimensions: rows g and g + 8 of an MMA tile
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint4 w = words[i];
          x[i] = halves(j == 0 ? w.x : j == 1 ? w.y : j == 2 ? w.z : w.w, v_unit_);
        }
        const uint32_t a[4] = {__byte_perm(x[0], x[1], 0x5410u), __byte_perm(x[0], x[1], 0x7632u),
                               __byte_perm(x[2], x[3], 0x5410u), __byte_perm(x[2], x[3], 0x7632u)};
        Order<C>::multiply_v_tile(state, 4 * chunk + j, a, weights);
      }
    }
  }

  // Elements d .. d + 7 of a token; zeros beyond the head.
  __device__ __forceinline__ static uint4 eight(const uint16_t* token, int d) {
    if (!C::EXACT && d >= C::D) return make_uint4(0, 0, 0, 0);
    return __ldg(reinterpret_cast<const uint4*>(token + d));
  }

  const Nvfp4AttentionParams& p_;
  const uint16_t *k_, *v_;
  const float k_unit_, v_unit_, k_to_pages_;
};

}  // namespace xlayer::attention

// A warp's work on one tile: 16 tokens of one KV head, all query rows of a head tile.
//
//   S^T [16 tokens x 8 rows]  = K [16 x D] Q^T [D x 8]       K is MMA operand A, straight from its bytes
//   O^T [D x 8 rows]         += V^T [D x 16] P^T [16 x 8]    V^T is operand A; P^T = S^T's registers
//   transposed
//
// Lane = 4 g + t. It holds, of K, rows g and g + 8 (tokens token_of_row(g), + 8), D/4 dimensions each; of V,
// D/8 dimensions of tokens t, t + 4, t + 8, t + 12; of S^T and O^T, query rows 2t and 2t + 1. The dimensions
// are permuted so that a lane's bytes are contiguous: Q is permuted with K, the output comes out in V's
// order.
//
// Sixteen query rows are operand A instead: rows_as_a.cuh.
#pragma once

#include <type_traits>

#include "../nvfp4/dequantise.cuh"
#include "rows_as_a.cuh"
#include "rows_as_b.cuh"

namespace xlayer::attention {

// What all lanes must know of the tile's place among the keys, and of capped logits.
struct TileMask {
  int first_token;       // of the tile
  int first, last;       // tokens outside are garbage: memory that nobody wrote, or freed
  int q_len, window;     // causal among the last q_len tokens; window 0: none
  int first_row, group;  // of the head tile; rows are query token * group + head in group
  float soft_cap;        // 0: none
};

// Shared addresses of what a lane reads of the ring's first stage.
template <class C>
struct LaneOffsets {
  static constexpr int V_GROUPS = C::DP == 256 ? 2 : 1;  // scale groups of V's dimensions of a lane
  uint32_t k_data, k_scale[C::EXACT && C::DP > 64 ? 1 : 2], v_data, v_scale[V_GROUPS];
  const Shifts& shifts;

  __device__ __forceinline__ LaneOffsets(uint32_t ring, const Nvfp4AttentionParams& p)
      : shifts(p.shifts) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int token = token_of_row(g);
    if (C::DP == 64) {
      k_data = ring + g * C::ROW + 8 * t;
      k_scale[0] = ring + C::K_SCALE + token * C::S + t;
    } else {
      k_data = ring + g * C::ROW + 16 * C::k_chunk(g, t);
      k_scale[0] = ring + C::K_SCALE + token * C::S + (C::EXACT ? 2 * t : min(2 * t, C::S - 1));
      if (!C::EXACT) k_scale[1] = ring + C::K_SCALE + token * C::S + min(2 * t + 1, C::S - 1);
    }
    // Rows t, t + 4, ... are swizzled alike.
    const int byte = g * (C::DP / 16);
    v_data = ring + C::V_DATA + t * C::ROW + 16 * C::v_chunk(t, byte / 16) + byte % 16;
#pragma unroll
    for (int i = 0; i < V_GROUPS; ++i) {
      const int s = min(C::DP == 256 ? 2 * g + i : C::DP == 128 ? g : g / 2, C::S - 1);
      v_scale[i] = ring + C::V_SCALE;
      if (p.v_order == ScaleOrder::LINEAR) {
        v_scale[i] += t * C::S + s;
      } else {  // Page::scale_index: a group of four tokens is [4][S/4][4], the token last
        constexpr int QUARTER = C::S >= 4 ? C::S / 4 : 1;
        v_scale[i] += s / QUARTER * C::S + s % QUARTER * 4 + t;
      }
    }
  }
};

// Which side of the products has the query rows; K and V are dequantised alike.
template <class C>
using Order = std::conditional_t<C::ROWS_M, RowsAsA<C>, RowsAsB<C>>;

template <class C>
class Tile {
 public:
  // stage: its offset in the ring. mask: null where every query sees every token of the tile and no logit is
  // capped.
  __device__ __forceinline__ static void attend(WarpState<C>& state, uint32_t stage, const LaneOffsets<C>& at,
                                                const TileMask* mask) {
    float s[C::NT][4];
    multiply_k(state, stage, at, s);
    if (mask != nullptr) {
      if (mask->soft_cap > 0.0f) cap(s, mask->soft_cap, state);
      mask_logits(s, *mask);
    }
    uint32_t p[C::NT][2];
    Order<C>::softmax(state, s, p);
    multiply_v(state, stage, at, p, mask);
  }

  // S^T becomes what gives the capped logits when it is multiplied by the factor.
  __device__ __forceinline__ static void cap(float (&s)[C::NT][4], float soft_cap,
                                             const WarpState<C>& state) {
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // tanh(x) = 1 - 2 / (1 + e^2x): more exact than tanh.approx.
        const float factor = state.factor[Held<C>::stat(n, i)];
        const float x = __fdividef(s[n][i] * factor, soft_cap * LOG2E);
        const float tanh_x = 1.0f - __fdividef(2.0f, 1.0f + ptx::exp2_approx(2.0f * LOG2E * x));
        s[n][i] = __fdividef(soft_cap * LOG2E * tanh_x, factor);
      }
    }
  }

  __device__ __forceinline__ static void mask_logits(float (&s)[C::NT][4], const TileMask& mask) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = Held<C>::row(mask.first_row, g, t, Held<C>::stat(n, i));
        const int query = mask.last - mask.q_len + row / mask.group;
        const int key = Held<C>::token(mask.first_token, g, t, n, i);
        const bool seen = key <= query && (mask.window == 0 || key > query - mask.window);
        if (!seen) s[n][i] = -INFINITY;
      }
    }
  }

 private:
  __device__ __forceinline__ static void multiply_k(const WarpState<C>& state, uint32_t stage,
                                                    const LaneOffsets<C>& at, float (&s)[C::NT][4]) {
    uint32_t words[2][C::WORDS];
    __half2 scales[2][C::DP == 64 ? 1 : C::DP / 128];
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // rows g and g + 8
      constexpr int BYTES = C::DP == 64 ? 8 : 16;
      const uint32_t data = stage + at.k_data + half * 8 * C::ROW;
      const uint32_t scale = stage + half * 8 * C::S;
#pragma unroll
      for (int i = 0; i < C::WORDS * 4 / BYTES; ++i) {
        // The second chunk of a 128-byte row is chunk t + 4: with the swizzle, 64 bytes up or down.
        ptx::load_shared<BYTES>(i == 0 ? data : data ^ 64u, words[half] + i * BYTES / 4);
      }
      if constexpr (C::DP == 64) {
        scales[half][0] = ptx::e4m3x2_to_half2(ptx::load_shared_u8(scale + at.k_scale[0]) * 0x0101u);
      } else {
#pragma unroll
        for (int i = 0; i < C::DP / 128; ++i) {
          // Groups 8 i + 2 t and the next.
          uint32_t bytes;
          if constexpr (C::EXACT) {
            bytes = ptx::load_shared_u16(scale + at.k_scale[0] + 8 * i);
          } else {
            bytes = ptx::load_shared_u8(scale + at.k_scale[0] + groups_on(i, 0)) |
                    ptx::load_shared_u8(scale + at.k_scale[1] + groups_on(i, 1)) << 8;
          }
          scales[half][i] = ptx::e4m3x2_to_half2(bytes);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
    }
#pragma unroll
    for (int w = 0; w < C::WORDS; ++w) {
      const Places a(words[0][w], at.shifts), b(words[1][w], at.shifts);
      const __half2 a_scale = scale_of_word(scales[0], w), b_scale = scale_of_word(scales[1], w);
      const uint32_t even[4] = {a.times(0, a_scale), b.times(0, b_scale), a.times(2, a_scale),
                                b.times(2, b_scale)};
      const uint32_t odd[4] = {a.times(1, a_scale), b.times(1, b_scale), a.times(3, a_scale),
                               b.times(3, b_scale)};
      Order<C>::multiply_k_word(state, w, even, odd, s);
    }
  }

  // From the scale of group 2 t + j to that of 8 i groups further on, or the token's last: data is zero
  // there.
  __device__ __forceinline__ static uint32_t groups_on(int i, int j) {
    const int group = 2 * int(threadIdx.x & 3) + j;
    return i == 0 ? 0 : min(8 * i, C::S - 1 - group);
  }

  __device__ __forceinline__ static __half2 scale_of_word(const __half2* scales, int w) {
    if constexpr (C::DP == 64) return scales[0];
    return w % 4 < 2 ? __low2half2(scales[w / 4]) : __high2half2(scales[w / 4]);
  }

  __device__ __forceinline__ static void multiply_v(WarpState<C>& state, uint32_t stage,
                                                    const LaneOffsets<C>& at, const uint32_t (&p)[C::NT][2],
                                                    const TileMask* mask) {
    constexpr int BYTES = 4 * C::V_WORDS;
    uint32_t words[4][C::V_WORDS];  // of tokens t, t + 4, t + 8, t + 12
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::load_shared<BYTES>(stage + at.v_data + i * 4 * C::ROW, words[i]);
    __half2 scales[LaneOffsets<C>::V_GROUPS][2];  // (t, t + 4) and (t + 8, t + 12)
#pragma unroll
    for (int group = 0; group < LaneOffsets<C>::V_GROUPS; ++group) {
      uint32_t bytes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bytes[i] = ptx::load_shared_u8(stage + at.v_scale[group] + i * 4 * C::S);
        if (mask != nullptr) {
          // P is 0 there, but 0 times a garbage scale, which may be NaN, is not.
          const int token = mask->first_token + int(threadIdx.x & 3) + 4 * i;
          if (token < mask->first || token >= mask->last) bytes[i] = 0;
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j)
        scales[group][j] = ptx::e4m3x2_to_half2(bytes[2 * j] | bytes[2 * j + 1] << 8);
    }
#pragma unroll
    for (int w = 0; w < C::V_WORDS; ++w) {
      const __half2 s0 = scales[w / 2 % LaneOffsets<C>::V_GROUPS][0];
      const __half2 s1 = scales[w / 2 % LaneOffsets<C>::V_GROUPS][1];
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // lanes of the word
        // Two tokens' lanes side by side: pairs are then of the same dimension.
        constexpr uint32_t SELECT[2] = {0x5410u, 0x7632u};
        const Places a(__byte_perm(words[0][w], words[1][w], SELECT[half]), at.shifts);
        const Places b(__byte_perm(words[2][w], words[3][w], SELECT[half]), at.shifts);
        const uint32_t first[4] = {a.times(0, s0), a.times(1, s0), b.times(0, s1), b.times(1, s1)};
        const uint32_t second[4] = {a.times(2, s0), a.times(3, s0), b.times(2, s1), b.times(3, s1)};
        // Dimensions 8 w + 2 half + (0, 1) and (4, 5) of the lane's.
        Order<C>::multiply_v_tile(state, 4 * w + half, first, p);
        Order<C>::multiply_v_tile(state, 4 * w + 2 + half, second, p);
      }
    }
  }
};

}  // namespace xlayer::attention

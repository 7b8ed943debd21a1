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
// Sixteen query rows are operand A instead (ROWS_M). B's fragment of eight tokens is half of A's of sixteen,
// in the same registers, so K and V are dequantised alike:
//
//   S [16 rows x 8 tokens]  = Q [16 x D] K^T [D x 8]         for tokens 0 to 7 and 8 to 15 of the tile
//   O [16 rows x 8]        += P [16 x 16] V [16 x 8]         for the dimensions of A's rows g, and of g + 8
//
// P is S's registers as they are; a lane has rows g and g + 8 of S and O, so half as many maxima and sums.
#pragma once

#include "../common/ptx.cuh"
#include "config.cuh"
#include "dequantise.cuh"

namespace xlayer::attention {

// What all lanes must know of the tile's place among the keys, and of capped logits.
struct TileMask {
  int first_token;       // of the tile
  int first, last;       // tokens outside are garbage: memory that nobody wrote, or freed
  int q_len, window;     // causal among the last q_len tokens; window 0: none
  int first_row, group;  // of the head tile; rows are query token * group + head in group
  float soft_cap;        // 0: none
};

// What Q^T has for eight rows and a word of K, in one lane: its two fragments of even elements, then of odd ones.
// Or (ROWS_M) operand A of sixteen rows.
struct QueryWord {
  uint32_t b[4];
};

// Q^T fragments: halves, each row times a power of two; of rows n and word w of K. With ROWS_M `load` has, of
// sixteen rows, the even elements where n is even, else the odd ones.
template <class C, bool SHARED = C::SHARED_Q>
struct QueryFragments {
  QueryWord all[C::NT][C::WORDS];

  __device__ __forceinline__ void store(int n, int w, const QueryWord& q) {
    if constexpr (C::ROWS_M) {
#pragma unroll
      for (int i = 0; i < 4; ++i) all[n / 2 * 2 + i / 2][w].b[n % 2 + i % 2 * 2] = q.b[i];
    } else {
      all[n][w] = q;
    }
  }
  __device__ __forceinline__ const QueryWord& load(int n, int w) const { return all[n][w]; }
};

// In shared memory: the same for all warps, and each stores some rows. None may still read the last run's.
template <class C>
struct QueryFragments<C, true> {
  uint32_t at;  // this lane's first

  // What lane `lane` has as b[i] of rows n and word w, and its row's factor.
  __device__ __forceinline__ void store(int lane, int n, int w, int i, uint32_t pair) {
    const uint32_t theirs = 16 * (lane - int(threadIdx.x & 31));
    if constexpr (C::ROWS_M) {
      ptx::store_shared(place(n / 2 * 2 + i / 2, w) + theirs + 4 * (n % 2 + i % 2 * 2), pair);
    } else {
      ptx::store_shared(place(n, w) + theirs + 4 * i, pair);
    }
  }
  __device__ __forceinline__ void store_factor(int row, float factor) {
    ptx::store_shared(factors() + 4 * row, float_bits(factor));
  }
  __device__ __forceinline__ float load_factor(int row) const {
    uint32_t bits;
    ptx::load_shared<4>(factors() + 4 * row, &bits);
    return bits_float(bits);
  }
  __device__ __forceinline__ QueryWord load(int n, int w) const {
    QueryWord q;
    ptx::load_shared<16>(place(n, w), q.b);
    return q;
  }

 private:
  __device__ __forceinline__ uint32_t place(int n, int w) const { return at + (n * C::WORDS + w) * C::Q_WORD; }
  __device__ __forceinline__ uint32_t factors() const {
    return at - 16 * int(threadIdx.x & 31) + (C::Q_FACTORS - C::Q_OFFSET);
  }
};

template <class C>
struct WarpState {
  QueryFragments<C> q;
  float out[C::NT][C::M_TILES][4];     // O^T, times UNSCALE^-1
  // Of the rows that this lane has (Held):
  float factor[C::STATS];              // logits in base 2 = S^T * factor
  float max[C::STATS];                 // of the logits in base 2, less HEADROOM; may lag by LAZY
  float sum[C::STATS];                 // this lane's part

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
#pragma unroll
      for (int m = 0; m < C::M_TILES; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][m][i] = 0.0f;
      }
    }
#pragma unroll
    for (int j = 0; j < C::STATS; ++j) max[j] = EMPTY, sum[j] = 0.0f;
  }
};

// Shared addresses of what a lane reads of the ring's first stage.
template <class C>
struct LaneOffsets {
  static constexpr int V_GROUPS = C::DP == 256 ? 2 : 1;  // scale groups of V's dimensions of a lane
  uint32_t k_data, k_scale[C::EXACT && C::DP > 64 ? 1 : 2], v_data, v_scale[V_GROUPS];
  const Shifts shifts;

  __device__ __forceinline__ LaneOffsets(uint32_t ring, const Nvfp4AttentionParams& p)
      : shifts{p.two, p.sixteen} {
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
    softmax(state, s, p);
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

  __device__ __forceinline__ static void softmax(WarpState<C>& state, const float (&s)[C::NT][4],
                                                 uint32_t (&p)[C::NT][2]) {
    if constexpr (C::ROWS_M) return softmax_of_rows(state, s, p);
    float x[C::NT][4];
    exponents(state, s, x);
    bool lags = false;
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) lags = lags || fmaxf(x[n][j], x[n][2 + j]) > HEADROOM + LAZY;
    }
    if (__any_sync(0xFFFFFFFFu, lags)) {
#pragma unroll
      for (int stat = 0; stat < C::STATS; ++stat) rescale(state, s, stat);
      exponents(state, s, x);
    }
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
      float e[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        e[i] = ptx::exp2_approx(x[n][i]);
        state.sum[Held<C>::stat(n, i)] += e[i];
      }
      p[n][0] = ptx::transpose_8x8(pack(e[0], e[1]));
      p[n][1] = ptx::transpose_8x8(pack(e[2], e[3]));
    }
  }

  // With ROWS_M a lane has four P of a row, of which it needs the sum anyway: if that is within what one may
  // reach, so is each. A lane has two rows of sixteen, the warp eight of either kind: only where one of those
  // eight lags are they rescaled, which takes 32 multiplications. With logits that differ by 18 bits (random
  // pages) that happens in a third of a short run's tiles.
  __device__ __forceinline__ static void softmax_of_rows(WarpState<C>& state, const float (&s)[C::NT][4],
                                                         uint32_t (&p)[C::NT][2]) {
    constexpr float MOST = float(1 << int(HEADROOM + LAZY));
    float e[C::NT][4], added[C::STATS];
    bool lags = false;
#pragma unroll
    for (int stat = 0; stat < C::STATS; ++stat) {
      added[stat] = weigh(state, s, stat, e);
      lags |= added[stat] > MOST;
    }
    if (__any_sync(0xFFFFFFFFu, lags)) {
#pragma unroll
      for (int stat = 0; stat < C::STATS; ++stat) {
        if (__any_sync(0xFFFFFFFFu, added[stat] > MOST)) {
          rescale(state, s, stat);
          added[stat] = weigh(state, s, stat, e);
        }
      }
    }
#pragma unroll
    for (int stat = 0; stat < C::STATS; ++stat) state.sum[stat] += added[stat];
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) p[n][j] = pack(e[n][2 * j], e[n][2 * j + 1]);
    }
  }

  // Adds what a word of K has: even[4] and odd[4] are operand A of its even and odd elements.
  __device__ __forceinline__ static void multiply_k_word(const WarpState<C>& state, int w,
                                                         const uint32_t (&even)[4], const uint32_t (&odd)[4],
                                                         float (&s)[C::NT][4]) {
    if constexpr (C::ROWS_M) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        const uint32_t(&k)[4] = parity == 0 ? even : odd;
#pragma unroll
        for (int n = 0; n < C::NT; n += 2) {
          const auto& q = state.q.load(n + parity, w);
          ptx::mma_16816(s[n], q.b[0], q.b[1], q.b[2], q.b[3], k[0], k[2]);
          ptx::mma_16816(s[n + 1], q.b[0], q.b[1], q.b[2], q.b[3], k[1], k[3]);
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < C::NT; ++n) {
        const auto& q = state.q.load(n, w);
        ptx::mma_16816(s[n], even[0], even[1], even[2], even[3], q.b[0], q.b[1]);
        ptx::mma_16816(s[n], odd[0], odd[1], odd[2], odd[3], q.b[2], q.b[3]);
      }
    }
  }

  // Adds an MMA tile of V^T, as operand A: rows g and g + 8 are dimensions 2 m and 2 m + 1 of the lane's.
  __device__ __forceinline__ static void multiply_v_tile(WarpState<C>& state, int m, const uint32_t (&v)[4],
                                                         const uint32_t (&p)[C::NT][2]) {
    if constexpr (C::ROWS_M) {
#pragma unroll
      for (int n = 0; n < C::NT; ++n) {
        const int j = n % 2, first = n - j;
        ptx::mma_16816(state.out[n][m], p[first][0], p[first][1], p[first + 1][0], p[first + 1][1], v[j],
                       v[2 + j]);
      }
    } else {
#pragma unroll
      for (int n = 0; n < C::NT; ++n) {
        ptx::mma_16816(state.out[n][m], v[0], v[1], v[2], v[3], p[n][0], p[n][1]);
      }
    }
  }

 private:
  // Logits in base 2, relative to the maximum: P's exponents.
  __device__ __forceinline__ static void exponents(const WarpState<C>& state, const float (&s)[C::NT][4],
                                                   float (&x)[C::NT][4]) {
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int stat = Held<C>::stat(n, i);
        x[n][i] = fmaf(s[n][i], state.factor[stat], -state.max[stat]);
      }
    }
  }

  // The same, as P, with ROWS_M and of one row of the lane's; returns their sum.
  __device__ __forceinline__ static float weigh(const WarpState<C>& state, const float (&s)[C::NT][4],
                                                int stat, float (&e)[C::NT][4]) {
    float sums[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {  // tokens 0 to 7 of the tile, and 8 to 15
      const int n = stat / 2 * 2 + j, i = stat % 2 * 2;
#pragma unroll
      for (int k = i; k < i + 2; ++k) {
        e[n][k] = ptx::exp2_approx(fmaf(s[n][k], state.factor[stat], -state.max[stat]));
      }
      sums[j] = e[n][i] + e[n][i + 1];
    }
    return sums[0] + sums[1];
  }

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
      const HighBytes a = high_bytes(words[0][w], at.shifts), b = high_bytes(words[1][w], at.shifts);
      const __half2 a_scale = scale_of_word(scales[0], w), b_scale = scale_of_word(scales[1], w);
      const uint32_t even[4] = {scaled_pair<0, 1>(a.even, a_scale), scaled_pair<0, 1>(b.even, b_scale),
                                scaled_pair<2, 3>(a.even, a_scale), scaled_pair<2, 3>(b.even, b_scale)};
      const uint32_t odd[4] = {scaled_pair<0, 1>(a.odd, a_scale), scaled_pair<0, 1>(b.odd, b_scale),
                               scaled_pair<2, 3>(a.odd, a_scale), scaled_pair<2, 3>(b.odd, b_scale)};
      multiply_k_word(state, w, even, odd, s);
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

  // Brings the maximum of one row of the lane's up to date, and its sum and output with it.
  __device__ __forceinline__ static void rescale(WarpState<C>& state, const float (&s)[C::NT][4], int stat) {
    const int n = stat / 2, j = stat % 2;
    float m;
    if constexpr (C::ROWS_M) {
      const int first = n * 2;
      m = fmaxf(fmaxf(s[first][2 * j], s[first][2 * j + 1]),
                fmaxf(s[first + 1][2 * j], s[first + 1][2 * j + 1]));
    } else {
      m = fmaxf(s[n][j], s[n][2 + j]);
    }
    m *= state.factor[stat];
#pragma unroll
    for (int lanes = Held<C>::LANES; lanes < Held<C>::LANES_END; lanes *= 2) {
      m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, lanes));
    }
    m = fmaxf(m - HEADROOM, state.max[stat]);
    const float shrink = ptx::exp2_approx(state.max[stat] - m);
    state.max[stat] = m;
    state.sum[stat] *= shrink;
#pragma unroll
    for (int k = 0; k < C::NT; ++k) {
#pragma unroll
      for (int d = 0; d < C::M_TILES; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (Held<C>::stat(k, i) == stat) state.out[k][d][i] *= shrink;
        }
      }
    }
  }

  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    return __builtin_bit_cast(uint32_t, __half2_raw(__floats2half2_rn(low, high)));
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
      for (int half = 0; half < 2; ++half) {  // elements 0..3 and 4..7 of the word
        // Two tokens' four elements side by side: pairs of the same dimension are then 16 bits apart.
        constexpr uint32_t SELECT[2] = {0x5410u, 0x7632u};
        const HighBytes a = high_bytes(__byte_perm(words[0][w], words[1][w], SELECT[half]), at.shifts);
        const HighBytes b = high_bytes(__byte_perm(words[2][w], words[3][w], SELECT[half]), at.shifts);
        const uint32_t first[4] = {scaled_pair<0, 2>(a.even, s0), scaled_pair<0, 2>(a.odd, s0),
                                   scaled_pair<0, 2>(b.even, s1), scaled_pair<0, 2>(b.odd, s1)};
        const uint32_t second[4] = {scaled_pair<1, 3>(a.even, s0), scaled_pair<1, 3>(a.odd, s0),
                                    scaled_pair<1, 3>(b.even, s1), scaled_pair<1, 3>(b.odd, s1)};
        // Dimensions 8 w + 4 half + (0, 1) and (2, 3) of the lane's.
        multiply_v_tile(state, 4 * w + 2 * half, first, p);
        multiply_v_tile(state, 4 * w + 2 * half + 1, second, p);
      }
    }
  }
};

}  // namespace xlayer::attention

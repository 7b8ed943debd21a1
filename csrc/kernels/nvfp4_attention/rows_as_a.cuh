// Query rows as operand A (Config::ROWS_M), sixteen of them. K's and V's fragments are those of tile.cuh: operand B
// of eight tokens is half of A of sixteen, in the same registers.
//
//   S [16 rows x 8 tokens]  = Q [16 x D] K^T [D x 8]         for tokens 0 to 7 and 8 to 15 of the tile
//   O [16 rows x 8]        += P [16 x 16] V [16 x 8]         for the dimensions of A's rows g, and of g + 8
//
// P is S's registers as they are; a lane has rows g and g + 8 of S and O, so half as many maxima and sums as with
// rows as operand B.
#pragma once

#include "state.cuh"

namespace xlayer::attention {

template <class C>
class RowsAsA {
 public:
  // P, for multiply_v_tile, of a tile's S; the maxima and sums of its rows.
  //
  // A lane has four P of a row, of which it needs the sum anyway: if that is within what one may reach, so is each. A
  // lane has two rows of sixteen, the warp eight of either kind: only where one of those eight lags are they rescaled,
  // which takes 32 multiplications. With logits that differ by 18 bits (random pages) that happens in a third of a
  // short run's tiles.
  __device__ __forceinline__ static void softmax(WarpState<C>& state, const float (&s)[C::NT][4],
                                                 uint32_t (&p)[C::NT][2]) {
    float e[C::NT][4], added[C::STATS];
    bool lags = false;
#pragma unroll
    for (int stat = 0; stat < C::STATS; ++stat) {
      added[stat] = weigh(state, s, stat, e);
      lags |= added[stat] > MOST_P;
    }
    if (__any_sync(0xFFFFFFFFu, lags)) {
#pragma unroll
      for (int stat = 0; stat < C::STATS; ++stat) {
        if (__any_sync(0xFFFFFFFFu, added[stat] > MOST_P)) {
          state.rescale(stat, most(s, stat));
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

  // Adds what a word of K has: even[4] and odd[4] are its even and odd elements as operand A of sixteen tokens, of
  // which half is B of eight.
  __device__ __forceinline__ static void multiply_k_word(const WarpState<C>& state, int w,
                                                         const uint32_t (&even)[4], const uint32_t (&odd)[4],
                                                         float (&s)[C::NT][4]) {
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
  }

  // Adds an MMA tile of V^T, which is operand A: its rows g, dimensions 2 m of the lanes', are operand B of n = 0, its
  // rows g + 8 of n = 1.
  __device__ __forceinline__ static void multiply_v_tile(WarpState<C>& state, int m, const uint32_t (&v)[4],
                                                         const uint32_t (&p)[C::NT][2]) {
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
      const int j = n % 2, first = n - j;
      ptx::mma_16816(state.out[n][m], p[first][0], p[first][1], p[first + 1][0], p[first + 1][1], v[j],
                     v[2 + j]);
    }
  }

 private:
  // P of one row of the lane's; returns their sum.
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

  // The largest S that this lane has of a row.
  __device__ __forceinline__ static float most(const float (&s)[C::NT][4], int stat) {
    const int first = stat / 2 * 2, j = stat % 2;
    return fmaxf(fmaxf(s[first][2 * j], s[first][2 * j + 1]),
                 fmaxf(s[first + 1][2 * j], s[first + 1][2 * j + 1]));
  }
};

}  // namespace xlayer::attention

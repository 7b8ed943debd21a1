// Query rows as operand B, eight of them, and the tile's sixteen tokens as A: the order that tile.cuh describes.
#pragma once

#include "state.cuh"

namespace xlayer::attention {

template <class C>
class RowsAsB {
 public:
  // P, for multiply_v_tile, of a tile's S^T; the maxima and sums of its rows.
  __device__ __forceinline__ static void softmax(WarpState<C>& state, const float (&s)[C::NT][4],
                                                 uint32_t (&p)[C::NT][2]) {
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
      for (int stat = 0; stat < C::STATS; ++stat) state.rescale(stat, most(s, stat));
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

  // Adds what a word of K has: even[4] and odd[4] are operand A of its even and odd elements.
  __device__ __forceinline__ static void multiply_k_word(const WarpState<C>& state, int w,
                                                         const uint32_t (&even)[4], const uint32_t (&odd)[4],
                                                         float (&s)[C::NT][4]) {
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
      const auto& q = state.q.load(n, w);
      ptx::mma_16816(s[n], even[0], even[1], even[2], even[3], q.b[0], q.b[1]);
      ptx::mma_16816(s[n], odd[0], odd[1], odd[2], odd[3], q.b[2], q.b[3]);
    }
  }

  // Adds an MMA tile of V^T, as operand A: rows g and g + 8 are dimensions 2 m and 2 m + 1 of the lane's.
  __device__ __forceinline__ static void multiply_v_tile(WarpState<C>& state, int m, const uint32_t (&v)[4],
                                                         const uint32_t (&p)[C::NT][2]) {
#pragma unroll
    for (int n = 0; n < C::NT; ++n) {
      ptx::mma_16816(state.out[n][m], v[0], v[1], v[2], v[3], p[n][0], p[n][1]);
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

  // The largest S^T that this lane has of a row.
  __device__ __forceinline__ static float most(const float (&s)[C::NT][4], int stat) {
    const int n = stat / 2, j = stat % 2;
    return fmaxf(s[n][j], s[n][2 + j]);
  }
};

}  // namespace xlayer::attention

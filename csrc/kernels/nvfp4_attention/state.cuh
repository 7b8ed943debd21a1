// What a warp has of a run: its queries, the maxima, sums and outputs of their rows. In registers, or (large head
// tiles' queries) in shared memory.
#pragma once

#include "../common/ptx.cuh"
#include "config.cuh"

namespace xlayer::attention {

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

  // Brings the maximum of row `stat` of the lane's up to date, of whose S^T this lane has at most m, and the row's
  // sum and output with it.
  __device__ __forceinline__ void rescale(int stat, float m) {
    m *= factor[stat];
#pragma unroll
    for (int lanes = Held<C>::LANES; lanes < Held<C>::LANES_END; lanes *= 2) {
      m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, lanes));
    }
    m = fmaxf(m - HEADROOM, max[stat]);
    const float shrink = ptx::exp2_approx(max[stat] - m);
    max[stat] = m;
    sum[stat] *= shrink;
#pragma unroll
    for (int k = 0; k < C::NT; ++k) {
#pragma unroll
      for (int d = 0; d < C::M_TILES; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (Held<C>::stat(k, i) == stat) out[k][d][i] *= shrink;
        }
      }
    }
  }
};

__device__ __forceinline__ uint32_t pack(float low, float high) {
  return __builtin_bit_cast(uint32_t, __half2_raw(__floats2half2_rn(low, high)));
}

}  // namespace xlayer::attention

// The warpgroups that multiply: attention of 64 query rows to the tiles that the producers make.
#pragma once

#include "../common/wgmma.cuh"
#include "query.cuh"

namespace xlayer::prefix {

// P's maximum is 2^HEADROOM when its row's maximum is set anew, and at most 2^LAZY times that until then:
// below 65,504, a half's most.
constexpr float EMPTY = -1e30f, HEADROOM = 12.0f, LAZY = 3.9f, LN2 = 0.6931471805599453f;

// Either warpgroup has 64 rows of its own and all tiles; or, where there are no more than 64, both have those
// rows and every other tile, and are merged at the end.
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const Nvfp4AttentionParams& p, uint32_t shared,
                                      const Barriers& barriers, int group, bool same_rows)
      : p_(p),
        shared_(shared),
        barriers_(barriers),
        group_(group),
        same_rows_(same_rows),
        thread_(threadIdx.x % GROUP_THREADS),
        lane_(threadIdx.x % 32) {}

  // begin: The request's first query token. first_row: of the thread block's rows, of all `rows`. len: above
  // 0.
  __device__ __forceinline__ void run(int begin, int rows, int first_row, int kv_head, int len) {
    const int per_head = p_.num_q_heads / p_.page.heads;
    if (!same_rows_) first_row += GROUP_ROWS * group_;
    const int in_shared = GROUP_ROWS * group_;
    {
      const int row = first_row + thread_ / 2;
      const uint16_t* q = static_cast<const uint16_t*>(p_.q) + (begin + row / per_head) * p_.q_stride_t +
                          (kv_head * per_head + row % per_head) * p_.q_stride_h;
      load_query(p_, shared_, in_shared + thread_ / 2, thread_ % 2, q, row < rows);
      wgmma::stores_are_seen();
      ptx::barrier(1 + group_, GROUP_THREADS);
    }
    const int mine = thread_ / 32 * 16 + lane_ / 4;  // and the row eight further
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t bits;
      ptx::load_shared<4>(shared_ + FACTORS_AT + 4 * (in_shared + mine + 8 * j), &bits);
      factor_[j] = bits_float(bits);
    }
    float o[64] = {};
    attend(o, len);
    if (same_rows_) {
      if (group_ == 1) give(o);
      ptx::barrier(3, 2 * GROUP_THREADS);
      if (group_ == 1) return;
      take(o);
    }
    merge_and_store(o, held(begin, rows, first_row + mine, kv_head, per_head));
  }

 private:
  // While the softmax of a tile is computed, P of the one before is multiplied by V.
  __device__ __forceinline__ void attend(float (&o)[64], int len) {
    const int tiles = (len + KEYS - 1) / KEYS, step = same_rows_ ? 2 : 1;
    int i = same_rows_ ? group_ : 0;
    if (i >= tiles) return;
    float s[64];
    uint32_t weights[32];
    ask_for_s(s, i);
    got_s(s, i, len, wgmma::wait<0>);
    grow(s);
    exponentials(s);
    pack_all(s, weights);
    for (; i + step < tiles; i += step) {
      ask_for_s(s, i + step);
      ask_for_o(o, weights, i);
      got_s(s, i + step, len, wgmma::wait<1>);
      const bool grown = grow(s);
      exponentials(s);
      got_o(o, i);
      if (grown) {
#pragma unroll
        for (int n = 0; n < 64; ++n) o[n] *= shrink_[n / 2 % 2];
      }
      pack_all(s, weights);
    }
    ask_for_o(o, weights, i);
    got_o(o, i);
  }

  __device__ __forceinline__ void ask_for_s(float (&s)[64], int tile) const {
    const int stage = tile % STAGES;
    wgmma::barrier_wait(barriers_.full(false, stage), tile / STAGES & 1);
    const uint64_t q = wgmma::descriptor(shared_ + group_ * GROUP_ROWS * 128, 16, 1024),
                   k = wgmma::descriptor(shared_ + K_AT + stage * OPERAND, 16, 1024);
    wgmma::fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const uint64_t on = (step / 4 * PANEL + step % 4 * 32) / 16;
      wgmma::multiply(s, q + on, k + on, step > 0);
    }
    wgmma::commit();
  }
  template <class Wait>
  __device__ __forceinline__ void got_s(float (&s)[64], int tile, int len, Wait wait) const {
    wait(s);
    if (lane_ == 0) wgmma::barrier_arrive(barriers_.empty(false, tile % STAGES));
    const int there = len - tile * KEYS;
    if (there < KEYS) {
#pragma unroll
      for (int n = 0; n < 64; ++n) {
        if (n / 4 * 8 + lane_ % 4 * 2 + n % 2 >= there) s[n] = -INFINITY;
      }
    }
  }
  __device__ __forceinline__ void ask_for_o(float (&o)[64], const uint32_t (&weights)[32], int tile) const {
    const int stage = tile % STAGES;
    wgmma::barrier_wait(barriers_.full(true, stage), tile / STAGES & 1);
    const uint64_t v = wgmma::descriptor(shared_ + V_AT + stage * OPERAND, PANEL, 1024);
    wgmma::fence();
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
      const uint32_t a[4] = {weights[4 * step], weights[4 * step + 1], weights[4 * step + 2],
                             weights[4 * step + 3]};
      wgmma::multiply_add(o, a, v + step * 16 * 128 / 16);
    }
    wgmma::commit();
  }
  __device__ __forceinline__ void got_o(float (&o)[64], int tile) const {
    wgmma::wait<0>(o);
    if (lane_ == 0) wgmma::barrier_arrive(barriers_.empty(true, tile % STAGES));
  }

  // Sets the rows' maxima anew where a row of this warp has grown by more than LAZY allows, and says so.
  __device__ __forceinline__ bool grow(const float (&s)[64]) {
    float m[2] = {s[0], s[2]};
#pragma unroll
    for (int n = 0; n < 64; ++n) m[n / 2 % 2] = fmaxf(m[n / 2 % 2], s[n]);
    bool grown = false;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      m[j] = fmaxf(m[j], __shfl_xor_sync(0xFFFFFFFFu, m[j], 1));
      m[j] = fmaxf(m[j], __shfl_xor_sync(0xFFFFFFFFu, m[j], 2));
      m[j] = m[j] * factor_[j] - HEADROOM;
      grown |= m[j] > max_[j] + LAZY;
    }
    if (!__any_sync(0xFFFFFFFFu, grown)) return false;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      m[j] = fmaxf(max_[j], m[j]);
      shrink_[j] = ptx::exp2_approx(max_[j] - m[j]);
      sum_[j] *= shrink_[j];
      max_[j] = m[j];
    }
    return true;
  }
  __device__ __forceinline__ void exponentials(float (&s)[64]) {
#pragma unroll
    for (int n = 0; n < 64; ++n) {
      const int j = n / 2 % 2;
      s[n] = ptx::exp2_approx(fmaf(s[n], factor_[j], -max_[j]));
      sum_[j] += s[n];
    }
  }
  // weights: P as operand A of eight steps of 16 tokens.
  __device__ __forceinline__ static void pack_all(const float (&s)[64], uint32_t (&weights)[32]) {
#pragma unroll
    for (int n = 0; n < 32; ++n) weights[n] = pack(s[2 * n], s[2 * n + 1]);
  }

  // The second warpgroup's result by way of what was its stage of V and K, to the first one.
  __device__ __forceinline__ uint32_t place(uint32_t at, int n) const {
    static_assert(STAGES == 2 && OPERAND == 64 * GROUP_THREADS * 4);
    return shared_ + at + OPERAND + 4 * (n * GROUP_THREADS + thread_);
  }
  __device__ __forceinline__ void give(const float (&o)[64]) const {
#pragma unroll
    for (int n = 0; n < 64; ++n) ptx::store_shared(place(V_AT, n), float_bits(o[n]));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      ptx::store_shared(place(K_AT, j), float_bits(max_[j]));
      ptx::store_shared(place(K_AT, 2 + j), float_bits(sum_[j]));
    }
  }
  __device__ __forceinline__ float taken(uint32_t at, int n) const {
    uint32_t bits;
    ptx::load_shared<4>(place(at, n), &bits);
    return bits_float(bits);
  }
  __device__ __forceinline__ void take(float (&o)[64]) {
    float mine[2], other[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float theirs = taken(K_AT, j), both = fmaxf(max_[j], theirs);
      mine[j] = ptx::exp2_approx(max_[j] - both);
      other[j] = ptx::exp2_approx(theirs - both);
      max_[j] = both;
      sum_[j] = sum_[j] * mine[j] + taken(K_AT, 2 + j) * other[j];
    }
#pragma unroll
    for (int n = 0; n < 64; ++n) o[n] = o[n] * mine[n / 2 % 2] + taken(V_AT, n) * other[n / 2 % 2];
  }

  // What out and lse hold of this lane's two rows: asked for together, since a thread block has its SM alone
  // and nothing hides what it waits for.
  struct Held {
    uint32_t* out[2];
    float* lse[2];
    float other[2];  // lse in base 2; EMPTY: nothing is merged
    uint32_t pairs[2][16];
  };
  __device__ __forceinline__ Held held(int begin, int rows, int first, int kv_head, int per_head) const {
    Held h;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = first + 8 * j, token = begin + row / per_head,
                head = kv_head * per_head + row % per_head;
      h.out[j] = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p_.out) + token * p_.out_stride_t +
                                             head * p_.out_stride_h) +
                 lane_ % 4;
      h.lse[j] = p_.lse + (head * p_.lse_stride_h + token);
      if (row >= rows) h.out[j] = nullptr;
      h.other[j] = row < rows ? fmaxf(*h.lse[j] * LOG2E, EMPTY) : EMPTY;
#pragma unroll
      for (int i = 0; i < 16; ++i) h.pairs[j][i] = row < rows ? h.out[j][4 * i] : 0u;
    }
    return h;
  }

  __device__ __forceinline__ void merge_and_store(const float (&o)[64], const Held& h) const {
    const int t = lane_ % 4;
    const bool f16 = p_.dtype == Dtype::F16;
    const float unscale = UNSCALE * *p_.v_scale;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float total = sum_[j];
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
      // In base 2. EMPTY is below all that counts: then the other's weight is 0, and what it holds is
      // nothing.
      const float here = max_[j] + log2f(total), both = fmaxf(here, h.other[j]);
      const float weight = exp2f(here - both), others = exp2f(h.other[j] - both);
      const float factor = unscale / total * weight / (weight + others),
                  others_factor = others / (weight + others);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        // This lane has elements in the order 0 2 | 1 3 | 4 6 | 5 7: the one beside it has what is missing.
        const float a = o[4 * i + 2 * j] * factor, b = o[4 * i + 2 * j + 1] * factor;
        const float lacked = __shfl_xor_sync(0xFFFFFFFFu, t % 2 == 0 ? b : a, 1);
        float low = t % 2 == 0 ? a : lacked, high = t % 2 == 0 ? lacked : b;
        if (others > 0.0f) {
          const float2 two = to_float2(h.pairs[j][i], f16);
          low = fmaf(two.x, others_factor, low);
          high = fmaf(two.y, others_factor, high);
        }
        if (h.out[j] != nullptr) h.out[j][4 * i] = f16 ? pack(low, high) : pack_bf16(low, high);
      }
      if (t == 0 && h.out[j] != nullptr) *h.lse[j] = (both + log2f(weight + others)) * LN2;
    }
  }

  const Nvfp4AttentionParams& p_;
  const uint32_t shared_;
  const Barriers barriers_;
  const int group_;
  const bool same_rows_;
  const int thread_, lane_;
  float factor_[2], max_[2] = {EMPTY, EMPTY}, sum_[2] = {0.0f, 0.0f}, shrink_[2];
};

}  // namespace xlayer::prefix

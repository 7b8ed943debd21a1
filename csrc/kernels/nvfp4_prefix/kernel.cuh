// Attention of a prompt's query tokens to the NVFP4 pages before them, without a copy of those in 16 bits.
//
// A thread block has 128 query rows (query token * group + head in group) of a request and KV head: one
// warpgroup dequantises tiles of 128 tokens into shared memory, two of 64 rows each multiply. Every query
// sees every token, so there is no mask but at the end; what a step adds itself is another kernel's, and both
// are merged by their LSE.
//
// Elements of a word of a page become halves in the order 0 2 1 3 4 6 5 7 (packed.cuh). Queries are in that
// order, too, and the output is put back at the end.
#pragma once

#include <cuda_bf16.h>

#include "../common/ptx.cuh"
#include "../common/wgmma.cuh"
#include "../nvfp4/dequantise.cuh"
#include "../nvfp4_attention/params.h"

namespace xlayer::prefix {

constexpr int D = 128, GROUP_ROWS = 64, ROWS = 2 * GROUP_ROWS, KEYS = 128, STAGES = 2, GROUP_THREADS = 128,
              THREADS = 3 * GROUP_THREADS;
constexpr int PANEL = 128 * 128;  // bytes: 128 rows of 64 halves
constexpr int OPERAND = D / 64 * PANEL;
constexpr int K_AT = OPERAND, V_AT = K_AT + STAGES * OPERAND, FACTORS = V_AT + STAGES * OPERAND;
constexpr int BARRIERS = FACTORS + ROWS * 4;
constexpr int SHARED_BYTES = BARRIERS + 4 * STAGES * 8 + 1024;  // aligned to 1024 in the kernel
constexpr int PRODUCER_REGISTERS = 104, CONSUMER_REGISTERS = 200, LEAST_REGISTERS = 128;
// 2^32 / (tokens of a page / 16), rounded up: times a token / 16 and / 2^32 it is the token's page, for 2^24
// tokens.
inline uint64_t per_page(int block_size) {
  const uint64_t tiles = uint64_t(block_size) / 16;
  return ((uint64_t(1) << 32) + tiles - 1) / tiles;
}
constexpr float EMPTY = -1e30f, HEADROOM = 12.0f, UNSCALE = 16384.0f;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

struct Barriers {
  uint32_t at;
  __device__ __forceinline__ uint32_t full(bool v, int stage) const { return at + 8 * (v * STAGES + stage); }
  __device__ __forceinline__ uint32_t empty(bool v, int stage) const {
    return at + 8 * ((2 + v) * STAGES + stage);
  }
};

// What the first warpgroup does: lane 8 c + i of warp w has dimensions 32 c to 32 c + 31 of tokens 8 w + i +
// 32 r. So eight lanes that store 16 bytes at once meet all banks, and a warp loads 512 bytes that lie
// together.
class Producer {
 public:
  __device__ __forceinline__ Producer(const Nvfp4AttentionParams& p, uint64_t per_page, uint32_t shared,
                                      int request, int kv_head, int len)
      : p_(p), per_page_(per_page), table_(p.block_table + request * p.block_table_stride), len_(len) {
    const int lane = threadIdx.x % 32, c = lane / 8;
    first_ = lane % 8 + 8 * (threadIdx.x / 32);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      to_[w] = shared + c / 2 * PANEL + first_ * 128 + 16 * ((c % 2 * 4 + w) ^ (lane % 8));
    }
    data_ = p.cache + p.page.data_offset(false, kv_head, 0) + 16 * c;
    scales_ = p.cache + p.page.scale_base(false, kv_head) + 2 * c;
    to_v_ = p.page.data_bytes() + p.page.scale_bytes();
  }

  __device__ __forceinline__ void run(const Barriers& barriers, int tiles) {
    Loaded k, v;
    look_up(0);
    aim(0);
    look_up(1);
    load(k, 0, 0);
    load(v, 0, to_v_);
    for (int i = 0; i < tiles; ++i) {
      const int stage = i % STAGES;
      const uint32_t parity = (i / STAGES & 1) ^ 1;
      const bool goes_on = i + 1 < tiles;
      wgmma::barrier_wait(barriers.empty(false, stage), parity);
      store(k, K_AT + stage * OPERAND);
      wgmma::stores_are_seen();
      wgmma::barrier_arrive(barriers.full(false, stage));
      if (goes_on) {
        aim(i + 1);
        look_up(i + 2);
        load(k, i + 1, 0);
      }
      wgmma::barrier_wait(barriers.empty(true, stage), parity);
      store(v, V_AT + stage * OPERAND);
      wgmma::stores_are_seen();
      wgmma::barrier_arrive(barriers.full(true, stage));
      if (goes_on) load(v, i + 1, to_v_);
    }
  }

 private:
  struct Loaded {
    uint4 data[4];
    uint32_t scales[4];  // two e4m3
  };

  // Tokens past the last are read as that one, with scales of zero: their memory may be anything.
  __device__ __forceinline__ int token(int tile, int r) const {
    return min(tile * KEYS + first_ + 32 * r, len_ - 1);
  }
  // Which of the request's blocks a token is in: pages are multiples of 16 tokens.
  __device__ __forceinline__ int logical(int token) const {
    return int(uint64_t(token / 16) * per_page_ >> 32);
  }

  __device__ __forceinline__ void look_up(int tile) {
#pragma unroll
    for (int r = 0; r < 4; ++r) block_[r] = __ldg(table_ + logical(token(tile, r)));
  }
  // At the blocks that were looked up.
  __device__ __forceinline__ void aim(int tile) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int at = token(tile, r), n = at - logical(at) * p_.page.block_size;
      const int64_t block = int64_t(uint32_t(block_[r])) * p_.block_stride;
      data_at_[r] = data_ + (block + n * (D / 2));
      scales_at_[r] = scales_ + (block + n * (D / GROUP));
    }
  }
  __device__ __forceinline__ void load(Loaded& to, int tile, int64_t on) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      to.data[r] = __ldg(reinterpret_cast<const uint4*>(data_at_[r] + on));
      const uint32_t two = __ldg(reinterpret_cast<const uint16_t*>(scales_at_[r] + on));
      to.scales[r] = tile * KEYS + first_ + 32 * r < len_ ? two : 0u;
    }
  }

  __device__ __forceinline__ void store(const Loaded& from, uint32_t operand) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const __half2 scales = ptx::e4m3x2_to_half2(from.scales[r]);
      const uint32_t words[4] = {from.data[r].x, from.data[r].y, from.data[r].z, from.data[r].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const Places places(words[w], p_.shifts);
        const __half2 scale = w < 2 ? __low2half2(scales) : __high2half2(scales);
        const uint32_t halves[4] = {places.times(0, scale), places.times(1, scale), places.times(2, scale),
                                    places.times(3, scale)};
        ptx::store_shared(to_[w] + operand + r * 32 * 128, halves);
      }
    }
  }

  const Nvfp4AttentionParams& p_;
  const uint64_t per_page_;
  const int32_t* table_;
  int len_, first_;
  uint32_t to_[4];
  const uint8_t *data_, *scales_;  // what this lane has of block 0 and token 0: of K
  int64_t to_v_;                   // from K to V in a page
  int block_[4];
  const uint8_t *data_at_[4], *scales_at_[4];
};

__device__ __forceinline__ float2 to_float2(uint32_t bits, bool f16) {
  if (f16) return __half22float2(__half2(__builtin_bit_cast(__half2_raw, bits)));
  return __bfloat1622float2(__nv_bfloat162(__builtin_bit_cast(__nv_bfloat162_raw, bits)));
}
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return __builtin_bit_cast(uint32_t, __half2_raw(__floats2half2_rn(low, high)));
}

// A row of queries, by two threads: thread `part` has 64 elements. Halves times a power of two, and rotated
// like K.
__device__ __forceinline__ void load_query(const Nvfp4AttentionParams& p, uint32_t shared, int row, int part,
                                           const uint16_t* q, bool there) {
  float x[64];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint4 raw =
        there ? __ldg(reinterpret_cast<const uint4*>(q + 64 * part) + i) : make_uint4(0, 0, 0, 0);
    const uint32_t bits[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 two = to_float2(bits[j], p.dtype == Dtype::F16);
      x[8 * i + 2 * j] = two.x, x[8 * i + 2 * j + 1] = two.y;
    }
  }
  float amax = 0.0f;
  if (p.rotated_keys) {
    butterflies<32>(x);
    butterflies<32>(x + 32);
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i] *= rotation_back(32);
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) amax = fmaxf(amax, fabsf(x[i]));
  amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 1));
  const uint32_t exponent = min(max(float_bits(amax) >> 23, 40u), 254u);
  const float up = bits_float((127 + 127 + 7 - exponent) << 23), down = bits_float((exponent - 7) << 23);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float* e = x + 8 * i;
    const uint32_t halves[4] = {pack(e[0] * up, e[2] * up), pack(e[1] * up, e[3] * up),
                                pack(e[4] * up, e[6] * up), pack(e[5] * up, e[7] * up)};
    ptx::store_shared(shared + part * PANEL + row * 128 + 16 * (i ^ (row & 7)), halves);
  }
  if (part == 0) {
    const float factor = p.scale * LOG2E * UNSCALE * *p.k_scale * down;
    ptx::store_shared(shared + FACTORS + 4 * row, float_bits(factor));
  }
}

// What the other two warpgroups do, with 64 rows each.
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const Nvfp4AttentionParams& p, uint32_t shared)
      : p_(p), shared_(shared) {}

  __device__ __forceinline__ void run(const Barriers& barriers, int group, int begin, int rows, int first_row,
                                      int kv_head, int len) {
    const int per_head = p_.num_q_heads / p_.page.heads, thread = threadIdx.x % GROUP_THREADS;
    {
      const int in_tile = GROUP_ROWS * group + thread / 2, row = first_row + in_tile;
      const uint16_t* q = static_cast<const uint16_t*>(p_.q) + (begin + row / per_head) * p_.q_stride_t +
                          (kv_head * per_head + row % per_head) * p_.q_stride_h;
      load_query(p_, shared_, in_tile, thread % 2, q, row < rows);
      wgmma::stores_are_seen();
      ptx::barrier(1 + group, GROUP_THREADS);
    }
    const int lane = thread % 32, g = lane / 4, t = lane % 4,
              mine = GROUP_ROWS * group + thread / 32 * 16 + g;
    float factor[2], max[2] = {EMPTY, EMPTY}, sum[2] = {0.0f, 0.0f}, o[64] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t bits;
      ptx::load_shared<4>(shared_ + FACTORS + 4 * (mine + 8 * j), &bits);
      factor[j] = bits_float(bits);
    }
    const uint64_t q = wgmma::descriptor(shared_ + group * GROUP_ROWS * 128, 16, 1024);
    const int tiles = (len + KEYS - 1) / KEYS;
    for (int i = 0; i < tiles; ++i) {
      const int stage = i % STAGES;
      const uint32_t parity = i / STAGES & 1;
      float s[64];
      wgmma::barrier_wait(barriers.full(false, stage), parity);
      const uint64_t k = wgmma::descriptor(shared_ + K_AT + stage * OPERAND, 16, 1024);
      wgmma::fence();
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        const uint64_t on = (step / 4 * PANEL + step % 4 * 32) / 16;
        wgmma::multiply(s, q + on, k + on, step > 0);
      }
      wgmma::commit();
      wgmma::wait<0>();
      if (lane == 0) wgmma::barrier_arrive(barriers.empty(false, stage));
      if ((i + 1) * KEYS > len) mask(s, len - i * KEYS, t);
      uint32_t weights[32];
      softmax(s, factor, max, sum, o, weights);
      wgmma::barrier_wait(barriers.full(true, stage), parity);
      const uint64_t v = wgmma::descriptor(shared_ + V_AT + stage * OPERAND, PANEL, 1024);
      wgmma::fence();
#pragma unroll
      for (int step = 0; step < KEYS / 16; ++step) {
        const uint32_t a[4] = {weights[4 * step], weights[4 * step + 1], weights[4 * step + 2],
                               weights[4 * step + 3]};
        wgmma::multiply_add(o, a, v + step * 16 * 128 / 16);
      }
      wgmma::commit();
      wgmma::wait<0>();
      if (lane == 0) wgmma::barrier_arrive(barriers.empty(true, stage));
    }
    store(o, max, sum, begin, rows, first_row + mine, kv_head, per_head, t);
  }

 private:
  __device__ __forceinline__ static void mask(float (&s)[64], int there, int t) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (8 * j + 2 * t + i % 2 >= there) s[4 * j + i] = -INFINITY;
      }
    }
  }

  // weights: P as operand A of eight steps of 16 tokens.
  __device__ __forceinline__ static void softmax(float (&s)[64], const float (&factor)[2], float (&max)[2],
                                                 float (&sum)[2], float (&o)[64], uint32_t (&weights)[32]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float m = s[2 * j];
#pragma unroll
      for (int i = 0; i < 16; ++i) m = fmaxf(m, fmaxf(s[4 * i + 2 * j], s[4 * i + 2 * j + 1]));
      m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, 1));
      m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, 2));
      m = fmaxf(max[j], m * factor[j] - HEADROOM);
      if (__any_sync(0xFFFFFFFFu, m > max[j])) {
        const float shrink = ptx::exp2_approx(max[j] - m);
        max[j] = m;
        sum[j] *= shrink;
#pragma unroll
        for (int i = 0; i < 16; ++i) o[4 * i + 2 * j] *= shrink, o[4 * i + 2 * j + 1] *= shrink;
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float a = ptx::exp2_approx(fmaf(s[4 * i + 2 * j], factor[j], -m));
        const float b = ptx::exp2_approx(fmaf(s[4 * i + 2 * j + 1], factor[j], -m));
        sum[j] += a + b;
        weights[2 * i + j] = pack(a, b);
      }
    }
  }

  __device__ __forceinline__ void store(const float (&o)[64], const float (&max)[2], float (&sum)[2],
                                        int begin, int rows, int first, int kv_head, int per_head,
                                        int t) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = first + 8 * j;
      float total = sum[j];
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
      const float unscale = total > 0.0f ? UNSCALE * *p_.v_scale / total : 0.0f;
      const int token = begin + row / per_head, head = kv_head * per_head + row % per_head;
      uint16_t* out = static_cast<uint16_t*>(p_.out) + token * p_.out_stride_t + head * p_.out_stride_h;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        // This lane has elements in the order 0 2 | 1 3 | 4 6 | 5 7: the one beside it has what is missing.
        const float a = o[4 * i + 2 * j] * unscale, b = o[4 * i + 2 * j + 1] * unscale;
        const float other = __shfl_xor_sync(0xFFFFFFFFu, t % 2 == 0 ? b : a, 1);
        const float low = t % 2 == 0 ? a : other, high = t % 2 == 0 ? other : b;
        const uint32_t two =
            p_.dtype == Dtype::F16
                ? pack(low, high)
                : __builtin_bit_cast(uint32_t, __nv_bfloat162_raw(__floats2bfloat162_rn(low, high)));
        if (row < rows) *reinterpret_cast<uint32_t*>(out + 8 * i + 2 * t) = two;
      }
      if (t == 0 && row < rows) {
        p_.lse[head * p_.lse_stride_h + token] = total > 0.0f ? (max[j] + log2f(total)) * LN2 : -INFINITY;
      }
    }
  }

  const Nvfp4AttentionParams& p_;
  uint32_t shared_;
};

// Its instructions are sm_90a's; elsewhere it is empty, and `nvfp4_prefix_rows` says so.
__global__ void __launch_bounds__(THREADS, 1)
    prefix_kernel(const __grid_constant__ Nvfp4AttentionParams p, uint64_t per_page) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(XLAYER_EMULATED)
  XLAYER_DYNAMIC_SHARED(raw);
  const int request = blockIdx.z, kv_head = blockIdx.y, first_row = blockIdx.x * ROWS;
  const int begin = p.query_starts[request],
            rows = (p.query_starts[request + 1] - begin) * (p.num_q_heads / p.page.heads);
  if (first_row >= rows) return;
  const int len = p.seq_lens[request];
  const uint32_t shared = (ptx::shared_address(raw) + 1023) & ~1023u;
  const Barriers barriers{shared + BARRIERS};
  const int groups = rows - first_row > GROUP_ROWS ? 2 : 1;  // that have rows
  if (threadIdx.x == 0) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
#pragma unroll
      for (int stage = 0; stage < STAGES; ++stage) {
        wgmma::barrier_init(barriers.full(v, stage), GROUP_THREADS);
        wgmma::barrier_init(barriers.empty(v, stage), groups * GROUP_THREADS / 32);
      }
    }
    wgmma::barriers_are_seen();
  }
  __syncthreads();
  const int group = __shfl_sync(0xFFFFFFFFu, int(threadIdx.x / GROUP_THREADS), 0);
  if (group == 0) {
    wgmma::give_back_registers<PRODUCER_REGISTERS>();
    if (len > 0) Producer(p, per_page, shared, request, kv_head, len).run(barriers, (len + KEYS - 1) / KEYS);
  } else if (group <= groups) {
    wgmma::take_registers<CONSUMER_REGISTERS>();
    Consumer(p, shared).run(barriers, group - 1, begin, rows, first_row, kv_head, len);
  }
#endif
}

}  // namespace xlayer::prefix

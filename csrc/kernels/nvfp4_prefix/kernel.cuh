// Attention of a prompt's query tokens to the NVFP4 pages before them, without a copy of those in 16 bits.
//
// A thread block has 128 query rows (query token * group + head in group) of a request and KV head: one
// warpgroup dequantises tiles of 128 tokens of K into shared memory, one those of V, two multiply. Every
// query sees every token, so there is no mask but at the end; what a step adds itself is another kernel's,
// with whose result this one's is merged, by their LSE.
//
// Elements of a word of a page become halves in the order 0 2 1 3 4 6 5 7 (packed.cuh). Queries are in that
// order, too, and the output is put back at the end.
#pragma once

#include "consumer.cuh"
#include "producer.cuh"

namespace xlayer::prefix {

// Of each thread: 128 at the start (LEAST_REGISTERS tells the kernel from an empty one), then as these need.
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 200, LEAST_REGISTERS = 128;

// Its instructions are sm_90a's; elsewhere it is empty, and `nvfp4_prefix_rows` says so.
__global__ void __launch_bounds__(THREADS, 1)
    nvfp4_prefix_kernel(const __grid_constant__ Nvfp4AttentionParams p, uint64_t per_page) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(XLAYER_EMULATED)
  XLAYER_DYNAMIC_SHARED(raw);
  const int request = blockIdx.z, kv_head = blockIdx.y, first_row = blockIdx.x * ROWS;
  const int begin = p.query_starts[request],
            rows = (p.query_starts[request + 1] - begin) * (p.num_q_heads / p.page.heads);
  const int len = p.seq_lens[request];
  if (first_row >= rows || len == 0) return;
  const uint32_t shared = (ptx::shared_address(raw) + 1023) & ~1023u;
  const Barriers barriers{shared + BARRIERS_AT};
  const bool same_rows = rows - first_row <= GROUP_ROWS;  // then a tile is one consumer's
  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        wgmma::barrier_init(barriers.full(v, stage), GROUP_THREADS);
        wgmma::barrier_init(barriers.empty(v, stage), same_rows ? GROUP_WARPS : 2 * GROUP_WARPS);
      }
#pragma unroll
      for (int warp = 0; warp < 2 * GROUP_WARPS; ++warp) wgmma::barrier_init(barriers.copied(warp, stage), 1);
    }
    wgmma::barriers_are_seen();
  }
  __syncthreads();
  const int group = __shfl_sync(0xFFFFFFFFu, int(threadIdx.x / GROUP_THREADS), 0);
  if (group < 2) {
    wgmma::give_back_registers<PRODUCER_REGISTERS>();
    Producer(p, per_page, shared, barriers, group == 1, request, kv_head, len).run((len + KEYS - 1) / KEYS);
  } else {
    wgmma::take_registers<CONSUMER_REGISTERS>();
    Consumer(p, shared, barriers, group - 2, same_rows).run(begin, rows, first_row, kv_head, len);
  }
#endif
}

}  // namespace xlayer::prefix

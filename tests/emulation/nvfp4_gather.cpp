// The gather's kernel on the CPU: for tests/ops/test_gather_sources.py and test_nvfp4_gather_emulated.py.
#include <vector>

#include "simt.h"

#include "kernels/nvfp4_gather/kernel.cuh"

using namespace xlayer;

// All of eight bytes, so that Python can mirror it: tests/reference/emulated.py.
struct GatherArgs {
  const uint8_t* cache;
  int64_t block_stride, heads, block_size, head_size;
  const int32_t* block_table;
  int64_t block_table_stride, max_blocks;
  const int32_t *seq_starts, *cu_seqlens;
  int64_t num_requests;
  const float *k_scale, *v_scale;
  void *k_out, *v_out;
  int64_t k_stride_t, k_stride_h, v_stride_t, v_stride_h, num_tokens, dtype, swizzled, rotated_keys;
  const int32_t *query_starts, *seq_lens;
  const void *key, *value;
  int64_t key_stride_t, key_stride_h, value_stride_t, value_stride_h;
  const void* newest;
  const int32_t *newest_rows, *newest_from;
  int64_t newest_tokens, source_dtype;
  int64_t each, forwards;  // tokens that a thread goes through, 0: as it chooses; order of warps and blocks
  int64_t at_once;         // thread blocks that the device holds
};

template <typename T, typename S>
void run(const Nvfp4GatherParams& p, const GatherPlan& plan) {
  const unsigned blocks = unsigned(ceil_div(p.num_tokens, plan.tokens()));
  const auto kernel = gather_kernel<T, S>(p);
  simt::launch({blocks, unsigned(plan.rounds), 1}, plan.threads, 0, [&] { kernel(p, plan, own_is_wide(p)); });
}

template <int BLOCK, bool LINES>
void stores(const Nvfp4GatherParams& p, const GatherPlan& plan, int64_t* out) {
  using CUT = Cut<BLOCK, LINES>;
  const std::vector<TokenPlace> places(GATHER_PLACES);
  simt::launch({1, unsigned(plan.rounds), 1}, plan.threads, 0, [&] {
    const GatherShare<__nv_bfloat16, CUT> to(p, plan, places.data());
    const int64_t thread = int64_t(blockIdx.y) * plan.threads + threadIdx.x;
    const bool is_idle = to.place == places.data() + plan.slots * (plan.each + 1);
    for (int c = 0; c < 2; ++c) {
      const int64_t at = to.k - static_cast<__nv_bfloat16*>(p.k_out) + c * CUT::OUT_APART;
      out[thread * 2 + c] = is_idle || c >= CUT::CHUNKS ? -1 : at;
    }
  });
}

static Nvfp4GatherParams params(const GatherArgs* a) {
  return {a->cache,
          a->block_stride,
          {int(a->heads), int(a->block_size), int(a->head_size)},
          a->block_table,
          a->block_table_stride,
          a->max_blocks,
          a->seq_starts,
          a->cu_seqlens,
          int(a->num_requests),
          a->k_scale,
          a->v_scale,
          a->k_out,
          a->v_out,
          a->k_stride_t,
          a->k_stride_h,
          a->v_stride_t,
          a->v_stride_h,
          a->num_tokens,
          Dtype(a->dtype),
          a->swizzled ? ScaleOrder::SWIZZLED : ScaleOrder::LINEAR,
          a->rotated_keys != 0,
          a->query_starts,
          a->seq_lens,
          a->key,
          a->value,
          a->key_stride_t,
          a->key_stride_h,
          a->value_stride_t,
          a->value_stride_h,
          a->newest,
          a->newest_rows,
          a->newest_from,
          int(a->newest_tokens),
          Dtype(a->source_dtype)};
}

extern "C" void run_nvfp4_gather(const GatherArgs* a) {
  const Nvfp4GatherParams p = params(a);
  GatherPlan plan = gather_plan(p, int(a->at_once));
  if (a->each != 0) plan.each = int(a->each);
  simt::machine().late_copies = a->forwards != 0;
  switch (p.dtype) {
    case Dtype::BF16: return run<__nv_bfloat16, __nv_bfloat16>(p, plan);
    case Dtype::F16: return run<__half, __half>(p, plan);
    case Dtype::F32:
      switch (p.source_dtype) {
        case Dtype::BF16: return run<float, __nv_bfloat16>(p, plan);
        case Dtype::F16: return run<float, __half>(p, plan);
        case Dtype::F32: return run<float, float>(p, plan);
      }
  }
}

// shares, rounds, lanes, slots, each, threads
extern "C" void run_gather_plan(const GatherArgs* a, int64_t* out) {
  const GatherPlan plan = gather_plan(params(a), int(a->at_once));
  const int64_t all[] = {plan.shares, plan.rounds, plan.lanes, plan.slots, plan.each, plan.threads};
  std::copy(all, all + 6, out);
}

// Of each thread's first token, for bfloat16: elements from k_out to where its chunks of 8 are stored by the
// first and by the second instruction; -1: nothing is. [rounds][threads][2]
extern "C" void run_gather_stores(const GatherArgs* a, int64_t* out) {
  const Nvfp4GatherParams p = params(a);
  const GatherPlan plan = gather_plan(p, int(a->at_once));
  if (in_lines(p)) return stores<32, true>(p, plan, out);
  return rotation_block(p.page.head_size) == 32 ? stores<32, false>(p, plan, out)
                                                : stores<16, false>(p, plan, out);
}

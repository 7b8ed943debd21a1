// The kernel of nvfp4_prefix_attention on the CPU: for tests/ops/test_nvfp4_prefix_emulated.py.
#include "simt.h"

#include "kernels/nvfp4_prefix/kernel.cuh"

// As FIELDS in tests/reference/prefix_cases.py.
struct Args {
  const void* q;
  int64_t q_stride_t, q_stride_h;
  void* out;
  int64_t out_stride_t, out_stride_h;
  float* lse;
  int64_t lse_stride_h, is_f16;
  const uint8_t* cache;
  int64_t block_stride, heads, block_size, head_size;
  const int32_t* block_table;
  int64_t block_table_stride;
  const int32_t* lens;
  int64_t num_requests, max_query_len, num_q_heads;
  const int32_t* query_starts;
  const float *k_scale, *v_scale;
  double scale;
  int64_t rotated_keys, late_copies;
};

// Returns 1 for a head size without a kernel.
extern "C" int run_nvfp4_prefix(const Args* a) {
  using namespace xlayer::prefix;
  if (a->head_size != D) return 1;
  xlayer::Nvfp4AttentionParams p = {};
  p.q = a->q;
  p.q_stride_t = a->q_stride_t;
  p.q_stride_h = a->q_stride_h;
  p.out = a->out;
  p.out_stride_t = a->out_stride_t;
  p.out_stride_h = a->out_stride_h;
  p.lse = a->lse;
  p.lse_stride_h = a->lse_stride_h;
  p.dtype = a->is_f16 ? xlayer::Dtype::F16 : xlayer::Dtype::BF16;
  p.cache = a->cache;
  p.block_stride = a->block_stride;
  p.page = {int(a->heads), int(a->block_size), int(a->head_size)};
  p.block_table = a->block_table;
  p.block_table_stride = a->block_table_stride;
  p.seq_lens = a->lens;
  p.num_requests = int(a->num_requests);
  p.q_len = int(a->max_query_len);
  p.num_q_heads = int(a->num_q_heads);
  p.query_starts = a->query_starts;
  p.k_scale = a->k_scale;
  p.v_scale = a->v_scale;
  p.scale = float(a->scale);
  p.rotated_keys = a->rotated_keys != 0;
  simt::machine().late_copies = a->late_copies != 0;
  const int rows = p.q_len * (p.num_q_heads / p.page.heads);
  const unsigned tiles = unsigned((rows + ROWS - 1) / ROWS);
  simt::launch({tiles, unsigned(p.page.heads), unsigned(p.num_requests)}, THREADS, SHARED_BYTES,
               [&] { nvfp4_prefix_kernel(p, per_page(p.page.block_size)); });
  return 0;
}

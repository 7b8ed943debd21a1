// The decode attention kernels, both, on the CPU: for tests/ops/test_nvfp4_attention_emulated.py.
#include "simt.h"

#include "kernels/nvfp4_attention/decode.cuh"
#include "kernels/nvfp4_attention/schedule.cuh"

namespace xlayer::attention {
namespace {

template <class C>
void run(Nvfp4AttentionParams p) {
  const int tiles = p.page.heads * row_tiles(p.q_len, p.num_q_heads / p.page.heads, C::TILE_ROWS);
  const int64_t splits =
      p.split_units > 0
          ? ceil_div(ceil_div(p.max_blocks * p.page.block_size, SPLIT_UNIT_TOKENS), p.split_units)
          : 0;
  const int64_t slots = p.split_units > 0 ? p.num_requests * tiles * splits : 2 * p.parts;
  // NaN: nothing is read that was not written.
  std::vector<float> out(slots * C::TILE_ROWS * C::DP, NAN), ml(slots * C::TILE_ROWS * 2, NAN);
  const int rows = p.q_len * (p.num_q_heads / p.page.heads);
  std::vector<int32_t> schedule(Schedule::size(p.num_requests, p.page.heads, rows), -1);
  p.partial_out = out.data();
  p.partial_ml = ml.data();
  p.schedule = schedule.data();
  simt::launch({1, 1, 1}, SCHEDULE_THREADS, 0, [&] {
    schedule_kernel(p, C::UNIT_TOKENS, C::TILE_ROWS, p.parts);
  });
  // As many teams as parts, or more.
  simt::launch({unsigned((p.parts + C::TEAMS - 1) / C::TEAMS), 1, 1}, C::THREADS, C::SHARED_BYTES, [&] {
    p.newest == nullptr ? decode_kernel<C, false>(p) : decode_kernel<C, true>(p);
  });
  for (int64_t i = Schedule::counters(p.num_requests); i < int64_t(schedule.size()); ++i) {
    if (schedule[i] > 0) simt::fail("a counter is not 0 after the launch");  // -1: never used
  }
}

}  // namespace
}  // namespace xlayer::attention

// The schedule alone, for a query head a KV head. newest_from: null without newest tokens.
extern "C" void run_nvfp4_schedule(const int32_t* seq_lens, const int32_t* newest_from, int64_t requests,
                                   int64_t unit, int64_t heads, int64_t parts, int64_t q_len, int64_t window,
                                   int64_t split_units, int32_t* schedule) {
  using namespace xlayer::attention;
  simt::launch({1, 1, 1}, SCHEDULE_THREADS, 0, [&] {
    xlayer::Nvfp4AttentionParams p = {};
    p.seq_lens = seq_lens;
    p.newest_from = newest_from;
    p.schedule = schedule;
    p.num_requests = int(requests);
    p.q_len = int(q_len);
    p.window = int(window);
    p.split_units = int(split_units);
    p.page.heads = p.num_q_heads = int(heads);
    schedule_kernel(p, int(unit), 8, int(parts));
  });
}

// All of eight bytes, so that Python can mirror it: tests/reference/emulated.py.
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
  int64_t block_table_stride, max_blocks;
  const int32_t* seq_lens;
  int64_t num_requests, q_len, num_q_heads;
  const float *k_scale, *v_scale, *sinks;
  double scale, soft_cap;
  int64_t window, swizzled, parts, split_units, late_copies, warps, teams;
  const void* newest;
  const int32_t *newest_rows, *newest_from;
  int64_t newest_tokens;
  const int32_t* query_starts;
  int64_t kernel_q_len, rotated_keys;
};

// Tile rows are chosen as launch.cu does; warps: of a team, 4, or 16 where there is such a kernel; teams: of a
// thread block, 1, or 4. Returns 1 for a head size without a kernel.
extern "C" int run_nvfp4_attention(const Args* a) {
  using namespace xlayer::attention;
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
  p.max_blocks = a->max_blocks;
  p.seq_lens = a->seq_lens;
  p.num_requests = int(a->num_requests);
  p.q_len = int(a->q_len);
  p.num_q_heads = int(a->num_q_heads);
  p.k_scale = a->k_scale;
  p.v_scale = a->v_scale;
  p.sinks = a->sinks;
  p.scale = float(a->scale);
  p.soft_cap = float(a->soft_cap);
  p.window = int(a->window);
  p.v_order = a->swizzled ? xlayer::ScaleOrder::SWIZZLED : xlayer::ScaleOrder::LINEAR;
  p.parts = int(a->parts);
  p.split_units = int(a->split_units);
  p.newest = a->newest;
  p.newest_rows = a->newest_rows;
  p.newest_from = a->newest_from;
  p.newest_tokens = int(a->newest_tokens);
  p.query_starts = a->query_starts;
  p.rotated_keys = a->rotated_keys != 0;
  p.kernel_q_len = int(a->query_starts == nullptr ? a->q_len : a->kernel_q_len);
  simt::machine().late_copies = a->late_copies != 0;

  const int rows = p.kernel_q_len * (p.num_q_heads / p.page.heads);
  if (a->teams == 4) {
    switch (p.page.head_size) {
      case 64: rows <= 8 ? run<Config<64, 1, 4, 4>>(p) : run<Config<64, 2, 4, 4>>(p); return 0;
      case 128: rows <= 8 ? run<Config<128, 1, 4, 4>>(p) : run<Config<128, 2, 4, 4>>(p); return 0;
      case 256: run<Config<256, 1, 4, 4>>(p); return 0;
    }
    return 1;
  }
  if (a->warps == 16) {
    switch (p.page.head_size) {
      case 64: run<Config<64, 1, 16>>(p); return 0;
      case 128: rows <= 8 ? run<Config<128, 1, 16>>(p) : run<Config<128, 2, 16>>(p); return 0;
    }
    return 1;
  }
  switch (p.page.head_size) {
    case 64:
      rows <= 8 ? run<Config<64, 1>>(p) : rows <= 16 ? run<Config<64, 2>>(p) : run<Config<64, 4>>(p);
      return 0;
    case 80: run<Config<80, 1>>(p); return 0;
    case 96: run<Config<96, 1>>(p); return 0;
    case 112: run<Config<112, 1>>(p); return 0;
    case 128: rows <= 8 ? run<Config<128, 1>>(p) : run<Config<128, 2>>(p); return 0;
    case 192: run<Config<192, 1>>(p); return 0;
    case 256: run<Config<256, 1>>(p); return 0;
  }
  return 1;
}

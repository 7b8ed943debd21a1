// The decode attention kernels, both, on the CPU: for tests/ops/test_nvfp4_attention_emulated.py.
#include <attention_args.h>

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
  simt::launch({1, 1, 1}, SCHEDULE_THREADS, 0,
               [&] { schedule_kernel(p, C::UNIT_TOKENS, C::TILE_ROWS, p.parts); });
  // As many teams as parts, or more.
  simt::launch({unsigned((p.parts + C::TEAMS - 1) / C::TEAMS), 1, 1}, C::THREADS, C::SHARED_BYTES,
               [&] { p.newest == nullptr ? decode_kernel<C, false>(p) : decode_kernel<C, true>(p); });
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

// Tile rows are chosen as launch.cu does; warps: of a team, 4, or 16 where there is such a kernel; teams: of
// a thread block, 1, or 4. Returns 1 for a head size without a kernel.
extern "C" int run_nvfp4_attention(const Args* a) {
  using namespace xlayer::attention;
  xlayer::Nvfp4AttentionParams p = params_of(a);
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

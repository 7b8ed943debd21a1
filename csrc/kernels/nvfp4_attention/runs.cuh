// The runs that a thread block takes of the schedule.
#pragma once

#include "combine.cuh"

namespace xlayer::attention {

// Calls f(run) for each run of this block's parts, in order.
template <class C, bool NEWEST, class F>
__device__ __forceinline__ void for_each_run(const Nvfp4AttentionParams& p, F f) {
  const int heads = C::LINE_OF_ALL_HEADS ? 1 : p.page.heads;
  const int32_t* begins = p.schedule + Schedule::BEGINS;
  const int chunk = p.schedule[Schedule::CHUNK];
  const int parts = p.schedule[Schedule::PARTS];
  const int total = p.schedule[Schedule::TOTAL];
  // Of the only part that a block has then: nothing else is waited for to find it.
  const int first_request = C::LINE_OF_ALL_HEADS ? first_requests(p, C::TILE_ROWS, gridDim.x)[blockIdx.x] : 0;
  for (int part = blockIdx.x; part < parts; part += gridDim.x) {
    int position = part * chunk;
    const int part_begin = position, part_end = min(position + chunk, total);
    int request = C::LINE_OF_ALL_HEADS ? first_request : find_request(begins, p.num_requests, position);
    while (position < part_end) {
      const int q_len = queries_of(p, request).count;
      const int units = key_range(p.seq_lens[request], q_len, p.window, C::UNIT_TOKENS).units;
      const int tiles_per_head = row_tiles(q_len, p.num_q_heads / p.page.heads, C::TILE_ROWS);
      int line = line_units(units, p.split_units);
      if constexpr (NEWEST) {  // longer, as the schedule has it. Without the maximum nvcc spills registers.
        line = max(line, (begins[request + 1] - begins[request]) / (heads * tiles_per_head));
      }
      const int within = position - begins[request];
      Run run;
      run.request = request;
      run.head_tile = within / line;
      run.kv_head = run.head_tile / tiles_per_head;
      run.first_row = run.head_tile % tiles_per_head * C::TILE_ROWS;
      run.begin = within - run.head_tile * line;
      const int advance = min(line - run.begin, part_end - position);
      run.end = min(run.begin + advance, units);
      const int begin = position - run.begin;  // of all units of this request and head tile
      run.first_part = ptx::uniform(begin / chunk);
      run.last_part = ptx::uniform((begin + units - 1) / chunk);
      run.starts_inside = begin != run.first_part * chunk;
      run.slot = slot_of(p, part, position != part_begin);
      // Nothing, where this part begins among what newest tokens add to the line.
      if (!NEWEST || run.begin < units) f(run);
      position += advance;
      while (position < part_end && begins[request + 1] <= position) ++request;
    }
  }
}

}  // namespace xlayer::attention

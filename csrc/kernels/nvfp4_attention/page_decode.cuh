// Attention of a few query tokens to an NVFP4 cache, one pass over the bytes, for pages of 16 tokens of as
// many KV heads as a thread block has warps.
//
// decode.cuh gives a thread block some tokens of one KV head, of which each warp copies its own; here it has
// all KV heads of a request, a warp a head. A page is contiguous, so one bulk copy brings a tile for each
// warp, in place of some twenty instructions in each; warps have nothing to merge with each other and meet at
// no barrier but those of the ring (page_ring.cuh). What parts share is merged by a warp as well
// (page_output.cuh). The words are those of decode.cuh, but that a tile is 16 tokens of all heads, and of
// costs (page_work.cuh).
#pragma once

#include "combine.cuh"
#include "newest.cuh"
#include "page_output.cuh"
#include "page_ring.cuh"
#include "query.cuh"

namespace xlayer::attention {

// The masks of a run's tiles.
__device__ __forceinline__ TileMask mask_of(const Nvfp4AttentionParams& p, const PageRun& run, int tile) {
  TileMask mask;
  mask.first_token = tile * TILE;
  mask.first = run.first_seen;
  mask.last = run.last;
  mask.q_len = run.q_len;
  mask.window = p.window;
  mask.first_row = run.row_tile * ROWS;
  mask.group = p.num_q_heads / p.page.heads;
  mask.soft_cap = p.soft_cap;
  return mask;
}

// The run's tiles of newest tokens: each is in several stages, one of which has this warp's head.
template <class C>
__device__ __forceinline__ void attend_newest_stages(const Nvfp4AttentionParams& p, const PageNotes& notes,
                                                     WarpState<C>& state, PageRing<C, true>& ring) {
  const int head = ptx::uniform(threadIdx.x / 32);
  const NewestTile<C> newest(p);
  newest.to_newest_unit(state);
  const int pages = ptx::uniform(notes.pages), fills = ptx::uniform(notes.fills);
#pragma unroll 1
  for (int fill = pages; fill < fills; ++fill) {
    const uint32_t stage = ring.wait(fill);
    const int part = fill - pages;
    if (part % C::NEWEST_STAGES == head / C::NEWEST_HEADS) {
      const NewestInStage<C> from = {stage + head % C::NEWEST_HEADS * 2 * C::NEWEST_BYTES};
      newest.attend(state, from, 0, mask_of(p, notes.run, notes.run.begin + pages + part / C::NEWEST_STAGES));
    }
    ring.leave();
  }
  newest.to_page_unit(state);
}

// The noted run from its first copy to its result. All threads of the block take part.
template <class C, bool NEWEST>
__device__ __forceinline__ void attend_page_run(const Nvfp4AttentionParams& p, const PageNotes& notes,
                                                WarpState<C>& state, PageRing<C, NEWEST>& ring) {
  const int head = ptx::uniform(threadIdx.x / 32);
  const PageRun& run = notes.run;
  ring.start();
  state.clear();
  load_query(state, p, Queries{run.queries, run.q_len}, head, run.row_tile * C::TILE_ROWS);

  uint32_t stage_begin = 0;
  ptx::pin(stage_begin);  // made anew in each run: not in registers while results are merged
  const LaneOffsets<C> at(stage_begin, p, head);
  // Tokens [all_see_from, all_see_to) are seen by every query.
  const int all_see_from = p.window > 0 ? max(run.last - p.window, 0) : 0;
  const int all_see_to = run.last - run.q_len + 1;
  const int plain_from = ptx::uniform((all_see_from + TILE - 1) / TILE - run.begin);
  const int plain_to = ptx::uniform(p.soft_cap == 0.0f ? all_see_to / TILE - run.begin : 0);
  const int pages = ptx::uniform(notes.pages);
#pragma unroll 1
  for (int i = 0; i < pages; ++i) {
    const uint32_t stage = ring.wait(i);
    if (i >= plain_from && i < plain_to) {
      Tile<C>::attend(state, stage, at, nullptr);
    } else {
      const TileMask mask = mask_of(p, run, run.begin + i);
      Tile<C>::attend(state, stage, at, &mask);
    }
    ring.leave();
  }
  if constexpr (NEWEST) {
    if (ptx::uniform(notes.fills) > ptx::uniform(notes.pages)) attend_newest_stages(p, notes, state, ring);
  }

  const int group = p.num_q_heads / p.page.heads, first_row = run.row_tile * C::TILE_ROWS;
  const int rows = ptx::uniform(min(run.q_len * group - first_row, C::TILE_ROWS));
  if (run.whole()) {
    store_whole(p, state, run.queries, head, first_row, rows);
    return;
  }
  store_partial(p, state, page_slot<C>(run.part, run.part == run.first_part, head), rows);
  const int64_t row_tile = int64_t(run.request) * row_tiles(p.q_len, group, C::TILE_ROWS) + run.row_tile;
  int32_t* counter = p.schedule + Schedule::counters(p.num_requests) + row_tile * C::HEADS + head;
  const int parts = ptx::uniform(run.last_part - run.first_part + 1);
  if (comes_last_of(counter, parts))
    combine_parts<C>(p, run.first_part, parts, run.queries, head, first_row, rows);
}

// What a part has from `position` on: of one request and row tile.
__device__ __forceinline__ PageRun page_run(const Nvfp4AttentionParams& p, int part, int position,
                                            int request) {
  const int32_t* begins = p.schedule + Schedule::BEGINS;
  const int chunk = p.schedule[Schedule::CHUNK];
  const int part_end = min((part + 1) * chunk, p.schedule[Schedule::TOTAL]);
  while (begins[request + 1] <= position) ++request;
  const Queries queries = queries_of(p, request);
  const Range keys = key_range(p.seq_lens[request], queries.count, p.window, TILE);
  const PageLine line(p, request, keys);
  // As the schedule has it: there may be something behind the last tile.
  const int row_tiles_here = row_tiles(queries.count, p.num_q_heads / p.page.heads, ROWS);
  const int length = (begins[request + 1] - begins[request]) / row_tiles_here;
  const int within = position - begins[request];
  PageRun run;
  run.request = request;
  run.row_tile = within / length;
  const int from = within - run.row_tile * length, to = min(length, from + part_end - position);
  run.begin = keys.begin_unit + line.tiles_before(from, p.costs);
  run.end = keys.begin_unit + line.tiles_before(to, p.costs);
  run.pages_end = keys.begin_unit + line.pages;
  run.first_seen = keys.first;
  run.last = keys.last;
  run.queries = queries.begin;
  run.q_len = queries.count;
  run.part = part;
  run.next = position + to - from;
  const int begin = position - from;  // of this request and row tile
  run.first_part = (begin + line.first_begin(p.costs)) / chunk;
  run.last_part = (begin + line.last_begin(p.costs)) / chunk;
  return run;
}

// NEWEST: there may be tiles of newest tokens. A variant of its own, so that the other is not held up by
// them.
template <class C, bool NEWEST>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS)
    page_decode_kernel(const __grid_constant__ Nvfp4AttentionParams p) {
#if XLAYER_HAS_BULK_COPY
  XLAYER_DYNAMIC_SHARED(shared);
  static_assert(sizeof(PageNotes) <= C::NOTES_BYTES);
  PageNotes& notes =
      *reinterpret_cast<PageNotes*>(shared + C::NOTES_OFFSET + threadIdx.x / 32 * C::NOTES_BYTES);
  PageRing<C, NEWEST> ring(p, ptx::shared_address(shared), notes);
  WarpState<C> state;
  notes.begin();

  const int parts = p.schedule[Schedule::PARTS];
  for (int part = blockIdx.x; part < parts; part += gridDim.x) {
    const int chunk = p.schedule[Schedule::CHUNK], begin = part * chunk;
    const int request = find_request(p.schedule + Schedule::BEGINS, p.num_requests, begin);
    notes.write(page_run(p, part, begin, request), C::NEWEST_STAGES);
    while (true) {
      // Nothing, where this part has only what was left over by another, or what a run costs.
      if (ptx::uniform(notes.fills) > 0) attend_page_run(p, notes, state, ring);
      const int next = ptx::uniform(notes.run.next);
      if (next >= min((notes.run.part + 1) * p.schedule[Schedule::CHUNK], p.schedule[Schedule::TOTAL])) break;
      notes.write(page_run(p, notes.run.part, next, notes.run.request), C::NEWEST_STAGES);
    }
    part = ptx::uniform(notes.run.part);
  }
  store_empty_requests<C>(p);
#endif
}

}  // namespace xlayer::attention

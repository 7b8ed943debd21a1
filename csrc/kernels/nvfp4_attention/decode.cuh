// Attention of a few query tokens to an NVFP4 cache, one pass over the bytes.
//
// A team of warps takes a part of the schedule (params.h): runs of units, each run of one request and head
// tile. Its warps take 16 tokens of a unit each and never wait for each other: every warp has its own ring of
// stages and its own running maximum. At the end of a run their results are merged in shared memory.
//
// The words, from small to large:
//   group    16 elements that share a block scale; elsewhere also query heads / KV heads
//   piece    16 bytes that a lane copies to shared memory at once
//   place    where a newest token is in its request's row: its position modulo newest_tokens
//   tile     16 tokens of one KV head, what a warp works on at a time; a stage of the ring holds one
//   unit     a tile for each warp of a team: 64 tokens (256 with sixteen warps)
//   head tile  query rows that are worked on together: 8, 16 or 32 of a KV head's q_len * group
//   line     all units of the batch, request by request and head tile by head tile; also those of one of them
//   run      consecutive units of one request and head tile that one team takes
//   chunk    units of a part; all parts but the last have as many
//   part     what a team takes at a time: consecutive units of the line, in one or several runs
//   slot     where in the workspace a run's partial result is, if other parts have units of the same head tile
#pragma once

#include "combine.cuh"
#include "load.cuh"
#include "newest.cuh"
#include "query.cuh"

namespace xlayer::attention {

// The warps' results of a run, added up: the output if the run is whole, else a partial result, and the
// output if it is the last one.
template <class C>
__device__ __forceinline__ void merge_and_store(const Nvfp4AttentionParams& p, const WarpState<C>& state,
                                                const Run& run) {
  float* shared = reinterpret_cast<float*>(Team<C>::shared() + C::MERGE_OFFSET);
  const int lane = threadIdx.x & 31, warp = Team<C>::warp(), g = lane >> 2, t = lane & 3;
  float* outs = shared;                                              // [WARPS][TILE_ROWS][OUT_STRIDE]
  float* maxima = shared + C::WARPS * C::TILE_ROWS * C::OUT_STRIDE;  // [WARPS][TILE_ROWS]
  float* sums = maxima + C::WARPS * C::TILE_ROWS;
  Team<C>::sync();  // all warps have read their tiles, and the last run's results
#pragma unroll
  for (int stat = 0; stat < C::STATS; ++stat) {
    const int row = Held<C>::row(warp * C::TILE_ROWS, g, t, stat);
    const int n = stat / 2, j = stat % 2;
    float sum = state.sum[stat];
#pragma unroll
    for (int lanes = Held<C>::LANES; lanes < Held<C>::LANES_END; lanes *= 2) {
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
    }
    if ((C::ROWS_M ? t : g) == 0) maxima[row] = state.max[stat], sums[row] = sum;
    // Dimensions 2 m and 2 m + 1 of those of V's lane group: rows g and g + 8 of MMA tile m as operand A.
    if constexpr (C::ROWS_M) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // of V's lane groups 2 t and 2 t + 1
        float* out = outs + row * C::OUT_STRIDE + C::out_place((2 * t + i) * (C::DP / 8));
#pragma unroll
        for (int d = 0; d < C::DP / 8; d += 4) {
          const float(*tiles)[C::M_TILES][4] = state.out + 2 * n;
          *reinterpret_cast<float4*>(out + d) =
              make_float4(tiles[0][d / 2][2 * j + i], tiles[1][d / 2][2 * j + i],
                          tiles[0][d / 2 + 1][2 * j + i], tiles[1][d / 2 + 1][2 * j + i]);
        }
      }
    } else {
      float* out = outs + row * C::OUT_STRIDE + g * (C::DP / 8);
#pragma unroll
      for (int d = 0; d < C::DP / 8; d += 4) {
        *reinterpret_cast<float4*>(out + d) =
            make_float4(state.out[n][d / 2][j], state.out[n][d / 2][2 + j], state.out[n][d / 2 + 1][j],
                        state.out[n][d / 2 + 1][2 + j]);
      }
    }
  }
  Team<C>::sync();
  constexpr int CHUNKS = C::D / 4;  // of a row
  const Queries queries = queries_of(p, run.request);
  const int rows = min(queries.count * (p.num_q_heads / p.page.heads) - run.first_row, C::TILE_ROWS);
  for (int i = int(Team<C>::thread()); i < rows * CHUNKS; i += C::TEAM_THREADS) {
    const int row = i / CHUNKS, d = i % CHUNKS * 4;
    float max = EMPTY, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < C::WARPS; ++w) max = fmaxf(max, maxima[w * C::TILE_ROWS + row]);
    float x[4] = {};
#pragma unroll
    for (int w = 0; w < C::WARPS; ++w) {
      const int at = w * C::TILE_ROWS + row;
      const float weight = exp2f(maxima[at] - max);
      sum += sums[at] * weight;
      const float4 y = *reinterpret_cast<const float4*>(outs + at * C::OUT_STRIDE + C::out_place(d));
      x[0] += y.x * weight, x[1] += y.y * weight, x[2] += y.z * weight, x[3] += y.w * weight;
    }
    if (run.whole()) {
      const OutputRow to = output_row(p, queries.begin, run.kv_head, run.first_row + row);
      store_out(p, to, d, x, finish_row(p, to, max, sum, d == 0));
    } else {
      const int64_t at = run.slot * C::TILE_ROWS + row;
      *reinterpret_cast<float4*>(p.partial_out + at * C::DP + d) = make_float4(x[0], x[1], x[2], x[3]);
      if (d == 0) reinterpret_cast<float2*>(p.partial_ml)[at] = make_float2(max, sum);
    }
  }
  if (run.whole()) {
    if constexpr (C::MERGES_IN_RING) Team<C>::sync();  // before the next run's tiles are copied there
  } else if (comes_last<C>(p, run)) {                  // which waits, too
    combine<C>(p, run, rows);
  }
}

// This warp's tiles of a run that are among the newest tokens, from tile `tile` to `last_tile`, WARPS apart.
template <class C>
__device__ __forceinline__ void attend_newest(const Nvfp4AttentionParams& p, const Run& run, WarpState<C>& state,
                                              TileMask& mask, int tile, int last_tile) {
  if (tile >= last_tile) return;
  const NewestTile<C> newest(p, p.newest_rows[run.request], run.kv_head);
  if constexpr (!C::NEWEST_FIRST) newest.to_newest_unit(state);
#pragma unroll 1
  for (; tile < last_tile; tile += C::WARPS) {
    mask.first_token = tile * TILE;
    newest.attend(state, mask);
  }
  newest.to_page_unit(state);
}

// A run from its first copy to its result. All threads of the team take part.
template <class C, bool NEWEST>
__device__ __forceinline__ void attend_run(const Nvfp4AttentionParams& p, const Run& run, WarpState<C>& state,
                                           TileLoader<C>& loader, const LaneOffsets<C>& at, uint32_t ring) {
  const int warp = ptx::uniform(Team<C>::warp());
  const int seq_len = p.seq_lens[run.request];
  const Queries queries = queries_of(p, run.request);
  const Range keys = key_range(seq_len, queries.count, p.window, C::UNIT_TOKENS);
  const int first_tile = (keys.begin_unit + run.begin) * C::WARPS + warp;
  const int run_end = min((keys.begin_unit + run.end) * C::WARPS, (keys.last + TILE - 1) / TILE);
  const int last_tile = NEWEST ? min(run_end, newest_tile(p, run.request, seq_len)) : run_end;
  const int count =
      ptx::uniform(last_tile > first_tile ? (last_tile - first_tile + C::WARPS - 1) / C::WARPS : 0);
  const int newest_from = ptx::uniform(first_tile + count * C::WARPS);
  const bool newest_first = NEWEST && C::NEWEST_FIRST && last_tile < run_end;
  if (!newest_first) loader.start(run.request, run.kv_head, first_tile, count, keys.first / TILE);
  state.clear();
  load_query(state, p, queries, run.kv_head, run.first_row);

  TileMask mask;
  mask.first = keys.first;
  mask.last = keys.last;
  mask.q_len = queries.count;
  mask.window = p.window;
  mask.first_row = run.first_row;
  mask.group = p.num_q_heads / p.page.heads;
  mask.soft_cap = p.soft_cap;
  // Tokens [all_see_from, all_see_to) are seen by every query: of this warp's tiles, those from plain_from
  // on.
  const int all_see_from = p.window > 0 ? max(keys.last - p.window, 0) : 0;
  const int all_see_to = keys.last - queries.count + 1;
  constexpr int STEP = C::WARPS * TILE;
  const int plain_from = ptx::uniform(max(0, (all_see_from - first_tile * TILE + STEP - 1) / STEP));
  const int plain_to = ptx::uniform(p.soft_cap == 0.0f && all_see_to / TILE > first_tile
                                        ? (all_see_to / TILE - first_tile + C::WARPS - 1) / C::WARPS
                                        : 0);

  if (newest_first) {
    attend_newest(p, run, state, mask, newest_from, run_end);
    ptx::pin(ring);
    loader.aim(ring);
    loader.start(run.request, run.kv_head, first_tile, count, keys.first / TILE);
  }

  uint32_t offset = 0,
           last_offset = (C::STAGES - 1) * C::STAGE_BYTES;  // in the ring: this tile's and the last's stage
  for (int i = 0; i < count; ++i) {
    ptx::cp_async_wait<C::STAGES - 2>();
    __syncwarp();  // everybody's copies of this tile are there, and nobody reads the stage filled next
    loader.load(i + C::STAGES - 1, last_offset);
    if (i >= plain_from && i < plain_to) {
      Tile<C>::attend(state, offset, at, nullptr);
    } else {
      mask.first_token = (first_tile + i * C::WARPS) * TILE;
      Tile<C>::attend(state, offset, at, &mask);
    }
    last_offset = offset;
    offset = offset == (C::STAGES - 1) * C::STAGE_BYTES ? 0 : offset + C::STAGE_BYTES;
  }
  ptx::cp_async_wait<0>();
  __syncwarp();
  if constexpr (NEWEST && !C::NEWEST_FIRST) attend_newest(p, run, state, mask, newest_from, run_end);
  merge_and_store(p, state, run);
}

// NEWEST: there may be tiles of newest tokens. A variant of its own, so that the other stays what it is.
template <class C, bool NEWEST>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS)
    decode_kernel(const __grid_constant__ Nvfp4AttentionParams p) {
  uint8_t* shared = Team<C>::shared();
  const int lane = threadIdx.x & 31, warp = Team<C>::warp();
  uint8_t* stages = shared + warp * C::STAGES * C::STAGE_BYTES;
  const uint32_t ring = ptx::shared_address(stages);
  if constexpr (!C::EXACT) {
    // Dimensions from D to DP stay zero: no copy goes there.
    for (int i = lane; i < C::STAGES * C::STAGE_BYTES / 16; i += 32) {
      reinterpret_cast<uint4*>(stages)[i] = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
  }
  const LaneOffsets<C> at(ring, p);
  TileLoader<C> loader(p, ring);
  WarpState<C> state;
  if constexpr (C::SHARED_Q) state.q.at = ptx::shared_address(shared + C::Q_OFFSET) + 16 * lane;

  const int32_t* begins = p.schedule + Schedule::BEGINS;
  const int chunk = p.schedule[Schedule::CHUNK];
  const int parts = p.schedule[Schedule::PARTS];
  const int total = p.schedule[Schedule::TOTAL];
  // All blocks' first teams have the first parts, and so on: where there are fewer parts than teams, no block has
  // two fewer than another.
  for (int part = Team<C>::index() * gridDim.x + blockIdx.x; part < parts; part += C::TEAMS * gridDim.x) {
    int position = part * chunk;
    const int part_begin = position, part_end = min(position + chunk, total);
    int request = find_request(begins, p.num_requests, position);
    while (position < part_end) {
      const int q_len = queries_of(p, request).count;
      const int units = key_range(p.seq_lens[request], q_len, p.window, C::UNIT_TOKENS).units;
      const int tiles_per_head = row_tiles(q_len, p.num_q_heads / p.page.heads, C::TILE_ROWS);
      // As long as the schedule has it. Without the maximum nvcc spills registers.
      const int line = max(line_units(units, p.split_units),
                           (begins[request + 1] - begins[request]) / (p.page.heads * tiles_per_head));
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
      // Nothing, where this part begins among what the schedule adds to the line.
      if (run.begin < units) attend_run<C, NEWEST>(p, run, state, loader, at, ring);
      position += advance;
      while (position < part_end && begins[request + 1] <= position) ++request;
    }
  }
  store_empty_requests<C>(p);
}

}  // namespace xlayer::attention

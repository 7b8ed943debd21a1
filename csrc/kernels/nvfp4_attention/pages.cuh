// Decode attention for pages that are one tile of every KV head: 16 tokens, dense, by bulk copies.
//
// A line of the schedule is a request (and head tile) with all its KV heads, a unit is a page. A thread block
// has a warp a KV head and one that loads: it copies whole pages, one instruction each, into a ring of stages
// that all the others read, each its own head's tile. They never meet: a stage has a barrier that says that
// its page is there, and one that says that all warps have read it. So the loading warp is in the next run
// while the others finish this one. No results are merged within a block; those of several parts are, as
// elsewhere, by whoever comes last, but each warp for its own head.
#pragma once

#include "newest.cuh"
#include "pages_config.cuh"
#include "runs.cuh"
#include "warp_result.cuh"

namespace xlayer::attention {

// Shared addresses of what a lane reads of the ring's first stage.
template <int HEADS>
struct LaneOffsets<PageConfig<HEADS>> {
  using C = PageConfig<HEADS>;
  static constexpr int V_GROUPS = 1;
  uint32_t k_data, k_scale[1], v_data[2], v_scale[2];
  const Shifts shifts;

  __device__ __forceinline__ uint32_t v_row(int i) const { return v_data[i % 2]; }
  __device__ __forceinline__ uint32_t v_row_scale(int, int i) const { return v_scale[i % 2]; }

  __device__ __forceinline__ LaneOffsets(uint32_t ring, const Nvfp4AttentionParams& p, int head)
      : shifts{p.two, p.sixteen} {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int token = C::token_of_row(g);
    k_data = ring + head * C::HEAD_DATA + token * C::ROW + 16 * t;
    k_scale[0] = ring + C::K_SCALE + head * C::HEAD_SCALES + token * C::S + 2 * t;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = C::v_token(t, i);
      v_data[i] = ring + C::V_DATA + head * C::HEAD_DATA + n * C::ROW + 8 * g;
      v_scale[i] = ring + C::V_SCALE + head * C::HEAD_SCALES + p.page.scale_index(p.v_order, n, g);
    }
  }
};

// The tiles of a run: `count` pages from tile `first` on, then newest tokens to tile `end`.
struct RunTiles {
  Queries queries;
  Range keys;
  int first, count, end;
};

template <class C, bool NEWEST>
__device__ __forceinline__ RunTiles tiles_of(const Nvfp4AttentionParams& p, const Run& run) {
  RunTiles r;
  const int seq_len = p.seq_lens[run.request];
  r.queries = queries_of(p, run.request);
  r.keys = key_range(seq_len, r.queries.count, p.window, C::UNIT_TOKENS);
  r.first = r.keys.begin_unit + run.begin;
  r.end = r.keys.begin_unit + run.end;
  const int last = NEWEST ? min(r.end, newest_tile(p, run.request, seq_len)) : r.end;
  r.count = ptx::uniform(max(last - r.first, 0));
  return r;
}

// A place in the ring, which goes around: the next stage to be filled, or to be read. Kept as addresses, so
// that there is nothing to be multiplied.
template <class C>
class Stage {
 public:
  __device__ __forceinline__ explicit Stage(uint32_t ring) : filled_(ring + C::BARRIERS) {}
  __device__ __forceinline__ uint32_t offset() const { return offset_; }
  __device__ __forceinline__ uint32_t filled() const { return filled_; }
  __device__ __forceinline__ uint32_t read() const { return filled_ + 8 * C::STAGES; }
  __device__ __forceinline__ uint32_t parity() const { return parity_; }
  __device__ __forceinline__ void advance() {
    const bool last = offset_ == (C::STAGES - 1) * C::STAGE_BYTES;
    offset_ = last ? 0 : offset_ + C::STAGE_BYTES;
    filled_ = last ? filled_ - 8 * (C::STAGES - 1) : filled_ + 8;
    parity_ ^= last;
  }

 private:
  uint32_t offset_ = 0, filled_, parity_ = 0;
};

// The warp that loads.
template <class C, bool NEWEST>
__device__ __forceinline__ void load_pages(const Nvfp4AttentionParams& p, uint32_t ring) {
  const int lane = threadIdx.x & 31;
  Stage<C> stage(ring);
  for_each_run<C, NEWEST>(p, [&](const Run& run) {
    const RunTiles tiles = tiles_of<C, NEWEST>(p, run);
    const int32_t* table = p.block_table + run.request * p.block_table_stride + tiles.first;
    int blocks = 0;  // of 32 pages, one a lane
    for (int i = 0; i < tiles.count; ++i) {
      if (i % 32 == 0 && i + lane < tiles.count) blocks = table[i + lane];
      const uint32_t block = uint32_t(__shfl_sync(0xFFFFFFFFu, blocks, i % 32));
      ptx::barrier_wait(stage.read(), stage.parity() ^ 1);
      if (lane == 0) {
        ptx::barrier_arrive_and_expect(stage.filled(), C::STAGE_BYTES);
        ptx::bulk_copy(ring + stage.offset(), p.cache + uint64_t(block) * uint32_t(p.block_stride),
                       C::STAGE_BYTES, stage.filled());
      }
      __syncwarp();
      stage.advance();
    }
  });
}

// A warp that attends to its head.
template <class C, bool NEWEST>
__device__ __forceinline__ void attend_pages(const Nvfp4AttentionParams& p, uint32_t ring, int head) {
  const int lane = threadIdx.x & 31;
  WarpState<C> state;
  Stage<C> stage(ring);
  for_each_run<C, NEWEST>(p, [&](const Run& run) {
    const RunTiles tiles = tiles_of<C, NEWEST>(p, run);
    state.clear();
    TileMask mask;
    mask.first = tiles.keys.first;
    mask.last = tiles.keys.last;
    mask.q_len = tiles.queries.count;
    mask.window = p.window;
    mask.first_row = run.first_row;
    mask.group = p.num_q_heads / C::WARPS;
    mask.soft_cap = p.soft_cap;
    if (NEWEST && tiles.first + tiles.count < tiles.end) {
      load_query(state, p, tiles.queries, head, run.first_row);
      attend_newest(p, run.request, head, state, mask, tiles.first + tiles.count, tiles.end);
    }
    load_query(state, p, tiles.queries, head, run.first_row);
    // Tokens [all_see_from, all_see_to) are seen by every query.
    const int all_see_from = p.window > 0 ? max(mask.last - p.window, 0) : 0;
    const int all_see_to = p.soft_cap == 0.0f ? mask.last - mask.q_len + 1 : 0;
    const int plain_from = ptx::uniform((all_see_from + TILE - 1) / TILE - tiles.first);
    const int plain_to = ptx::uniform(all_see_to / TILE - tiles.first);
    uint32_t first_stage = ring;
    ptx::pin(first_stage);  // only now: newest tokens and pages each need all registers
    const LaneOffsets<C> at(first_stage, p, head);
    for (int i = 0; i < tiles.count; ++i) {
      ptx::barrier_wait(stage.filled(), stage.parity());
      if (i >= plain_from && i < plain_to) {
        Tile<C>::attend(state, stage.offset(), at, nullptr);
      } else {
        mask.first_token = (tiles.first + i) * TILE;
        Tile<C>::attend(state, stage.offset(), at, &mask);
      }
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(stage.read());
      stage.advance();
    }
    WarpResult<C>(p, run, tiles.queries, head).store(state);
  });
}

template <class C, bool NEWEST>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS)
    decode_pages_kernel(const __grid_constant__ Nvfp4AttentionParams p) {
#if XLAYER_HAS_BULK_COPY
  XLAYER_DYNAMIC_SHARED(shared);
  const uint32_t ring = ptx::uniform(ptx::shared_address(shared));  // not worked out anew for each page
  const int warp = ptx::uniform(threadIdx.x / 32);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::STAGES; ++i) {
      ptx::barrier_init(ring + C::BARRIERS + 8 * i, 1);
      ptx::barrier_init(ring + C::BARRIERS + 8 * (C::STAGES + i), C::WARPS);
    }
    ptx::barriers_made();
  }
  __syncthreads();
  if (warp == C::WARPS) {
    load_pages<C, NEWEST>(p, ring);
  } else {
    attend_pages<C, NEWEST>(p, ring, warp);
  }
  store_empty_requests<C>(p);
#endif
}

}  // namespace xlayer::attention

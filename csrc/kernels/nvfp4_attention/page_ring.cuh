// Pages and newest tokens to a thread block's ring of stages in shared memory, by bulk copies.
//
// What is copied at once is a fill: a page, or a part of a tile of newest tokens. A block's fills are
// numbered through all of its runs; fill n goes to stage n % STAGES, warp n % WARPS asks for it, and all
// warps leave it one after the other in the order of numbers. Each stage has two barriers:
//
//   full   one arrival a phase, of who asks for a fill, with the bytes that it brings. Phase n / STAGES is
//   complete
//          when fill n is there. Every lane that reads a stage has waited for it by itself: so the copy's
//          writes, which the barrier's completion releases, come before that lane's reads.
//   empty  one arrival a phase of each warp, by a lane that has met the other 31 (__syncwarp) after their
//   last read
//          of the stage. Who asks for fill n + STAGES waits for it in phase n / STAGES: so all reads come
//          before the copy that overwrites what was read. Nobody writes to the ring but copies: there are no
//          writes of threads that a copy would have to be kept behind.
//
// A barrier is never two phases ahead of a thread that waits for it by parity: a stage is filled anew only
// when all warps have left it, and a warp leaves it only when it is full, whether it has read from it or not.
// No warp waits for ever: who waits for an empty stage, for fill n + STAGES, has left fill n itself, and the
// others need for that only fills before n + STAGES.
#pragma once

#include "../common/ptx.cuh"
#include "page_config.cuh"
#include "page_work.cuh"

namespace xlayer::attention {

template <class C, bool NEWEST>
class PageRing {
 public:
  // notes: this warp's.
  __device__ __forceinline__ PageRing(const Nvfp4AttentionParams& p, uint32_t ring, const PageNotes& notes)
      : p_(p), notes_(notes), ring_(ring), stage_(ring) {
    ptx::pin(ring_);
    if (threadIdx.x == 0) {
      for (uint32_t stage = ring_; stage != end(); stage += C::STAGE_PITCH) {
        ptx::barrier_init(stage + C::FULL, 1);
        ptx::barrier_init(stage + C::EMPTY_BARRIER, C::WARPS);
      }
      ptx::fence_async_copies();  // which complete the barriers
    }
    __syncthreads();
  }

  // The fills of the noted run; the first are asked for.
  __device__ __forceinline__ void start() {
    mine_ = next((threadIdx.x / 32 - notes_.number) & (C::WARPS - 1));
#pragma unroll 1
    for (int i = 0; i < C::STAGES - C::LAG; ++i) ask(i);
  }

  // Called for each of the run's fills in turn: waits until it is there, and returns the address of its
  // stage. Asks for another, if this warp is to.
  __device__ __forceinline__ uint32_t wait(int fill) {
    ask(fill + C::STAGES - C::LAG);
    ptx::barrier_wait(stage_ + C::FULL, parity_);
    return stage_;
  }

  // The warp will not read from the fill any more.
  __device__ __forceinline__ void leave() {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) ptx::barrier_arrive(stage_ + C::EMPTY_BARRIER);
    stage_ += C::STAGE_PITCH;
    if (stage_ == end()) stage_ = ring_, parity_ ^= 1;
  }

 private:
  __device__ __forceinline__ uint32_t end() const { return ring_ + C::RING_BYTES; }

  // `fill`, or a number that none has if the run has fewer.
  __device__ __forceinline__ int next(int fill) const {
    return ptx::uniform(fill < notes_.fills ? fill : INT32_MAX);
  }

  // Asks for a fill of the run, if it is this warp's to ask for. Called for each in turn.
  __device__ __forceinline__ void ask(int fill) {
    if (fill != mine_) return;
    mine_ = next(fill + C::WARPS);
    const int lane = threadIdx.x & 31, asked = fill / C::WARPS;  // by this warp
    if (asked % 32 == 0) {                                       // this warp's next 32 fills, one a lane
      const int page = fill + lane * C::WARPS;
      const int32_t* table = p_.block_table + notes_.run.request * p_.block_table_stride + notes_.run.begin;
      if (page < notes_.pages) block_ = table[page];
    }
    const int block = __shfl_sync(0xFFFFFFFFu, block_, asked % 32);
    const uint32_t number = notes_.number + fill, round = number / C::STAGES;
    const uint32_t to = ring_ + (number - round * C::STAGES) * C::STAGE_PITCH;
    if (lane == 0) {
      ptx::barrier_wait(to + C::EMPTY_BARRIER,
                        (round & 1) ^ 1);  // complete from the beginning in the first round
      if (!NEWEST || fill < notes_.pages) {
        ptx::barrier_expect(to + C::FULL, C::STAGE_BYTES);
        const uint64_t from = uint64_t(uint32_t(block)) * uint32_t(p_.block_stride);
        ptx::bulk_copy(to, p_.cache + from, C::STAGE_BYTES, to + C::FULL);
      } else {
        copy_newest(fill - notes_.pages, to);
      }
    }
    __syncwarp();
  }

  // A part of one of the run's tiles of newest tokens.
  __device__ __forceinline__ void copy_newest(int part, uint32_t to) const {
    const int tile = notes_.run.begin + notes_.pages + part / C::NEWEST_STAGES;
    const int head = part % C::NEWEST_STAGES * C::NEWEST_HEADS;
    const int row = p_.newest_rows[notes_.run.request];
    const int place = tile * TILE % p_.newest_tokens;  // a tile's places are contiguous
    ptx::barrier_expect(to + C::FULL, 2 * C::NEWEST_HEADS * C::NEWEST_BYTES);
#pragma unroll 1
    for (int i = 0; i < 2 * C::NEWEST_HEADS; ++i) {
      const int64_t from = newest_offset(p_.page, p_.newest_tokens, row, i % 2 != 0, head + i / 2, place);
      ptx::bulk_copy(to + i * C::NEWEST_BYTES, static_cast<const uint16_t*>(p_.newest) + from,
                     C::NEWEST_BYTES, to + C::FULL);
    }
  }

  const Nvfp4AttentionParams& p_;
  const PageNotes& notes_;
  uint32_t ring_;
  uint32_t stage_, parity_ = 0;  // of the fill that comes next, or that the warp reads
  int mine_ = 0;                 // the next fill of the run that this warp asks for
  int block_ = 0;                // of one of its next 32
};

}  // namespace xlayer::attention

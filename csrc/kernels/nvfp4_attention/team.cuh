// The warps that take a part of the schedule together: all of a thread block, or a fourth of it.
#pragma once

#include "../common/ptx.cuh"
#include "config.cuh"

namespace xlayer::attention {

template <class C>
struct Team {
  // Of this thread: which team of its block it is in, its number and its warp's in that. Read anew each time:
  // none is worth a register that is kept through the loop over pages. A team's index is known to be the same in
  // all lanes, and so is all that follows from it: its part, run, and request.
  __device__ __forceinline__ static int index() {
    return C::TEAMS == 1 ? 0 : ptx::uniform(int(ptx::thread_index() / C::TEAM_THREADS));
  }
  __device__ __forceinline__ static unsigned thread() {
    return C::TEAMS == 1 ? threadIdx.x : ptx::thread_index() % C::TEAM_THREADS;
  }
  __device__ __forceinline__ static unsigned warp() { return thread() / 32; }
  __device__ __forceinline__ static uint8_t* shared() {
    XLAYER_DYNAMIC_SHARED(of_all_teams);
    return of_all_teams + index() * C::TEAM_BYTES;
  }

  // All of the team's threads wait for each other.
  __device__ __forceinline__ static void sync() {
    if constexpr (C::TEAMS == 1) {
      __syncthreads();
    } else {
      ptx::barrier(1 + index(), C::TEAM_THREADS);
    }
  }
  // ... and learn whether one of them says so.
  __device__ __forceinline__ static bool any(bool says) {
    if constexpr (C::TEAMS == 1) {
      return __syncthreads_or(says) != 0;
    } else {
      return ptx::barrier_or(1 + index(), C::TEAM_THREADS, says);
    }
  }
};

}  // namespace xlayer::attention

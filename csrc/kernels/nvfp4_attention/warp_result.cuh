// A warp's results of a run, straight from its registers: the output, or a partial result and, where it is the
// last of its line, what all parts' results come to.
#pragma once

#include "combine.cuh"
#include "tile.cuh"

namespace xlayer::attention {

// Where a part's partial result of a run is, a head at a time.
template <class C>
__device__ __forceinline__ int64_t head_slot(int64_t slot, int head) {
  return slot * C::WARPS + head;
}

// A lane's rows are 2t and 2t + 1, and of each it has D / 8 dimensions from g * D / 8 on. Those from d on.
template <class C, int N>
__device__ __forceinline__ void take_out(const WarpState<C>& state, int j, int d, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = state.out[0][(d + i) / 2][j + 2 * (i % 2)];
}

// Of a lane's two rows.
template <class C>
__device__ __forceinline__ void store_rows(const Nvfp4AttentionParams& p, const WarpState<C>& state, const Run& run,
                                           const Queries& queries, int head, const float (&max)[2],
                                           const float (&sum)[2]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int rows = queries.count * (p.num_q_heads / C::WARPS) - run.first_row;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row = 2 * t + j;
    if (row >= rows) continue;
    const OutputRow to = output_row(p, queries.begin, head, run.first_row + row);
    const float factor = finish_row(p, to, max[j], sum[j], g == 0);
#pragma unroll
    for (int d = 0; d < C::D / 8; d += 8) {
      float x[8];
      take_out(state, j, d, x);
      store_out(p, to, g * (C::D / 8) + d, x, factor);
    }
  }
}

template <class C>
__device__ __forceinline__ void store_partial(const Nvfp4AttentionParams& p, const WarpState<C>& state, int64_t slot,
                                              const float (&sum)[2]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float* out = p.partial_out + (slot * ROWS + 2 * t + j) * C::D + g * (C::D / 8);
#pragma unroll
    for (int d = 0; d < C::D / 8; d += 4) {
      float x[4];
      take_out(state, j, d, x);
      *reinterpret_cast<float4*>(out + d) = make_float4(x[0], x[1], x[2], x[3]);
    }
  }
  if (g == 0) {
    *reinterpret_cast<float4*>(p.partial_ml + (slot * ROWS + 2 * t) * 2) =
        make_float4(state.max[0][0], sum[0], state.max[0][1], sum[1]);
  }
}

// The other parts' results and this one's, added up in the order of the parts: in `state`, `max` and `sum`.
template <class C>
__device__ __forceinline__ void combine_warp(const Nvfp4AttentionParams& p, WarpState<C>& state, const Run& run,
                                             int head, float (&max)[2], float (&sum)[2]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int count = run.last_part - run.first_part + 1;
  const auto first_row = [&](int i) {
    const int64_t slot = slot_of(p, run.first_part + i, i == 0 && run.starts_inside);
    return head_slot<C>(slot, head) * ROWS + 2 * t;
  };
  const auto max_and_sum = [&](int i) {
    return *reinterpret_cast<const float4*>(p.partial_ml + 2 * first_row(min(i, count - 1)));
  };
  max[0] = max[1] = EMPTY;
  for (int i = g; i < count; i += 8) {
    const float4 other = max_and_sum(i);
    max[0] = fmaxf(max[0], other.x), max[1] = fmaxf(max[1], other.z);
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      max[j] = fmaxf(max[j], __shfl_xor_sync(0xFFFFFFFFu, max[j], lanes));
    }
    sum[j] = 0.0f;
  }
  state.clear();
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const float4 other = max_and_sum(i);
    const float weight[2] = {exp2f(other.x - max[0]), exp2f(other.z - max[1])};
    sum[0] += other.y * weight[0], sum[1] += other.w * weight[1];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float* out = p.partial_out + (first_row(i) + j) * C::D + g * (C::D / 8);
#pragma unroll
      for (int d = 0; d < C::D / 8; d += 4) {
        const float4 y = *reinterpret_cast<const float4*>(out + d);
        state.out[0][d / 2][j] += y.x * weight[j], state.out[0][d / 2][2 + j] += y.y * weight[j];
        state.out[0][d / 2 + 1][j] += y.z * weight[j], state.out[0][d / 2 + 1][2 + j] += y.w * weight[j];
      }
    }
  }
}

// `state` is not needed any more.
template <class C>
__device__ __forceinline__ void store_result(const Nvfp4AttentionParams& p, WarpState<C>& state, const Run& run,
                                             const Queries& queries, int head) {
  float max[2], sum[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    max[j] = state.max[0][j], sum[j] = state.sum[0][j];
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) sum[j] += __shfl_xor_sync(0xFFFFFFFFu, sum[j], lanes);
  }
  if (!run.whole()) {
    store_partial(p, state, head_slot<C>(run.slot, head), sum);
    __syncwarp();
    int before = 0;
    int32_t* counter = p.schedule + Schedule::counters(p.num_requests) +
                       int64_t(run.request) * head_tiles_of(p, p.q_len, C::TILE_ROWS) + run.head_tile * C::WARPS + head;
    const int others = run.last_part - run.first_part;
    if ((threadIdx.x & 31) == 0) {
      before = ptx::add_acq_rel(counter, 1);
      if (before == others) *counter = 0;  // for the next layer
    }
    if (ptx::uniform(__shfl_sync(0xFFFFFFFFu, before, 0)) != others) return;
    combine_warp(p, state, run, head, max, sum);
  }
  store_rows(p, state, run, queries, head, max, sum);
}

}  // namespace xlayer::attention

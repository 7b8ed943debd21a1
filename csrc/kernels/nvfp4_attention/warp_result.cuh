// A warp's results of a run, straight from its registers: the output, or a partial result and, if it is the
// last one, what all of the line come to.
//
// Where a line has many parts, as a long request beside short ones has, one warp would read for long while no
// other has anything left to do. So the parts of a line are merged in groups, and then the groups: each time
// by the warp that comes last. The bits do not depend on who that is.
#pragma once

#include "combine.cuh"
#include "tile.cuh"

namespace xlayer::attention {

// Parts of a line that one warp merges, of so many.
__device__ __forceinline__ int parts_of_group(int parts) {
  constexpr int FEW = 6;  // at once
  if (parts <= FEW) return parts;
  int size = 3;
  while (size * size < parts) ++size;
  return size;
}

template <class C>
class WarpResult {
  static constexpr int DIMS = C::D / 8;  // of a row, that a lane has: from g * DIMS on, of rows 2t and 2t + 1
  static constexpr int TOGETHER = 4;     // parts read at a time: their latencies overlap

 public:
  __device__ __forceinline__ WarpResult(const Nvfp4AttentionParams& p, const Run& run, const Queries& queries,
                                        int head)
      : p_(p),
        run_(run),
        head_(head),
        first_query_(queries.begin),
        rows_(queries.count * (p.num_q_heads / C::WARPS) - run.first_row) {}

  __device__ __forceinline__ void store(const WarpState<C>& state) const {
    const int parts = run_.last_part - run_.first_part + 1, group = parts_of_group(parts);
    const int part = int(run_.slot / 2) - run_.first_part;  // of the line's
    const int64_t at = place(part);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float sum = state.sum[0][j], x[DIMS];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
#pragma unroll
      for (int d = 0; d < DIMS; ++d) x[d] = state.out[0][d / 2][j + 2 * (d % 2)];
      run_.whole() ? store_row(j, x, state.max[0][j], sum) : store_partial(at, j, x, state.max[0][j], sum);
    }
    if (run_.whole()) return;
    int32_t* lines = p_.schedule + Schedule::counters(p_.num_requests);
    const int tiles = head_tiles_of(p_, p_.q_len, C::TILE_ROWS);
    if (group < parts) {
      const int first = part / group * group, count = min(group, parts - first);
      if (count > 1) {
        // No other line has a group that begins with this part: at most it ends there.
        int32_t* groups = group_counters(p_, C::TILE_ROWS);
        if (!comes_last(groups + int64_t(run_.first_part + first) * C::WARPS + head_, count)) return;
        merge(first, 1, count, false);
      }
    }
    const int step = group < parts ? group : 1, count = (parts + step - 1) / step;
    if (!comes_last(lines + int64_t(run_.request) * tiles + run_.head_tile * C::WARPS + head_, count)) return;
    merge(0, step, count, true);
  }

 private:
  // Where the first row of a part's partial result is.
  __device__ __forceinline__ int64_t place(int part) const {
    const int64_t slot = slot_of(p_, run_.first_part + part, part == 0 && run_.starts_inside);
    return (slot * C::WARPS + head_) * ROWS;
  }

  // Whether all others have come before, after which their results can be read.
  __device__ __forceinline__ static bool comes_last(int32_t* counter, int count) {
    __syncwarp();
    int before = 0;
    if ((threadIdx.x & 31) == 0) {
      before = ptx::add_acq_rel(counter, 1);
      if (before == count - 1) *counter = 0;  // for the next layer
    }
    const bool last = ptx::uniform(__shfl_sync(0xFFFFFFFFu, before, 0)) == count - 1;
    __syncwarp();
    return last;
  }

  // `count` partial results, `step` parts apart, in order: to the output, or to the first one's place.
  __device__ __forceinline__ void merge(int first, int step, int count, bool to_output) const {
    const int g = int(threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    const auto at = [&](int i) { return place(first + min(i, count - 1) * step); };
#pragma unroll 1
    for (int j = 0; j < 2; ++j) {
      const int row = 2 * t + j;
      const auto max_and_sum = [&](int i) {
        return *reinterpret_cast<const float2*>(p_.partial_ml + 2 * (at(i) + row));
      };
      float max = EMPTY, sum = 0.0f, x[DIMS] = {};
      for (int base = 0; base < count; base += 8) max = fmaxf(max, max_and_sum(base + g).x);
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFFu, max, lanes));
#pragma unroll 1
      for (int base = 0; base < count; base += TOGETHER) {
        float2 ml[TOGETHER];
        float4 y[TOGETHER][DIMS / 4];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {  // beyond the last: that one again, times 0
          ml[i] = max_and_sum(base + i);
          const float* out = p_.partial_out + (at(base + i) + row) * C::D + g * DIMS;
#pragma unroll
          for (int d = 0; d < DIMS / 4; ++d) y[i][d] = *reinterpret_cast<const float4*>(out + 4 * d);
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
          const float weight = base + i < count ? exp2f(ml[i].x - max) : 0.0f;
          sum += ml[i].y * weight;
#pragma unroll
          for (int d = 0; d < DIMS / 4; ++d) {
            x[4 * d] += y[i][d].x * weight, x[4 * d + 1] += y[i][d].y * weight;
            x[4 * d + 2] += y[i][d].z * weight, x[4 * d + 3] += y[i][d].w * weight;
          }
        }
      }
      __syncwarp();  // all lanes have read maxima and sums
      to_output ? store_row(j, x, max, sum) : store_partial(place(first), j, x, max, sum);
    }
  }

  __device__ __forceinline__ void store_row(int j, const float (&x)[DIMS], float max, float sum) const {
    const int g = int(threadIdx.x & 31) >> 2, row = 2 * (threadIdx.x & 3) + j;
    if (row >= rows_) return;
    const OutputRow to = output_row(p_, first_query_, head_, run_.first_row + row);
    const float factor = finish_row(p_, to, max, sum, g == 0);
#pragma unroll
    for (int d = 0; d < DIMS; d += 8) {
      float eight[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) eight[i] = x[d + i];
      store_out(p_, to, g * DIMS + d, eight, factor);
    }
  }

  __device__ __forceinline__ void store_partial(int64_t at, int j, const float (&x)[DIMS], float max,
                                                float sum) const {
    const int g = int(threadIdx.x & 31) >> 2, row = 2 * (threadIdx.x & 3) + j;
    float4* out = reinterpret_cast<float4*>(p_.partial_out + (at + row) * C::D + g * DIMS);
#pragma unroll
    for (int d = 0; d < DIMS / 4; ++d)
      out[d] = make_float4(x[4 * d], x[4 * d + 1], x[4 * d + 2], x[4 * d + 3]);
    if (g == 0) *reinterpret_cast<float2*>(p_.partial_ml + 2 * (at + row)) = make_float2(max, sum);
  }

  const Nvfp4AttentionParams& p_;
  const Run& run_;
  const int head_, first_query_, rows_;
};

}  // namespace xlayer::attention

#include "launch.h"

#include "schedule.cuh"
#include "shapes.h"
#include "variant.cuh"

namespace xlayer {
namespace {

using attention::Config;
using attention::head_tiles_of;
using attention::Variant;

#define XLAYER_COUNT(D, NT, WARPS, TEAMS) +1
#define XLAYER_VARIANT(D, NT, WARPS, TEAMS) attention::variant<Config<D, NT, WARPS, TEAMS>>(),

using Variants = Variant[XLAYER_DECODE_SHAPES(XLAYER_COUNT)];

const Variants& variants() {
  static const Variants made = {XLAYER_DECODE_SHAPES(XLAYER_VARIANT)};
  return made;
}

// With blocks of one team of four warps: the first of the head size with enough rows, else its last.
const Variant* find(int head_size, int rows) {
  const Variant* found = nullptr;
  for (const Variant& v : variants()) {
    if (v.head_size != head_size || v.warps != 4 || v.teams != 1) continue;
    if (found == nullptr || found->tile_rows < rows) found = &v;
  }
  return found;
}

// The same with thread blocks that fill an SM, of one team or of several, if there is one and the current device
// has room for it. Of several only if `parts` are enough for a block on each SM.
const Variant* find_large(const Variant& small, bool teams, int parts) {
  int device = 0, room = 0, sms = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return nullptr;
  }
  for (const Variant& v : variants()) {
    if (v.head_size == small.head_size && v.tile_rows == small.tile_rows && v.warps * v.teams > small.warps &&
        (v.teams > 1) == teams && v.shared_bytes <= room && (!teams || v.blocks(parts) >= sms)) {
      return &v;
    }
  }
  return nullptr;
}

// Of the requests that the kernel is chosen for.
int rows_of(const Nvfp4AttentionParams& p) { return p.kernel_q_len * (p.num_q_heads / p.page.heads); }

// For this batch: the same for its schedule and its attention.
const Variant* find(const Nvfp4AttentionParams& p) {
  const Variant* v = find(p.page.head_size, rows_of(p));
  // With a fixed split, a request has the same bits in any batch.
  if (v == nullptr || p.split_units > 0) return v;
  const Variant* large = find_large(*v, false, p.parts);
  // As long as no large block has two lines to work on, one after the other.
  const bool few =
      large != nullptr &&
      int64_t(p.num_requests) * head_tiles_of(p, p.kernel_q_len, v->tile_rows) <= large->blocks(p.parts);
  if (few) return large;
  const Variant* teams = find_large(*v, true, p.parts);
  return teams != nullptr ? teams : v;
}

}  // namespace

cudaError_t launch_nvfp4_attention_schedule(const Nvfp4AttentionParams& p, cudaStream_t stream) {
  const Variant* v = find(p);
  if (v == nullptr) return cudaErrorInvalidValue;
  attention::schedule_kernel<<<1, attention::SCHEDULE_THREADS, 0, stream>>>(p, v->unit_tokens, v->tile_rows,
                                                                             v->all_teams(p.parts));
  return cudaGetLastError();
}

cudaError_t launch_nvfp4_attention(const Nvfp4AttentionParams& p, cudaStream_t stream) {
  const Variant* v = find(p);
  return v == nullptr ? cudaErrorInvalidValue : v->launch(p, stream);
}

int nvfp4_attention_parts(int head_size, int rows) {
  const Variant* v = find(head_size, rows);
  int device = 0, sms = 0;
  if (v == nullptr || cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 0;
  }
  return sms * v->blocks_per_sm();
}

int nvfp4_attention_tile_rows(int head_size, int rows) {
  const Variant* v = find(head_size, rows);
  return v == nullptr ? 0 : v->tile_rows;
}

int nvfp4_attention_padded_head_size(int head_size) {
  const Variant* v = find(head_size, 1);
  return v == nullptr ? 0 : v->padded_head_size;
}

}  // namespace xlayer

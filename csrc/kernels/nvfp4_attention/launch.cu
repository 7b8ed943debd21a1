#include "launch.h"

#include <cstdio>
#include <cstdlib>

#include "schedule.cuh"
#include "shapes.h"
#include "variant.cuh"

namespace xlayer {
namespace {

using attention::Config;
using attention::find_page_variant;
using attention::head_tiles_of;
using attention::PageVariant;
using attention::ROWS;
using attention::TILE;
using attention::Variant;

#define XLAYER_COUNT(D, NT, WARPS) +1
#define XLAYER_VARIANT(D, NT, WARPS) attention::variant<Config<D, NT, WARPS>>(),

using Variants = Variant[XLAYER_DECODE_SHAPES(XLAYER_COUNT)];

const Variants& variants() {
  static const Variants made = {XLAYER_DECODE_SHAPES(XLAYER_VARIANT)};
  return made;
}

// With blocks of four warps: the first of the head size with enough rows, else its last.
const Variant* find(int head_size, int rows) {
  const Variant* found = nullptr;
  for (const Variant& v : variants()) {
    if (v.head_size != head_size || v.warps != 4) continue;
    if (found == nullptr || found->tile_rows < rows) found = &v;
  }
  return found;
}

// The same with thread blocks that fill an SM, if there is one and the current device has room for it.
const Variant* find_large(const Variant& small) {
  int device = 0, room = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    return nullptr;
  }
  for (const Variant& v : variants()) {
    if (v.head_size == small.head_size && v.tile_rows == small.tile_rows && v.warps > small.warps &&
        v.shared_bytes <= room) {
      return &v;
    }
  }
  return nullptr;
}

// Of most requests.
int rows_of(const Nvfp4AttentionParams& p) { return p.usual_q_len * (p.num_q_heads / p.page.heads); }

// For this batch: the same for its schedule and its attention.
const Variant* find(const Nvfp4AttentionParams& p) {
  const Variant* v = find(p.page.head_size, rows_of(p));
  // With a fixed split, a request has the same bits in any batch.
  if (v == nullptr || p.split_units > 0) return v;
  const Variant* large = find_large(*v);
  // As long as no large block has two lines to work on, one after the other.
  const bool few =
      large != nullptr &&
      int64_t(p.num_requests) * head_tiles_of(p, p.usual_q_len, v->tile_rows) <= large->blocks(p.parts);
  return few ? large : v;
}

// The kernel for whole pages, if there is one for these heads and the current device; sm_90's, as it is
// measured there.
const PageVariant* page_variant(const Nvfp4AttentionParams& p) {
  int device = 0, major = 0;
  if (p.split_units > 0 || rows_of(p) > ROWS) return nullptr;
  const PageVariant* v = find_page_variant(p.page.head_size, p.page.heads);
  if (v == nullptr || cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      major != 9 || !v->runs()) {
    return nullptr;
  }
  return v;
}

// ... and if it is the faster one for this batch: the same for its schedule and its attention.
const PageVariant* find_pages(const Nvfp4AttentionParams& p) {
  if (p.page.block_size != TILE) return nullptr;
  const char* forced = std::getenv("XLAYER_KERNEL");  // "pages" or "tiles"
  const bool many =
      forced != nullptr ? forced[0] == 'p' : int64_t(p.num_requests) * p.page.heads * 2 > p.parts;
  return many ? page_variant(p) : nullptr;
}

// For measurements.
Nvfp4AttentionParams with_costs(Nvfp4AttentionParams p) {
  if (const char* text = std::getenv("XLAYER_COSTS")) {
    std::sscanf(text, "%d,%d,%d", &p.costs.run, &p.costs.newest, &p.costs.least);
  }
  return p;
}

}  // namespace

cudaError_t launch_nvfp4_attention_schedule(const Nvfp4AttentionParams& p, cudaStream_t stream) {
  if (const PageVariant* pages = find_pages(p)) {
    attention::schedule_kernel<<<1, attention::SCHEDULE_THREADS, 0, stream>>>(with_costs(p), TILE, ROWS,
                                                                              pages->blocks(p.parts), true);
    return cudaGetLastError();
  }
  const Variant* v = find(p);
  if (v == nullptr) return cudaErrorInvalidValue;
  attention::schedule_kernel<<<1, attention::SCHEDULE_THREADS, 0, stream>>>(p, v->unit_tokens, v->tile_rows,
                                                                            v->blocks(p.parts), false);
  return cudaGetLastError();
}

cudaError_t launch_nvfp4_attention(const Nvfp4AttentionParams& p, cudaStream_t stream) {
  if (const PageVariant* pages = find_pages(p)) return pages->launch(with_costs(p), stream);
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

int64_t nvfp4_attention_page_slots(const Nvfp4AttentionParams& p) {
  const PageVariant* v = page_variant(p);
  return v == nullptr ? 0 : 2 * int64_t(v->blocks(p.parts)) * v->heads;
}

int nvfp4_attention_padded_head_size(int head_size) {
  const Variant* v = find(head_size, 1);
  return v == nullptr ? 0 : v->padded_head_size;
}

}  // namespace xlayer

// Gathers tokens into dense K and V: from NVFP4 pages, from the step's own K and V, and from the newest
// tokens' memory (params.h says which, and GatherPlan how the work is cut).
//
// A thread block has consecutive tokens. First its threads find out where they are, one token each, and tell
// the others through shared memory; then each thread goes through `each` of the tokens with the same elements
// of K and V (chunk.cuh), so that where these are in a page and in the output is computed once. It asks for
// the next token's bytes before it decodes those that it has.
//
// From a page a thread reads 4 bytes of data a chunk, and the chunks' block scales; lines of K both chunks at
// once, and the one scale that they share.
#pragma once

#include "chunk.cuh"
#include "place.cuh"

namespace xlayer {

// Thread blocks that an SM is to hold, with 48 registers a thread. Where an SM has 48 warps at most, nvcc
// would spill with so few.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int GATHER_BLOCKS = 4;
#else
constexpr int GATHER_BLOCKS = 5;
#endif

// An element of a token.
struct HeadElement {
  int h, d;
};

// A thread's share (GatherPlan), of consecutive tokens.
template <typename T, typename CUT>
struct GatherShare {
  HeadElement key;               // its first chunk's first element
  HeadElement out[CUT::CHUNKS];  // each chunk's that it stores
  const TokenPlace* place;
  T *k, *v;  // out

  __device__ __forceinline__ GatherShare(const Nvfp4GatherParams& p, const GatherPlan& plan,
                                         const TokenPlace* places) {
    const int slot = int(threadIdx.x / unsigned(plan.lanes));
    unsigned share = threadIdx.x - unsigned(slot * plan.lanes) + blockIdx.y * unsigned(plan.lanes);
    const bool idle = slot >= plan.slots || share >= unsigned(plan.shares);
    if (idle) share = 0;
    const auto at = [&](unsigned element) -> HeadElement {
      const unsigned h = element / unsigned(p.page.head_size);
      return {int(h), int(element - h * unsigned(p.page.head_size))};
    };
    key = at(CUT::key(share));
#pragma unroll
    for (int c = 0; c < CUT::CHUNKS; ++c) {
      const int apart = c * CUT::OUT_APART;
      // Chunks of a block are in one head.
      out[c] = CUT::LINES ? at(CUT::out(share) + apart) : HeadElement{key.h, key.d + apart};
    }
    place = places + (idle ? plan.slots : slot) * (plan.each + 1);
    const int64_t token = int64_t(blockIdx.x) * plan.tokens() + slot * plan.each;
    k = static_cast<T*>(p.k_out) + token * p.k_stride_t + out[0].h * p.k_stride_h + out[0].d;
    v = static_cast<T*>(p.v_out) + token * p.v_stride_t + out[0].h * p.v_stride_h + out[0].d;
  }

  __device__ __forceinline__ void next(const GatherPlan& plan) {
    ++place;
    k = reinterpret_cast<T*>(reinterpret_cast<uint8_t*>(k) + plan.k_step);
    v = reinterpret_cast<T*>(reinterpret_cast<uint8_t*>(v) + plan.v_step);
  }
};

// Tokens that are read from pages. USUAL: both global scales are.
template <typename T, typename CUT, bool USUAL>
struct FromPages {
  static constexpr int CHUNKS = CUT::CHUNKS;

  const Nvfp4GatherParams& p;
  const GatherPlan& plan;
  // From a token's place. Pages are below 2 GiB.
  uint32_t k_data, v_data, k_scale, v_scales[CHUNKS];
  float k_global, v_global;
  // Of a token.
  struct {
    uint32_t words[CHUNKS], scales;
  } k = {};
  struct {
    uint32_t words[CHUNKS], scales[CHUNKS];
  } v = {};

  __device__ __forceinline__ FromPages(const Nvfp4GatherParams& p, const GatherPlan& plan,
                                       const GatherShare<T, CUT>& to)
      : p(p), plan(plan) {
    const HeadElement key = to.key;
    k_data = uint32_t(p.page.data_offset(false, key.h, 0)) + key.d / 2;
    k_scale = uint32_t(p.page.scale_base(false, key.h)) + key.d / GROUP;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const HeadElement value = to.out[c];
      if (c == 0) v_data = uint32_t(p.page.data_offset(true, value.h, 0)) + value.d / 2;
      v_scales[c] =
          uint32_t(p.page.scale_base(true, value.h)) + p.page.scale_index(p.v_order, 0, value.d / GROUP);
    }
    k_global = *p.k_scale;
    v_global = *p.v_scale;
    if constexpr (USUAL) {
      k_global *= HALVES * (p.rotated_keys ? rotation_back(CUT::BLOCK) : 1.0f);
      v_global *= HALVES;
    }
  }

  __device__ __forceinline__ void load_k(const TokenPlace& place) {
    if (place.source != int(Source::PAGE)) return;
    if constexpr (CUT::LINES) {
      const uint2 both = load<uint2>(place.k + k_data);
      k.words[0] = both.x;
      k.words[CHUNKS - 1] = both.y;
    } else {
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) k.words[c] = load<uint32_t>(place.k + k_data + c * CUT::KEY_APART / 2);
    }
    if constexpr (CHUNKS == 2 && !CUT::LINES) {
      k.scales = load<uint16_t>(place.k_scale + k_scale);
    } else {
      k.scales = load<uint8_t>(place.k_scale + k_scale);
    }
  }
  __device__ __forceinline__ void load_v(const TokenPlace& place) {
    if (place.source != int(Source::PAGE)) return;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      v.words[c] = load<uint32_t>(place.k + v_data + c * (CUT::LINES ? plan.v_apart : CUT::OUT_APART / 2));
      v.scales[c] = load<uint8_t>(place.v + v_scales[c]);
    }
  }

  // What was loaded goes out, and the next token is asked for. All lanes of the warp come here.
  __device__ __forceinline__ void put_k(bool is_loaded, const TokenPlace& next, T* out) {
    Elements<CHUNKS> x;
    if constexpr (CUT::LINES) {  // else rotate_lanes sees to that
      if (!p.rotated_keys && keeps_second()) {
        const uint32_t first = k.words[0];
        k.words[0] = k.words[1];
        k.words[1] = first;
      }
    }
    decode<CHUNKS, CUT::LINES>(k.words, ptx::e4m3x2_to_half2(k.scales), x);
    load_k(next);
    scale(x, k_global);
    if (p.rotated_keys) {
      rotate_lanes<CUT>(x);
      if constexpr (!USUAL) times<CHUNKS>(x, rotation_back(CUT::BLOCK));
    }
    store_key<CUT>(is_loaded, out, x);
  }
  __device__ __forceinline__ void put_v(bool is_loaded, const TokenPlace& next, T* out) {
    Elements<CHUNKS> x;
    const uint32_t scales = CHUNKS == 2 ? v.scales[0] | v.scales[CHUNKS - 1] << 8 : v.scales[0];
    decode<CHUNKS, false>(v.words, ptx::e4m3x2_to_half2(scales), x);
    load_v(next);
    scale(x, v_global);
    if (is_loaded) store<CUT>(out, x);
  }

 private:
  template <typename Word>
  static __device__ __forceinline__ Word load(uint64_t address) {
    return __ldg(reinterpret_cast<const Word*>(address));
  }
  static __device__ __forceinline__ void scale(Elements<CHUNKS>& x, float global) {
    if constexpr (!USUAL) times<CHUNKS>(x, HALVES);
    times<CHUNKS>(x, global);
  }
};

template <typename T, typename CUT, bool USUAL>
__device__ __forceinline__ void put_from_pages(const Nvfp4GatherParams& p, const GatherPlan& plan,
                                               const TokenPlace* places) {
  GatherShare<T, CUT> to(p, plan, places);
  FromPages<T, CUT, USUAL> from(p, plan, to);
  from.load_k(*to.place);
  from.load_v(*to.place);
#pragma unroll 1
  for (int i = 0; i < plan.each; ++i, to.next(plan)) {
    const bool is_loaded = to.place->source == int(Source::PAGE);
    from.put_k(is_loaded, to.place[1], to.k);
    from.put_v(is_loaded, to.place[1], to.v);
  }
}

// A token that is not read from a page. All lanes of the warp come here.
template <typename T, typename S, typename CUT>
__device__ __forceinline__ void put_elsewhere(const Nvfp4GatherParams& p, bool wide,
                                              const GatherShare<T, CUT>& to) {
  constexpr int CHUNKS = CUT::CHUNKS;
  const TokenPlace& place = *to.place;
  const bool is_own = place.source == int(Source::OWN), is_newest = place.source == int(Source::NEWEST);
  const auto from = [&](bool is_v, HeadElement at) {
    const int64_t newest = int64_t(p.newest_tokens) * p.page.head_size;
    const int64_t stride_h = is_newest ? newest : is_v ? p.value_stride_h : p.key_stride_h;
    return reinterpret_cast<const S*>(is_v ? place.v : place.k) + at.h * stride_h + at.d;
  };
  const auto copy = [&](bool is_v, T* out) {
    const S* first = from(is_v, to.out[0]);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const S* in = CUT::LINES && c > 0 ? from(is_v, to.out[c]) : first + c * CUT::OUT_APART;
      store_raw(out + c * CUT::OUT_APART, load_raw(in, wide || is_newest));
    }
  };
  if (is_own || is_newest) copy(true, to.v);
  if (is_own || (is_newest && !p.rotated_keys)) copy(false, to.k);
  if (!p.rotated_keys || !__any_sync(~0u, is_newest)) return;
  Elements<CHUNKS> x = {};
  if (is_newest) {
    const S* in = from(false, to.key);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) to_floats(load_raw(in + c * CUT::KEY_APART, true), x[c]);
  }
  rotate_lanes<CUT>(x);
  times<CHUNKS>(x, rotation_back(CUT::BLOCK));
  store_key<CUT>(is_newest, to.k, x);
}

// T: dtype of the output. S: of the own and the newest tokens. BLOCK: of the rotation. LINES: the plan's.
// wide: all chunks of key and value start at multiples of 16 bytes.
template <typename T, typename S, int BLOCK, bool LINES>
__global__ void __launch_bounds__(GATHER_THREADS, GATHER_BLOCKS)
    nvfp4_gather_kernel(const Nvfp4GatherParams p, const GatherPlan plan, bool wide) {
  using CUT = Cut<BLOCK, LINES>;
  // A row for each slot, and one for the threads that are too many.
  __shared__ TokenPlace places[GATHER_PLACES];
  const int row = plan.each + 1;
  bool any_in_page = false, any_elsewhere = false;
  for (int i = int(threadIdx.x); i < (plan.slots + 1) * row; i += plan.threads) {
    const int slot = i / row, at = i - slot * row;
    TokenPlace place = {0, 0, 0, at == plan.each ? END : NOWHERE};
    if (slot < plan.slots && at < plan.each) {
      place = place_of<S>(p, int64_t(blockIdx.x) * plan.tokens() + slot * plan.each + at);
    }
    any_in_page |= place.source == int(Source::PAGE);
    any_elsewhere |= place.source > int(Source::PAGE);
    places[i] = place;
  }
  any_in_page = __syncthreads_or(any_in_page);
  any_elsewhere = __syncthreads_or(any_elsewhere);
  if (any_in_page) {
    if (is_usual(*p.k_scale) && is_usual(*p.v_scale)) {
      put_from_pages<T, CUT, true>(p, plan, places);
    } else {
      put_from_pages<T, CUT, false>(p, plan, places);
    }
  }
  if (any_elsewhere) {
    GatherShare<T, CUT> to(p, plan, places);
#pragma unroll 1
    for (; to.place->source != END; to.next(plan)) put_elsewhere<T, S>(p, wide, to);
  }
}

template <typename T, typename S>
auto gather_kernel(const Nvfp4GatherParams& p) {
  if constexpr (sizeof(T) == 2) {
    if (in_lines(p)) return nvfp4_gather_kernel<T, S, 32, true>;
  }
  return rotation_block(p.page.head_size) == 32 ? nvfp4_gather_kernel<T, S, 32, false>
                                                : nvfp4_gather_kernel<T, S, 16, false>;
}

}  // namespace xlayer

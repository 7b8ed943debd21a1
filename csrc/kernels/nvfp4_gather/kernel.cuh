// Gathers tokens into dense K and V: from NVFP4 pages, from the step's own K and V, and from the newest
// tokens' memory (params.h says which, and GatherPlan how the work is cut).
//
// A thread block has consecutive tokens. First its threads find out where they are, one token each, and tell
// the others through shared memory; then each thread goes through `each` of the tokens with the same elements
// of K and V (chunk.cuh), so that where these are in a page and in the output is computed once. It asks for
// the next token's bytes before it decodes those that it has.
//
// From a page a thread reads 4 bytes of data a chunk, and the chunks' block scales. A token's data of a head are
// half a line of the L2, the next token's the other half: it is told to fetch both at once.
#pragma once

#include "chunk.cuh"

namespace xlayer {

// Thread blocks that an SM is to hold, with 48 registers a thread. Where an SM has 48 warps at most, nvcc
// would spill with so few.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int GATHER_BLOCKS = 4;
#else
constexpr int GATHER_BLOCKS = 5;
#endif

// Where a token is. Addresses: in a page that of its K data in head 0, and what a thread adds the offsets of
// its scales to; else of K and V in head 0.
struct alignas(16) TokenPlace {
  uint64_t k, k_scale, v;
  int source;  // a Source, or what follows
};
constexpr int NOWHERE = -1;  // not a token of any request: its output is left as it is
constexpr int END = -2;      // after a thread's last token

// The request whose output range holds `token`: the last r with cu_seqlens[r] <= token.
__device__ __forceinline__ int find_request(const int32_t* cu_seqlens, int num_requests, int64_t token) {
  int lo = 0, hi = num_requests;
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    if (__ldg(cu_seqlens + mid) <= token) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  return lo;
}

template <typename S>
__device__ __forceinline__ TokenPlace place_of(const Nvfp4GatherParams& p, int64_t token) {
  const int64_t begin = __ldg(p.cu_seqlens), end = __ldg(p.cu_seqlens + p.num_requests);
  if (token >= p.num_tokens || token < begin || token >= end) return {0, 0, 0, NOWHERE};
  const int r = find_request(p.cu_seqlens, p.num_requests, token);
  const int64_t position = p.seq_starts[r] + (token - p.cu_seqlens[r]);
  const uint32_t logical_block = uint32_t(position) / uint32_t(p.page.block_size);
  // Asked for before it is known whether the token is read from its page: one wait, not two.
  const int64_t block = p.block_table[r * p.block_table_stride + logical_block];
  const TokenSource source = source_of(p, r, position);
  const auto address = [](const void* base, int64_t elements) {
    return reinterpret_cast<uintptr_t>(base) + uint64_t(elements) * sizeof(S);
  };
  switch (source.kind) {
    case Source::OWN:
      return {address(p.key, source.at * p.key_stride_t), 0, address(p.value, source.at * p.value_stride_t),
              int(Source::OWN)};
    case Source::NEWEST: {
      const auto at = [&](bool is_v) {
        return newest_offset(p.page, p.newest_tokens, source.row, is_v, 0, source.at);
      };
      return {address(p.newest, at(false)), 0, address(p.newest, at(true)), int(Source::NEWEST)};
    }
    case Source::PAGE: break;
  }
  const int n = int(position - int64_t(logical_block) * p.page.block_size);
  const uint64_t page = reinterpret_cast<uintptr_t>(p.cache + block * p.block_stride);
  return {page + uint64_t(p.page.data_offset(false, 0, n)),
          page + unsigned(p.page.scale_index(ScaleOrder::LINEAR, n, 0)),
          page + unsigned(p.page.scale_index(p.v_order, n, 0)), int(Source::PAGE)};
}

// A thread's share (GatherPlan): elements of head h from d on, of consecutive tokens.
template <typename T, int BLOCK>
struct GatherShare {
  int h, d;
  const TokenPlace* place;
  T *k, *v;  // out

  __device__ __forceinline__ GatherShare(const Nvfp4GatherParams& p, const GatherPlan& plan,
                                         const TokenPlace* places) {
    const int slot = int(threadIdx.x / unsigned(plan.lanes));
    int share = int(threadIdx.x) - slot * plan.lanes + int(blockIdx.y) * plan.lanes;
    const bool idle = slot >= plan.slots || share >= plan.shares;
    if (idle) share = 0;
    const unsigned of_head = unsigned(p.page.head_size) / BLOCK * 2;
    h = int(unsigned(share) / of_head);
    const int in_head = share - h * int(of_head);
    d = in_head / 2 * BLOCK + in_head % 2 * CHUNK;
    place = places + (idle ? plan.slots : slot) * (plan.each + 1);
    const int64_t token = int64_t(blockIdx.x) * plan.tokens() + slot * plan.each;
    k = static_cast<T*>(p.k_out) + token * p.k_stride_t + h * p.k_stride_h + d;
    v = static_cast<T*>(p.v_out) + token * p.v_stride_t + h * p.v_stride_h + d;
  }

  __device__ __forceinline__ void next(const GatherPlan& plan) {
    ++place;
    k = reinterpret_cast<T*>(reinterpret_cast<uint8_t*>(k) + plan.k_step);
    v = reinterpret_cast<T*>(reinterpret_cast<uint8_t*>(v) + plan.v_step);
  }
};

// Tokens that are read from pages. USUAL: both global scales are.
template <typename T, int BLOCK, bool USUAL>
struct FromPages {
  static constexpr int CHUNKS = BLOCK / (2 * CHUNK);

  const Nvfp4GatherParams& p;
  // From a token's place. Pages are below 2 GiB.
  uint32_t k_data, v_data, k_scale, v_scales[CHUNKS];
  float k_global, v_global;
  struct Bytes {
    uint32_t words[CHUNKS], scales[CHUNKS];
  } k = {}, v = {};

  __device__ __forceinline__ FromPages(const Nvfp4GatherParams& p, int h, int d) : p(p) {
    const int s = d / GROUP;
    k_data = uint32_t(p.page.data_offset(false, h, 0)) + d / 2;
    v_data = uint32_t(p.page.data_offset(true, h, 0)) + d / 2;
    k_scale = uint32_t(p.page.scale_base(false, h)) + s;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      v_scales[c] = uint32_t(p.page.scale_base(true, h)) + p.page.scale_index(p.v_order, 0, s + c);
    }
    k_global = *p.k_scale;
    v_global = *p.v_scale;
    if constexpr (USUAL) {
      k_global *= HALVES * (p.rotated_keys ? rotation_back(BLOCK) : 1.0f);
      v_global *= HALVES;
    }
  }

  __device__ __forceinline__ void load_k(const TokenPlace& place) {
    if (place.source != int(Source::PAGE)) return;
    load_words(place.k + k_data, k);
    if constexpr (CHUNKS == 2) {
      k.scales[0] = load<uint16_t>(place.k_scale + k_scale);
    } else {
      k.scales[0] = load<uint8_t>(place.k_scale + k_scale);
    }
  }
  __device__ __forceinline__ void load_v(const TokenPlace& place) {
    if (place.source != int(Source::PAGE)) return;
    load_words(place.k + v_data, v);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) v.scales[c] = load<uint8_t>(place.v + v_scales[c]);
  }

  // What was loaded goes out, and the next token is asked for. All lanes of the warp come here.
  __device__ __forceinline__ void put_k(bool is_loaded, const TokenPlace& next, T* out) {
    Elements<CHUNKS> x;
    decode<CHUNKS>(k.words, ptx::e4m3x2_to_half2(k.scales[0]), x);
    load_k(next);
    scale(x, k_global);
    if (p.rotated_keys) {
      rotate_lanes<CHUNKS>(x);
      if constexpr (!USUAL) times<CHUNKS>(x, rotation_back(BLOCK));
    }
    if (is_loaded) store<CHUNKS>(out, x);
  }
  __device__ __forceinline__ void put_v(bool is_loaded, const TokenPlace& next, T* out) {
    Elements<CHUNKS> x;
    const uint32_t scales = CHUNKS == 2 ? v.scales[0] | v.scales[CHUNKS - 1] << 8 : v.scales[0];
    decode<CHUNKS>(v.words, ptx::e4m3x2_to_half2(scales), x);
    load_v(next);
    scale(x, v_global);
    if (is_loaded) store<CHUNKS>(out, x);
  }

 private:
  template <typename Word>
  static __device__ __forceinline__ Word load(uint64_t address) {
    return __ldg(reinterpret_cast<const Word*>(address));
  }
  static __device__ __forceinline__ void load_words(uint64_t address, Bytes& bytes) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {  // 16 elements apart
      bytes.words[c] = ptx::load_of_line(address + c * CHUNK);
    }
  }
  static __device__ __forceinline__ void scale(Elements<CHUNKS>& x, float global) {
    if constexpr (!USUAL) times<CHUNKS>(x, HALVES);
    times<CHUNKS>(x, global);
  }
};

template <typename T, int BLOCK, bool USUAL>
__device__ __forceinline__ void put_from_pages(const Nvfp4GatherParams& p, const GatherPlan& plan,
                                               const TokenPlace* places) {
  GatherShare<T, BLOCK> to(p, plan, places);
  FromPages<T, BLOCK, USUAL> from(p, to.h, to.d);
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
template <typename T, typename S, int BLOCK>
__device__ __forceinline__ void put_elsewhere(const Nvfp4GatherParams& p, bool wide,
                                              const GatherShare<T, BLOCK>& to) {
  constexpr int CHUNKS = BLOCK / (2 * CHUNK);
  const TokenPlace& place = *to.place;
  const bool is_own = place.source == int(Source::OWN), is_newest = place.source == int(Source::NEWEST);
  const auto from = [&](bool is_v) {
    const int64_t newest = int64_t(p.newest_tokens) * p.page.head_size;
    const int64_t stride_h = is_newest ? newest : is_v ? p.value_stride_h : p.key_stride_h;
    return reinterpret_cast<const S*>(is_v ? place.v : place.k) + to.h * stride_h + to.d;
  };
  const auto copy = [&](bool is_v, T* out) {
    const S* in = from(is_v);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      store_raw(out + 2 * c * CHUNK, load_raw(in + 2 * c * CHUNK, wide || is_newest));
    }
  };
  if (is_own || is_newest) copy(true, to.v);
  if (is_own || (is_newest && !p.rotated_keys)) copy(false, to.k);
  if (!p.rotated_keys || !__any_sync(~0u, is_newest)) return;
  Elements<CHUNKS> x = {};
  if (is_newest) {
    const S* key = from(false);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) to_floats(load_raw(key + 2 * c * CHUNK, true), x[c]);
  }
  rotate_lanes<CHUNKS>(x);
  times<CHUNKS>(x, rotation_back(BLOCK));
  if (is_newest) store<CHUNKS>(to.k, x);
}

// T: dtype of the output. S: of the own and the newest tokens. BLOCK: of the rotation. wide: all chunks of
// key and value start at multiples of 16 bytes.
template <typename T, typename S, int BLOCK>
__global__ void __launch_bounds__(GATHER_THREADS, GATHER_BLOCKS)
    nvfp4_gather_kernel(const Nvfp4GatherParams p, const GatherPlan plan, bool wide) {
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
      put_from_pages<T, BLOCK, true>(p, plan, places);
    } else {
      put_from_pages<T, BLOCK, false>(p, plan, places);
    }
  }
  if (any_elsewhere) {
    GatherShare<T, BLOCK> to(p, plan, places);
#pragma unroll 1
    for (; to.place->source != END; to.next(plan)) put_elsewhere<T, S, BLOCK>(p, wide, to);
  }
}

}  // namespace xlayer

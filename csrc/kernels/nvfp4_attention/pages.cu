// Instantiations of the kernel that works on whole pages.
#include "page_decode.cuh"
#include "variant.cuh"

namespace xlayer::attention {
namespace {

template <class C, bool NEWEST>
cudaError_t launch(const Nvfp4AttentionParams& p, int blocks, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(
      page_decode_kernel<C, NEWEST>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::SHARED_BYTES);
  if (error != cudaSuccess) return error;
  page_decode_kernel<C, NEWEST><<<blocks, C::THREADS, C::SHARED_BYTES, stream>>>(p);
  return cudaGetLastError();
}

template <class C>
cudaError_t launch(const Nvfp4AttentionParams& p, cudaStream_t stream) {
  const int blocks = find_page_variant(C::D, C::HEADS)->blocks(p.parts);
  Nvfp4AttentionParams q = p;
  q.v_scale_flip = C::v_scale_flip(p.v_order);
  return p.newest == nullptr ? launch<C, false>(q, blocks, stream) : launch<C, true>(q, blocks, stream);
}

// What is compiled for an older architecture, also as PTX, is an empty kernel.
template <class C>
bool runs() {
#if defined(XLAYER_FORCE_SM80)
  return false;
#else
  cudaFuncAttributes made;
  return cudaFuncGetAttributes(&made, page_decode_kernel<C, false>) == cudaSuccess &&
         made.binaryVersion >= 90 && made.ptxVersion >= 90;
#endif
}

template <class C>
constexpr PageVariant page_variant() {
  return {C::D, C::HEADS, C::SHARED_BYTES, launch<C>, runs<C>};
}

constexpr PageVariant VARIANTS[] = {page_variant<PageConfig<128, 4>>(), page_variant<PageConfig<128, 8>>()};

}  // namespace

const PageVariant* find_page_variant(int head_size, int heads) {
  for (const PageVariant& v : VARIANTS) {
    if (v.head_size == head_size && v.heads == heads) return &v;
  }
  return nullptr;
}

}  // namespace xlayer::attention

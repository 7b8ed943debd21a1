#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../cpu/block_copy.h"
#include "checks.h"
#include "ops.h"

#if defined(XLAYER_WITH_CUDA)
#include "../kernels/block_copy/engine.h"
#include "../kernels/block_copy/launch.h"
#include "../kernels/block_copy/pairs.h"
#include "stream.h"
#endif

namespace xlayer::api {
namespace {

void check_pieces(const char* name, const Tensor& tensor) {
  check_rank(name, tensor, 2, "(pieces, bytes a piece)");
  check_rows(name, tensor, false);
  STD_TORCH_CHECK(tensor.size(0) <= 1 || tensor.stride(0) >= tensor.size(1), name,
                  ": expected a row stride of at least ", tensor.size(1), " bytes (one piece), got ",
                  tensor.stride(0));
}

void check_ids(const char* name, const Tensor& ids, const char* of, const Tensor& pieces) {
  const int64_t* values = static_cast<const int64_t*>(ids.data_ptr());
  const int64_t count = ids.size(0);  // asked once: each time is a call into torch
  const int64_t last = pieces.size(0) - 1;
  uint64_t signs = 0;  // the first bit: whether an id is negative, or what is left from it to the last piece
  for (int64_t i = 0; i < count; ++i) signs |= uint64_t(values[i]) | (uint64_t(last) - uint64_t(values[i]));
  if (signs >> 63 == 0) return;
  const int64_t* wrong = std::find_if(values, values + count, [=](int64_t v) { return v < 0 || v > last; });
  STD_TORCH_CHECK(false, name, ": expected ids from 0 to ", last, " (the pieces of ", of, "), got ", *wrong,
                  " at ", wrong - values);
}

CopyMethod check_method(int64_t method) {
  STD_TORCH_CHECK(method == 0 || method == 1, "method: expected 0 (copy engine) or 1 (kernel), got ", method);
  return CopyMethod(method);
}

BlockCopyParams check(const Tensor& src, const Tensor& dst, const Tensor& src_ids, const Tensor& dst_ids) {
  check_on_cpu("src_ids", src_ids);
  check_on_cpu("dst_ids", dst_ids);
  check_dtype("src", src, {ScalarType::Byte});
  check_dtype("dst", dst, {ScalarType::Byte});
  check_dtype("src_ids", src_ids, {ScalarType::Long});
  check_dtype("dst_ids", dst_ids, {ScalarType::Long});
  check_pieces("src", src);
  check_pieces("dst", dst);
  check_rank("src_ids", src_ids, 1, "(pairs)");
  check_rank("dst_ids", dst_ids, 1, "(pairs)");
  check_dense("src_ids", src_ids);
  check_dense("dst_ids", dst_ids);
  check_size("dst", dst, 1, src.size(1), "the bytes of a piece of src");
  check_size("dst_ids", dst_ids, 0, src_ids.size(0), "the pairs of src_ids");
  check_ids("src_ids", src_ids, "src", src);
  check_ids("dst_ids", dst_ids, "dst", dst);

  BlockCopyParams p = {};
  p.src = static_cast<const uint8_t*>(src.data_ptr());
  p.dst = static_cast<uint8_t*>(dst.data_ptr());
  p.src_stride = src.stride(0);
  p.dst_stride = dst.stride(0);
  p.piece_bytes = src.size(1);
  p.src_ids = static_cast<const int64_t*>(src_ids.data_ptr());
  p.dst_ids = static_cast<const int64_t*>(dst_ids.data_ptr());
  p.num_pairs = p.piece_bytes > 0 ? src_ids.size(0) : 0;
  return p;
}

#if defined(XLAYER_WITH_CUDA)
// A kernel's address of host memory whose address is `base`. The pieces that `ids` names must be pinned.
uint8_t* check_mapped(const char* name, const uint8_t* base, int64_t stride, int64_t piece_bytes,
                      const int64_t* ids, int64_t num_pairs) {
  const auto [low, high] = std::minmax_element(ids, ids + num_pairs);
  const uint8_t* first = base + *low * stride;
  const uint8_t* last = base + *high * stride + piece_bytes - 1;
  uint8_t* on_device = device_address(first);
  STD_TORCH_CHECK(
      on_device != nullptr && device_address(last) == on_device + (last - first), name,
      ": expected pinned host memory (method: kernel), got memory that the device does not reach");
  return on_device - *low * stride;
}

void copy_by_kernel(BlockCopyParams p, const Tensor& src, const Tensor& dst, cudaStream_t stream) {
  STD_TORCH_CHECK(p.piece_bytes <= int64_t(1) << 30,
                  "src: expected pieces of at most 1 GiB (method: kernel), got ", p.piece_bytes, " bytes");
  STD_TORCH_CHECK(src.size(0) <= INT32_MAX && dst.size(0) <= INT32_MAX,
                  "src, dst: expected at most 2^31 - 1 pieces (method: kernel), got ", src.size(0), " and ",
                  dst.size(0));
  if (src.is_cpu()) p.src = check_mapped("src", p.src, p.src_stride, p.piece_bytes, p.src_ids, p.num_pairs);
  if (dst.is_cpu()) p.dst = check_mapped("dst", p.dst, p.dst_stride, p.piece_bytes, p.dst_ids, p.num_pairs);
  const bool touches_host = src.is_cpu() || dst.is_cpu();
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check_cuda("copy_blocks", cudaStreamIsCapturing(stream, &capture));
  check_cuda("copy_blocks", capture == cudaStreamCaptureStatusNone
                                ? upload_and_launch_block_copy(p, touches_host, stream)
                                : launch_block_copy(p, touches_host, nullptr, stream));
}
#endif

}  // namespace

void copy_blocks_cpu(const Tensor& src, const Tensor& dst, const Tensor& src_ids, const Tensor& dst_ids,
                     int64_t method) {
  check_method(method);
  const BlockCopyParams p = check(src, dst, src_ids, dst_ids);
  if (p.num_pairs == 0) return;
  const int64_t grain = ceil_div(256 << 10, p.piece_bytes);
  torch::stable::parallel_for(0, p.num_pairs, grain,
                              [&p](int64_t begin, int64_t end) { cpu::block_copy(p, begin, end); });
}

#if defined(XLAYER_WITH_CUDA)
void copy_blocks_cuda(const Tensor& src, const Tensor& dst, const Tensor& src_ids, const Tensor& dst_ids,
                      int64_t method) {
  for (const auto& [name, tensor] : {std::pair{"src", &src}, std::pair{"dst", &dst}}) {
    STD_TORCH_CHECK(tensor->is_cuda() || tensor->is_cpu(), name, ": expected a CUDA device or cpu, got ",
                    device_name(*tensor));
  }
  STD_TORCH_CHECK(src.is_cuda() || dst.is_cuda(), "src, dst: expected one of them on a CUDA device, got ",
                  device_name(src), " and ", device_name(dst));
  if (src.is_cuda() && dst.is_cuda()) check_device("dst", dst, "src", src);
  const CopyMethod by = check_method(method);
  const BlockCopyParams p = check(src, dst, src_ids, dst_ids);
  if (p.num_pairs == 0) return;
  const Tensor& on_device = src.is_cuda() ? src : dst;
  const torch::stable::accelerator::DeviceGuard guard(on_device.get_device_index());
  const cudaStream_t stream = current_stream(on_device);
  if (by == CopyMethod::KERNEL) {
    copy_by_kernel(p, src, dst, stream);
  } else {
    const cudaMemcpyKind kind = src.is_cpu()   ? cudaMemcpyHostToDevice
                                : dst.is_cpu() ? cudaMemcpyDeviceToHost
                                               : cudaMemcpyDeviceToDevice;
    check_cuda("copy_blocks", submit_block_copy(p, kind, stream));
  }
}
#endif

}  // namespace xlayer::api

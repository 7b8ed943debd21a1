#include <torch/csrc/stable/ops.h>

#include "../cpu/block_copy.h"
#include "checks.h"
#include "ops.h"

#if defined(XLAYER_WITH_CUDA)
#include "../kernels/block_copy/launch.h"
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
  for (int64_t i = 0; i < ids.size(0); ++i) {
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < pieces.size(0), name, ": expected ids from 0 to ",
                    pieces.size(0) - 1, " (the pieces of ", of, "), got ", values[i], " at ", i);
  }
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

}  // namespace

void copy_blocks_cpu(const Tensor& src, const Tensor& dst, const Tensor& src_ids, const Tensor& dst_ids) {
  const BlockCopyParams p = check(src, dst, src_ids, dst_ids);
  if (p.num_pairs == 0) return;
  const int64_t grain = ceil_div(256 << 10, p.piece_bytes);
  torch::stable::parallel_for(0, p.num_pairs, grain,
                              [&p](int64_t begin, int64_t end) { cpu::block_copy(p, begin, end); });
}

#if defined(XLAYER_WITH_CUDA)
void copy_blocks_cuda(const Tensor& src, const Tensor& dst, const Tensor& src_ids, const Tensor& dst_ids) {
  for (const auto& [name, tensor] : {std::pair{"src", &src}, std::pair{"dst", &dst}}) {
    STD_TORCH_CHECK(tensor->is_cuda() || tensor->is_cpu(), name, ": expected a CUDA device or cpu, got ",
                    device_name(*tensor));
  }
  STD_TORCH_CHECK(src.is_cuda() || dst.is_cuda(), "src, dst: expected one of them on a CUDA device, got ",
                  device_name(src), " and ", device_name(dst));
  if (src.is_cuda() && dst.is_cuda()) check_device("dst", dst, "src", src);
  const BlockCopyParams p = check(src, dst, src_ids, dst_ids);
  if (p.num_pairs == 0) return;
  const Tensor& on_device = src.is_cuda() ? src : dst;
  const torch::stable::accelerator::DeviceGuard guard(on_device.get_device_index());
  const cudaStream_t stream = current_stream(on_device);
  if (src.is_cuda() && dst.is_cuda()) {
    check_cuda("copy_blocks", launch_block_copy(p, stream));
  } else {
    const cudaMemcpyKind kind = src.is_cuda() ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
    check_cuda("copy_blocks", submit_block_copy(p, kind, stream));
  }
}
#endif

}  // namespace xlayer::api

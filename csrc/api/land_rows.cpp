#include <torch/csrc/stable/ops.h>

#include "../cpu/land_rows.h"
#include "checks.h"
#include "ops.h"

#if defined(XLAYER_WITH_CUDA)
#include "../kernels/land_rows/launch.h"
#include "stream.h"
#endif

namespace xlayer::api {
namespace {

constexpr int64_t WORD = 8;  // bytes that a factor is for

void check_words(const char* name, const Tensor& rows) {
  check_rank(name, rows, 2, "(rows, bytes a row)");
  check_rows(name, rows, false);
  STD_TORCH_CHECK(rows.size(1) % WORD == 0, name, ": expected a multiple of ", WORD, " bytes a row, got ",
                  rows.size(1));
  if (rows.numel() == 0) return;
  const bool aligned = reinterpret_cast<uintptr_t>(rows.data_ptr()) % WORD == 0 &&
                       (rows.size(0) == 1 || rows.stride(0) % WORD == 0);
  STD_TORCH_CHECK(aligned, name, ": expected rows that start at multiples of ", WORD, " bytes, got address ",
                  rows.data_ptr(), " and a row stride of ", rows.stride(0));
}

void check_entries(const char* name, const Tensor& tensor, const char* what, int64_t entries,
                   const char* why) {
  check_rank(name, tensor, 1, what);
  check_dense(name, tensor);
  check_size(name, tensor, 0, entries, why);
}

LandRowsParams check(const Tensor& rows, const Tensor& pool, const Tensor& blocks,
                     const std::optional<Tensor>& factors, const std::optional<Tensor>& digests) {
  STD_TORCH_CHECK(digests.has_value() == factors.has_value(), "digests: expected ",
                  factors ? "a tensor" : "none", " with", factors ? "" : "out", " factors, got ",
                  digests ? "one" : "none");
  check_device("rows", rows, "pool", pool);
  check_device("blocks", blocks, "pool", pool);
  if (factors) check_device("factors", *factors, "pool", pool);
  if (digests) check_device("digests", *digests, "pool", pool);
  check_dtype("rows", rows, {ScalarType::Byte});
  check_dtype("pool", pool, {ScalarType::Byte});
  check_dtype("blocks", blocks, {ScalarType::Long});
  if (factors) check_dtype("factors", *factors, {ScalarType::Long});
  if (digests) check_dtype("digests", *digests, {ScalarType::Long});
  check_words("rows", rows);
  check_dense("rows", rows);
  check_words("pool", pool);
  STD_TORCH_CHECK(pool.size(0) <= 1 || pool.stride(0) >= pool.size(1),
                  "pool: expected a row stride of at least ", pool.size(1), " bytes (one row), got ",
                  pool.stride(0));
  check_size("rows", rows, 1, pool.size(1), "the bytes of a row of pool");
  check_entries("blocks", blocks, "(rows)", rows.size(0), "the rows of rows");
  if (factors)
    check_entries("factors", *factors, "(words)", pool.size(1) / WORD, "the 8-byte words of a row");
  if (digests) check_entries("digests", *digests, "(rows)", rows.size(0), "the rows of rows");

  LandRowsParams p = {};
  p.rows = static_cast<const uint8_t*>(rows.data_ptr());
  p.pool = static_cast<uint8_t*>(pool.data_ptr());
  p.pool_stride = pool.stride(0);
  p.row_bytes = pool.size(1);
  p.blocks = static_cast<const int64_t*>(blocks.data_ptr());
  p.num_rows = rows.size(0);
  p.num_blocks = pool.size(0);
  p.factors = factors ? static_cast<const int64_t*>(factors->data_ptr()) : nullptr;
  p.digests = digests ? static_cast<int64_t*>(digests->data_ptr()) : nullptr;
  return p;
}

}  // namespace

void land_rows_cpu(const Tensor& rows, const Tensor& pool, const Tensor& blocks,
                   const std::optional<Tensor>& factors, const std::optional<Tensor>& digests) {
  const LandRowsParams p = check(rows, pool, blocks, factors, digests);
  for (int64_t i = 0; i < p.num_rows; ++i) {
    STD_TORCH_CHECK(p.blocks[i] >= 0 && p.blocks[i] < p.num_blocks, "blocks: expected blocks from 0 to ",
                    p.num_blocks - 1, " (the rows of pool), got ", p.blocks[i], " at ", i);
  }
  if (p.num_rows == 0) return;
  const int64_t grain = ceil_div(256 << 10, p.row_bytes + 1);
  torch::stable::parallel_for(0, p.num_rows, grain,
                              [&p](int64_t begin, int64_t end) { cpu::land_rows(p, begin, end); });
}

#if defined(XLAYER_WITH_CUDA)
void land_rows_cuda(const Tensor& rows, const Tensor& pool, const Tensor& blocks,
                    const std::optional<Tensor>& factors, const std::optional<Tensor>& digests) {
  const LandRowsParams p = check(rows, pool, blocks, factors, digests);
  if (p.num_rows == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(pool.get_device_index());
  check_cuda("land_rows", launch_land_rows(p, current_stream(pool)));
}
#endif

}  // namespace xlayer::api

#include "checks.h"

#include <torch/csrc/stable/device.h>

#include <cstdint>
#include <sstream>

namespace xlayer::api {
namespace {

constexpr int64_t ALIGNMENT = 16;

std::string list(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << ')';
  return out.str();
}

bool address_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % ALIGNMENT == 0;
}

}  // namespace

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  const std::string index = std::to_string(tensor.get_device_index());
  if (tensor.is_cuda()) return "cuda:" + index;
  return "device type " + std::to_string(int(tensor.device().type())) + ":" + index;
}

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return torch::headeronly::toString(dtype);
  }
}

std::string shape_name(const Tensor& tensor) { return list(tensor.sizes()); }

void check_device(const char* name, const Tensor& tensor, const char* reference_name,
                  const Tensor& reference) {
  STD_TORCH_CHECK(tensor.device() == reference.device(), name, ": expected ", device_name(reference),
                  " (the device of ", reference_name, "), got ", device_name(tensor));
}

void check_on_cpu(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected cpu, got ", device_name(tensor));
}

void check_dtype(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> expected) {
  std::string names;
  for (const ScalarType dtype : expected) {
    if (tensor.scalar_type() == dtype) return;
    names += (names.empty() ? "" : " or ") + dtype_name(dtype);
  }
  STD_TORCH_CHECK(false, name, ": expected ", names, ", got ", dtype_name(tensor.scalar_type()));
}

void check_rank(const char* name, const Tensor& tensor, int64_t rank, const char* axes) {
  STD_TORCH_CHECK(tensor.dim() == rank, name, ": expected ", rank, " dimensions ", axes, ", got shape ",
                  shape_name(tensor));
}

void check_dense(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ",
                  list(tensor.strides()), " for shape ", shape_name(tensor));
}

void check_rows(const char* name, const Tensor& tensor, bool aligned) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1, name,
                  ": expected a dense last dimension (stride 1), got strides ", list(tensor.strides()));
  if (!aligned || tensor.numel() == 0) return;
  const int64_t item = tensor.element_size();
  bool ok = address_aligned(tensor);
  for (int64_t i = 0; i < last; ++i) {
    ok = ok && (tensor.size(i) <= 1 || tensor.stride(i) * item % ALIGNMENT == 0);
  }
  STD_TORCH_CHECK(ok, name, ": expected rows that start at multiples of ", ALIGNMENT, " bytes, got address ",
                  tensor.data_ptr(), " and strides ", list(tensor.strides()), " of ", item, "-byte elements");
}

void check_size(const char* name, const Tensor& tensor, int64_t dim, int64_t expected, const char* why) {
  STD_TORCH_CHECK(tensor.size(dim) == expected, name, ": expected size ", expected, " in dimension ", dim,
                  " (", why, "), got shape ", shape_name(tensor));
}

void check_global_scale(const char* name, const Tensor& tensor, const Tensor& kv_cache) {
  check_device(name, tensor, "kv_cache", kv_cache);
  check_dtype(name, tensor, {ScalarType::Float});
  STD_TORCH_CHECK(tensor.numel() == 1, name, ": expected one element, got shape ", shape_name(tensor));
}

void check_newest_pair(const char* name, const std::optional<Tensor>& tensor,
                       const std::optional<Tensor>& newest) {
  STD_TORCH_CHECK(tensor.has_value() == newest.has_value(), name, ": expected ", newest ? "a tensor" : "none",
                  " with", newest ? "" : "out", " newest, got ", tensor ? "one" : "none");
}

void check_newest(const char* like_name, const Tensor& like, const Tensor& newest, const Page& page) {
  check_device("newest", newest, like_name, like);
  check_dtype("newest", newest, {like.scalar_type()});
  check_rank("newest", newest, 5, "(rows, 2, heads, tokens, head_size)");
  check_dense("newest", newest);
  check_rows("newest", newest, true);
  check_size("newest", newest, 1, 2, "K and V");
  check_size("newest", newest, 2, page.heads, "the heads of kv_cache");
  check_size("newest", newest, 4, page.head_size, "the head size of kv_cache");
  const int64_t tokens = newest.size(3);
  STD_TORCH_CHECK(tokens > 0 && tokens % GROUP == 0 && tokens <= INT32_MAX, "newest: expected a multiple of ",
                  GROUP, " tokens a row, got ", tokens);
}

Dtype float_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::BF16;
    case ScalarType::Half: return Dtype::F16;
    default: return Dtype::F32;
  }
}

ScaleOrder scale_order_of(int64_t value, int head_size) {
  STD_TORCH_CHECK(value == 0 || value == 1, "scale_order: expected 0 (linear) or 1 (swizzled), got ", value);
  STD_TORCH_CHECK(value == 0 || head_size % (4 * GROUP) == 0,
                  "scale_order: expected a head size that is a multiple of 64 for the swizzled order, got ",
                  head_size);
  return ScaleOrder(value);
}

ScaleChoice scale_choice_of(int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= 2,
                  "scale_choice: expected 0 (amax/6), 1 (4 over 6) or 2 (best of 9), got ", value);
  return ScaleChoice(value);
}

Page check_kv_cache(const Tensor& kv_cache) {
  check_dtype("kv_cache", kv_cache, {ScalarType::Byte});
  check_rank("kv_cache", kv_cache, 4, "(blocks, heads, block_size, bytes a token and head)");
  const int64_t B = kv_cache.size(0), H = kv_cache.size(1), N = kv_cache.size(2), C = kv_cache.size(3);
  STD_TORCH_CHECK(C > 0 && C % (2 * (GROUP / 2 + 1)) == 0,
                  "kv_cache: expected 9/8 * head_size bytes in dimension 3 with head_size a multiple of ",
                  GROUP, " (a multiple of 18), got shape ", shape_name(kv_cache));
  STD_TORCH_CHECK(N > 0 && N % GROUP == 0, "kv_cache: expected a block size that is a multiple of ", GROUP,
                  ", got ", N);
  STD_TORCH_CHECK(H > 0 && H <= INT32_MAX / (N * C),
                  "kv_cache: expected at least one head and pages below 2 GiB, got shape ",
                  shape_name(kv_cache));
  const bool dense =
      kv_cache.stride(3) == 1 && kv_cache.stride(2) == C && (H == 1 || kv_cache.stride(1) == N * C);
  STD_TORCH_CHECK(
      dense, "kv_cache: expected dense NVFP4 pages, strides (any, ", N * C, ", ", C, ", 1), got strides ",
      list(kv_cache.strides()),
      "; a page is [K data | K scale | V data | V scale] of all heads, so layouts that put tokens or "
      "layers between heads (NHD, BHLNC) cannot hold it");
  STD_TORCH_CHECK(B <= 1 || kv_cache.stride(0) >= H * N * C, "kv_cache: expected a block stride of at least ",
                  H * N * C, " bytes (one page), got ", kv_cache.stride(0));
  STD_TORCH_CHECK(B == 0 || (address_aligned(kv_cache) && (B == 1 || kv_cache.stride(0) % ALIGNMENT == 0)),
                  "kv_cache: expected an address and a block stride that are multiples of ", ALIGNMENT,
                  " bytes, got address ", kv_cache.data_ptr(), " and block stride ", kv_cache.stride(0));
  return {int(H), int(N), int(C / 9 * 8)};
}

int64_t block_stride_of(const Tensor& kv_cache) { return kv_cache.stride(0); }

}  // namespace xlayer::api

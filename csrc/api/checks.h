// Argument checks shared by the ops. Each op checks in the order device, dtype, layout, shape, before
// any side effect; every message names the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "../kernels/nvfp4/codec.cuh"

namespace xlayer::api {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string device_name(const Tensor& tensor);
std::string dtype_name(ScalarType dtype);
std::string shape_name(const Tensor& tensor);

// "cpu" or the device of `reference`.
void check_device(const char* name, const Tensor& tensor, const char* reference_name,
                  const Tensor& reference);
void check_on_cpu(const char* name, const Tensor& tensor);
void check_dtype(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> expected);
void check_rank(const char* name, const Tensor& tensor, int64_t rank, const char* axes);
void check_dense(const char* name, const Tensor& tensor);
// Last dimension dense; with `aligned`, the address and the other strides are multiples of 16 bytes.
void check_rows(const char* name, const Tensor& tensor, bool aligned);
void check_size(const char* name, const Tensor& tensor, int64_t dim, int64_t expected, const char* why);
void check_global_scale(const char* name, const Tensor& tensor, const Tensor& kv_cache);

// `newest` and what says where in it: both or neither.
void check_newest_pair(const char* name, const std::optional<Tensor>& tensor,
                       const std::optional<Tensor>& newest);
// newest: (rows, 2, H, tokens, D) of the dtype of `like`, dense.
void check_newest(const char* like_name, const Tensor& like, const Tensor& newest, const Page& page);

Dtype float_dtype(const Tensor& tensor);
ScaleOrder scale_order_of(int64_t value, int head_size);
ScaleChoice scale_choice_of(int64_t value);

// The page geometry of a (B, H, N, C) uint8 cache. Refuses every layout in which a page is not dense.
Page check_kv_cache(const Tensor& kv_cache);

// A cache's block stride in bytes.
int64_t block_stride_of(const Tensor& kv_cache);

}  // namespace xlayer::api

// Op schemas and the module's init. No logic.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "api/ops.h"

STABLE_TORCH_LIBRARY(vllm_xlayer, m) {
  m.def(
      "reshape_and_cache_nvfp4(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, "
      "Tensor k_scale, Tensor v_scale, int scale_order, int scale_choice, Tensor(b!)? newest=None, "
      "Tensor? newest_slots=None, bool rotated_keys=False) -> ()");
  m.def(
      "gather_nvfp4(Tensor kv_cache, Tensor block_table, Tensor seq_starts, Tensor cu_seqlens, "
      "Tensor k_scale, Tensor v_scale, Tensor(a!) k_out, Tensor(b!) v_out, int scale_order, "
      "bool rotated_keys=False, Tensor? key=None, Tensor? value=None, Tensor? query_starts=None, "
      "Tensor? seq_lens=None, Tensor? newest=None, Tensor? newest_rows=None, "
      "Tensor? newest_from=None) -> ()");
  m.def(
      "nvfp4_attention_schedule(Tensor seq_lens, Tensor(a!) schedule, int q_len, int num_q_heads, "
      "int num_kv_heads, int head_size, int window, int parts, int split_units, "
      "Tensor? query_starts=None, int kernel_q_len=0, Tensor? newest_from=None) -> ()");
  m.def(
      "nvfp4_paged_attention(Tensor q, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor(d!) schedule, Tensor k_scale, Tensor v_scale, Tensor(a!) out, Tensor(b!)? lse, Tensor? sinks, "
      "Tensor(c!) workspace, float scale, int q_len, int window, float soft_cap, int scale_order, "
      "int parts, int split_units, Tensor? newest=None, Tensor? newest_rows=None, "
      "Tensor? newest_from=None, Tensor? query_starts=None, int kernel_q_len=0, "
      "bool rotated_keys=False) -> ()");
  m.def(
      "nvfp4_prefix_attention(Tensor q, Tensor kv_cache, Tensor block_table, Tensor lens, Tensor query_starts, "
      "Tensor k_scale, Tensor v_scale, Tensor(a!) out, Tensor(b!) lse, float scale, int max_query_len, "
      "bool rotated_keys) -> ()");
  m.def("nvfp4_prefix_rows(Tensor like, int head_size) -> int");
  m.def(
      "newest_step(Tensor query_starts, Tensor seq_lens, Tensor rows, Tensor slot_mapping, Tensor(a!) state, "
      "Tensor(b!) newest_slots, Tensor(c!) newest_from, int newest_tokens) -> ()");
  m.def("nvfp4_attention_parts(Tensor like, int head_size, int rows) -> int");
  m.def(
      "nvfp4_attention_workspace_size(Tensor like, int requests, int max_tokens, int q_len, "
      "int num_q_heads, int num_kv_heads, int head_size, int parts, int split_units) -> int");
  m.def("copy_blocks(Tensor src, Tensor(a!) dst, Tensor src_ids, Tensor dst_ids, int method) -> ()");
  m.def(
      "land_rows(Tensor rows, Tensor(a!) pool, Tensor blocks, Tensor? factors=None, Tensor(b!)? "
      "digests=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_xlayer, CPU, m) {
  m.impl("reshape_and_cache_nvfp4", TORCH_BOX(&xlayer::api::reshape_and_cache_nvfp4_cpu));
  m.impl("gather_nvfp4", TORCH_BOX(&xlayer::api::gather_nvfp4_cpu));
  m.impl("nvfp4_attention_schedule", TORCH_BOX(&xlayer::api::nvfp4_attention_schedule_cpu));
  m.impl("nvfp4_paged_attention", TORCH_BOX(&xlayer::api::nvfp4_paged_attention_cpu));
  m.impl("nvfp4_attention_parts", TORCH_BOX(&xlayer::api::nvfp4_attention_parts_cpu));
  m.impl("nvfp4_attention_workspace_size", TORCH_BOX(&xlayer::api::nvfp4_attention_workspace_size_cpu));
  m.impl("nvfp4_prefix_attention", TORCH_BOX(&xlayer::api::nvfp4_prefix_attention_cpu));
  m.impl("nvfp4_prefix_rows", TORCH_BOX(&xlayer::api::nvfp4_prefix_rows_cpu));
  m.impl("newest_step", TORCH_BOX(&xlayer::api::newest_step_cpu));
  m.impl("copy_blocks", TORCH_BOX(&xlayer::api::copy_blocks_cpu));
  m.impl("land_rows", TORCH_BOX(&xlayer::api::land_rows_cpu));
}

#if defined(XLAYER_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(vllm_xlayer, CUDA, m) {
  m.impl("reshape_and_cache_nvfp4", TORCH_BOX(&xlayer::api::reshape_and_cache_nvfp4_cuda));
  m.impl("gather_nvfp4", TORCH_BOX(&xlayer::api::gather_nvfp4_cuda));
  m.impl("nvfp4_attention_schedule", TORCH_BOX(&xlayer::api::nvfp4_attention_schedule_cuda));
  m.impl("nvfp4_paged_attention", TORCH_BOX(&xlayer::api::nvfp4_paged_attention_cuda));
  m.impl("nvfp4_attention_parts", TORCH_BOX(&xlayer::api::nvfp4_attention_parts_cuda));
  m.impl("nvfp4_attention_workspace_size", TORCH_BOX(&xlayer::api::nvfp4_attention_workspace_size_cuda));
  m.impl("nvfp4_prefix_attention", TORCH_BOX(&xlayer::api::nvfp4_prefix_attention_cuda));
  m.impl("nvfp4_prefix_rows", TORCH_BOX(&xlayer::api::nvfp4_prefix_rows_cuda));
  m.impl("newest_step", TORCH_BOX(&xlayer::api::newest_step_cuda));
  m.impl("copy_blocks", TORCH_BOX(&xlayer::api::copy_blocks_cuda));
  m.impl("land_rows", TORCH_BOX(&xlayer::api::land_rows_cuda));
}
#endif

// Importing vllm_xlayer._C runs the registrations above; the module itself only carries what was built.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr &&
      PyModule_AddStringConstant(module, "build_info", xlayer::api::build_info().c_str()) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}

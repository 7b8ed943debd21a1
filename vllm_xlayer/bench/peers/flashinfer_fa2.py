"""FlashInfer's decode attention over NVFP4 pages ("fa2"), as vLLM's FLASHINFER backend calls it on sm_90
where decode runs in full CUDA graphs. It reads the bytes of this package's pages.

It is compiled at first use, a minute or two for each head size.
"""

import functools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...nvfp4 import page_views
from ..inputs import Calls, Inputs
from .ours import nvfp4_cache

HEAD_SIZE = 128
"""The only one that is measured: each other is compiled for itself."""
WORKSPACE = 394 << 20
"""Bytes for the partial results of split requests: vLLM's default (VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE)."""


def make(inputs: Inputs, kv: torch.Tensor | None = None) -> Calls:
    """Calls with a plan that is made once a step for all layers, and not timed.

    Raises whatever FlashInfer raises, and:

    NotImplementedError: what is not measured here.
    RuntimeError: its kernel cannot be had.
    """
    s = inputs.shape
    if s.head_size != HEAD_SIZE or s.q_len != 1:
        raise NotImplementedError(f"measured for head size {HEAD_SIZE} and one query token a request only")
    if reason := _unusable(inputs.device):
        raise RuntimeError(reason)
    views = page_views(nvfp4_cache(inputs, kv, ours=False))
    scales = (views.k_scale.view(torch.float8_e4m3fn), views.v_scale.view(torch.float8_e4m3fn))
    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=inputs.device)
    starts = torch.tensor([0, *s.blocks]).cumsum(0).int()
    last = torch.tensor([(n - 1) % s.block_size + 1 for n in s.lens]).int()

    def call(table: torch.Tensor) -> Callable[[], Any]:
        pages = torch.cat([table[r, :count] for r, count in enumerate(s.blocks)])
        wrapper = _planned(workspace, starts, pages, last, s.num_q_heads, s.num_kv_heads, s.block_size)
        return partial(
            wrapper.run, inputs.q, (views.k_data, views.v_data), out=inputs.out, kv_cache_sf=scales,
            q_scale=1.0, k_scale=1.0, v_scale=1.0,
        )  # fmt: skip

    return [call(table) for table in inputs.tables]


@functools.cache
def _unusable(device: str) -> str:
    """Why its kernel cannot be had, empty if it can. It is compiled here: once, also where that fails."""
    try:
        one = torch.ones(1, dtype=torch.int32)
        workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
        _planned(workspace, torch.tensor([0, 1]).int(), (one - 1).to(device), one, 1, 1, 16)
    except Exception as error:  # no package, no compiler, no such kernel
        package = sys.modules.get("flashinfer")
        return f"FlashInfer {getattr(package, '__version__', '')}: {type(error).__name__}: {error}"
    return ""


def _planned(
    workspace: torch.Tensor, starts: torch.Tensor, pages: torch.Tensor, last: torch.Tensor,
    q_heads: int, kv_heads: int, block_size: int,
) -> Any:  # fmt: skip
    """A wrapper with its plan. starts, last: int32 on the host; pages: int32 on the device."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    device = workspace.device
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_cuda_graph=True, paged_kv_indptr_buffer=starts.to(device),
        paged_kv_indices_buffer=pages.clone(), paged_kv_last_page_len_buffer=last.to(device),
        use_tensor_cores=True, backend="auto",
    )  # fmt: skip
    wrapper.plan(
        starts, pages, last, q_heads, kv_heads, HEAD_SIZE, block_size, pos_encoding_mode="NONE",
        window_left=-1, logits_soft_cap=0.0, q_data_type=torch.bfloat16, kv_data_type=torch.uint8,
        o_data_type=torch.bfloat16, sm_scale=HEAD_SIZE**-0.5, fixed_split_size=-1, disable_split_kv=False,
        q_len_per_req=1,
    )  # fmt: skip
    return wrapper

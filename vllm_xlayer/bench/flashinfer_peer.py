"""FlashInfer's decode attention over NVFP4 pages, where it has one (0.6.14 has, for sm_80 and newer: "fa2").

It wants data and block scales in two tensors (its kernel takes the scales' strides to be an eighth of the
data's), both (blocks, 2, heads, tokens, D/2 or D/16): the bytes of this package's pages, in another order.
It is compiled at first use, a minute or two for each head size.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..nvfp4 import GROUP, decode, encode
from .inputs import Calls, Inputs, Shape

HEAD_SIZE = 128
"""The only one that is measured: each other is compiled for itself."""
WORKSPACE = 512 << 20
"""Bytes for the partial results of split requests; FlashInfer recommends 128 MiB."""
CHECKED = (1, 15, 16, 17, 333, 2048)
"""Lengths of the requests whose result is compared."""


def nvfp4(inputs: Inputs) -> Calls:
    """Calls over random bytes; its plan, made once a step for all layers, is not timed."""
    s = inputs.shape
    size = (inputs.num_blocks, 2, s.num_kv_heads, s.block_size)
    data = torch.randint(0, 256, (*size, s.head_size // 2), dtype=torch.uint8, device=inputs.device)
    # Any byte below 0x7F is a positive block scale.
    scale = torch.randint(0, 0x60, (*size, s.head_size // GROUP), dtype=torch.uint8, device=inputs.device)
    return _calls(inputs, data, scale)


def error(shape: Shape, device: str = "cuda") -> float:
    """Relative L2 error against float64 attention over the dequantised pages, with this shape's heads and
    pages and requests of ``CHECKED`` lengths."""
    shape = replace(shape, lens=CHECKED)
    inputs = Inputs(shape, 1, device)
    size = (inputs.num_blocks, 2, shape.num_kv_heads, shape.block_size, shape.head_size)
    data, scale = encode(torch.randn(size, device=inputs.device))
    _calls(inputs, data, scale)[0]()
    exact = attention(inputs, decode(data, scale))
    return float((inputs.out.double() - exact).norm() / exact.norm())


def attention(inputs: Inputs, cache: torch.Tensor) -> torch.Tensor:
    """Attention from its definition: (requests, query heads, D) float64, of one query token a request.

    cache: (blocks, 2, heads, tokens, D), K then V.
    """
    s, results = inputs.shape, []
    for r, (length, count) in enumerate(zip(s.lens, s.blocks, strict=True)):
        pages = cache[inputs.tables[0][r, :count].long()].double()
        k, v = pages.movedim(3, 1).flatten(0, 1)[:length].unbind(1)  # (tokens, heads, D)
        q = inputs.q[r].double().unflatten(0, (s.num_kv_heads, -1))
        scores = torch.einsum("hgd,nhd->hgn", q, k) * s.head_size**-0.5
        results.append(torch.einsum("hgn,nhd->hgd", scores.softmax(-1), v).flatten(0, 1))
    return torch.stack(results)


def _calls(inputs: Inputs, data: torch.Tensor, scale: torch.Tensor) -> Calls:
    """Raises whatever FlashInfer raises, and:

    NotImplementedError: what is not measured here.
    RuntimeError: its kernel cannot be had.
    """
    s = inputs.shape
    if s.head_size != HEAD_SIZE or s.q_len != 1:
        raise NotImplementedError(f"measured for head size {HEAD_SIZE} and one query token a request only")
    if reason := _unusable(inputs.device):
        raise RuntimeError(reason)
    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=inputs.device)
    starts = torch.tensor([0, *s.blocks]).cumsum(0).int()
    last = torch.tensor([(n - 1) % s.block_size + 1 for n in s.lens]).int()

    def call(table: torch.Tensor) -> Callable[[], Any]:
        pages = torch.cat([table[r, :count] for r, count in enumerate(s.blocks)])
        heads = (s.num_q_heads, s.num_kv_heads)
        wrapper = _planned(workspace, starts, pages, last, *heads, s.block_size)
        return partial(
            wrapper.run, inputs.q, data, out=inputs.out, kv_cache_sf=scale.view(torch.float8_e4m3fn),
            k_scale=1.0, v_scale=1.0,
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


def _planned(workspace: torch.Tensor, *plan: Any) -> Any:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace, kv_layout="HND", use_tensor_cores=True, backend="fa2"
    )
    *sizes, block_size = plan
    wrapper.plan(*sizes, HEAD_SIZE, block_size, q_data_type=torch.bfloat16, kv_data_type=torch.uint8)
    return wrapper

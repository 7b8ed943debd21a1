"""One layer's prefill over an NVFP4 cache, as the backend runs it."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from ..attention.metadata import DevicePiece, NVFP4Metadata
from ..attention.newest import NewestBatch
from ..attention.prefix import Limits
from .inputs import Calls, Inputs
from .peers import ours


class Layer:
    """Attention of a batch's query tokens to tokens in the cache and to each other.

    Attributes:
        attend: calls of the layer's whole prefill attention, one a copy of the cache, into ``Inputs.out``.
        gather: the same without FlashAttention; none where no request has tokens before its own.
        pieces: that the batch is cut into.
    """

    attend: Calls
    gather: Calls
    pieces: list[DevicePiece]

    def __init__(
        self,
        inputs: Inputs,
        workspace_bytes: int,
        newest_tokens: int = 0,
        kv: torch.Tensor | None = None,
        in_pages: bool | None = None,
    ) -> None:
        """kv: what cache, newest tokens and step hold, (blocks, 2, heads, tokens, D) bfloat16, in the first
        table's blocks; None: anything.
        in_pages: Whether attention reads tokens in their pages, where there is a kernel for it; None: as the
        backend chooses."""
        s = inputs.shape
        cache = ours.nvfp4_cache(inputs, kv)
        given = ours.newest_arguments(inputs, cache, kv, newest_tokens) if newest_tokens else {}
        impl = _impl(inputs)
        impl.newest = given.get("newest")
        if in_pages is not None:
            impl.prefix_rows *= in_pages
            chosen = impl._prefix_kernel
            impl._prefix_kernel = lambda query: replace(chosen(query), limits=Limits(1, 1 << 30, 0.0))
        impl.capacity = max(workspace_bytes // (4 * s.num_kv_heads * s.head_size), *s.queries)
        newest = None
        if given:
            none = torch.empty(0, dtype=torch.int64)
            newest = NewestBatch(none, given["newest_rows"], given["newest_from"], newest_tokens)
        query, key, value = _projected(inputs, kv)
        scale = torch.ones(1, device=inputs.device)
        layer = SimpleNamespace(_k_scale=scale, _v_scale=scale)
        self.attend, self.gather, self.pieces = [], [], []
        for table in inputs.tables:
            step = NVFP4Metadata(
                num_actual_tokens=len(query),
                query_starts=np.cumsum([0, *s.queries]),
                seq_lens=np.array(s.lens, dtype=np.int64),
                block_table=table,
                slot_mapping=torch.empty(0, dtype=torch.int64),
                newest=newest,
            )
            # Once a step for all layers, and not timed. The gather is timed of all tokens, also where
            # attention reads most of them in their pages.
            if impl.prefix_rows and (prefix := step.prefix(impl._prefix_kernel(query))) is not None:
                step.plan(None, impl.capacity, impl._waves, prefix)
            self.pieces = step.plan(None, impl.capacity, impl._waves)
            self.attend.append(partial(impl._prefill, layer, query, key, value, cache, step, inputs.out))
            gathered = [piece for piece in self.pieces if not piece.all_own]
            if gathered:
                self.gather.append(partial(_gather, impl, layer, key, value, cache, gathered))

    @property
    def gathered_tokens(self) -> int:
        return sum(piece.num_keys for piece in self.pieces if not piece.all_own)


def _gather(impl: Any, layer: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor,
            pieces: list[DevicePiece]) -> None:  # fmt: skip
    for piece in pieces:
        impl._gather(layer, key[piece.tokens], value[piece.tokens], cache, piece, key.dtype)


def _projected(inputs: Inputs, kv: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Q, K and V of the step's tokens, views of one tensor as vLLM's models make it."""
    s = inputs.shape
    counts = (s.num_q_heads, s.num_kv_heads, s.num_kv_heads)
    fused = torch.randn(len(inputs.q), sum(counts), s.head_size, dtype=torch.bfloat16, device=inputs.device)
    query, key, value = fused.split(counts, dim=1)
    query.copy_(inputs.q)
    if kv is not None:
        at = 0
        for r, (length, new) in enumerate(zip(s.lens, s.queries, strict=True)):
            for position in range(length - new, length):
                block, row = inputs.tables[0][r, position // s.block_size], position % s.block_size
                key[at], value[at] = kv[block, 0, :, row], kv[block, 1, :, row]
                at += 1
    return query, key, value


def _impl(inputs: Inputs) -> Any:
    """The backend's layer, with vLLM's FlashAttention on a GPU and PyTorch in its place elsewhere."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.worker import workspace

    from ..attention.impl import NVFP4Impl

    s, on_gpu = inputs.shape, inputs.device != "cpu"
    if not workspace.is_workspace_manager_initialized():
        workspace.init_workspace_manager(torch.device(inputs.device))

    class OnCpu(NVFP4Impl):
        def _kernels(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
            return partial(_torch_attention, self.scale), _torch_merge

        def _waves(self, query_lens: np.ndarray) -> None:
            return None

    # The newest tokens are given by whoever measures, not kept by an engine.
    with mock.patch.dict(os.environ, VLLM_XLAYER_NEWEST_TOKENS="0"), set_current_vllm_config(VllmConfig()):
        return (NVFP4Impl if on_gpu else OnCpu)(s.num_q_heads, s.head_size, s.head_size**-0.5, s.num_kv_heads)


def _torch_attention(
    scale: float,
    piece: DevicePiece,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `flash.FlashAttention`, of one request after the other."""
    results, sums = [], []
    queries, keys = (torch.diff(x).tolist() for x in (piece.cu_q, piece.cu_k))
    for q_r, k_r, v_r in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        grouped = q_r.float().unflatten(1, (k.shape[1], -1))
        scores = torch.einsum("qhgd,nhd->hgqn", grouped, k_r.float()) * scale
        if piece.piece.causal:
            last = torch.arange(len(q_r))[:, None] + len(k_r) - len(q_r)
            scores = scores.masked_fill(torch.arange(len(k_r)) > last, -torch.inf)
        sums.append(scores.logsumexp(-1).flatten(0, 1))
        results.append(torch.einsum("hgqn,nhd->qhgd", scores.softmax(-1), v_r.float()).flatten(1, 2))
    result = torch.cat(results).to(q.dtype)
    return result if out is None else out.copy_(result), torch.cat(sums, 1)


def _torch_merge(
    first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.logaddexp(first_lse, second_lse)
    a, b = ((part - lse).exp().T.unsqueeze(-1) for part in (first_lse, second_lse))
    return (first * a + second * b).to(first.dtype), lse

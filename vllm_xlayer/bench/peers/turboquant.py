"""vLLM's ``turboquant_4bit_nc`` as its TURBOQUANT backend decodes it, the copy of the result included.

In a model the first and the last two layers of such a cache stay at 16 bits.
"""

from functools import partial
from typing import Any

import torch

from ..inputs import Calls, Inputs

DTYPE = "turboquant_4bit_nc"
SPLITS = 32
"""Parts of a request: vLLM's default (tq_max_kv_splits_for_cuda_graph)."""
BESIDE = 2 + 4
"""Bytes of a token and head beside its 4-bit elements: K's norm; V's scale and zero. (float16)"""


def make(inputs: Inputs, kv: torch.Tensor | None = None) -> Calls:
    """Raises NotImplementedError for more than one query token a request: vLLM computes those otherwise."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    s, device = inputs.shape, inputs.device
    if s.q_len != 1:
        raise NotImplementedError("vLLM decodes one query token a request with this kernel")
    if s.layers > 1:
        raise NotImplementedError("vLLM keeps this cache layer by layer only")
    config = TurboQuantConfig.from_cache_dtype(DTYPE, s.head_size)
    # Heads of a token side by side: the only layout that the backend has.
    pages = inputs.pages(s.block_size * s.num_kv_heads * config.slot_size_aligned)
    cache = pages.unflatten(-1, (s.block_size, s.num_kv_heads, config.slot_size_aligned))
    rotation = _hadamard(s.head_size).to(device)
    centroids = get_centroids(s.head_size, config.centroid_bits).to(device, torch.float32)
    if kv is None:
        cache.random_(0, 0x3C)  # float16 of such bytes are small and positive
    else:
        _store(kv, cache, rotation, centroids, config)
    size = (len(s.lens), s.num_q_heads)
    parts = torch.empty((*size, SPLITS, s.head_size + 1), dtype=torch.float32, device=device)
    result, lse = torch.empty_like(inputs.out), torch.empty(size, dtype=torch.float32, device=device)

    def call(table: torch.Tensor) -> None:
        inputs.out.copy_(
            triton_turboquant_decode_attention(
                query=inputs.q, kv_cache=cache, block_table=table, seq_lens=inputs.seq_lens,
                Pi=rotation, PiT=rotation, centroids=centroids, scale=s.head_size**-0.5,
                mse_bits=config.key_mse_bits, key_packed_size=config.key_packed_size,
                value_quant_bits=config.effective_value_quant_bits, key_fp8=config.key_fp8,
                norm_correction=config.norm_correction, mid_o_buf=parts, output_buf=result, lse_buf=lse,
                max_num_kv_splits=SPLITS,
            )
        )  # fmt: skip

    return [partial(call, table) for table in inputs.tables]


def _store(
    kv: torch.Tensor, cache: torch.Tensor, rotation: torch.Tensor, centroids: torch.Tensor, config: Any
) -> None:
    """All blocks, written by vLLM."""
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    key, value = kv.transpose(2, 3).unbind(1)  # (blocks, tokens, heads, D)
    ordered = centroids.sort()[0]
    triton_turboquant_store(
        key.flatten(0, 1), value.flatten(0, 1), cache,
        torch.arange(cache.shape[0] * cache.shape[1], dtype=torch.int32, device=kv.device),
        rotation, (ordered[:-1] + ordered[1:]) / 2, mse_bits=config.key_mse_bits,
        key_packed_size=config.key_packed_size, value_quant_bits=config.effective_value_quant_bits,
        key_fp8=config.key_fp8,
    )  # fmt: skip


def _hadamard(size: int) -> torch.Tensor:
    """The orthonormal Hadamard matrix, (size, size) float32; size a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5

"""Scattered copies of this package and of vLLM's offloading connector, on the same pieces."""

from collections.abc import Callable
from functools import partial

import torch

from .. import ops
from ..connector.copy.choice import Way, choose
from ..ops import CopyMethod

Call = Callable[[], object]
Peer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Call]
"""(src, dst, src_ids, dst_ids) as `ops.copy_blocks` takes them -> a call, copying on the current stream."""

TITLES = {
    "ours": "ours",
    "engine": "ours, engine",
    "kernel": "ours, kernel",
    "vllm_dma": "vLLM DMA",
    "vllm_kernel": "vLLM kernel",
}
VLLM = ("vllm_dma", "vllm_kernel")
"""Of TITLES: vLLM's own paths."""
NOT_MEASURED = ("LMCache", "SGLang", "Mooncake", "NIXL")
"""Peers that move pieces as well and are not here."""


def peers() -> dict[str, Peer]:
    """A function for each of TITLES. ours: by engine or kernel, as the connector chooses."""

    def ours(src: torch.Tensor, dst: torch.Tensor, src_ids: torch.Tensor, dst_ids: torch.Tensor) -> Call:
        way = Way.of(src.device, dst.device)
        method = choose(way, src.shape[1])
        return partial(ops.copy_blocks, src, dst, src_ids, dst_ids, method)

    def by(method: CopyMethod) -> Peer:
        return lambda src, dst, src_ids, dst_ids: partial(ops.copy_blocks, src, dst, src_ids, dst_ids, method)

    return {
        "ours": ours,
        "engine": by(CopyMethod.ENGINE),
        "kernel": by(CopyMethod.KERNEL),
        "vllm_dma": vllm_dma,
        "vllm_kernel": vllm_kernel,
    }


def _addresses(pieces: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """As vLLM's worker has them: int64 in pinned memory."""
    return (pieces.data_ptr() + ids * pieces.stride(0)).pin_memory()


def _descriptors(
    src: torch.Tensor, dst: torch.Tensor, src_ids: torch.Tensor, dst_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = torch.full((len(src_ids),), src.shape[1]).pin_memory()
    return _addresses(src, src_ids), _addresses(dst, dst_ids), sizes


def vllm_dma(src: torch.Tensor, dst: torch.Tensor, src_ids: torch.Tensor, dst_ids: torch.Tensor) -> Call:
    """vLLM's batched submission; from the host in any order, as its connector asks for."""
    from vllm import _custom_ops

    descriptors = _descriptors(src, dst, src_ids, dst_ids)
    return partial(_custom_ops.swap_blocks_batch, *descriptors, is_src_access_order_any=src.is_cpu)


def vllm_kernel(src: torch.Tensor, dst: torch.Tensor, src_ids: torch.Tensor, dst_ids: torch.Tensor) -> Call:
    """vLLM's Triton kernel, with its connector's chunk. (That uses it for small pieces to the device.)"""
    from vllm.triton_utils import triton
    from vllm.v1.kv_offload.cpu.swap_blocks_triton import swap_blocks_batch

    chunk = min(triton.next_power_of_2(src.shape[1]), 8192)
    return partial(swap_blocks_batch, *_descriptors(src, dst, src_ids, dst_ids), bytes_per_chunk=chunk)

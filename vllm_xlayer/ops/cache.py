"""Ops that write and move cache memory."""

from enum import IntEnum

import torch

from ..nvfp4 import ScaleChoice, ScaleOrder
from .extension import checks_values, load, require_cuda_build


class CopyMethod(IntEnum):
    """Who moves the bytes of ``copy_blocks`` where device memory takes part."""

    ENGINE = 0
    """The copy engine: leaves the SMs to the model, and is slow for small pieces."""
    KERNEL = 1
    """A kernel: at most 12 thread blocks between device and host, as many as help inside a device."""


def reshape_and_cache_nvfp4(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    scale_order: int = ScaleOrder.LINEAR,
    scale_choice: int = ScaleChoice.BEST_OF_9,
    newest: torch.Tensor | None = None,
    newest_slots: torch.Tensor | None = None,
    rotated_keys: bool = False,
) -> None:
    """Quantise new tokens and write them into their slots of one layer's NVFP4 cache.

    Args:
        key: [T, H, D] bfloat16, float16 or float32; D dense, any strides in T and H. D a multiple of 16.
        value: as key, same shape and dtype.
        kv_cache: (B, H, N, 9D/8) uint8, strides (block stride, N*C, C, 1): dense pages, any block stride
            that is a multiple of 16 bytes. N a multiple of 16. Written in place.
        slot_mapping: int64 [t], t <= T: slot = block * N + offset of the first t tokens; -1 skips a token.
            Two tokens must not have the same slot.
        k_scale: float32, one element: K's global decode scale; what is stored is key / k_scale.
        v_scale: the same for V.
        scale_order: a ``ScaleOrder``, of V's block scales. SWIZZLED needs D to be a multiple of 64.
        scale_choice: a ``ScaleChoice``.
        newest: (rows, 2, H, n, D) of key's dtype, dense, n a multiple of 16, or None: memory of each running
            request's newest n tokens as they are, K and then V. Written in place.
        newest_slots: int64 [t] with ``newest``: row * n + place of each token, or -1 to leave it out, as
            ``newest_step`` makes them.
        rotated_keys: keep K rotated (``nvfp4.rotate``), in pages and among the newest.

    A NaN makes its group of 16 elements NaN; Inf and values beyond 2688 * global scale become +-2688 *
    global scale. Neither changes another group. (In rotated K all of the block that is rotated together.)
    """
    require_cuda_build("reshape_and_cache_nvfp4", key, value, kv_cache)
    load()
    if checks_values(slot_mapping) and slot_mapping.numel() and kv_cache.dim() == 4:
        slots = kv_cache.shape[0] * kv_cache.shape[2]
        low, high = (int(x) for x in slot_mapping.aminmax())
        if low < -1 or high >= slots:
            raise RuntimeError(
                f"slot_mapping: expected -1 or slots below {slots}, got values from {low} to {high}"
            )
    torch.ops.vllm_xlayer.reshape_and_cache_nvfp4(
        key, value, kv_cache, slot_mapping, k_scale, v_scale, int(scale_order), int(scale_choice), newest,
        newest_slots, rotated_keys,
    )  # fmt: skip


def copy_blocks(
    src: torch.Tensor,
    dst: torch.Tensor,
    src_ids: torch.Tensor,
    dst_ids: torch.Tensor,
    method: CopyMethod | None = None,
) -> None:
    """Copy equal-sized pieces: dst[dst_ids[i]] = src[src_ids[i]] for every i.

    Args:
        src: uint8 [n, piece], each piece dense, any stride between pieces; CPU or CUDA.
        dst: uint8 [m, piece], the same piece size; CPU or the CUDA device of src.
        src_ids: int64 [P] on the CPU, each below n.
        dst_ids: int64 [P] on the CPU, each below m.
        method: a ``CopyMethod``; None is the kernel inside a device, else the copy engine. Which one is
            faster between device and host, ``connector.copy.choice`` knows. No meaning between host memory.

    Copy engine: submitted in a few batches, so that the first pieces move while the host submits the rest.
    Kernel: host memory must be pinned or registered, a piece has at most 1 GiB, and it is fast only where
    addresses, strides and piece are multiples of 16 bytes. Both run on torch's current stream; host memory
    must be pinned for the copy to be asynchronous, and must stay alive and unchanged until the stream has got
    there (the ids need not). Between host memory: threads, done on return.

    The pairs are copied in no particular order. That no destination occurs twice and none overlaps a source
    of another pair is the caller's duty; it is not checked.
    """
    require_cuda_build("copy_blocks", src, dst)
    load()
    if method is None:
        method = CopyMethod.KERNEL if src.is_cuda and dst.is_cuda else CopyMethod.ENGINE
    torch.ops.vllm_xlayer.copy_blocks(src, dst, src_ids, dst_ids, int(method))


def land_rows(
    rows: torch.Tensor,
    pool: torch.Tensor,
    blocks: torch.Tensor,
    factors: torch.Tensor | None = None,
    digests: torch.Tensor | None = None,
) -> None:
    """Copy rows into blocks of a pool, and say what was stored: pool[blocks[i]] = rows[i] for every i.

    Args:
        rows: uint8 [n, row_bytes], dense. row_bytes a multiple of 8; of 16 is faster.
        pool: uint8 [B, row_bytes], each row dense, any stride between rows that is a multiple of 8 bytes and
            at least row_bytes. Written in place. Rows and pool start at multiples of 8 bytes (faster: of 16).
        blocks: int64 [n], each from 0 to B - 1, no two the same.
        factors: int64 [row_bytes / 8], or None: no digests.
        digests: int64 [n] with ``factors``. Written: of each row the sum of its 8-byte words times their
            factors, modulo 2**64.

    All on one device, CPU or CUDA; there on torch's current stream, by as many thread blocks as a quarter of
    the SMs, so that a step runs beside it. A digest is of what was stored, whatever else came into ``rows``.

    A block that the pool does not have raises RuntimeError on the CPU and with ``VLLM_XLAYER_DEBUG=1``. Else,
    on CUDA, its row is written nowhere and has the digest 0. That ``rows`` and ``pool`` do not overlap and no
    block occurs twice is the caller's duty; it is not checked.
    """
    require_cuda_build("land_rows", pool)
    load()
    if checks_values(blocks) and blocks.numel():
        low, high = (int(x) for x in blocks.aminmax())
        if low < 0 or high >= pool.shape[0]:
            raise RuntimeError(f"blocks: expected blocks from 0 to {pool.shape[0] - 1}, got {low} to {high}")
    torch.ops.vllm_xlayer.land_rows(rows, pool, blocks, factors, digests)

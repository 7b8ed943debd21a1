"""The dense attention the NVFP4 backend stands on: FlashAttention-3 on Hopper, FlashAttention-2 elsewhere."""

import numpy as np
import torch
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from .metadata import DevicePiece
from .plan import Waves


class FlashAttention:
    """Attention of a piece's queries to its dense keys.

    Args:
        head_size: D; with the GPU it decides the FlashAttention version.
        scale: Factor of Q K^T.
        window: Sliding window in tokens, a query and those before it; None for all.
        soft_cap: Logits become cap * tanh(logits / cap); 0 for none.
    """

    def __init__(self, head_size: int, scale: float, window: int | None, soft_cap: float):
        version = get_flash_attn_version(head_size=head_size)
        if version is None:
            raise RuntimeError("--kv-cache-dtype nvfp4: expected vLLM's FlashAttention kernels, found none")
        self.version = version
        self.head_size = head_size
        self.scale = scale
        self.window = [-1, -1] if window is None else [window - 1, 0]
        self.soft_cap = soft_cap

    def waves(self, query_lens: np.ndarray, num_heads: int, num_kv_heads: int) -> Waves | None:
        """Of FlashAttention-3, which keeps a thread block an SM, and gives each 128 rows of a KV head (192
        where heads are of 64): all query heads of so many tokens.

        Args:
            query_lens: int [R].
        """
        if self.version != 3:
            return None
        rows = 192 if self.head_size <= 64 else 128
        blocks = num_kv_heads * -(-query_lens * (num_heads // num_kv_heads) // rows)
        return Waves(blocks, torch.cuda.get_device_properties().multi_processor_count)

    def __call__(self, piece: DevicePiece, q, k, v, out: torch.Tensor | None):
        """q [Tq, Hq, D]; k, v [Tk, H, D]. Returns (output [Tq, Hq, D], LSE float32 [Hq, Tq] in base e); the
        output is in ``out`` if that is given. The kernels compute the LSE in any case."""
        return flash_attn_varlen_func(
            q=q, k=k, v=v, out=out,
            cu_seqlens_q=piece.cu_q, cu_seqlens_k=piece.cu_k,
            max_seqlen_q=piece.max_q, max_seqlen_k=piece.max_k,
            softmax_scale=self.scale,
            causal=piece.piece.causal,
            window_size=self.window,
            softcap=self.soft_cap,
            return_softmax_lse=True,
            fa_version=self.version,
        )  # fmt: skip


def merge(first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor):
    """Attention over the keys of both: outputs [Tq, Hq, D], LSEs float32 [Hq, Tq]. Returns the same pair."""
    out, lse = torch.empty_like(first), torch.empty_like(first_lse)
    merge_attn_states(out, first, first_lse, second, second_lse, lse)
    return out, lse

"""Multi-head latent attention (DeepSeek) on the CPU reference platform: plain torch, in float32.

A page is [tokens, C]: for every token its latent, C minus the rotary part, and the rotary part that all heads
share. vLLM's layer turns queries into the latents' space and what comes back out of it; between the two
this is attention with one KV head, whose keys are the tokens' entries and whose values are their latents. So
every token of a step, of a prompt too, goes the way that vLLM calls decode. A step's tokens are written
before they are read.

vLLM's own CPU backend reads pages of one layout only, and neither parts of prompts nor cached ones.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionLayer,
    CommonAttentionMetadata,
    MLAAttentionImpl,
)

from vllm_xlayer.attention.cpu import CpuReferenceMetadataBuilder
from vllm_xlayer.attention.cpu_impl import CpuReferenceImpl, CpuReferenceMetadata


class CpuMlaBackend(AttentionBackend):
    """What vLLM asks about shapes and supported combinations; every order of layers and blocks will do."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16"]

    @staticmethod
    def get_name() -> str:
        return "CPU_MLA"  # vLLM looks the name up in AttentionBackendEnum

    @staticmethod
    def get_impl_cls() -> type["CpuMlaImpl"]:
        return CpuMlaImpl

    @staticmethod
    def get_builder_cls() -> type["CpuMlaMetadataBuilder"]:
        return CpuMlaMetadataBuilder

    @classmethod
    def is_mla(cls) -> bool:
        return True


@dataclass
class CpuMlaMetadata(CpuReferenceMetadata):
    """A step as vLLM's layer splits it: all of it is decode."""

    num_actual_tokens: int = 0
    num_decodes: int = 0
    num_decode_tokens: int = 0
    num_prefills: int = 0
    decode: object = True
    """Only looked at for not being None."""
    prefill: None = None


class CpuMlaMetadataBuilder(CpuReferenceMetadataBuilder):
    """Turns vLLM's description of a step into ``CpuMlaMetadata``."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CpuMlaMetadata:
        step = super().build(common_prefix_len, common_attn_metadata, fast_build)
        tokens = common_attn_metadata.num_actual_tokens
        return CpuMlaMetadata(
            **vars(step),
            num_actual_tokens=tokens,
            num_decodes=len(step.query_ranges),
            num_decode_tokens=tokens,
        )


class CpuMlaImpl(MLAAttentionImpl[CpuMlaMetadata]):
    """Attention of one layer between the latents' projections."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        *,
        kv_lora_rank: int,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        **others: Any,
    ) -> None:
        if sliding_window is not None or others.get("indexer") is not None:
            raise NotImplementedError(
                "CPU reference attention: latent attention with windows or chosen tokens is not supported"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads, kv_cache_dtype
        self.latent_size = kv_lora_rank
        self._attention = CpuReferenceImpl(num_heads, head_size, scale, num_kv_heads=1)

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        skip_scale: bool = False,
    ) -> None:
        """Write latents [>= T, L] and rotary parts [>= T, 1, R] to the slots of int64 [T]; -1 is skipped."""
        if kv_cache.numel() == 0:  # a profiling run
            return
        slot_mapping = slot_mapping.flatten()
        tokens = torch.nonzero(slot_mapping >= 0).squeeze(1)
        slots, block_size = slot_mapping[tokens], kv_cache.shape[1]
        content = torch.cat((kv_c_normed[tokens], k_pe[tokens].flatten(1)), dim=-1)
        kv_cache[slots // block_size, slots % block_size] = content.to(kv_cache.dtype)

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: CpuMlaMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor, None]:
        """Attend q [T, Hq, L + R], or its two parts, to the cache [B, N, L + R]: ([T, Hq, L], no sums)."""
        if isinstance(q, tuple):
            q = torch.cat(q, dim=-1)
        output = q.new_zeros(*q.shape[:2], self.latent_size)
        block_size = kv_c_and_k_pe_cache.shape[1]
        requests = zip(
            attn_metadata.query_ranges, attn_metadata.seq_lens, attn_metadata.block_table, strict=True
        )
        for (q0, q1), seq_len, blocks in requests:
            if q0 == q1:
                continue
            pages = kv_c_and_k_pe_cache.index_select(0, blocks[: -(-seq_len // block_size)])
            keys = pages.flatten(0, 1)[:seq_len].float().unsqueeze(0)  # [1, tokens, L + R]
            found = self._attention.attend(q[q0:q1].float(), keys, keys, seq_len - (q1 - q0))
            output[q0:q1] = found[..., : self.latent_size]
        return output, None

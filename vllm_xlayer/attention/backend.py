"""The NVFP4 attention backend for GPUs without FP4 instructions.

Pages are written by ``reshape_and_cache_nvfp4``. Decode requests attend to them with
``nvfp4_paged_attention``. For the others ``gather_nvfp4`` fills a bounded 16-bit workspace
with the cached tokens, dequantised, and the new ones, as they are, and FlashAttention-3
(FlashAttention-2 where that is not available) attends to it. Prompts of which nothing is
cached need no workspace.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from ..nvfp4 import GROUP, KV_DTYPES, MAX_HEAD_SIZE, content_bytes


class DensePages:
    """What this package's backends have in common: a page is dense, with heads outside tokens.

    Mixed into vLLM's AttentionBackend.
    """

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """An NVFP4 page is seen as (H, N, C) bytes; see ``nvfp4.py`` for the order of the bytes inside."""
        if not spec.kv_quant_mode.is_nvfp4 or spec.state_content_bytes is not None:
            return spec
        return replace(spec, state_content_bytes=content_bytes(spec.head_size))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """The orders in which a page's K and V are contiguous halves; the first is the default."""
        return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(GROUP)]

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """The metadata is made from the host's query lengths: they must be the device's."""
        return False


class NVFP4Backend(DensePages, AttentionBackend):
    """NVFP4 KV cache on CUDA devices, sm_80 and newer, except where upstream's own path is used."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(KV_DTYPES)
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        # vLLM looks the name up in AttentionBackendEnum; this is the member it leaves to plugins.
        return "CUSTOM"

    @staticmethod
    def get_impl_cls():
        from .impl import NVFP4Impl

        return NVFP4Impl

    @staticmethod
    def get_builder_cls():
        from .metadata import NVFP4MetadataBuilder

        return NVFP4MetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % GROUP == 0 and head_size <= MAX_HEAD_SIZE

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        return capability.major >= 8

    @classmethod
    def supports_combination(
        cls, head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, use_mm_prefix,
        device_capability,
    ) -> str | None:  # fmt: skip
        config = get_current_vllm_config_or_none()
        if config is None:
            return None
        if config.parallel_config.decode_context_parallel_size > 1:
            return "decode context parallelism not supported (its merge needs the LSE of each shard)"
        return None

    @classmethod
    def explain_refusal(cls, capability, selector_config) -> str | None:
        """One sentence about why this backend cannot serve the configuration, or None if it can."""
        reasons = cls.validate_configuration(device_capability=capability, **selector_config._asdict())
        if not reasons:
            return None
        return (
            f"vllm-xlayer cannot serve --kv-cache-dtype {selector_config.kv_cache_dtype} here: "
            f"{'; '.join(reasons)} "
            f"(head_size={selector_config.head_size}, dtype={selector_config.dtype}, "
            f"block_size={selector_config.block_size}, compute capability {capability}). "
            f"Supported: decoder attention, head sizes that are multiples of {GROUP} up to {MAX_HEAD_SIZE}, "
            f"float16 or bfloat16 models, block sizes that are multiples of {GROUP}, sm_80 and newer."
        )

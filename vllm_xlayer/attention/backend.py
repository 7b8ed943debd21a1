"""The NVFP4 attention backend for GPUs whose attention vLLM has no NVFP4 kernels for.

Pages are written by ``reshape_and_cache_nvfp4``. Decode requests attend to them with
``nvfp4_paged_attention``. For the others the cached tokens are dequantised with
``gather_nvfp4`` into a bounded 16-bit workspace, and FlashAttention-3 (FlashAttention-2
where that is not available) attends to them; their new tokens attend to each other from
the unquantised K and V at hand.
"""

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

from ..nvfp4 import GROUP, content_bytes


class NVFP4Backend(AttentionBackend):
    """NVFP4 KV cache on CUDA devices, sm_80 and newer, except where upstream's own path is used."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["nvfp4"]
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

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(GROUP)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "nvfp4",
    ) -> tuple[int, ...]:
        """(B, H, N, C) bytes; see ``nvfp4.py`` for the order of the bytes inside a page."""
        return num_blocks, num_kv_heads, block_size, content_bytes(head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """A page is dense, so layers can only come between blocks and heads: BLHNC."""
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)

    @classmethod
    def get_required_kv_cache_layout(cls) -> Any:
        # Heads outside tokens: the only order in which a page's K and V are contiguous halves.
        return "HND"

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % GROUP == 0 and head_size <= 256

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """One head slot holds K and V of a token as the ops want it: (B, H, N, C) bytes."""
        from dataclasses import replace

        if spec.kv_quant_mode.is_nvfp4 and spec.state_content_bytes is None:
            return replace(spec, state_content_bytes=2 * (spec.head_size // 2 + spec.head_size // GROUP))
        return spec

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        from vllm.v1.kv_cache_layout import KVCacheLayout

        return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC

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
            f"--kv-cache-dtype nvfp4 cannot be used here: {'; '.join(reasons)} "
            f"(head_size={selector_config.head_size}, dtype={selector_config.dtype}, "
            f"block_size={selector_config.block_size}, compute capability {capability}). "
            f"Supported: decoder attention, head sizes that are multiples of {GROUP} up to 256, float16 or "
            f"bfloat16 models, block sizes that are multiples of {GROUP}, sm_80 and newer."
        )

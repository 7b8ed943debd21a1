"""The attention backend of the CPU reference platform: what vLLM asks of it, and how a step is described."""

from itertools import pairwise
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_xlayer.attention.backend import DensePages
from vllm_xlayer.attention.cpu_impl import CpuReferenceImpl, CpuReferenceMetadata
from vllm_xlayer.attention.newest import make_planner
from vllm_xlayer.attention.scale_counts import make_report
from vllm_xlayer.nvfp4 import GROUP, KV_DTYPES


class CpuReferenceBackend(DensePages, AttentionBackend):
    """What vLLM asks about shapes, orders and supported combinations."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16", *KV_DTYPES]

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"  # vLLM looks the name up in AttentionBackendEnum

    @staticmethod
    def get_impl_cls() -> type["CpuReferenceImpl"]:
        return CpuReferenceImpl

    @staticmethod
    def get_builder_cls() -> type["CpuReferenceMetadataBuilder"]:
        return CpuReferenceMetadataBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *others: Any
    ) -> str | None:
        if kv_cache_dtype in KV_DTYPES and head_size % GROUP != 0:
            return f"{kv_cache_dtype} needs a head size that is a multiple of {GROUP}, got {head_size}"
        return None


class CpuReferenceMetadataBuilder(AttentionMetadataBuilder[CpuReferenceMetadata]):
    """Turns vLLM's description of a step into ``CpuReferenceMetadata``."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # abstract in vLLM
        self._newest = self._scales = None
        if kv_cache_spec.kv_quant_mode.is_nvfp4:
            self._newest = make_planner(vllm_config, layer_names, device)
            self._scales = make_report(vllm_config, layer_names)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CpuReferenceMetadata:
        if common_attn_metadata.causal is not True:
            raise NotImplementedError(
                f"CPU reference attention: expected a causal step, got causal={common_attn_metadata.causal}"
            )
        if self._scales is not None:
            self._scales.say()
        return CpuReferenceMetadata(
            query_ranges=list(pairwise(common_attn_metadata.query_start_loc_cpu.tolist())),
            seq_lens=common_attn_metadata.seq_lens.tolist(),
            block_table=common_attn_metadata.block_table_tensor,
            newest=None if self._newest is None else self._newest.plan(common_attn_metadata),
        )

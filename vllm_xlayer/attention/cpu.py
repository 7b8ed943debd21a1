"""Paged attention on torch tensors: the attention backend of the CPU reference platform.

One page is (H, N, C) and dense; only the block stride is free, so a layer's cache may be a
tensor of its own or a view of cross-layer rows. A 16-bit (or float32) page holds, for every
token and head, D elements of K and then D of V. An NVFP4 page is laid out as
``vllm_xlayer.nvfp4`` says, and only the extension's ops look inside.

How a step attends: the K and V that are visible to the step's queries are gathered from the
cache to one ragged float32 tensor (``VisibleTokens``), the rows of the step's own tokens are
replaced by the K and V at hand, and each request attends to its rows. So a token sees the
cached, rounded form of the earlier chunks of its prompt and the exact form of its own chunk.
Nothing but valid tokens is ever read: unused cache memory may hold NaN.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_xlayer.nvfp4 import GROUP, ScaleChoice, ScaleOrder

QUERY_TILE = 256
"""Queries attended at once: bounds the scores to heads * QUERY_TILE * context floats."""


class CpuReferenceBackend(AttentionBackend):
    """What vLLM asks about shapes, orders and supported combinations."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16", "nvfp4"]

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"  # vLLM looks the name up in AttentionBackendEnum

    @staticmethod
    def get_impl_cls() -> type["CpuReferenceImpl"]:
        return CpuReferenceImpl

    @staticmethod
    def get_builder_cls() -> type["CpuReferenceMetadataBuilder"]:
        return CpuReferenceMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def get_required_kv_cache_layout(cls) -> Any:
        return "HND"

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """(B, H, N, C): C elements of the cache's dtype, or C bytes of the dense page for nvfp4."""
        content = 2 * head_size
        if cache_dtype_str == "nvfp4":
            content = 2 * (head_size // 2 + head_size // GROUP)
        return num_blocks, num_kv_heads, block_size, content

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """BHNC, and BLHNC for rows: each layer's page stays dense in its row."""
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)


@dataclass(frozen=True)
class VisibleTokens:
    """Which cached tokens a step reads in a layer: a ragged list over the step's requests.

    Request r reads its tokens starts[r] .. starts[r] + len_r, which become the rows
    cu_lens[r] : cu_lens[r + 1].
    """

    starts: torch.Tensor  # int32 [R]
    cu_lens: torch.Tensor  # int32 [R + 1]
    row_ranges: list[tuple[int, int]]  # R pairs: cu_lens as Python ints
    blocks: torch.Tensor  # int64 [rows]: the cache block of each row
    offsets: torch.Tensor  # int64 [rows]: the token's place in that block
    chunk_rows: torch.Tensor  # int64 [T]: the row of each of the step's own tokens


@dataclass
class CpuReferenceMetadata(AttentionMetadata):
    """One step of one KV cache group: R requests, T tokens."""

    num_tokens: int
    query_lens: torch.Tensor  # int32 [R]
    query_ranges: list[tuple[int, int]]  # R pairs: each request's tokens in the batch
    computed: list[int]  # R: tokens before this step
    seq_lens: torch.Tensor  # int32 [R]: tokens after this step
    block_table: torch.Tensor  # int32 [R, M]
    block_size: int
    _visible: dict[int | None, VisibleTokens] = field(default_factory=dict)

    def visible(self, window: int | None) -> VisibleTokens:
        """The tokens a layer with that sliding window reads; computed once a step."""
        if window not in self._visible:
            self._visible[window] = self._find_visible(window)
        return self._visible[window]

    def _find_visible(self, window: int | None) -> VisibleTokens:
        computed = self.seq_lens - self.query_lens
        starts = torch.zeros_like(computed) if window is None else (computed - window + 1).clamp_(min=0)
        lens = self.seq_lens - starts
        cu_lens = torch.zeros(len(lens) + 1, dtype=torch.int32)
        torch.cumsum(lens, 0, out=cu_lens[1:])
        ends = cu_lens.tolist()
        request, position = _ragged_positions(starts, lens)
        chunk_request, chunk_position = _ragged_positions(computed, self.query_lens)
        return VisibleTokens(
            starts=starts,
            cu_lens=cu_lens,
            row_ranges=list(zip(ends[:-1], ends[1:], strict=True)),
            blocks=self.block_table[request, position // self.block_size].to(torch.int64),
            offsets=position % self.block_size,
            chunk_rows=(cu_lens[:-1] - starts)[chunk_request] + chunk_position,
        )


def _ragged_positions(starts: torch.Tensor, lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For request r the positions starts[r] .. starts[r] + lens[r]: (request, position) of each."""
    request = torch.repeat_interleave(lens)
    first = torch.cumsum(lens, 0) - lens
    return request, torch.arange(len(request)) + (starts - first)[request]


class CpuReferenceMetadataBuilder(AttentionMetadataBuilder[CpuReferenceMetadata]):
    """Turns vLLM's description of a step into ``CpuReferenceMetadata``."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # abstract in vLLM

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
        query_starts = common_attn_metadata.query_start_loc_cpu
        query_lens = query_starts.diff()
        seq_lens = common_attn_metadata.seq_lens
        bounds = query_starts.tolist()
        return CpuReferenceMetadata(
            num_tokens=common_attn_metadata.num_actual_tokens,
            query_lens=query_lens,
            query_ranges=list(zip(bounds[:-1], bounds[1:], strict=True)),
            computed=(seq_lens - query_lens).tolist(),
            seq_lens=seq_lens,
            block_table=common_attn_metadata.block_table_tensor,
            block_size=self.kv_cache_spec.block_size,
        )


class CpuReferenceImpl(AttentionImpl[CpuReferenceMetadata]):
    """Attention of one layer, in float32."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise NotImplementedError("CPU reference attention: ALiBi is not supported")
        if kv_sharing_target_layer_name is not None:
            raise NotImplementedError(
                "CPU reference attention: layers that share another layer's KV cache are not supported "
                f"(this one reads {kv_sharing_target_layer_name})"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.is_nvfp4 = kv_cache_dtype == "nvfp4"
        self.soft_cap = logits_soft_cap or None
        self.sinks = sinks

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write key and value [>= T, H, D] to the slots of slot_mapping int64 [T]; -1 is skipped."""
        if self.is_nvfp4:
            from vllm_xlayer import ops

            ops.reshape_and_cache_nvfp4(
                key,
                value,
                kv_cache,
                slot_mapping,
                layer._k_scale,
                layer._v_scale,
                ScaleOrder.LINEAR,
                ScaleChoice.BEST_OF_9,
            )
            return
        tokens = torch.nonzero(slot_mapping >= 0).squeeze(1)
        slots = slot_mapping[tokens]
        block_size = kv_cache.shape[2]
        content = torch.cat((key[tokens], value[tokens]), dim=-1).to(kv_cache.dtype)
        kv_cache[slots // block_size, :, slots % block_size] = content

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CpuReferenceMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend query [T, Hq, D] to the cache and to key, value [T, H, D]; write output [T, Hq, D]."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("CPU reference attention: fused output quantisation is not supported")
        if attn_metadata is None:  # a profiling run
            return output.zero_()
        num_tokens = attn_metadata.num_tokens
        visible = attn_metadata.visible(self.window)
        keys, values = self._gather(layer, kv_cache, attn_metadata.block_table, visible)
        keys[visible.chunk_rows] = key[:num_tokens].float()
        values[visible.chunk_rows] = value[:num_tokens].float()
        starts = visible.starts.tolist()
        for (q0, q1), (k0, k1), computed, start in zip(
            attn_metadata.query_ranges, visible.row_ranges, attn_metadata.computed, starts, strict=True
        ):
            output[q0:q1] = self._attend(query[q0:q1].float(), keys[k0:k1], values[k0:k1], computed - start)
        return output

    def _gather(
        self, layer: AttentionLayer, kv_cache: torch.Tensor, block_table: torch.Tensor, visible: VisibleTokens
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The visible tokens' K and V, each float32 [rows, H, D]."""
        rows = visible.row_ranges[-1][1]
        if self.is_nvfp4:
            from vllm_xlayer import ops

            keys = torch.empty(rows, self.num_kv_heads, self.head_size)
            values = torch.empty_like(keys)
            ops.gather_nvfp4(
                kv_cache,
                block_table,
                visible.starts,
                visible.cu_lens,
                layer._k_scale,
                layer._v_scale,
                keys,
                values,
                ScaleOrder.LINEAR,
            )
            return keys, values
        content = kv_cache[visible.blocks, :, visible.offsets].float()
        return content[..., : self.head_size], content[..., self.head_size :]

    def _attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int
    ) -> torch.Tensor:
        """Causal attention of one request: query [n, Hq, D] to keys, values [m, H, D], all float32.

        Query i sees the keys up to first + i, and no further back than the window.
        """
        num_queries = query.shape[0]
        group = self.num_heads // self.num_kv_heads
        query = query.view(num_queries, self.num_kv_heads, group, self.head_size).permute(1, 2, 0, 3)
        keys, values = keys.transpose(0, 1), values.transpose(0, 1)
        tiles = []
        for q0 in range(0, num_queries, QUERY_TILE):
            q1 = min(q0 + QUERY_TILE, num_queries)
            k0 = 0 if self.window is None else max(0, first + q0 - self.window + 1)
            k1 = first + q1
            tile = query[:, :, q0:q1].reshape(self.num_kv_heads, group * (q1 - q0), self.head_size)
            scores = torch.matmul(tile, keys[:, k0:k1].transpose(1, 2)).mul_(self.scale)
            scores = scores.view(self.num_kv_heads, group, q1 - q0, k1 - k0)
            weights = self._weights(scores, torch.arange(first + q0, first + q1), torch.arange(k0, k1))
            tiles.append(torch.matmul(weights.flatten(1, 2), values[:, k0:k1]).view(*scores.shape[:3], -1))
        return torch.cat(tiles, dim=2).permute(2, 0, 1, 3).reshape(num_queries, self.num_heads, -1)

    def _weights(
        self, scores: torch.Tensor, query_positions: torch.Tensor, key_positions: torch.Tensor
    ) -> torch.Tensor:
        """Softmax over scores [H, group, n, m] after soft cap and mask, with the sinks' share left out."""
        if self.soft_cap is not None:
            scores = scores.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        if len(query_positions) > 1:  # a single query's range is exact
            distance = query_positions[:, None] - key_positions
            hidden = distance < 0
            if self.window is not None:
                hidden |= distance >= self.window
            scores = scores.masked_fill_(hidden, float("-inf"))
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.float().view(scores.shape[0], scores.shape[1], 1, 1)
        return torch.cat((scores, sinks.expand(*scores.shape[:3], 1)), dim=-1).softmax(-1)[..., :-1]

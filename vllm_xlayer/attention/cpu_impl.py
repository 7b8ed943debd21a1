"""Paged attention on torch tensors, for the CPU reference platform.

One page is (H, N, C) and dense; only the block stride is free, so a layer's cache may be a
tensor of its own or a view of cross-layer rows. A 16-bit (or float32) page holds, for every
token and head, D elements of K and then D of V. An NVFP4 page is laid out as
``vllm_xlayer.nvfp4`` says, and only the extension's ops look inside.

How a step attends: for each request the visible part of its sequence is read from the cache
as float32, the rows of the step's own tokens are replaced by the K and V at hand, and the
request's queries attend to that. So a token sees the cached, rounded form of earlier chunks
of its prompt and the exact form of its own chunk. With VLLM_XLAYER_NEWEST_TOKENS it sees the
exact form of the newest tokens before its chunk, too (see ``newest``). Nothing but valid tokens
enters a product: unused cache memory may hold NaN.
"""

from dataclasses import dataclass

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionMetadata, AttentionType

from vllm_xlayer import ops
from vllm_xlayer.attention.newest import NewestBatch, allocate, newest_tokens_of, write_arguments
from vllm_xlayer.attention.scale_counts import ScaleCounts
from vllm_xlayer.config import Config
from vllm_xlayer.nvfp4 import KV_DTYPES, ROTATED_KEYS, ScaleOrder, scale_choice_of

QUERY_TILE = 128
"""Queries attended at once: bounds the scores to heads * QUERY_TILE * context floats."""


@dataclass
class CpuReferenceMetadata(AttentionMetadata):
    """One step of one KV cache group: which tokens of the batch belong to which request."""

    query_ranges: list[tuple[int, int]]
    """For each request, its tokens in the batch: first, and one past the last."""
    seq_lens: list[int]
    """For each request, its tokens in the cache once this step's are written."""
    block_table: torch.Tensor
    """int32 [requests, max blocks]: each request's blocks in order."""
    newest: NewestBatch | None = None
    """Where the unquantised newest tokens are; None: there are none."""


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
        if kv_sharing_target_layer_name is not None:
            raise NotImplementedError(
                "CPU reference attention: layers that share another layer's KV cache are not supported "
                f"(this one reads {kv_sharing_target_layer_name})"
            )
        self.is_nvfp4 = kv_cache_dtype in KV_DTYPES
        if self.is_nvfp4:
            if alibi_slopes is not None:  # as the kernels on a GPU
                raise NotImplementedError(
                    f"--kv-cache-dtype {kv_cache_dtype}: expected no ALiBi slopes, got some"
                )
            ops.load()  # a missing extension should stop the start, not the first request
        self.uses_global_scales = self.is_nvfp4  # see patches.kv_scales
        self.kv_cache_dtype = kv_cache_dtype
        settings = Config.load()
        self.scale_choice = scale_choice_of(kv_cache_dtype, settings.scale_choice)
        self.scale_counts = ScaleCounts("cpu") if self.is_nvfp4 and settings.debug else None
        self.num_heads = num_heads  # vLLM's layer prints it
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.window = sliding_window
        self.soft_cap = logits_soft_cap or None
        self.sinks = sinks
        self.slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.newest: torch.Tensor | None = None
        self.vllm_config = get_current_vllm_config() if self.is_nvfp4 else None
        self._keeps_newest = self.vllm_config is not None and newest_tokens_of(self.vllm_config) > 0

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Reserves the memory of the newest tokens, before the KV cache takes what is left."""
        if self._keeps_newest and self.newest is None:
            assert self.vllm_config is not None
            self.newest = allocate(self.vllm_config, self.num_kv_heads, self.head_size, act_dtype)

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
            if self.scale_counts is not None:
                self.scale_counts.add(layer, key, value, slot_mapping)
            ops.reshape_and_cache_nvfp4(
                key,
                value,
                kv_cache,
                slot_mapping,
                layer._k_scale,
                layer._v_scale,
                ScaleOrder.LINEAR,
                self.scale_choice,
                rotated_keys=ROTATED_KEYS,
                **write_arguments(layer, self.newest, len(slot_mapping)),
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
        ranges = zip(
            attn_metadata.query_ranges, attn_metadata.seq_lens, attn_metadata.block_table, strict=True
        )
        for request, ((q0, q1), seq_len, blocks) in enumerate(ranges):
            if q0 == q1:
                continue
            computed = seq_len - (q1 - q0)
            start = 0 if self.window is None else max(0, computed - self.window + 1)
            own_keys, own_values = key[q0:q1].transpose(0, 1).float(), value[q0:q1].transpose(0, 1).float()
            if computed == 0:
                keys, values = own_keys, own_values
            elif self.is_nvfp4:
                keys, values = self._gather(layer, kv_cache, attn_metadata, request, start, key, value)
            else:
                keys, values = self._read(kv_cache, blocks, start, seq_len)
                keys[:, computed - start :] = own_keys
                values[:, computed - start :] = own_values
            output[q0:q1] = self.attend(query[q0:q1].float(), keys, values, computed - start)
        return output

    def _gather(
        self,
        layer: AttentionLayer,
        kv_cache: torch.Tensor,
        step: CpuReferenceMetadata,
        request: int,
        start: int,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a request's tokens from ``start`` on, from NVFP4 pages or as they were: float32
        [H, n, D]."""
        newest, seq_len = step.newest, step.seq_lens[request]
        keys = torch.empty(seq_len - start, self.num_kv_heads, self.head_size)
        values = torch.empty_like(keys)
        one = slice(request, request + 1)
        ops.gather_nvfp4(
            kv_cache,
            step.block_table[one],
            torch.tensor([start], dtype=torch.int32),
            torch.tensor([0, seq_len - start], dtype=torch.int32),
            layer._k_scale,
            layer._v_scale,
            keys,
            values,
            ScaleOrder.LINEAR,
            ROTATED_KEYS,
            key=key,
            value=value,
            query_starts=torch.tensor(step.query_ranges[request], dtype=torch.int32),
            seq_lens=torch.tensor([seq_len], dtype=torch.int32),
            newest=None if newest is None else self.newest,
            newest_rows=None if newest is None else newest.rows[one],
            newest_from=None if newest is None else newest.begin[one],
        )
        return keys.transpose(0, 1), values.transpose(0, 1)

    def _read(
        self, kv_cache: torch.Tensor, blocks: torch.Tensor, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the tokens start .. stop of the request with those blocks of 16-bit (or float32) pages:
        float32 [H, n, D]."""
        block_size = kv_cache.shape[2]
        first_block = start // block_size
        pages = kv_cache.index_select(0, blocks[first_block : -(-stop // block_size)])
        tokens = pages.transpose(0, 1).float().flatten(1, 2)  # [H, tokens of these blocks, 2 * D]
        first = first_block * block_size
        tokens = tokens[:, start - first : stop - first]
        return tokens[..., : self.head_size], tokens[..., self.head_size :]

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int
    ) -> torch.Tensor:
        """Causal attention of one request: query [n, Hq, D] to keys, values [H, m, D], all float32.

        Query i sees the keys up to first + i, and no further back than the window.
        Returns [n, Hq, D].
        """
        num_queries = query.shape[0]
        grouped = (query * self.scale).view(num_queries, self.num_kv_heads, -1, self.head_size)
        tiles = []
        for q0 in range(0, num_queries, QUERY_TILE):
            q1 = min(q0 + QUERY_TILE, num_queries)
            k0 = 0 if self.window is None else max(0, first + q0 - self.window + 1)
            k1 = first + q1
            tile = grouped[q0:q1].permute(1, 2, 0, 3)  # [H, group, queries, D]
            scores = torch.matmul(tile.flatten(1, 2), keys[:, k0:k1].transpose(1, 2))
            weights = self._weights(scores.view(*tile.shape[:3], k1 - k0), first + q0, k0)
            tiles.append(torch.matmul(weights.flatten(1, 2), values[:, k0:k1]).view(tile.shape))
        return torch.cat(tiles, dim=2).permute(2, 0, 1, 3).reshape(query.shape)

    def _weights(self, scores: torch.Tensor, first_query: int, first_key: int) -> torch.Tensor:
        """Softmax over scores [H, group, n, m] after soft cap, ALiBi and mask; overwrites the scores.

        Row i is position first_query + i, column j position first_key + j. A sink takes its
        share of each row's weight and attends to nothing.
        """
        if self.soft_cap is not None:
            scores = scores.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        num_queries, num_keys = scores.shape[2:]
        query_positions = torch.arange(first_query, first_query + num_queries).unsqueeze(1)
        key_positions = torch.arange(first_key, first_key + num_keys)
        if self.slopes is not None:
            slopes = self.slopes.view(*scores.shape[:2], 1, 1)
            scores = scores.add_(slopes * (key_positions - query_positions))
        if num_queries > 1:  # the columns are exactly what a single query sees
            hidden = key_positions > query_positions
            if self.window is not None:
                hidden |= key_positions <= query_positions - self.window
            scores = scores.masked_fill_(hidden, float("-inf"))
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.float().view(scores.shape[0], -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]

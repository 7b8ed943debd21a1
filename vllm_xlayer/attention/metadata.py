"""Per-step metadata of the NVFP4 backend: the batch on the host, and its plan on the device."""

from dataclasses import dataclass, field

import numpy as np
import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from .plan import Piece, plan_pieces


@dataclass
class DevicePiece:
    """A `Piece` with what its kernels read, on the device.

    Attributes:
        tokens: The piece's query tokens in the batch, half-open.
        cu_q, cu_k: int32 [n + 1], running query and key counts.
        seq_starts: int32 [n], first key position of each request.
        own_rows: int64 [query tokens], where this step's own K and V go in the workspace.
    """

    piece: Piece
    tokens: slice
    num_keys: int
    max_q: int
    max_k: int
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    seq_starts: torch.Tensor
    own_rows: torch.Tensor | None
    block_table: torch.Tensor


@dataclass
class NVFP4Metadata(AttentionMetadata):
    """One step's batch. Plans are made on first use and shared by all layers with the same window.

    Attributes:
        query_starts: int64 [R + 1] on the host, first query token of each request.
        seq_lens: int64 [R] on the host, exact tokens of each request including this step's.
        block_table: int32 [R, M] on the device.
    """

    num_actual_tokens: int
    query_starts: np.ndarray
    seq_lens: np.ndarray
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    _plans: dict[tuple[int | None, int], list[DevicePiece]] = field(default_factory=dict)

    def plan(self, window: int | None, capacity: int) -> list[DevicePiece]:
        key = (window, capacity)
        if key not in self._plans:
            query_lens = np.diff(self.query_starts)
            pieces = plan_pieces(query_lens, self.seq_lens, capacity, window)
            self._plans[key] = [self._to_device(p, query_lens) for p in pieces]
        return self._plans[key]

    def _to_device(self, p: Piece, query_lens: np.ndarray) -> DevicePiece:
        n = p.last - p.first
        q = query_lens[p.first : p.last]
        cu_q = np.concatenate([[0], np.cumsum(q)])
        cu_k = np.concatenate([[0], np.cumsum(p.lens, dtype=np.int64)])
        packed = np.concatenate([cu_q, cu_k, p.seq_starts])
        own = np.empty(0, dtype=np.int64)
        if p.causal:
            # A request's own tokens are the last q of its keys.
            within = np.arange(cu_q[-1]) - np.repeat(cu_q[:-1], q)
            own = np.repeat(cu_k[1:] - q, q) + within
        # One transfer for everything a piece needs; cu_q starts the buffer, so views stay aligned.
        host = torch.from_numpy(np.concatenate([own, packed]).astype(np.int64))
        device = self.block_table.device
        dev = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
        ints = dev[len(own) :].to(torch.int32)
        return DevicePiece(
            piece=p,
            tokens=slice(int(self.query_starts[p.first]), int(self.query_starts[p.last])),
            num_keys=int(cu_k[-1]),
            max_q=int(q.max()),
            max_k=int(p.lens.max()),
            cu_q=ints[: n + 1],
            cu_k=ints[n + 1 : 2 * n + 2],
            seq_starts=ints[2 * n + 2 :],
            own_rows=dev[: len(own)] if p.causal else None,
            block_table=self.block_table[p.first : p.last],
        )


class NVFP4MetadataBuilder(AttentionMetadataBuilder[NVFP4Metadata]):
    # The pieces depend on the lengths, so a captured graph could not be replayed for others.
    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        head_size_v = getattr(kv_cache_spec, "head_size_v", kv_cache_spec.head_size)
        if head_size_v != kv_cache_spec.head_size:
            raise ValueError(
                f"--kv-cache-dtype nvfp4: expected K and V heads of one size, got {kv_cache_spec.head_size} "
                f"and {head_size_v} ({layer_names[0]})"
            )
        # With speculative decoding vLLM knows only an upper bound of the lengths on the host.
        self._lens_exact_on_host = vllm_config.speculative_config is None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> NVFP4Metadata:
        m = common_attn_metadata
        if m.causal is not True:
            raise NotImplementedError("--kv-cache-dtype nvfp4: expected causal attention, got non-causal")
        if self._lens_exact_on_host and m.seq_lens_cpu_upper_bound is not None:
            seq_lens = m.seq_lens_cpu_upper_bound
        else:
            seq_lens = m.seq_lens.cpu()
        return NVFP4Metadata(
            num_actual_tokens=m.num_actual_tokens,
            query_starts=m.query_start_loc_cpu[: m.num_reqs + 1].numpy().astype(np.int64),
            seq_lens=seq_lens[: m.num_reqs].numpy().astype(np.int64),
            block_table=m.block_table_tensor,
            slot_mapping=m.slot_mapping,
        )

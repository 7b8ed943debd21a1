"""Per-step metadata of the NVFP4 backend: decode requests first, then prefill, planned on the host."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from .decode import DecodeBatch, DecodePlanner, limits
from .newest import NewestBatch, chunk_of, make_planner
from .plan import Piece, Waves, plan_pieces
from .prefix import Prefix, PrefixKernel, on_device
from .scale_counts import make_report

logger = init_logger(__name__)


@dataclass
class DevicePiece:
    """A `Piece` with what its kernels read, on the device; int32, made of one transfer.

    Attributes:
        tokens: The piece's query tokens in the batch, half-open.
        num_keys: Keys of all its requests.
        max_q, max_k: Most query tokens, most keys of a request.
        all_own: All keys are the step's own tokens, in their order: nothing is to be read from the cache.
        cu_q, cu_k: [n + 1], running query and key counts.
        seq_starts: [n], first key position of each request.
        seq_lens: [n], tokens of each request, this step's included.
        block_table: [n, M].
        newest_rows, newest_from: [n], see `NewestBatch`; None if no newest tokens are kept.
    """

    piece: Piece
    tokens: slice
    num_keys: int
    max_q: int
    max_k: int
    all_own: bool
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    seq_starts: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    newest_rows: torch.Tensor | None = None
    newest_from: torch.Tensor | None = None


@dataclass
class NVFP4Metadata(AttentionMetadata):
    """One step's batch: its decode requests, and R requests after them that are dequantised first.

    Plans are made on first use and shared by all layers with the same window.

    Attributes:
        query_starts: int64 [R + 1] on the host, first query token of each request in the batch.
        seq_lens: int64 [R] on the host, exact tokens of each request including this step's.
        block_table: int32 [R, M] on the device.
        decode: None if there are no decode requests, or no kernel for them.
        newest: where the newest tokens of all the batch's requests are; None if none are kept.
    """

    num_actual_tokens: int
    query_starts: np.ndarray
    seq_lens: np.ndarray
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    decode: DecodeBatch | None = None
    newest: NewestBatch | None = None
    _plans: dict[tuple[int | None, int, int], list[DevicePiece]] = field(default_factory=dict)
    _prefixes: dict[PrefixKernel, Prefix | None] = field(default_factory=dict)

    def prefix(self, kernel: PrefixKernel) -> Prefix | None:
        """What layers with such a kernel attend to without a plan; None for nothing."""
        if kernel not in self._prefixes:
            starts = kernel.lens(np.diff(self.query_starts), self.seq_lens)
            made = None if starts is None else on_device(starts, self.query_starts, self.block_table)
            self._prefixes[kernel] = made
        return self._prefixes[kernel]

    def plan(
        self,
        window: int | None,
        capacity: int,
        waves_of: Callable[[np.ndarray], Waves | None] = lambda query_lens: None,
        prefix: Prefix | None = None,
    ) -> list[DevicePiece]:
        """The pieces for layers with such a window (tokens) and workspace (tokens).

        waves_of: numbers of query tokens, int [R] -> the thread blocks of the dense attention.
        prefix: what is attended to elsewhere; one that `prefix` gave, and so lives as long as the plans.
        """
        key = (window, capacity, id(prefix))
        if key not in self._plans:
            query_lens = np.diff(self.query_starts)
            starts = None if prefix is None else prefix.starts
            pieces = plan_pieces(query_lens, self.seq_lens, capacity, window, waves_of(query_lens), starts)
            self._plans[key] = [self._to_device(p, query_lens) for p in pieces]
        return self._plans[key]

    def _to_device(self, p: Piece, query_lens: np.ndarray) -> DevicePiece:
        n, device = p.last - p.first, self.block_table.device
        q, starts = query_lens[p.first : p.last], self.query_starts[p.first : p.last + 1]
        host = torch.empty(4 * n + 2, dtype=torch.int32, pin_memory=device.type == "cuda")
        ints = host.numpy()
        ints[: n + 1] = starts - starts[0]
        ints[n + 1] = 0
        np.cumsum(p.lens, out=ints[n + 2 : 2 * n + 2])
        ints[2 * n + 2 : 3 * n + 2] = p.seq_starts
        ints[3 * n + 2 :] = self.seq_lens[p.first : p.last]
        parts = host.to(device, non_blocking=True).split((n + 1, n + 1, n, n))
        piece = DevicePiece(
            piece=p,
            tokens=slice(int(starts[0]), int(starts[-1])),
            num_keys=int(ints[2 * n + 1]),
            max_q=int(q.max()),
            max_k=int(p.lens.max()),
            all_own=p.causal and bool((p.lens == q).all()),
            cu_q=parts[0],
            cu_k=parts[1],
            seq_starts=parts[2],
            seq_lens=parts[3],
            block_table=self.block_table[p.first : p.last],
        )
        if self.newest is not None:
            decodes = len(self.newest.rows) - len(self.seq_lens)
            requests = slice(decodes + p.first, decodes + p.last)
            piece.newest_rows, piece.newest_from = self.newest.rows[requests], self.newest.begin[requests]
        return piece


class NVFP4MetadataBuilder(AttentionMetadataBuilder[NVFP4Metadata]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        head_size_v = kv_cache_spec.head_size_v
        if head_size_v != kv_cache_spec.head_size:
            raise ValueError(
                f"--kv-cache-dtype nvfp4: expected K and V heads of one size, got {kv_cache_spec.head_size} "
                f"and {head_size_v} ({layer_names[0]})"
            )
        if getattr(kv_cache_spec, "non_causal", False):
            raise ValueError(
                "--kv-cache-dtype nvfp4: expected causal attention, got layers whose prompts see what comes "
                f"after them ({layer_names[0]}). --attention-backend FLASHINFER asks for vLLM's own"
            )
        _share_kv_as_layers_do(vllm_config, layer_names)
        self._speculates = vllm_config.speculative_config is not None
        self._starts_come_late = vllm_config.cache_config.kv_sharing_fast_prefill
        self._newest = make_planner(vllm_config, layer_names, device)
        self._scales = make_report(vllm_config, layer_names)
        self._planner: DecodePlanner | None = None
        self._decode_len = _decode_query_len(vllm_config)
        heads = _query_heads(vllm_config, layer_names)
        shape = (heads, kv_cache_spec.num_kv_heads, kv_cache_spec.head_size)
        if _is_decoded(*shape):
            self.reorder_batch_threshold = self._decode_len
            self._planner = self._make_planner(vllm_config, shape, layer_names, device)
        else:
            logger.warning_once(
                "NVFP4 KV cache: no decode kernel for heads of %d and %d query heads a KV head: decode is "
                "slow (pages are dequantised first, and not in full CUDA graphs). There is one for heads of "
                "%s and up to %d query heads a KV head.",
                kv_cache_spec.head_size,
                heads // kv_cache_spec.num_kv_heads,
                ", ".join(map(str, limits().head_sizes)),
                limits().max_group,
            )

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """Decode follows its inputs in a captured graph; the pieces of a prefill do not."""
        kv_heads, head_size = kv_cache_spec.num_kv_heads, kv_cache_spec.head_size
        if not all(_is_decoded(n, kv_heads, head_size) for n in _all_query_heads(vllm_config, kv_cache_spec)):
            return AttentionCGSupport.NEVER
        spec = vllm_config.speculative_config
        if spec is not None and 1 + spec.num_speculative_tokens > limits().max_query_len:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.UNIFORM_BATCH

    def _make_planner(self, vllm_config, shape: tuple[int, int, int], layer_names, device) -> DecodePlanner:
        layers = vllm_config.compilation_config.static_forward_context
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        # Of a request whose query tokens are in two chunks vLLM makes two (`newest.chunk_of`).
        of_each = 1 if chunk_of(vllm_config, layer_names) is None else 2
        return DecodePlanner(
            device,
            num_heads=shape[0],
            num_kv_heads=shape[1],
            head_size=shape[2],
            max_requests=of_each * max(vllm_config.scheduler_config.max_num_seqs, captured),
            max_query_len=self._decode_len,
            windows={layers[name].impl.window for name in layer_names},
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> NVFP4Metadata:
        m = common_attn_metadata
        if m.causal is not True:
            raise NotImplementedError("--kv-cache-dtype nvfp4: expected causal attention, got non-causal")
        if self._scales is not None:
            self._scales.say()
        if self._starts_come_late:  # vLLM has asked for the copy of what it computed, and does not wait
            m = m.replace(query_start_loc_cpu=m.query_start_loc.cpu())
        starts = m.query_start_loc_cpu[: m.num_reqs + 1].numpy().astype(np.int64)
        newest = None if self._newest is None else self._newest.plan(m)
        first, decode = 0, None
        if self._planner is not None:
            first, _, tokens, _ = split_decodes_and_prefills(m, self._decode_len)
            if tokens > 0:
                query_lens = np.diff(starts[: first + 1])
                decode = self._planner.plan(
                    query_lens, m.query_start_loc, m.seq_lens, m.block_table_tensor,
                    None if newest is None else newest.begin,
                )  # fmt: skip
        seq_lens = np.empty(0, dtype=np.int64)
        if first < m.num_reqs:
            seq_lens = self._lens_on_host(m, first).numpy().astype(np.int64)
        return NVFP4Metadata(
            num_actual_tokens=m.num_actual_tokens,
            query_starts=starts[first:],
            seq_lens=seq_lens,
            block_table=m.block_table_tensor[first:],
            slot_mapping=m.slot_mapping,
            decode=decode,
            newest=newest,
        )

    def _lens_on_host(self, m: CommonAttentionMetadata, first: int) -> torch.Tensor:
        """Lengths of the requests from the first that is not decoded; waits for the device only where vLLM
        does not know them: while it speculates, of such as compute no prompt (too many drafts, say)."""
        known, prefilling = m.seq_lens_cpu_upper_bound, m.is_prefilling
        computes_prompts = prefilling is not None and bool(prefilling[first : m.num_reqs].all())
        if self._speculates and not computes_prompts:
            known = None  # of a request that decodes it counts drafts that the device may have rejected
        return (m.seq_lens.cpu() if known is None else known)[first : m.num_reqs]


def _share_kv_as_layers_do(vllm_config, layer_names: list[str]) -> None:
    """Tells the impls of layers whose KV vLLM made another layer's after it had made them."""
    layers = vllm_config.compilation_config.static_forward_context
    for name in layer_names:
        target = getattr(layers[name], "kv_sharing_target_layer_name", None)
        if target is not None and layers[name].impl.shared_kv != target:
            layers[name].impl.share_kv_of(target, layers)


def _decode_query_len(vllm_config) -> int:
    """The most query tokens of a decode request: one and what is speculated."""
    spec = vllm_config.speculative_config
    if spec is None:
        return 1
    drafts = (2 if spec.parallel_drafting else 1) * spec.num_speculative_tokens
    return min(1 + drafts, limits().max_query_len)


def _is_decoded(query_heads: int, kv_heads: int, head_size: int) -> bool:
    """Whether there is a decode kernel for them."""
    return limits().include(head_size, query_heads, kv_heads)


def _query_heads(vllm_config, layer_names: list[str]) -> int:
    """Of these layers, on a rank. A model's layers may differ in them, a drafter's from the model's; vLLM
    makes a builder for those that do not.

    Raises:
        ValueError: they differ; one schedule could not serve them.
    """
    layers = vllm_config.compilation_config.static_forward_context
    heads = {layers[name].impl.num_heads for name in layer_names}
    if len(heads) != 1:
        raise ValueError(
            f"--kv-cache-dtype nvfp4: expected layers that share a schedule to have as many query heads, got "
            f"{sorted(heads)} ({', '.join(layer_names)})"
        )
    return int(heads.pop())


def _all_query_heads(vllm_config, kv_cache_spec) -> set[int]:
    """The numbers of query heads that layers with such a KV cache have, on a rank."""
    shape = (kv_cache_spec.num_kv_heads, kv_cache_spec.head_size)
    heads = set()
    for layer in vllm_config.compilation_config.static_forward_context.values():
        impl = getattr(layer, "impl", None)
        if (getattr(impl, "num_kv_heads", None), getattr(impl, "head_size", None)) == shape:
            heads.add(int(layer.impl.num_heads))
    return heads

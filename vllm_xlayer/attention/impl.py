"""NVFP4 attention on CUDA.

Decode requests attend to the cache's bytes. For all others one kernel dequantises the tokens before the
step's into a bounded workspace and puts the step's own behind them, which are not quantised; FlashAttention
attends to all. Where nothing is before them it attends to K and V as they come. Of prompts that go on by a
few tokens another kernel attends to the pages (see `prefix`), and only the newest are dequantised. Attention
sinks are part of the decode kernel's softmax; FlashAttention runs without them, and its result is scaled.
"""

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType
from vllm.v1.worker.workspace import current_workspace_manager

from .. import ops
from ..config import Config
from ..nvfp4 import ROTATED_KEYS, ScaleOrder, scale_choice_of
from .decode import DecodeBatch
from .metadata import DevicePiece, NVFP4Metadata
from .newest import NewestBatch, allocate, newest_tokens_of, write_arguments
from .prefix import LIMITS, Prefix, PrefixKernel
from .scale_counts import ScaleCounts


class NVFP4Impl(AttentionImpl[NVFP4Metadata]):
    uses_global_scales = True
    """See `patches.kv_scales`."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "nvfp4",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """sinks: [Hq] floating point or None, a logit a query head that takes part in the softmax and has no
        value. What it holds is taken in `process_weights_after_loading`."""
        if alibi_slopes is not None:
            raise NotImplementedError("--kv-cache-dtype nvfp4: expected no ALiBi slopes, got some")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"--kv-cache-dtype nvfp4: expected decoder attention, got {attn_type}")
        if sinks is not None and sinks.shape != (num_heads,):
            raise ValueError(f"sinks: expected shape ({num_heads},), got {tuple(sinks.shape)}")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.window = sliding_window
        self.soft_cap = logits_soft_cap or 0.0
        self.attn_type = attn_type
        self.shared_kv = kv_sharing_target_layer_name
        self._loaded_sinks = sinks
        # NaN until the weights are loaded: whoever skips that step notices.
        self.sinks = None if sinks is None else torch.full_like(sinks, torch.nan, dtype=torch.float32)
        self.attend, self.merge = self._kernels()
        self._partial: tuple[torch.Tensor, torch.Tensor] | None = None
        config = get_current_vllm_config()
        settings = Config.load()
        self.scale_choice = scale_choice_of(kv_cache_dtype, settings.scale_choice)
        self.capacity = self._workspace_tokens(config, settings.gather_workspace_bytes)
        self.newest: torch.Tensor | None = None
        self.prefix_rows = 0 if self.window is not None or self.soft_cap else self._prefix_rows(config)
        self.vllm_config = config
        self._keeps_newest = newest_tokens_of(config) > 0
        self.scale_counts = ScaleCounts(config.device_config.device) if settings.debug else None

    def _kernels(self):
        """(attend, merge), see `flash`: imported only where there is a GPU."""
        from .flash import FlashAttention, merge

        return FlashAttention(self.head_size, self.scale, self.window, self.soft_cap), merge

    def _waves(self, query_lens):
        """Of the dense attention of requests with so many query tokens, `plan.Waves` or None."""
        return self.attend.waves(query_lens, self.num_heads, self.num_kv_heads)

    def _prefix_rows(self, config) -> int:
        """Query rows of a thread block of `ops.nvfp4_prefix_attention`, 0 where there is no kernel."""
        return ops.nvfp4_prefix_rows(torch.empty(0, device=config.device_config.device), self.head_size)

    def _prefix_kernel(self, query: torch.Tensor) -> PrefixKernel:
        return PrefixKernel(
            rows=self.prefix_rows,
            group=self.num_heads // self.num_kv_heads,
            kv_heads=self.num_kv_heads,
            at_once=torch.cuda.get_device_properties().multi_processor_count if query.is_cuda else 1,
            newest_tokens=0 if self.newest is None else self.newest.shape[3],
            limits=LIMITS,
        )

    def _workspace_tokens(self, config, workspace_bytes: int) -> int:
        """Tokens of K and V the workspace holds: what the setting buys, at least what one request's
        query tokens (and the window before them) need."""
        per_token = 2 * 2 * self.num_kv_heads * self.head_size
        needed = config.scheduler_config.max_num_batched_tokens + (self.window or 0)
        return max(workspace_bytes // per_token, needed)

    def _workspace(self, dtype: torch.dtype, tokens: int) -> tuple[torch.Tensor, ...]:
        """K and V [tokens, H, D], of at most ``capacity`` tokens."""
        shape = (2, tokens, self.num_kv_heads, self.head_size)
        return current_workspace_manager().get_simultaneous((shape, dtype))[0].unbind()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Converts the sinks for the kernels, and reserves the memory of newest tokens before vLLM sizes the
        cache. vLLM calls this after each loading, outside CUDA graph capture; both stay at the address that
        captured graphs read."""
        if self.sinks is not None and self._loaded_sinks is not None:
            self.sinks.copy_(self._loaded_sinks.detach())
        if self._keeps_newest and self.newest is None:
            self.newest = self._newest_memory(self.vllm_config, act_dtype)

    def share_kv_of(self, target: str, layers) -> None:
        """Reads another layer's pages and newest tokens from now on, whatever this layer was made as: whose
        KV it is vLLM tells the layers of a drafter (Gemma 4) once they are loaded.

        Args:
            layers: name -> layer, as in vLLM's ``static_forward_context``.
        """
        self.shared_kv = target
        self.newest = getattr(layers[target].impl, "newest", None)

    def _newest_memory(self, config, dtype: torch.dtype) -> torch.Tensor:
        """A layer that reads another's pages reads its newest tokens, too; that one was loaded before."""
        if self.shared_kv is not None:
            return config.compilation_config.static_forward_context[self.shared_kv].impl.newest
        return allocate(config, self.num_kv_heads, self.head_size, dtype)

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        if self.scale_counts is not None:
            self.scale_counts.add(layer, key, value, slot_mapping)
        ops.reshape_and_cache_nvfp4(
            key, value, kv_cache, slot_mapping, layer._k_scale, layer._v_scale,
            ScaleOrder.LINEAR, self.scale_choice, rotated_keys=ROTATED_KEYS,
            **write_arguments(layer, self.newest, len(slot_mapping)),
        )  # fmt: skip

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata: NVFP4Metadata | None, output,
        output_scale=None, output_block_scale=None,
    ) -> torch.Tensor:  # fmt: skip
        """query [T, Hq, D]; key, value [T, H, D]; kv_cache (B, H, N, C) uint8; output [T, Hq, D]."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("--kv-cache-dtype nvfp4: fused output quantisation is not supported")
        if attn_metadata is None:
            # The profiling run: reserve the workspace, so that it counts when vLLM sizes the cache.
            self._workspace(query.dtype, self.capacity)
            return output.fill_(0)
        if attn_metadata.decode is not None:
            self._decode(layer, query, kv_cache, attn_metadata.decode, attn_metadata.newest, output)
        if len(attn_metadata.seq_lens) > 0:
            self._prefill(layer, query, key, value, kv_cache, attn_metadata, output)
        return output

    def _decode(self, layer, query, kv_cache, batch: DecodeBatch, newest: NewestBatch | None, output) -> None:
        window, n = self.window or 0, batch.num_requests
        ops.nvfp4_paged_attention(
            query[: batch.num_tokens], kv_cache, batch.block_table, batch.seq_lens, batch.workspaces[window],
            layer._k_scale, layer._v_scale, output[: batch.num_tokens],
            scale=self.scale, q_len=batch.q_len, window=window, soft_cap=self.soft_cap,
            sinks=self.sinks, query_starts=batch.query_starts, kernel_q_len=batch.kernel_q_len,
            newest=None if newest is None else self.newest,
            newest_rows=None if newest is None else newest.rows[:n],
            newest_from=None if newest is None else newest.begin[:n], rotated_keys=ROTATED_KEYS,
        )  # fmt: skip

    def _prefill(self, layer, query, key, value, kv_cache, attn_metadata: NVFP4Metadata, output) -> None:
        prefix = attn_metadata.prefix(self._prefix_kernel(query)) if self.prefix_rows else None
        lse = None  # of pieces: where something is merged with them
        if prefix is not None:
            lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device=query.device)
        for piece in attn_metadata.plan(self.window, self.capacity, self._waves, prefix):
            tokens = piece.tokens
            own = (None, None)
            if self.shared_kv is None:  # a layer that reads another's pages reads all tokens there
                own = key[tokens], value[tokens]
            if piece.all_own and self.shared_kv is None:
                k, v = own
            else:
                k, v = self._gather(layer, *own, kv_cache, piece, query.dtype)
            self._attend(piece, query[tokens], k, v, output[tokens], None if lse is None else lse[:, tokens])
        if prefix is not None:
            self._attend_prefix(layer, query, kv_cache, prefix, output, lse)

    def _attend_prefix(self, layer, query, kv_cache, prefix: Prefix, output, lse) -> None:
        """Attention to pages as they are, merged with the pieces' output and LSE, float32 [Hq, T]."""
        t = prefix.tokens
        ops.nvfp4_prefix_attention(
            query[t], kv_cache, prefix.block_table, prefix.lens, prefix.query_starts, layer._k_scale,
            layer._v_scale, output[t], lse[:, t], scale=self.scale, max_query_len=prefix.max_query_len,
            rotated_keys=ROTATED_KEYS,
        )  # fmt: skip
        if self.sinks is not None:
            output[t].mul_(sink_factor(lse[:, t], self.sinks))

    def _gather(
        self, layer, key, value, kv_cache, piece: DevicePiece, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [keys, H, D] of a piece, in the workspace: own tokens and newest ones as they are, all
        others from their pages."""
        k, v = self._workspace(dtype, piece.num_keys)
        newest = self.newest if piece.newest_rows is not None else None
        ops.gather_nvfp4(
            kv_cache, piece.block_table, piece.seq_starts, piece.cu_k, layer._k_scale, layer._v_scale,
            k, v, ScaleOrder.LINEAR, ROTATED_KEYS, key, value, piece.cu_q, piece.seq_lens, newest,
            None if newest is None else piece.newest_rows, None if newest is None else piece.newest_from,
        )  # fmt: skip
        return k, v

    def _attend(self, piece: DevicePiece, q, k, v, out, all_lse) -> None:
        """Attention of one piece into ``out``; a request that is cut in pieces ends with its last one.

        all_lse: float32 [Hq, Tq] that gets the piece's LSE, where other tokens are merged with it later, and
            sinks with both; or None.
        """
        is_last = piece.piece.causal
        is_whole = is_last and not piece.piece.merge
        part, lse = self.attend(piece, q, k, v, out if is_whole else None)
        if piece.piece.merge:
            assert self._partial is not None
            part, lse = self.merge(*self._partial, part, lse)
        self._partial = None if is_last else (part, lse)
        if not is_last:
            return
        if all_lse is not None:
            all_lse.copy_(lse)
        if self.sinks is not None and all_lse is None:
            torch.mul(part, sink_factor(lse, self.sinks), out=out)
        elif not is_whole:
            out.copy_(part)


def sink_factor(lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """What attention without sinks is multiplied by, float32 [T, Hq, 1].

    The sum of exp(score) grows from exp(lse) to exp(lse) + exp(sink), and no value is added.

    Args:
        lse: float32 [Hq, T] in base e, of all of a token's keys. -inf, a token without keys, gives 0.
        sinks: float32 [Hq].
    """
    return torch.sigmoid(lse - sinks[:, None]).T.unsqueeze(-1)

"""Which newest tokens are at hand unquantised: what is valid in the row of each running request.

Pages, tiers and the prefix cache hold all tokens in NVFP4, whatever happens here. Beside them each running
request has a row with the newest of its tokens as they were, from which attention reads them: a better copy,
never another content. What is not there (a prompt found in a cache, a preempted request) is read from pages.

Nothing stale is read as long as every start of a request in a row is counted, a resumption too
(`RequestRows.starts`): what a row holds is then followed from the lengths of each step (``ops.newest_step``).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata

from .. import ops
from ..config import Config
from ..ops.newest import JUST_STARTED
from .newest_rows import (
    NO_ROW,
    RequestRows,
    batches_of_hybrids_are_told,
    have_rows,
    rows_in_use,
    starts_on_v2_are_told,
)

logger = init_logger(__name__)

USUAL_TOKENS = 64
"""Kept where the user names no number, and nothing speaks against it: fewer lose more (docs/accuracy.md)."""
MEMORY_SHARE = 0.025
"""Of the device's memory, that newest tokens take at most. vLLM lets 1,024 requests run on a large GPU: 64
tokens of each would be 6 % of an H200, for a model with 8 KV heads of 128 in 32 layers."""
SPECULATION = ("ngram", "ngram_gpu", "suffix", "eagle", "eagle3", "mtp")
"""Methods of speculation of which is known what their steps write: nothing of their own, or, in the layers of
a drafter, the tokens of the step that was verified and then drafts, all of which the next step writes
again."""


@dataclass(frozen=True)
class NewestBatch:
    """A step's newest tokens, for all layers of a group; on the device, each step at the same address.

    Attributes:
        slots: int64 [tokens], where the writer puts each token; -1: nowhere.
        rows: int32 [requests].
        begin: int32 [requests], the first token that may be read from its row; if there is none, one past
            the request's tokens.
        places: tokens that a row holds.
    """

    slots: torch.Tensor
    rows: torch.Tensor
    begin: torch.Tensor
    places: int


class NewestPlanner:
    """Follows what the rows hold, for the layers of one KV cache group.

    Args:
        rows: that there are.
        requests: as many as a batch can have, with padding.
        max_tokens: as many as a batch can have.
        places: tokens that a row holds.
    """

    def __init__(self, rows: int, requests: int, max_tokens: int, places: int, device: torch.device) -> None:
        self._places = places
        self._state = torch.full((rows, 2), JUST_STARTED, dtype=torch.int32, device=device)
        self._slots = torch.empty(max_tokens, dtype=torch.int64, device=device)
        self._row_of = torch.empty(requests, dtype=torch.int32, device=device)
        self._begin = torch.empty(requests, dtype=torch.int32, device=device)
        self._followed: RequestRows | None = None
        self._starts = np.zeros(0, dtype=np.int64)

    def plan(self, step: CommonAttentionMetadata) -> NewestBatch:
        """The step that begins. Nothing is kept, nor read, of requests of which nobody says the row."""
        self._forget_what_others_left()
        n = step.num_reqs
        in_use = rows_in_use()
        rows = np.full(n, NO_ROW, dtype=np.int32) if in_use is None else in_use.rows_of(step)
        rows[rows >= len(self._state)] = NO_ROW  # another engine of this process may have more
        slots = self._slots[: len(step.slot_mapping)]
        batch = NewestBatch(slots, self._row_of[:n], self._begin[:n], self._places)
        batch.rows.copy_(self._to_device(rows))
        ops.newest_step(
            step.query_start_loc[: n + 1], step.seq_lens[:n], batch.rows, step.slot_mapping, self._state,
            batch.slots, batch.begin, self._places,
        )  # fmt: skip
        return batch

    def _forget_what_others_left(self) -> None:
        """Rows in which requests were started since the last step hold nothing of theirs."""
        rows = rows_in_use()
        if rows is not self._followed:
            self._followed = rows
            self._state.fill_(JUST_STARTED)
        elif rows is not None:
            started = np.flatnonzero(self._starts != rows.starts)
            started = started[started < len(self._state)]
            if len(started):
                self._state.index_fill_(0, self._to_device(started), JUST_STARTED)
        if rows is not None:
            self._starts = rows.starts.copy()

    def _to_device(self, host: np.ndarray) -> torch.Tensor:
        """Without waiting; host memory that is copied from is not used again before it was."""
        tensor = torch.from_numpy(host)
        if self._state.is_cuda:
            tensor = tensor.pin_memory().to(self._state.device, non_blocking=True)
        return tensor


def make_planner(config: VllmConfig, layer_names: list[str], device: torch.device) -> NewestPlanner | None:
    """A planner for the layers of an NVFP4 KV cache group, if newest tokens are kept.

    Says what their memory takes, or what keeps them from being kept.

    Raises:
        ValueError: the user asked for them, and in this configuration rows could be mistaken for others'.
    """
    asked, places = Config.load().newest_tokens, newest_tokens_of(config)
    if asked != 0 and (refusal := explain_refusal(config)):
        if asked is not None:
            raise ValueError(
                f"VLLM_XLAYER_NEWEST_TOKENS={places}: {refusal}, or VLLM_XLAYER_NEWEST_TOKENS=0, which reads "
                "all tokens from their NVFP4 pages"
            )
        logger.info_once(
            "NVFP4 KV cache: all tokens are read from their pages, which costs accuracy. To keep the newest "
            "%d of each running request in 16 bits, too: %s",
            USUAL_TOKENS, refusal,
        )  # fmt: skip
    if not places:
        return None
    if chunk := chunk_of(config, layer_names):
        logger.warning(
            "NVFP4 KV cache: expected layers whose batches are the runner's, got attention in chunks of %d "
            "tokens in %s: %d layers read all tokens from their pages, which costs accuracy",
            chunk, layer_names[0], len(layer_names),
        )  # fmt: skip
        return None
    kept = num_rows(config)
    if bare := _layers_without(config, layer_names, kept, places):
        logger.warning(
            "NVFP4 KV cache: expected memory for the newest %d tokens of %d requests in each layer, got less "
            "in %s: %d layers read all tokens from their pages, which costs accuracy",
            places, kept, bare[0], len(layer_names),
        )  # fmt: skip
        return None
    have_rows(kept)
    scheduler, captured = config.scheduler_config, config.compilation_config.max_cudagraph_capture_size or 0
    logger.info(
        "Newest %d tokens of each of %d running requests in 16 bits: %.1f MB of memory for %d layers%s",
        places, kept, reserved_bytes(config, layer_names) / 1e6, len(layer_names),
        "" if kept == scheduler.max_num_seqs else
        f". More would take over {MEMORY_SHARE:.1%} of the device's memory: of --max-num-seqs "
        f"{scheduler.max_num_seqs} requests, those beyond read all tokens from their NVFP4 pages",
    )  # fmt: skip
    return NewestPlanner(
        kept,
        max(scheduler.max_num_seqs, captured),
        max(scheduler.max_num_batched_tokens, captured),
        places,
        device,
    )


def chunk_of(config: VllmConfig, layer_names: list[str]) -> int | None:
    """Tokens of a chunk, where layers attend in chunks (Llama 4). vLLM makes a request of each chunk that a
    step has tokens of, in which positions begin anew, and says of none whose it is."""
    layers = config.compilation_config.static_forward_context
    chunks = (getattr(layers[name], "attention_chunk_size", None) for name in layer_names)
    return next((chunk for chunk in chunks if chunk), None)


def _layers_without(config: VllmConfig, layer_names: list[str], rows: int, places: int) -> list[str]:
    """Layers without memory for so many rows: a step's schedule counts on all layers of a group."""
    layers = config.compilation_config.static_forward_context
    memory = {name: layers[name].impl.newest for name in layer_names}
    return [name for name, m in memory.items() if m is None or len(m) < rows or m.shape[3] != places]


def newest_tokens_of(config: VllmConfig) -> int:
    """Tokens that a row holds, 0 if none are kept: what the user asked for, or ``USUAL_TOKENS`` where
    nothing speaks against it."""
    asked = Config.load().newest_tokens
    if asked is not None:
        return asked
    return 0 if explain_refusal(config) else USUAL_TOKENS


def explain_refusal(config: VllmConfig) -> str | None:
    """What to change for newest tokens, or None."""
    runs_on_gpu = config.device_config.device_type != "cpu"
    if runs_on_gpu and (refusal := _explain_v2_refusal(config)):
        return refusal
    speculation, parallel = config.speculative_config, config.parallel_config
    if speculation is not None and speculation.method not in SPECULATION:
        return (
            "expected no speculation, or by one of the methods "
            f"{', '.join(SPECULATION)}, got {speculation.method}: choose one of them"
        )
    if parallel.use_ubatching:
        return "expected whole batches, got micro-batches: remove --enable-dbo"
    if parallel.prefill_context_parallel_size > 1:
        return (
            "expected a prefill context parallel size of 1, got "
            f"{parallel.prefill_context_parallel_size}: remove --prefill-context-parallel-size"
        )
    if config.cache_config.kv_sharing_fast_prefill:
        return "expected no fast prefill of shared KV: remove --kv-sharing-fast-prefill"
    return None


def _explain_v2_refusal(config: VllmConfig) -> str | None:
    """Why the rows of model runner V2 cannot be followed, or None."""
    if not config.use_v2_model_runner:
        return (
            "expected model runner V2, whose requests have rows, got V1: set VLLM_USE_V2_MODEL_RUNNER=1 "
            "where it serves the model"
        )
    if config.model_config.is_hybrid and not batches_of_hybrids_are_told():
        return (
            "expected to be told a step's requests, got a hybrid, for which this vLLM's runner is another "
            "(`vllm-xlayer doctor` says what is missing): use a vLLM that is supported"
        )
    if not starts_on_v2_are_told():
        return (
            "expected to be told when a request starts; this vLLM's runner is another (`vllm-xlayer doctor` "
            "says what is missing): use a vLLM that is supported"
        )
    return None


def num_rows(config: VllmConfig) -> int:
    """Requests whose newest tokens are kept: all that can run, or as many as ``MEMORY_SHARE`` of the device's
    memory is enough for, if all layers have the model's KV heads."""
    model, parallel = config.model_config, config.parallel_config
    heads = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    assert isinstance(model.dtype, torch.dtype)
    row_bytes = heads * 2 * newest_tokens_of(config) * model.get_head_size() * model.dtype.itemsize
    most = int(MEMORY_SHARE * current_platform.get_device_total_memory()) // row_bytes
    return min(config.scheduler_config.max_num_seqs, max(1, most))


def allocate(config: VllmConfig, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> torch.Tensor:
    """A layer's memory of newest tokens, [rows, 2, H, places, D], K and then V.

    It starts as NaN: whoever reads a place that nobody wrote notices.
    """
    shape = (num_rows(config), 2, num_kv_heads, newest_tokens_of(config), head_size)
    return torch.full(shape, torch.nan, dtype=dtype, device=config.device_config.device)


def reserved_bytes(config: VllmConfig, layer_names: Iterable[str] | None = None) -> int:
    """Memory of the newest tokens of those layers, or of all."""
    layers = config.compilation_config.static_forward_context
    impls = [getattr(layers[name], "impl", None) for name in (layers if layer_names is None else layer_names)]
    memory = [newest for impl in impls if (newest := getattr(impl, "newest", None)) is not None]
    return sum({newest.data_ptr(): newest.nbytes for newest in memory}.values())  # some share another's


def write_arguments(layer: Any, memory: torch.Tensor | None, num_tokens: int) -> dict[str, torch.Tensor]:
    """What ``reshape_and_cache_nvfp4`` takes to also write a step's tokens into a layer's memory."""
    if memory is None:
        return {}
    steps: Any = get_forward_context().attn_metadata
    step = steps.get(layer.layer_name) if isinstance(steps, dict) else None
    if step is None or step.newest is None:  # a run without a cache
        return {}
    return dict(newest=memory, newest_slots=step.newest.slots[:num_tokens])

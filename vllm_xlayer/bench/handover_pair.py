"""A prefill and a decode engine, asked as vLLM's proxy asks them."""

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..connector.nixl.link import allow_cuda_ipc_reads
from .engines import Answer, Engine, Prompt

LIMIT_SECONDS = 120.0
"""For an engine to start, or to answer."""
PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"
CORE_HERE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""So that `Engine.call` sees an engine's core."""
THEIR_HITS = "remote_prefill_cached_tokens"
"""Tokens that the prefill engine had in its cache; vLLM's decode engine reports them as its own."""
ASK_TO_PREFILL: dict[str, Any] = dict(
    do_remote_decode=True, do_remote_prefill=False, remote_engine_id=None, remote_block_ids=None,
    remote_host=None, remote_port=None,
)  # fmt: skip
"""What vLLM's proxy sends to a prefill engine."""


class NotMeasured(RuntimeError):
    """A prompt came another way than the one that is measured; says which."""


@dataclass(frozen=True)
class Pair:
    """Two engines."""

    prefill: Engine
    decode: Engine

    def wait(self) -> None:
        """Until both have started."""
        for engine in (self.prefill, self.decode):
            engine.wait()

    def end(self) -> None:
        """At once."""
        for engine in (self.prefill, self.decode):
            engine.end()

    def hand_over(self, prompts: list[Prompt], tokens: int) -> tuple[Answer, Answer]:
        """Prompts that one computes and the other reads; what each answered, the second ``tokens`` tokens.

        Raises:
            NotMeasured: the prefill engine said nothing of a prompt.
        """
        there = self.prefill.generate(prompts, 1, [ASK_TO_PREFILL] * len(prompts))
        return there, self.decode.generate(prompts, tokens, [_to_read(said) for said in there.handed_over])


def _to_read(said: dict[str, Any] | None) -> dict[str, Any]:
    """What the decode engine is given, without what it would report in place of the tokens that it read."""
    if said is None:
        raise NotMeasured("expected the prefill engine to say where a prompt's KV is, got nothing")
    return {name: value for name, value in said.items() if name != THEIR_HITS}


def on_devices(devices: str | None, settings: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Variables and settings of an engine with a rank on each of these ("0" or "0,1"); None for any one.

    The memory of the KV cache among the settings is of all ranks.
    """
    if devices is None:
        return {}, settings
    ranks = len(devices.split(","))
    of_a_rank = settings["kv_cache_memory_bytes"] // ranks
    settings = settings | dict(tensor_parallel_size=ranks, kv_cache_memory_bytes=of_a_rank)
    return {"CUDA_VISIBLE_DEVICES": devices}, settings


@contextlib.contextmanager
def start_pair(
    model: Path,
    cache: str,
    connector: str,
    devices: list[str] | None = None,
    extra: dict[str, Any] | None = None,
    wait: bool = True,
    **settings: Any,
) -> Iterator[Pair]:
    """Both start at the same time.

    devices: of the prefill engine and of the decode engine, as `on_devices` takes them.
    extra: the connector's own settings.
    wait: until both have started; else `Pair.wait` must be called first.
    """
    transfer = dict(
        kv_connector=connector, kv_role="kv_both", kv_load_failure_policy="recompute",
        kv_connector_extra_config=extra or {},
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        engines = []
        either: list[str | None] = [*devices] if devices else [None, None]
        for theirs in either:
            # Held, so that nobody else is given it before the engine binds it: both set SO_REUSEADDR.
            holder = stack.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("", 0))
            environment, own = on_devices(theirs, settings)
            environment[PORT] = str(holder.getsockname()[1])
            environment |= CORE_HERE
            if torch.cuda.is_available():
                # Ours says so itself, vLLM's connector does not: both are measured over the same link.
                allow_cuda_ipc_reads(environment)
            engine = Engine(
                model, cache, environment, LIMIT_SECONDS, wait=False,
                kv_transfer_config=transfer, disable_log_stats=False, **own,
            )  # fmt: skip
            engines.append(stack.enter_context(engine))
        pair = Pair(*engines)
        if wait:
            pair.wait()
        yield pair

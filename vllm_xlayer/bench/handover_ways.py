"""The ways to a prompt's first token: the engines of each, and what is asked of them."""

import contextlib
import time
from pathlib import Path
from typing import Any

from ..compat.engine import come_to_rest, empty_device_cache, histogram_sum, shuffle_free_blocks
from .engines import GRAPHS_ONLY, Answer, Engine, Prompt, prompts
from .handover_pair import CORE_HERE, LIMIT_SECONDS, NotMeasured, Pair, on_devices, start_pair

LARGE_RING = 1 << 30
CONNECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "rows": ("XLayerNixlConnector", {}),
    "rows-large": ("XLayerNixlConnector", {"staging_bytes": LARGE_RING}),
    "pages": ("NixlConnector", {}),
}
"""How a prompt is read: a descriptor a block, or vLLM's, one a block and layer. With the settings."""
WAYS = {
    "rows": "read as rows",
    "rows-large": f"read as rows, staging_bytes {LARGE_RING >> 20:,} MiB",
    "pages": "read as pages (vLLM's NixlConnector)",
    "computed": "computed here",
    "host": "restored from host memory",
}
BLOCK = 16
DESCRIPTORS = "vllm:nixl_num_descriptors"
SPARE = 1.1
"""Of a pool that all prompts fit into."""


def start(
    way: str,
    model: Path,
    cache: str,
    devices: list[str] | None,
    lengths: list[int],
    token_bytes: int,
    gpu_memory_utilization: float,
) -> contextlib.AbstractContextManager[Engine | Pair]:
    """Starts a way's engines, without waiting, with memory for a prompt of each length and one more.

    Graphs for decode only: the one step in which a prompt's last token is computed may be one. Nothing is
    compiled for the prefill, which is no part of what a way takes but of "computed".
    """
    pool = int(SPARE * (sum(lengths) + min(lengths)) * token_bytes)
    settings: dict[str, Any] = dict(
        max_model_len=max(lengths) + BLOCK, max_num_seqs=1, kv_cache_memory_bytes=pool,
        gpu_memory_utilization=gpu_memory_utilization, **GRAPHS_ONLY,
    )  # fmt: skip
    if way in CONNECTORS:
        connector, extra = CONNECTORS[way]
        return start_pair(model, cache, connector, devices, extra, wait=False, **settings)
    environment, settings = on_devices(devices[1] if devices else None, settings)
    if way == "host":
        settings["kv_transfer_config"] = dict(
            kv_connector="XLayerConnector", kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": pool},
        )  # fmt: skip
    return Engine(model, cache, environment | CORE_HERE, LIMIT_SECONDS, wait=False, **settings)


def begin(way: str, engines: Engine | Pair, tokens: int, seconds: float) -> None:
    """Waits until a way's engines have started; one prompt then, so that kernels are loaded and a pair has
    met, and each engine gives out its free blocks in an order of its own.

    Raises:
        EngineFailed: also where an engine has not answered within so many seconds.
        NotMeasured: the prompt came another way.
    """
    engines.wait()
    _due(engines, seconds)
    for seed, engine in enumerate(_each(engines)):
        if way == "host":
            engine.call(come_to_rest)  # its host tier is pinned beside the engine's start
        engine.call(shuffle_free_blocks, seed)
    measure(way, engines, "first", tokens, 1, seconds)


def measure(
    way: str, engines: Engine | Pair, seed: str, tokens: int, repeats: int, seconds: float
) -> dict[str, Any]:
    """{"seconds": to the first token, of each repeat}; of a hand-over as `_handed_over` says.

    Raises:
        EngineFailed, NotMeasured: as begin.
    """
    _due(engines, seconds)
    vocabulary = next(iter(_each(engines))).about["vocabulary"]
    (prompt,) = prompts(f"{seed} {tokens}", 1, tokens, vocabulary)  # no other one begins as it does
    if isinstance(engines, Pair):
        return _handed_over(engines, prompt, repeats)
    if way == "host":
        engines.generate([prompt], 1)
    answers = []
    for _ in range(repeats):
        engines.call(empty_device_cache)
        answers.append(engines.generate([prompt], 1))
        if way == "host":
            _expect("restored", answers[-1], tokens)
    return {"seconds": [answer.seconds for answer in answers]}


def _each(engines: Engine | Pair) -> list[Engine]:
    return [engines.prefill, engines.decode] if isinstance(engines, Pair) else [engines]


def _due(engines: Engine | Pair, seconds: float) -> None:
    for engine in _each(engines):
        engine.due = time.monotonic() + seconds


def _handed_over(pair: Pair, prompt: Prompt, repeats: int) -> dict[str, Any]:
    """Seconds of each repeat: until the first token of a prompt that is read, and until that token once the
    prompt is on the device; until the prefill engine had computed it, the first time (then it has it in its
    cache, and the decode engine's is emptied); and the descriptors that NIXL was given a prompt."""
    read, cached, there = [], [], []
    before = pair.decode.call(histogram_sum, DESCRIPTORS)
    for _ in range(repeats):
        computed, here = pair.hand_over([prompt], 1)
        _expect("read", here, len(prompt))
        there.append(computed.seconds)
        read.append(here.seconds)
        cached.append(pair.decode.generate([prompt], 1).seconds)
        pair.decode.call(empty_device_cache)
    return {
        "seconds": read,
        "cached_seconds": cached,
        "prefill_seconds": there[0],
        "descriptors": (pair.decode.call(histogram_sum, DESCRIPTORS) - before) / repeats,
    }


def _expect(what: str, answer: Answer, tokens: int) -> None:
    (cached,) = answer.cached
    if cached < tokens - BLOCK:
        raise NotMeasured(f"expected {tokens} tokens to be {what}, got {cached}: the others were computed")

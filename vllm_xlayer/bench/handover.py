"""A prompt that another engine has computed: its first token, read as rows or pages, against computing it.

Two engines at a time share the GPU; only one of them computes. Needs nixl. Without a GPU it runs on the CPU
reference platform, whose times say nothing of a GPU's.
"""

import argparse
import contextlib
import socket
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..nvfp4 import content_bytes
from ..provenance import write
from .bounds import SHAPE
from .engines import GRAPHS_ONLY, SHAPES, Engine, goes_on, prompts, write_model
from .handover_link import read_rate

CONNECTORS = {"rows": "XLayerNixlConnector", "pages": "NixlConnector"}
"""How a prompt is read: a descriptor a block, or vLLM's, one a block and layer."""
WAYS = {
    "rows": "read as rows",
    "pages": "read as pages (vLLM's NixlConnector)",
    "computed": "computed here",
    "host": "restored from host memory",
}
ELEMENT_BYTES = {"bf16": 2, "fp8": 1}
BLOCK = 16
POOL, TIER_POOL = 4, 2
"""Prompts that fit on the device: of engines that hand over, and of the one with a host tier, which must
not find on the device what it is to restore."""
THEIR_HITS = "remote_prefill_cached_tokens"
"""Tokens that the prefill engine had in its cache; vLLM's decode engine reports them as its own."""
ASK_TO_PREFILL: dict[str, Any] = dict(
    do_remote_decode=True, do_remote_prefill=False, remote_engine_id=None, remote_block_ids=None,
    remote_host=None, remote_port=None,
)  # fmt: skip
"""What vLLM's proxy sends to a prefill engine."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default=SHAPE if on_gpu else "tiny")
    parser.add_argument("--cache", choices=("nvfp4", "fp8", "bf16"), default="nvfp4")
    parser.add_argument("--tokens", type=int, default=16384 if on_gpu else 512, help="of the prompt")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.4, help="of each engine")
    parser.add_argument(
        "--json", type=Path, default=Path("handover.json"), help="file to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON. Returns 1 if something could not be measured."""
    tokens = args.tokens
    kv_bytes = tokens * token_bytes(args.shape, args.cache)
    blocks, layers = -(-tokens // BLOCK), SHAPES[args.shape]["num_hidden_layers"]
    ways: dict[str, dict[str, Any]] = {}
    results: dict[str, Any] = {
        "shape": args.shape, "cache": args.cache, "tokens": tokens, "kv_bytes": kv_bytes,
        "descriptors": {"rows": blocks, "pages": blocks * layers}, "ways": ways,
    }  # fmt: skip
    try:
        results["link"] = read_rate(kv_bytes)
    except (ImportError, RuntimeError) as error:
        print(f"handover: NIXL alone could not read from another process: {error}")
        return 1
    settings = dict(
        max_model_len=tokens + BLOCK, max_num_seqs=1, gpu_memory_utilization=args.gpu_memory_utilization,
        **GRAPHS_ONLY,
    )  # fmt: skip
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-handover-") as folder:
        model = write_model(Path(folder), args.shape)
        for way in args.ways:
            print(f"{WAYS[way]}: starting", flush=True)
            with goes_on(way, failed):
                try:
                    ways[way] = _measure(way, model, args, kv_bytes, settings)
                except NotMeasured as error:
                    print(f"{WAYS[way]}: {error}", flush=True)
                    failed.append(way)
            write(args.json, results)  # what is measured is kept
    grid = Table(*HEAD, title=title(results))
    for cells in rows(results):
        grid.add_row(*cells)
    Console(width=100).print(grid)
    return int(bool(failed))


class NotMeasured(RuntimeError):
    """A prompt came another way than the one that is measured; says which."""


def token_bytes(shape: str, cache: str) -> int:
    """Of KV, of all layers."""
    model = SHAPES[shape]
    head = model["head_dim"]
    of_a_head = content_bytes(head) if cache == "nvfp4" else 2 * head * ELEMENT_BYTES[cache]
    return int(model["num_hidden_layers"] * model["num_key_value_heads"] * of_a_head)


def _measure(
    way: str, model: Path, args: argparse.Namespace, kv_bytes: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """{"seconds": to the first token, of each repeat}, and "prefill_seconds" of the other engine."""
    pool: dict[str, Any] = dict(kv_cache_memory_bytes=POOL * kv_bytes)
    if way == "computed":
        with Engine(model, args.cache, **settings, **pool) as engine:
            return {"seconds": _computed(engine, args.tokens, args.repeats)}
    if way == "host":
        tier = dict(
            kv_connector="XLayerConnector", kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": (args.repeats + 4) * kv_bytes},
        )  # fmt: skip
        pool = dict(kv_cache_memory_bytes=TIER_POOL * kv_bytes)
        with Engine(model, args.cache, **settings, **pool, kv_transfer_config=tier) as engine:
            return {"seconds": _restored(engine, args.tokens, args.repeats)}
    with _pair(model, args.cache, CONNECTORS[way], **settings, **pool) as (prefill, decode):
        return _handed_over(prefill, decode, args.tokens, args.repeats)


@contextlib.contextmanager
def _pair(model: Path, cache: str, connector: str, **settings: Any) -> Iterator[tuple[Engine, Engine]]:
    """A prefill and a decode engine."""
    transfer = dict(kv_connector=connector, kv_role="kv_both", kv_load_failure_policy="recompute")
    with contextlib.ExitStack() as stack:
        engines = []
        for _ in range(2):
            # Held, so that nobody else is given it before the engine binds it: both set SO_REUSEADDR.
            holder = stack.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("", 0))
            environment = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(holder.getsockname()[1])}
            engine = Engine(model, cache, environment, kv_transfer_config=transfer, **settings)
            engines.append(stack.enter_context(engine))
        yield engines[0], engines[1]


def _handed_over(prefill: Engine, decode: Engine, tokens: int, repeats: int) -> dict[str, Any]:
    report: dict[str, Any] = {"seconds": [], "prefill_seconds": []}
    # The first: the engines meet, and kernels are loaded.
    for prompt in prompts("handover", 1 + repeats, tokens, decode.about["vocabulary"]):
        there = prefill.generate([prompt], 1, [ASK_TO_PREFILL])
        here = decode.generate([prompt], 1, [_to_read(there.handed_over[0])])
        _expect("read", here.cached[0], tokens)
        report["seconds"].append(here.seconds)
        report["prefill_seconds"].append(there.seconds)
    return {name: seconds[1:] for name, seconds in report.items()}


def _to_read(said: dict[str, Any] | None) -> dict[str, Any]:
    """What the decode engine is given, without what it would report in place of the tokens that it read."""
    if said is None:
        raise NotMeasured("expected the prefill engine to say where a prompt's KV is, got nothing")
    return {name: value for name, value in said.items() if name != THEIR_HITS}


def _computed(engine: Engine, tokens: int, repeats: int) -> list[float]:
    asked = prompts("computed", 1 + repeats, tokens, engine.about["vocabulary"])
    return [engine.generate([prompt], 1).seconds for prompt in asked][1:]


def _restored(engine: Engine, tokens: int, repeats: int) -> list[float]:
    """Prompts in turn, more than fit on the device: when one comes again it is in host memory only."""
    asked = prompts("restored", max(1 + repeats, TIER_POOL + 2), tokens, engine.about["vocabulary"])
    for prompt in asked:
        engine.generate([prompt], 1)
    seconds = []
    for prompt in asked[: 1 + repeats]:
        answer = engine.generate([prompt], 1)
        _expect("restored", answer.cached[0], tokens)
        seconds.append(answer.seconds)
    return seconds[1:]


def _expect(what: str, cached: int, tokens: int) -> None:
    if cached < tokens - BLOCK:
        raise NotMeasured(f"expected {tokens} tokens to be {what}, got {cached}: the others were computed")


HEAD = ("", "first token, ms", "descriptors", "times the link's floor")


def title(results: dict[str, Any]) -> str:
    return (
        f"A prompt of {results['tokens']:,} tokens, {results['shape']}, {results['cache']}: "
        f"{results['kv_bytes'] / 1e6:,.1f} MB"
    )


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of a line for each way, and of the floor: one read of so many bytes by NIXL alone."""
    floor = results["kv_bytes"] / results["link"]
    lines: list[tuple[str, ...]] = [
        (f"NIXL alone, in one piece ({results['link'] / 1e9:.2f} GB/s)", f"{floor * 1e3:.1f}", "1", "1.0")
    ]
    for way, numbers in results["ways"].items():
        seconds, count = statistics.median(numbers["seconds"]), results["descriptors"].get(way)
        lines.append(
            (WAYS[way], f"{seconds * 1e3:.1f}", f"{count:,}" if count else "", f"{seconds / floor:.1f}")
        )
    return lines

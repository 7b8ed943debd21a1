"""A prompt that another engine has computed: its first token, read as rows or pages, against computing it.

Two engines at a time, on one GPU or with GPUs of their own (``--devices``); only one of them computes. Needs
nixl. Without a GPU it runs on the CPU reference platform, whose times say nothing of a GPU's.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..compat.engine import histogram_sum, shuffle_free_blocks
from ..nvfp4 import content_bytes
from ..provenance import write
from .bounds import SHAPE
from .engines import GRAPHS_ONLY, SHAPES, Engine, goes_on, prompts, write_model
from .handover_link import read_rates
from .handover_pair import LIMIT_SECONDS, NotMeasured, Pair, on_devices, start_pair

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
DESCRIPTORS = "vllm:nixl_num_descriptors"
POOL, TIER_POOL = 4, 2
"""Prompts that fit on the device: of engines that hand over, and of the one with a host tier, which must
not find on the device what it is to restore."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default=SHAPE if on_gpu else "tiny")
    parser.add_argument("--cache", choices=("nvfp4", "fp8", "bf16"), default="nvfp4")
    parser.add_argument("--tokens", type=int, default=16384 if on_gpu else 512, help="of the prompt")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--devices", nargs=2, metavar=("PREFILL", "DECODE"),
        help="GPUs of each engine, as CUDA_VISIBLE_DEVICES has them; several for as many ranks: 0,1",
    )  # fmt: skip
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
        "devices": args.devices, "ways": ways,
    }  # fmt: skip
    pieces = {"one": 1, "rows": blocks, "pages": blocks * layers}
    try:
        rates = read_rates(kv_bytes, list(pieces.values()), args.devices)
        results["link"] = dict(zip(pieces, rates, strict=True))
        write(args.json, results)
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
    Console(width=120).print(grid)
    return int(bool(failed))


def token_bytes(shape: str, cache: str) -> int:
    """Of KV, of all layers."""
    model = SHAPES[shape]
    head = model["head_dim"]
    of_a_head = content_bytes(head) if cache == "nvfp4" else 2 * head * ELEMENT_BYTES[cache]
    return int(model["num_hidden_layers"] * model["num_key_value_heads"] * of_a_head)


def _measure(
    way: str, model: Path, args: argparse.Namespace, kv_bytes: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """{"seconds": to the first token, of each repeat}; of a hand-over as `_handed_over` says."""
    settings = settings | dict(kv_cache_memory_bytes=POOL * kv_bytes)
    if way in CONNECTORS:
        with start_pair(model, args.cache, CONNECTORS[way], args.devices, **settings) as pair:
            return _handed_over(pair, args.tokens, args.repeats)
    if way == "host":
        settings["kv_cache_memory_bytes"] = TIER_POOL * kv_bytes
        settings["kv_transfer_config"] = dict(
            kv_connector="XLayerConnector", kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": (args.repeats + 4) * kv_bytes},
        )  # fmt: skip
    environment, settings = on_devices(args.devices and args.devices[1], settings)
    with Engine(model, args.cache, environment, LIMIT_SECONDS, **settings) as engine:
        ask = _restored if way == "host" else _computed
        return {"seconds": ask(engine, args.tokens, args.repeats)}


def _handed_over(pair: Pair, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of each repeat: until the first token of a prompt that is read, until the prefill engine had
    computed it, and until that token once the prompt is on the device; and what NIXL was given a prompt."""
    report: dict[str, list[float]] = {"seconds": [], "prefill_seconds": [], "cached_seconds": []}
    for engine in (pair.prefill, pair.decode):
        engine.call(shuffle_free_blocks)
    before = 0.0
    for repeat, prompt in enumerate(
        prompts("handover", 1 + repeats, tokens, pair.decode.about["vocabulary"])
    ):
        there, here = pair.hand_over([prompt], 1)
        _expect("read", here.cached[0], tokens)
        again = pair.decode.generate([prompt], 1)
        if repeat == 0:  # the engines have met, and kernels are loaded
            before = pair.decode.call(histogram_sum, DESCRIPTORS)
            continue
        report["seconds"].append(here.seconds)
        report["prefill_seconds"].append(there.seconds)
        report["cached_seconds"].append(again.seconds)
    return report | {"descriptors": (pair.decode.call(histogram_sum, DESCRIPTORS) - before) / repeats}


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


HEAD = ("", "first token, ms", "on the device, ms", "descriptors", "hand-over / floor")


def title(results: dict[str, Any]) -> str:
    return (
        f"A prompt of {results['tokens']:,} tokens, {results['shape']}, {results['cache']}: "
        f"{results['kv_bytes'] / 1e6:,.1f} MB"
    )


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of a line for NIXL alone, in one piece (the floor) and more, and for each way.

    A hand-over is what a first token takes longer than that of the same prompt once it is on the device.
    """
    link = results["link"]
    floor = results["kv_bytes"] / link["one"]
    lines: list[tuple[str, ...]] = []
    for pieces, rate in link.items():
        seconds = results["kv_bytes"] / rate
        what = f"NIXL alone, in {'one piece' if pieces == 'one' else pieces} ({rate / 1e9:.2f} GB/s)"
        lines.append((what, f"{seconds * 1e3:.1f}", "", "", f"{seconds / floor:.1f}"))
    for way, numbers in results["ways"].items():
        seconds = statistics.median(numbers["seconds"])
        cells = ["", "", ""]
        if way in CONNECTORS:
            cached = statistics.median(numbers["cached_seconds"])
            cells = [
                f"{cached * 1e3:.1f}",
                f"{numbers['descriptors']:,.0f}",
                f"{(seconds - cached) / floor:.1f}",
            ]
        lines.append((WAYS[way], f"{seconds * 1e3:.1f}", *cells))
    return lines

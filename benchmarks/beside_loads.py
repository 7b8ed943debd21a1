"""What loads from the host tier cost a decode step and a first token, by method of copying and bytes a batch.

One engine, alone on a GPU, whose loads are changed from case to case: what the connector does is measured
beside what it could do. A case's host time is what the worker spends in a step on submitting and booking
copies: where the step is longer by that, it is the host that it waits for, and not the copies.
"""

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vllm_xlayer.bench import offload
from vllm_xlayer.bench.bounds import SHAPE
from vllm_xlayer.bench.engines import GRAPHS_ONLY, run_engine
from vllm_xlayer.bench.first_token import added, make_prompts, restores
from vllm_xlayer.bench.shapes import SHAPES, write_model
from vllm_xlayer.bench.tier_worker import row_copies, wait_for_tier
from vllm_xlayer.compat.engine import connector
from vllm_xlayer.connector.copy import transfers
from vllm_xlayer.connector.copy.choice import Way
from vllm_xlayer.ops import CopyMethod
from vllm_xlayer.provenance import write

from . import RESULTS, ROOT


@dataclass(frozen=True)
class Case:
    """How loads are copied."""

    method: str
    mib: int
    """A batch."""

    @property
    def title(self) -> str:
        return f"{self.method.lower()}, {self.mib} MiB"


BESIDE = [Case("ENGINE", mib) for mib in (8, 32, 128)] + [Case("KERNEL", mib) for mib in (8, 32)]
"""Beside a model. The kernel takes 12 of the SMs, and a launch instead of a command for every row."""
IDLE = [Case("ENGINE", mib) for mib in (32, 128)] + [Case("KERNEL", mib) for mib in (32, 128)]
"""Before a request that waits for nothing else: the SMs have nothing to do then."""
OURS = {"beside": Case("ENGINE", transfers.BATCH_BYTES[Way.H2D] >> 20),
        "idle": Case("ENGINE", transfers.IDLE_BATCH_BYTES >> 20)}  # fmt: skip
TURNS = 6
"""Of restored prompts in a case."""


# These two run in vLLM's worker.


def set_loads(_: Any, method: str, mib: int) -> None:
    """Lets the tier's loads, and those beside steps, be copied so; begins to count the host's seconds."""
    tier = connector().connector_worker.worker
    copies = _beside()
    for direction in (tier._load, copies._direction):
        direction._method = CopyMethod[method]
    transfers.BATCH_BYTES[Way.H2D] = transfers.IDLE_BATCH_BYTES = mib << 20
    copies.host_seconds = 0.0
    for name in ("after_launch", "book"):
        # In the instance, in place of what the last case put there.
        setattr(copies, name, functools.partial(_timed, getattr(type(copies), name), copies))


def host_seconds(_: Any) -> float:
    """Of the steps since `set_loads`."""
    seconds: float = _beside().host_seconds
    return seconds


def _beside() -> Any:
    """What copies beside steps, the same in every round."""
    tier = connector().connector_worker.worker
    return row_copies(True, tier.host.shape[1], connector().pool.device)


def _timed(original: Any, copies: Any) -> None:
    begin = time.perf_counter()
    original(copies)
    copies.host_seconds += time.perf_counter() - begin


def engine(job: dict[str, Any]) -> dict[str, Any]:
    """One engine: decode steps beside loads, every round with every case, then first tokens."""
    from vllm import LLM

    llm = LLM(
        job["model"], load_format="dummy", skip_tokenizer_init=True, kv_cache_dtype=job["dtype"],
        max_model_len=max(job["prompt"], job["tokens"]) + 2 * job["steps"], max_num_seqs=job["requests"],
        gpu_memory_utilization=0.85, worker_extension_cls=offload.WORKER,
        kv_transfer_config=dict(
            kv_connector="XLayerConnector", kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": job["host_bytes"]},
        ),
        **job["settings"],
    )  # fmt: skip
    report: dict[str, Any] = {"idle": {}, "beside": {case.title: [] for case in BESIDE}, "alone": []}
    for case in IDLE:
        llm.collective_rpc(set_loads, args=(case.method, case.mib))
        report["idle"][case.title] = restores(llm, job["prompt"] - offload.LAST, job["repeats"], job["turns"])
    batch = make_prompts(llm, job["requests"], job["tokens"] - offload.LAST, seed=101)
    steps = functools.partial(offload.steps, llm, job=job | dict(connector=True, same_answers=False))
    steps(batch, beside="alone")  # computes the prompts
    total = job["steps"] + 2 * (job["steps"] // 4)
    for turn in range(job["rounds"]):
        report["alone"].append(steps(batch, beside="alone")[0])
        for case in BESIDE[turn:] + BESIDE[:turn]:
            llm.collective_rpc(set_loads, args=(case.method, case.mib))
            seconds, rate = steps(batch, beside="loads")
            (host,) = llm.collective_rpc(host_seconds)
            report["beside"][case.title].append(dict(seconds=seconds, rate=rate, host=host / total))
    wait_for_tier(llm)
    llm.llm_engine.engine_core.shutdown()
    return report


def run(args: argparse.Namespace) -> int:
    """Measures, prints both tables, writes the JSON. Returns a process exit code."""
    on_gpu = torch.cuda.is_available()
    job = {name: value for name, value in vars(args).items() if name not in ("json", "shape")}
    job |= dict(settings=GRAPHS_ONLY if on_gpu else {}, dtype="nvfp4")
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-beside-") as folder:
        job["model"] = str(write_model(Path(folder), args.shape))
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # Functions of this module are what its worker is asked to call.
        environment = {"PYTHONPATH": path, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
        report = run_engine("benchmarks.beside_loads:engine", job, Path(folder), environment=environment)
    if report is None:
        print("beside_loads: the engine failed, see above", file=sys.stderr)
        return 1
    write(args.json, {"shape": args.shape, "ours": {k: asdict(v) for k, v in OURS.items()}, **job, **report})
    console = Console(width=100, highlight=False)
    for grid in tables(report):
        console.print(grid)
    return 0


def tables(report: dict[str, Any]) -> list[Table]:
    alone = statistics.median(report["alone"])
    beside = Table(title=f"A decode step beside loads; alone: {alone * 1e3:.2f} ms")
    for title in ("loads", "step, ms", "slower by", "GB/s", "the host's, ms a step"):
        beside.add_column(title, justify="left" if title == "loads" else "right")
    for title, rounds in report["beside"].items():
        seconds, rate, host = (statistics.median(r[k] for r in rounds) for k in ("seconds", "rate", "host"))
        star = " *" if title == OURS["beside"].title else ""
        beside.add_row(title + star, f"{seconds * 1e3:.2f}", f"{100 * (seconds / alone - 1):+.1f} %",
                       f"{rate / 1e9:.1f}", f"{host * 1e3:.2f}")  # fmt: skip
    idle = Table(title="A restored first token", caption="*: what the connector does")
    for title in ("loads", "on the device, ms", "in the host tier, ms", "difference, prompt by prompt"):
        idle.add_column(title, justify="left" if title == "loads" else "right")
    for title, restore in report["idle"].items():
        medians = [f"{statistics.median(restore[kind]) * 1e3:.1f}" for kind in ("cached", "restored")]
        star = " *" if title == OURS["idle"].title else ""
        idle.add_row(title + star, *medians, f"{added(restore) * 1e3:.1f}")
    return [beside, idle]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beside_loads", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default=SHAPE)
    parser.add_argument("--prompt", type=int, default=offload.PROMPT, help="tokens of a restored prompt")
    parser.add_argument("--repeats", type=int, default=3, help="restored prompts")
    parser.add_argument("--turns", type=int, default=TURNS, help="of them, in a case")
    parser.add_argument("--requests", type=int, default=offload.BATCH[0], help="in the decoding batch")
    parser.add_argument("--tokens", type=int, default=offload.BATCH[1], help="of each of them")
    parser.add_argument("--steps", type=int, default=32, help="decode steps timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--host-bytes", type=int, default=24 << 30, help="host tier, for all prompts at once")
    parser.add_argument("--json", type=Path, default=RESULTS / "beside-loads.json", help="file to write")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())

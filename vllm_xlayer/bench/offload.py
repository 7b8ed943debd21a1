"""The host tier in vLLM's engine: first tokens of restored prompts, and decode steps beside copies."""

import argparse
import bisect
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from ..provenance import kept, rows_of, stamped, write
from . import offload_peers
from .arguments import shape_argument
from .engines import GRAPHS_ONLY, run_engine
from .first_token import link, make_prompts, restore_table, restores, span_table
from .offload_tables import BATCH, BESIDE, LARGE, PROMPT, bounds, decode_table
from .shapes import SETTINGS, has_experts, same_answers, write_model
from .tier_worker import tier, wait_for_tier

WORKER = "vllm_xlayer.bench.tier_worker.TierWorker"
OURS = "XLayerConnector"
CONNECTORS = {"with": OURS, "without": None} | dict.fromkeys(offload_peers.PEERS, "OffloadingConnector")
"""Engine -> its connector."""
LAST = 7
"""A prompt is so many tokens short of whole blocks: vLLM computes a whole prompt's last block in any case."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shape_argument(parser)
    parser.add_argument("--kv-cache-dtype", default="nvfp4", help="as for vllm serve (default: nvfp4)")
    parser.add_argument(
        "--prompt", type=int, default=PROMPT, help=f"tokens of a restored prompt, less {LAST}"
    )
    parser.add_argument("--repeats", type=int, default=5, help="restored prompts")
    parser.add_argument("--requests", type=int, default=BATCH[0], help="in the decoding batch")
    parser.add_argument(
        "--tokens",
        type=int,
        default=BATCH[1],
        help=f"of each of them, less {LAST}; where blocks are larger than --steps, in the mean",
    )
    parser.add_argument("--steps", type=int, default=32, help="decode steps timed, after a quarter as many")
    parser.add_argument("--rounds", type=int, default=5, help="of decoding alone and beside copies")
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.85, help="as for vllm serve (default: %(default)s)"
    )
    parser.add_argument(
        "--engines", nargs="+", choices=CONNECTORS, default=list(CONNECTORS),
        help="with and without XLayerConnector, and vLLM's own, layer by layer and in rows, of which first "
        "tokens only are timed; the file keeps the others",
    )  # fmt: skip
    parser.add_argument("--host-bytes", type=int, default=24 << 30, help="host tier, for all prompts at once")
    parser.add_argument(
        "--json", type=Path, default=Path("offload.json"), help="file to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs an engine after the other, prints the tables, writes the JSON. Returns 1 if one failed."""
    failed = False
    first_tokens = dict(dtype=args.kv_cache_dtype, prompt=args.prompt, repeats=args.repeats)
    decoding = dict(requests=args.requests, tokens=args.tokens, steps=args.steps, rounds=args.rounds)
    asked = first_tokens | decoding
    question = {"shape": args.shape, **asked}
    engines = engines_kept(args.json, args.engines, {"shape": args.shape, **first_tokens}, decoding)
    numbers = question | {"engines": engines}
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-offload-") as name:
        folder = Path(name)
        job = dict(
            model=str(write_model(folder, args.shape)), utilization=args.gpu_memory_utilization,
            host_bytes=args.host_bytes, settings=SETTINGS.get(args.shape, {}),
            same_answers=has_experts(args.shape), **asked,
        )  # fmt: skip
        for which in args.engines:
            print(f"{which}: starting", flush=True)
            result = run_engine(
                f"{__name__}:engine",
                {**job, "connector": CONNECTORS[which]},
                folder,
                environment=offload_peers.PEERS.get(which),
            )
            if result is None:
                print(f"{which}: the engine failed, see above", file=sys.stderr)
                failed = True
                continue
            engines[which] = stamped(result)
            # What is measured is kept, whatever happens to the next engine.
            write(args.json, numbers)
    console = Console(width=100, highlight=False)
    if "with" in engines:
        console.print(restore_table(engines["with"]))
        console.print(span_table(engines["with"]["restore"]["spans"]))
    console.print(offload_peers.peer_table(engines))
    if "with" in engines and "without" in engines:
        console.print(decode_table(engines, f"{args.requests} x {args.tokens:,}"))
        for bound in bounds(numbers):
            console.print(str(bound))
    return int(failed)


def engines_kept(
    path: Path, asked: list[str], first_tokens: dict[str, Any], decoding: dict[str, Any]
) -> dict[str, Any]:
    """The engines of a file, to which others are added; of peers decoding was not asked."""
    engines = kept(path, "engines", asked, **first_tokens)
    same = rows_of(path, "engines", **first_tokens, **decoding)
    return {name: row for name, row in engines.items() if name in same or name in offload_peers.PEERS}


def engine(job: dict[str, Any]) -> dict[str, Any]:
    """One engine; its core is in a process of its own, as vLLM's default is."""
    from vllm import LLM

    settings: dict[str, Any] = GRAPHS_ONLY | job["settings"]
    ours = job["connector"] == OURS
    if job["connector"] is not None:
        settings["kv_transfer_config"] = {
            "kv_connector": job["connector"], "kv_role": "kv_both",
            # vLLM stores what a prompt fills only; here what is decoded too, so that decoding has stores.
            "kv_connector_extra_config": {
                "cpu_bytes_to_use": job["host_bytes"], "offload_prompt_only": False,
            },
        }  # fmt: skip
    if ours:
        settings["worker_extension_cls"] = WORKER
    started = time.perf_counter()
    llm = LLM(
        job["model"], load_format="dummy", skip_tokenizer_init=True, kv_cache_dtype=job["dtype"],
        max_model_len=max(job["prompt"], 2 * job["tokens"]) + most_decoded(job["steps"], job["requests"]),
        max_num_seqs=job["requests"],
        gpu_memory_utilization=job["utilization"], **settings,
    )  # fmt: skip
    report: dict[str, Any] = {
        "runner": "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1",
        "start_seconds": time.perf_counter() - started,
    }
    if ours:
        report["row_bytes"] = tier(llm)["row_bytes"]
        block = llm.llm_engine.vllm_config.cache_config.block_size
        if (needed := rows_needed(job, block) * report["row_bytes"]) > job["host_bytes"]:
            raise ValueError(
                f"--host-bytes: expected at least {needed} for all prompts, got {job['host_bytes']}"
            )
        report["link"] = link()
        report["restore"] = restores(llm, job["prompt"] - LAST, job["repeats"])
    elif job["connector"] is not None:
        report["restore"] = offload_peers.restores(llm, job["prompt"] - LAST, job["repeats"])
    if ours or job["connector"] is None:
        block = llm.llm_engine.vllm_config.cache_config.block_size
        lengths = batch_tokens(job, block)
        batch = make_prompts(llm, job["requests"], max(lengths), seed=101)
        batch = [prompt[:length] for prompt, length in zip(batch, lengths, strict=True)]
        report["decode"] = decodes(llm, batch, job)
        if ours and not report["decode"]["rows_stored"]:
            raise RuntimeError("expected rows stored of what is decoded, got none")
    llm.llm_engine.engine_core.shutdown()
    return report


def batch_tokens(job: dict[str, Any], block: int) -> list[int]:
    """Of each prompt in the decoding batch.

    Of large blocks few end while steps are timed. So prompts end anywhere in a block, as in the long run:
    as many blocks end in a step as there are tokens in it for each of a block's.
    """
    tokens, requests = job["tokens"], job["requests"]
    if block <= job["steps"]:
        return [tokens - LAST] * requests
    if requests * job["steps"] < 2 * block:
        raise ValueError(
            f"--steps: expected at least {-(-2 * block // requests)}, so that two blocks of {block} tokens "
            f"end meanwhile, got {job['steps']}"
        )
    return [tokens + block // 2 - (n + 1) * block // requests for n in range(requests)]


def most_decoded(steps: int, requests: int) -> int:
    """Tokens of an answer, at most: requests that begin first go on until the last has all that are timed."""
    return 2 * (steps // 4) + steps + 2 * requests


def rows_needed(job: dict[str, Any], block: int) -> int:
    """Rows, block tokens each, of all that is stored. In a smaller tier every round stores prompts anew."""
    lengths = batch_tokens(job, block)
    decoded = 2 * (job["steps"] // 4) + job["steps"]
    kept = sum(length // block for length in lengths)
    new = sum((length + decoded) // block for length in lengths) - kept
    runs = 1 + (1 + len(BESIDE)) * job["rounds"]  # of steps(): the first computes the prompts
    return kept + runs * new + job["repeats"] * ((job["prompt"] - LAST) // block)


def decodes(llm: Any, prompts: list[list[int]], job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a decode step, the batch's prompts on the device: alone, and beside copies of rows.

    With the connector, "alone" is with what it stores itself: the blocks that decoding fills.
    """
    steps(llm, prompts, job, "alone")  # computes the prompts
    beside = ("alone", *BESIDE) if job["connector"] else ("alone",)
    report: dict[str, Any] = {name: {"seconds": [], "copied_per_second": []} for name in beside}
    report["same_answers"] = job["same_answers"]
    before = tier(llm)["stored"] if job["connector"] else 0
    for number in range(job["rounds"]):
        for kind, name in enumerate(beside):
            # Another last token each time: what is decoded after it is new to the tier.
            last = number * len(beside) + kind + 1
            batch = [[*p[:-1], last] for p in prompts]
            seconds, rate = steps(llm, batch, job, name)
            report[name]["seconds"].append(seconds)
            report[name]["copied_per_second"].append(rate)
    if job["connector"]:
        wait_for_tier(llm)
        report["rows_stored"] = tier(llm)["stored"] - before
    return report


def steps(llm: Any, prompts: list[list[int]], job: dict[str, Any], beside: str) -> tuple[float, float]:
    """(seconds of a decode step, bytes copied a second meanwhile)."""
    from vllm import SamplingParams

    if job["connector"]:
        wait_for_tier(llm)
    copying = beside != "alone"
    if copying:
        row_bytes = LARGE if beside == "large" else tier(llm)["row_bytes"]
        llm.collective_rpc("begin_copies", args=(beside != "stores", row_bytes))
    engine, timed, warm = llm.llm_engine, job["steps"], job["steps"] // 4
    most = most_decoded(timed, len(prompts))
    said = same_answers(len(prompts), engine.model_config.get_vocab_size())
    for n, prompt in enumerate(prompts):
        sampling = SamplingParams(
            max_tokens=most, temperature=0.0, ignore_eos=True, detokenize=False,
            allowed_token_ids=[said[n]] if job["same_answers"] else None,
        )  # fmt: skip
        engine.add_request(f"{time.perf_counter()}-{n}", {"prompt_token_ids": prompt}, sampling)
    done: dict[str, int] = {}

    def run_to(count: int) -> float:
        """Steps until every request has so many tokens; the time then."""
        while len(done) < len(prompts) or min(done.values()) < count:
            for output in engine.step():
                done[output.request_id] = len(output.outputs[0].token_ids)
        return time.monotonic()

    begin = run_to(warm)
    end = run_to(warm + timed)
    if max(done.values()) == most:
        raise RuntimeError("expected all requests to decode while steps are timed, but one has ended")
    run_to(2 * warm + timed)
    engine.abort_request(list(done))
    while engine.has_unfinished_requests():
        engine.step()
    rate = 0.0
    if copying:
        (samples,) = llm.collective_rpc("end_copies")
        rate = (copied_until(samples, end) - copied_until(samples, begin)) / (end - begin)
    return (end - begin) / timed, rate


def copied_until(samples: list[tuple[float, int]], when: float) -> int:
    """Bytes of the last sample, (time, bytes) in ascending order, that is not after ``when``."""
    after = bisect.bisect_right(samples, when, key=lambda sample: sample[0])
    return samples[after - 1][1] if after else 0

"""Speculation with NVFP4, a small device cache and a host tier, for minutes: what became of its answers.

    python -m benchmarks.soak [--minutes 30] [--engines 1] [--seed 0]

Random arrivals of prompts with shared prefixes, aborts, resets and failing copies, on a GPU or on the CPU
reference platform; accounts are checked after every step. The model is MiMo's, with random weights: a Qwen 2
that drafts by a layer of its own (MTP).

With NVFP4 a prompt has as many right answers as ways to be computed: what a step computes together is exact
to each other, what it finds in a cache is quantised. So the model has one layer, where a token's K and V
depend on nothing but the token, and no step cuts a prompt. That leaves an answer for each number of cached
tokens; all are taken beforehand, without drafts and connector. A request that was preempted and goes on has
yet others: it must be answered, and is not compared. Where two tokens were as likely, either is right, and
what follows is not known.

Results go to results/DEVICE-soak.json as they come.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_xlayer.provenance import write

from . import RESULTS, serving
from .faults import device

VOCABULARY, NUM_TOKENS, BLOCK = 16, 16, 16
"""So few tokens make many drafts right by chance."""
BLOCKS, ROWS = 30, 40
"""Of the device's cache, and of the host tier: three requests fill the first."""
TIE = 1 / 4
"""Logprobs as near as that may change places. Not for rounding alone: drafts that a step accepts together are
exact to each other, and the right answers are taken without drafts, each token after quantised ones. 0.1 was
seen to change places; what `noticed` counts says whether wrong blocks change more."""
WRITE_SECONDS = 20
ENGINE = dict(
    dtype="bfloat16", kv_cache_dtype="nvfp4", max_model_len=160, max_num_seqs=8, max_num_batched_tokens=2048,
    block_size=BLOCK,
)  # fmt: skip
"""A step takes eight whole prompts."""


@dataclass(frozen=True)
class Right:
    """An answer, and how much likelier each token was than the next."""

    tokens: list[int]
    margins: list[float]

    def fits(self, tokens: list[int]) -> bool:
        """Whether these are its tokens, up to where two were as likely."""
        for one, other, margin in zip(tokens, self.tokens, self.margins, strict=True):
            if one != other:
                return margin < TIE
        return True


def prompts_with_shared_prefixes() -> list[list[int]]:
    from test_soak import prompts_with_shared_prefixes

    return [[1 + token % (VOCABULARY - 1) for token in prompt] for prompt in prompts_with_shared_prefixes()]


def right_answers(llm: Any, prompts: list[list[int]]) -> list[list[Right]]:
    """Of each prompt, with every number of tokens that a cache can hold of it."""
    found = []
    for prompt in prompts:
        answers = []
        for cached in range(0, len(prompt), BLOCK):
            llm.reset_prefix_cache()
            if cached:
                serving.answer_to(llm, prompt[: cached + 1], 1)
            answers.append(_right(llm, prompt, cached))
        found.append(answers)
    return found


def _right(llm: Any, prompt: list[int], cached: int) -> Right:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, logprobs=2
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    if output.num_cached_tokens != cached:
        raise RuntimeError(f"expected {cached} cached tokens, got {output.num_cached_tokens}")
    margins = []
    for step in output.outputs[0].logprobs:
        best, second = sorted((logprob.logprob for logprob in step.values()), reverse=True)[:2]
        margins.append(best - second)
    return Right(list(output.outputs[0].token_ids), margins)


def noticed(llm: Any, prompts: list[list[int]], right: list[list[Right]]) -> tuple[int, int]:
    """(answers from wrong blocks that the soak would call wrong, of so many): what its zero is worth."""
    from hybrid_fixture import corrupt_group

    from vllm_xlayer.compat.engine import empty_device_cache

    asked = [(prompt, answers) for prompt, answers in zip(prompts, right, strict=True) if len(answers) > 1]
    seen = 0
    for prompt, answers in asked:
        empty_device_cache(llm)
        serving.answer_to(llm, prompt, 1)
        corrupt_group(llm, 0)
        tokens = serving.answer_to(llm, prompt, NUM_TOKENS)[0]
        seen += not any(answer.fits(tokens) for answer in answers)
    return seen, len(asked)


def make_soak(llm: Any, copies: Any, prompts: list[list[int]], right: list[list[Right]], seed: int) -> Any:
    """tests/engine's soak, with several right answers to a prompt."""
    from faults import core_of, greedy
    from test_soak import Soak

    sampling = greedy(NUM_TOKENS)

    class SpeculationSoak(Soak):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.preempted: set[str] = set()

        def add(self) -> None:
            for _ in range(self.rng.randint(1, 6)):
                name, which = f"r{self.did['requests']}", self.rng.randrange(len(self.prompts))
                self.did["requests"] += 1
                self.running[name] = which
                self.llm.llm_engine.add_request(name, {"prompt_token_ids": self.prompts[which]}, sampling)

        def step(self) -> None:
            for _ in range(self.rng.randint(1, 12)):
                outputs = {o.request_id: o for o in self.llm.llm_engine.step() if o.finished}
                alive = core_of(self.llm).scheduler.requests.values()
                self.preempted |= {_name(request) for request in alive if request.num_preemptions}
                self.answered(outputs)

        def answered(self, outputs: dict[str, Any]) -> None:
            for name, output in outputs.items():
                which, tokens = self.running.pop(name), list(output.outputs[0].token_ids)
                self.did["answers"] += 1
                if name in self.preempted:
                    self.did["preempted"] += 1
                elif len(tokens) != NUM_TOKENS or not any(a.fits(tokens) for a in self.answers[which]):
                    self.did["wrong"] += 1
                    print(f"wrong: prompt {which}, {tokens}, expected one of {self.answers[which]}")

    return SpeculationSoak(llm, copies, Path(), prompts, right, random.Random(seed))


def _name(request: Any) -> str:
    """As it was added: vLLM's core has a suffix of its own on it."""
    return request.request_id.rpartition("-")[0] or request.request_id


def run(folder: Path, seconds: float, seed: int, result: Path) -> int:
    """Soaks for so long; returns 1 if an answer was wrong or lost, accounts did not balance, or no wrong
    block would have been noticed."""
    import pytest

    os.environ["VLLM_XLAYER_DEBUG"] = "1"
    serving.prepare()
    from faults import Copies, finish, live_connector, settle, slow_down
    from model_fixture import save_mimo

    from vllm_xlayer.compat.engine import core_of, rows_loaded
    from vllm_xlayer.connector.host.accounts import AccountingError

    model = save_mimo(folder / "model", vocab_size=VOCABULARY, num_hidden_layers=1)
    prompts = prompts_with_shared_prefixes()
    with serving.started({"model": str(model), **ENGINE}) as llm:
        right = right_answers(llm, prompts)
        seen, of = noticed(llm, prompts, right)
        config = core_of(llm).scheduler.kv_cache_config
        row = 2 * config.kv_cache_tensors[0].size // config.num_blocks  # the drafter has a layer too
    print(f"{sum(map(len, right))} right answers to {len(prompts)} prompts")
    print(f"wrong blocks are noticed in {seen} of {of}")
    connector = {"cpu_bytes_to_use": ROWS * row}
    settings = ENGINE | dict(
        model=str(model), num_gpu_blocks_override=BLOCKS, disable_log_stats=False,
        speculative_config=dict(method="mtp", num_speculative_tokens=2),
        kv_transfer_config=dict(
            kv_connector="XLayerConnector", kv_role="kv_both", kv_connector_extra_config=connector
        ),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        slow_down(patch, 2)
        copies = Copies(patch, lambda: live_connector().pool)
        with serving.started(settings) as llm:
            soak = make_soak(llm, copies, prompts, right, seed)
            layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
            newest = sum(layer.impl.newest is not None for layer in layers)
            print(f"newest tokens in 16 bits in {newest} of {len(layers)} layers")
            found = dict(
                seconds=0.0, seed=seed, newest_layers=newest, noticed=seen, noticed_of=of, leaked=0, lost=0
            )
            begin = time.monotonic()

            def note() -> dict[str, Any]:
                did = {name: soak.did[name] for name in ("requests", "answers", "preempted", "wrong")}
                tries = copies.failed + sum(
                    soak.did[what] for what in ("aborted", "resets", "resets of tiers")
                )
                counts = dict(tries=tries, rows_loaded=rows_loaded(), accepted_drafts=_accepted(llm))
                found.update(seconds=round(time.monotonic() - begin, 1), **did, **counts)
                write(result, found)
                print(
                    {name: found[name] for name in (*did, *counts, "lost", "leaked", "seconds")}, flush=True
                )
                return found

            try:
                while (left := seconds - (time.monotonic() - begin)) > 0:
                    soak.act(min(left, WRITE_SECONDS))
                    note()
                soak.answered(finish(llm))
                found["lost"] = len(soak.running)
                settle(llm)
            except AccountingError as error:
                found["leaked"] = len(error.problems)
                print(error)
            note()
    return int(bool(found["wrong"] or found["lost"] or found["leaked"] or not seen))


def run_several(folder: Path, minutes: float, seeds: range, result: Path) -> int:
    """An engine for each seed at the same time, each in a process of its own; adds up what they counted.
    Returns 1 if one of them did."""
    files = [folder / f"{seed}.json" for seed in seeds]
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", str(minutes)]
    processes = [
        subprocess.Popen([*command, "--seed", str(seed), "--json", str(file)])
        for seed, file in zip(seeds, files, strict=True)
    ]
    try:
        running = True
        while running:
            running = any(process.poll() is None for process in processes)
            if parts := [part for part in map(_counted, files) if part]:
                write(result, {"engines": len(parts), "seed": seeds[0], **added_up(parts)})
            time.sleep(1)
    finally:
        for process in processes:
            process.terminate()  # nothing, where it has ended
    return int(any(process.returncode for process in processes))


def _counted(file: Path) -> dict[str, Any] | None:
    """What an engine has counted so far; None if that is nothing yet, or is being written."""
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found


def added_up(parts: list[dict[str, Any]]) -> dict[str, int | float]:
    """What several engines counted, together."""
    counts = [name for name, value in parts[0].items() if isinstance(value, int | float) and name != "seed"]
    return {name: sum(part[name] for part in parts) for name in counts}


def _accepted(llm: Any) -> int:
    found = {metric.name: metric for metric in llm.get_metrics()}
    return found["vllm:spec_decode_num_accepted_tokens"].value


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30, help="of each engine (default: 30)")
    parser.add_argument("--engines", type=int, default=1, help="at the same time (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write (default: results/DEVICE-soak.json)")
    args = parser.parse_args()
    result = args.json or RESULTS / f"{device()}-soak.json"
    with tempfile.TemporaryDirectory() as folder:
        if args.engines > 1:
            seeds = range(args.seed, args.seed + args.engines)
            return run_several(Path(folder), args.minutes, seeds, result)
        return run(Path(folder), 60 * args.minutes, args.seed, result)


if __name__ == "__main__":
    sys.exit(main())

"""Engines of a real model's shape with random weights, each in a process of its own.

The sizes and times of a KV cache do not depend on the weights.
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

OURS = {"kv_cache_dtype": "nvfp4", "attention_config": {"backend": "CUSTOM"}}
"""This package's backend, named: where it cannot serve, the engine fails: no other's figures get its name."""
CACHES: dict[str, dict[str, Any]] = {
    "bf16": {"kv_cache_dtype": "auto"},
    "fp8": {"kv_cache_dtype": "fp8"},
    "nvfp4": OURS,
    "nvfp4-pages": OURS,
    "stock-nvfp4": {"kv_cache_dtype": "nvfp4", "attention_config": {"backend": "FLASHINFER"}},
}
"""Name of a KV cache -> vLLM's settings; "stock-nvfp4" is vLLM's own, with FlashInfer's kernels."""
ENVIRONMENT = {"nvfp4-pages": {"VLLM_XLAYER_NEWEST_TOKENS": "0"}}
"""Name of a KV cache -> variables that belong to it."""
GRAPHS_ONLY = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
"""Settings with which an engine starts in a fraction of the time: no torch.compile, graphs for decode."""
SAMPLER = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
"""FlashInfer's sampler is compiled at the first start on a machine: minutes that are not the cache's."""
NO_MULTICAST = {
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm",
}
"""For engines of several ranks: vLLM's all-reduces without NVLink multicast, which a host that others share
may forbid. FlashInfer's asks for it whatever NCCL_NVLS_ENABLE and TORCH_SYMM_MEM_DISABLE_MULTICAST say."""
WARM_STEPS = 8
"""Tokens before the timed ones."""
Prompt = list[int]
Params = dict[str, Any] | None
"""vLLM's kv_transfer_params of a request."""


class EngineFailed(RuntimeError):
    """The engine's process ended; it said why on stderr."""


@contextlib.contextmanager
def goes_on(cache: str, failed: list[str]) -> Iterator[None]:
    """Around work with one cache's engine: if that fails, says so and notes it, and the others go on."""
    try:
        yield
    except EngineFailed as error:
        print(f"{cache}: {error}, see above", file=sys.stderr)
        failed.append(cache)


def end_when_told() -> None:
    """On SIGTERM, too, `with` blocks end what they have started: engines are in groups of their own, which
    nobody else would end where one hangs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def prompts(seed: str, requests: int, tokens: int, vocabulary: int) -> list[Prompt]:
    """Random token ids, which no other seed gives: nothing of them is in a prefix cache by chance."""
    return prompts_of(seed, [tokens] * requests, vocabulary)


def prompts_of(seed: str, lengths: list[int], vocabulary: int) -> list[Prompt]:
    """The same, each of a length of its own."""
    draw = random.Random(seed)
    return [draw.choices(range(vocabulary), k=tokens) for tokens in lengths]


@dataclass(frozen=True)
class Answer:
    """What `Engine.generate` saw."""

    seconds: float
    """From the call to the last token, in the engine's process: the transfer of the prompts is not in it."""
    cached: list[int]
    """Prompt tokens a request found in the prefix cache, or that came from a connector."""
    handed_over: list[Params] = field(default_factory=list)
    """What the connector says of each request to whoever goes on with it; None where it says nothing."""
    tokens: list[list[int]] = field(default_factory=list)
    token_seconds: float = 0.0
    """Between two tokens of the request that began last, as the engine's core saw it, in the mean: while all
    others decode, too, until the first of them end. 0 where it got one token."""
    first_at: list[float] = field(default_factory=list)
    """When each request's first token came, by the core's clock: those of one step at the same time."""


class Engine:
    """vLLM's LLM in a new process, which ends with the `with` block and gives its memory back.

    It computes only while `generate` runs, so that several can share a GPU and be timed in turn.

    Raises:
        EngineFailed: from the constructor or `wait`, and from `generate`.
    """

    def __init__(
        self,
        model: Path,
        cache: str,
        environment: dict[str, str] | None = None,
        limit: float | None = None,
        wait: bool = True,
        **settings: Any,
    ) -> None:
        """
        environment: variables of its process, besides this one's.
        limit: seconds in which it must start, and answer; None for no limit.
        wait: until it has started; else `wait` must be called before it is asked anything, so that several
            start at the same time.
        settings: vLLM's, besides the cache's and those that a model without weights needs.
        """
        self._limit = limit
        self.due: float | None = None
        """When all further answers must have come (time.monotonic), in place of the limit of each."""
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        job = dict(
            model=str(model), load_format="dummy", skip_tokenizer_init=True,
            disable_log_stats=False,  # for when tokens came
        ) | CACHES[cache] | settings  # fmt: skip
        variables = ENVIRONMENT.get(cache, {}) | (environment or {})
        self._process = context.Process(target=_serve, args=(there, job, variables))
        self._process.start()
        self._pid = self._process.pid
        there.close()
        self.about: dict[str, Any] = {}
        """start_seconds, runner, capacity (tokens of KV), block_size, vocabulary, step_tokens (most of a
        prompt in a step); once it has started"""
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until it has started."""
        try:
            self.about = self._receive()
        except BaseException:
            self.end()
            raise

    def generate(
        self,
        asked: list[Prompt],
        tokens: int | list[int],
        params: list[Params] | None = None,
        said: list[int] | None = None,
    ) -> Answer:
        """All prompts at once, so many tokens for each; one number is for all of them.

        params: for the connector, of each request.
        said: of each request, the token that its answer consists of; None for what the model says.
        """
        nothing = [None] * len(asked)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `_receive` says it
            self._pipe.send((asked, tokens, params or nothing, said or nothing))
        return Answer(*self._receive())

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(llm, *args)`` in the engine's process: a function of a module."""
        self._pipe.send((function, args))
        return self._receive()

    def step_seconds(self, asked: list[Prompt], steps: int, said: list[int] | None = None) -> float:
        """A decode step of these prompts, which are in the prefix cache: the mean of so many, the median of
        three times. Hashing the prompts, which takes as long as dozens of steps, is not in it."""
        self.generate(asked, WARM_STEPS, said=said)
        return statistics.median(self.generate(asked, 1 + steps, said=said).token_seconds for _ in range(3))

    def turn_seconds(self, asked: list[Prompt], fresh: list[Prompt]) -> float | None:
        """A step that computes the ends of these prompts, whose beginnings are in the prefix cache; None
        where they did not come in one step.

        fresh: Prompts of no other request, which take a step each: while the others arrive.
        """
        first_at = self.generate([*fresh, *asked], 1).first_at
        before, turn = first_at[: len(fresh)], first_at[len(fresh) :]
        return min(turn) - max(before) if min(turn) == max(turn) > max(before) else None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pipe.close()  # it ends when nobody can ask any more
        if kind is None:
            self._process.join(60)
        self.end()

    def end(self) -> None:
        """Ends the process and those that vLLM started from it, which would keep the GPU's memory; at once,
        where the `with` block lets it end by itself, which takes seconds."""
        pid, self._pid = self._pid, None
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            self._process.kill()  # before it had a group of its own
            self._process.join()

    def _receive(self) -> Any:
        # Not the pipe alone: vLLM's own processes may hold its other end open.
        limit = self._limit if self.due is None else max(0.0, self.due - time.monotonic())
        if not wait([self._pipe, self._process.sentinel], limit):
            self.end()
            raise EngineFailed(f"expected the engine to start or to answer within {limit:.0f} s")
        try:
            if self._pipe.poll():
                return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            pass
        self.end()
        raise EngineFailed(f"the engine ended with exit code {self._process.exitcode}")


def _serve(pipe: Connection, job: dict[str, Any], environment: dict[str, str]) -> None:
    """The engine's process: one LLM, asked until the other end of the pipe is closed."""
    os.setsid()  # one group with all that vLLM starts
    os.environ.update(SAMPLER | NO_MULTICAST | os.environ | environment)
    from vllm import LLM

    begin = time.perf_counter()
    llm = LLM(**job)
    start = time.perf_counter() - begin
    try:
        _answer(pipe, llm, start)
    finally:
        # Also after an exception: Python waits at its end for vLLM's processes, which nobody else ends.
        llm.llm_engine.engine_core.shutdown()


def _answer(pipe: Connection, llm: Any, start_seconds: float) -> None:
    from vllm import SamplingParams

    config = llm.llm_engine.vllm_config
    about = {
        "start_seconds": start_seconds,
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "capacity": (config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
        "block_size": config.cache_config.block_size,
        "vocabulary": llm.llm_engine.model_config.get_vocab_size(),
        "step_tokens": min(
            config.scheduler_config.max_num_batched_tokens, config.model_config.max_model_len - 1
        ),
    }
    pipe.send(about)
    while True:
        try:
            wanted = pipe.recv()
        except EOFError:
            return
        if callable(wanted[0]):
            function, args = wanted
            pipe.send(function(llm, *args))
            continue
        asked, tokens, params, answers = wanted
        batch = [{"prompt_token_ids": prompt} for prompt in asked]
        counts = tokens if isinstance(tokens, list) else [tokens] * len(asked)
        sampling = [
            SamplingParams(
                max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False,
                extra_args={"kv_transfer_params": for_connector} if for_connector else None,
                allowed_token_ids=None if token is None else [token],
            )
            for count, for_connector, token in zip(counts, params, answers, strict=True)
        ]  # fmt: skip
        begin = time.perf_counter()
        outputs = llm.generate(batch, sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        cached = [output.num_cached_tokens or 0 for output in outputs]
        handed_over = [output.kv_transfer_params for output in outputs]
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        first_at = [output.metrics.first_token_ts for output in outputs]
        pipe.send((seconds, cached, handed_over, tokens, _token_seconds(outputs), first_at))


def _token_seconds(outputs: list[Any]) -> float:
    last = max(outputs, key=lambda output: output.metrics.first_token_ts)
    steps = len(last.outputs[0].token_ids) - 1
    return (last.metrics.last_token_ts - last.metrics.first_token_ts) / steps if steps else 0.0


def run_engine(
    function: str,
    job: dict[str, Any],
    folder: Path,
    core_here: bool = False,
    environment: dict[str, str] | None = None,
) -> dict[str, Any] | None:
    """What ``module:function`` returns for the job, called in a new process; None if it failed.

    core_here: with vLLM's engine core in that process too, so that the function can look into it.
    environment: variables of that process, besides this one's.
    """
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    module, name = function.split(":")
    env = SAMPLER | NO_MULTICAST | os.environ | (environment or {})
    if core_here:
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    code = (
        f"import json, pathlib; from {module} import {name} as f; "
        f"result = f(json.loads({json.dumps(json.dumps(job))})); "
        f"pathlib.Path({str(out)!r}).write_text(json.dumps(result))"
    )
    # Not in the current folder: a source tree there would be imported instead of the package.
    if subprocess.run([sys.executable, "-c", code], env=env, cwd=folder, check=False).returncode:
        return None
    result: dict[str, Any] = json.loads(out.read_text())
    return result

"""An engine of the quality command: reads or writes the text with one KV cache, saves what it thought."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from vllm import LLM, EngineArgs, SamplingParams, TokensPrompt

from ..provenance import provenance
from . import hooks, text
from .forcing import engine_options, forced
from .job import Job

TOP = 64
"""Most probable tokens that are recorded at each position."""


class Engine:
    """A vLLM engine and the ways in which it reads the windows."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self.job, self.progress = job, progress
        options: dict[str, Any] = {
            "model": job.model,
            "kv_cache_dtype": job.kv_cache_dtype,
            "max_model_len": job.length + 1,
            "max_num_seqs": job.batch,
            # Prompts are computed in steps of so many tokens, however many of them run beside each other.
            "long_prefill_token_threshold": min(job.chunk, job.length),
            "max_num_batched_tokens": max(2048, job.chunk, job.batch),
            # A prompt that is found in the cache would be another one's rounding.
            "enable_prefix_caching": False,
            # Whoever looks at K and V stands between the layers. Which kernels attend does not depend on it.
            "enforce_eager": True,
            "seed": 0,
            **job.options,
        }
        self.uses_runner_v2 = EngineArgs(**options).create_engine_config().use_v2_model_runner
        self.llm = LLM(**options, max_logprobs=TOP, **engine_options(self.uses_runner_v2))
        config = self.llm.llm_engine.vllm_config
        self.top = min(TOP, config.model_config.get_vocab_size())
        cache = config.cache_config
        assert cache.num_gpu_blocks is not None
        room = cache.num_gpu_blocks * cache.block_size // (job.length + cache.block_size)
        if room < 1:
            found = cache.num_gpu_blocks * cache.block_size
            raise ValueError(f"expected memory for {job.length} tokens of KV, got {found}")
        # Preempted requests are computed anew, as prompts: nothing must be.
        self.batch = min(job.batch, room)

    def shut_down(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def decode(self, windows: list[list[int]], batch: int | None = None) -> dict[str, np.ndarray]:
        """Reads the windows as if it wrote them: a prompt, then a token a step. The first of those is the
        prompt's own result and does not count."""
        start = self.job.first - 1
        results = []
        for group in self._groups("decode", windows, batch):
            prompts = [TokensPrompt(prompt_token_ids=w[:start]) for w in group]
            settings = {"logprobs": self.top, "flat_logprobs": True, "detokenize": False}
            wanted = [forced(w[start:], self.uses_runner_v2, **settings) for w in group]
            outputs = self.llm.generate(prompts, wanted, use_tqdm=False)
            for window, output in zip(group, outputs, strict=True):
                answer = output.outputs[0]
                if list(answer.token_ids) != window[start:]:
                    raise RuntimeError("vLLM did not answer the tokens that it was made to answer")
                results.append(self._arrays(answer.logprobs, skip=1))
        return _stack(results)

    def prefill(self, windows: list[list[int]]) -> dict[str, np.ndarray]:
        """Reads the windows as prompts, in chunks."""
        settings = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=self.top, flat_logprobs=True, detokenize=False
        )
        results = []
        for group in self._groups("chunked prefill", windows):
            prompts = [TokensPrompt(prompt_token_ids=w) for w in group]
            for output in self.llm.generate(prompts, settings, use_tqdm=False):
                # The first token has no log-probability, but an entry.
                results.append(self._arrays(output.prompt_logprobs, skip=self.job.first))
        return _stack(results)

    def answers(self, windows: list[list[int]], batch: int | None = None) -> np.ndarray:
        """Greedy answers [W, answer] to the first part of each window."""
        settings = SamplingParams(
            max_tokens=self.job.answer, temperature=0.0, ignore_eos=True, detokenize=False
        )
        found: list[list[int]] = []
        for group in self._groups("greedy answers", windows, batch):
            prompts = [TokensPrompt(prompt_token_ids=w[: self.job.first]) for w in group]
            outputs = self.llm.generate(prompts, settings, use_tqdm=False)
            found += [list(output.outputs[0].token_ids) for output in outputs]
        return np.array(found)

    def windows(self) -> list[list[int]]:
        """The text, from the user's files or written by the model."""
        job, tokenizer = self.job, self.llm.get_tokenizer()
        if job.text_files:
            return text.windows_of([Path(f) for f in job.text_files], tokenizer, job.windows, job.length)
        starts = (
            text.demo_beginnings(tokenizer, job.windows, job.first)
            if job.is_demo
            else text.beginnings(job.windows, tokenizer)
        )
        starts = [start[: job.first] for start in starts]
        windows = []
        for group in self._groups("writing the text", starts):
            # Without a seed each: runner V1 on a CPU fails with one where a prompt is computed in chunks.
            settings = [
                SamplingParams(
                    max_tokens=job.length - len(start), temperature=1.0, ignore_eos=True, detokenize=False
                )
                for start in group
            ]
            outputs = self.llm.generate(
                [TokensPrompt(prompt_token_ids=s) for s in group], settings, use_tqdm=False
            )
            windows += [
                start + list(output.outputs[0].token_ids)
                for start, output in zip(group, outputs, strict=True)
            ]
        return windows

    def _groups(self, what: str, windows: list[list[int]], batch: int | None = None):
        """The windows in groups that run at once, with a bar of progress."""
        size = min(batch or self.batch, self.batch)
        for i in self.progress.track(range(0, len(windows), size), description=f"{self.job.title}: {what}"):
            yield windows[i : i + size]

    def _arrays(self, found: Any, skip: int) -> dict[str, np.ndarray]:
        """vLLM's FlatLogprobs from position ``skip`` on: at each the text's token, then the most probable."""
        width = self.top + 1
        start = found.start_indices[skip]
        ids = np.array(found.token_ids[start:], dtype=np.int32)
        values = np.array(found.logprobs[start:], dtype=np.float32)
        if len(ids) % width:
            raise RuntimeError(f"expected {width} log-probabilities a token, got {len(ids)} in all")
        ids, values = ids.reshape(-1, width), values.reshape(-1, width)
        return {"text": values[:, 0], "top_ids": ids[:, 1:], "top": values[:, 1:]}


def _stack(results: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([result[name] for result in results]) for name in results[0]}


def run(job: Job) -> None:
    """All that the job asks for, into its file."""
    hidden = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=hidden, transient=True) as progress:
        starting = progress.add_task(f"{job.title}: starting the engine", total=None)
        engine = Engine(job, progress)
        progress.remove_task(starting)
        try:
            np.savez(job.out, **_results(job, engine))
        finally:
            engine.shut_down()


def _results(job: Job, engine: Engine) -> dict[str, Any]:
    """Arrays by name, and "facts", JSON."""
    file = Path(job.windows_file)
    if not file.exists():
        file.write_text(json.dumps(engine.windows()))
    windows = json.loads(file.read_text())
    saved: dict[str, Any] = {}
    for name, arrays in (("decode", engine.decode(windows)), ("prefill", engine.prefill(windows))):
        saved |= {f"{name}.{key}": value for key, value in arrays.items()}
    saved["answers"] = engine.answers(windows)
    facts: dict[str, Any] = {"runner": "V2" if engine.uses_runner_v2 else "V1", **provenance()}
    if job.is_reference:
        # In other batches the sums of matrix products are made in another order: what that does is noise.
        again = engine.decode(windows[::-1], batch=(engine.batch + 1) // 2)
        saved |= {f"again.{key}": value[::-1] for key, value in again.items()}
        saved["again.answers"] = engine.answers(windows[::-1], batch=(engine.batch + 1) // 2)[::-1]
        facts["layers"] = hooks.look_at_layers(engine.llm, windows)
    return saved | {"facts": json.dumps(facts)}

"""Which families of models this package serves: docs/models.md's table, from tiny models on the CPU platform.

    python -m benchmarks.models [family ...] [--seconds 240]

Starts every family of models.json with random weights in three ways: with NVFP4, with XLayerConnector, and
with both. A prompt is answered from the device's cache; with the connector, once more after that cache was
emptied and filled with 0xFF. "Works" means that as many tokens came from the cache, and that tokens and
logprobs are equal. A refusal at start is quoted. Each family has a process of its own and a time limit;
results go to results/cpu-models.json as they come, beside those of families that were not named.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from vllm_xlayer.provenance import write

from . import RESULTS, ROOT

CONFIGS = ROOT / "benchmarks" / "models.json"
RESULT, DOCUMENT = RESULTS / "cpu-models.json", ROOT / "docs" / "models.md"
CONNECTOR = {
    "kv_transfer_config": {
        "kv_connector": "XLayerConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 64 << 20},
    }
}
NVFP4 = {"kv_cache_dtype": "nvfp4"}
WAYS: dict[str, dict[str, Any]] = {"NVFP4": NVFP4, "XLayerConnector": CONNECTOR, "both": NVFP4 | CONNECTOR}
PROMPT_TOKENS = 700
"""More than the largest block of models.json."""
NUM_TOKENS = 8


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Args:
        config: of models.json.
        drafts: what the table says of its speculative decoding.
        speculation: vLLM's settings of that; a drafter of method "eagle" gets its weights here.
    """

    config: dict[str, Any]
    drafts: str = ""
    speculation: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.config["architectures"][0], self.drafts)))

    def settings(self, folder: Path) -> dict[str, Any]:
        """Saves the model in a folder; what LLM() is told of it."""
        from hybrid_fixture import save_hybrid_config
        from model_fixture import save_eagle

        settings = {"dtype": self.config["dtype"], **save_hybrid_config(self.config, folder / "model")}
        if self.speculation:
            settings["speculative_config"] = dict(self.speculation)
        if self.speculation.get("method") == "eagle":
            draft = save_eagle(folder / "draft", 0, vocab_size=self.config["vocab_size"])
            settings["speculative_config"]["model"] = str(draft)
        return {"model": str(folder / "model"), **settings}


def families() -> dict[str, Family]:
    found = {name: Family(config) for name, config in json.loads(CONFIGS.read_text()).items()}
    llama = found["llama"].config
    ngram = dict(method="ngram", prompt_lookup_max=3, prompt_lookup_min=1, num_speculative_tokens=3)
    found["llama_ngram"] = Family(llama, "n-gram drafts", ngram)
    found["llama_eagle"] = Family(llama, "EAGLE drafts", dict(method="eagle", num_speculative_tokens=2))
    return found


def serve(settings: dict[str, Any]) -> str:
    """What happened to a model served that way, for a cell of the table."""
    from vllm import LLM
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
    from vllm.distributed.parallel_state import destroy_model_parallel

    llm = None
    try:
        llm = LLM(
            skip_tokenizer_init=True,
            max_model_len=1024,
            max_num_seqs=4,
            max_num_batched_tokens=128,
            kv_cache_memory_bytes=16 << 20,
            **settings,
        )
        return _compare(llm, "kv_transfer_config" in settings)
    except (ValueError, NotImplementedError) as error:
        return f"refused: {_sentence(error)}"
    except Exception as error:
        return f"does not run: {type(error).__name__}: {_sentence(error)}"
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        destroy_model_parallel()


def _compare(llm: Any, has_tier: bool) -> str:
    """Whether a prompt is answered from the cache, and from the host tier as from the cache."""
    from hybrid_fixture import answers_and_hits, fill_memory
    from model_fixture import random_prompts

    from vllm_xlayer.compat.engine import come_to_rest

    fill_memory(llm, 0xFF)
    prompt = random_prompts([PROMPT_TOKENS])
    answers_and_hits(llm, prompt, 1)
    (cached,) = answers_and_hits(llm, prompt, NUM_TOKENS)
    if cached[2] == 0:
        return "runs, but nothing was cached"
    if any(logprob != logprob for logprob in cached[1]):
        return f"WRONG: cached tokens have no number as logprob: {cached}"
    if has_tier:
        come_to_rest(llm)
        if not llm.reset_prefix_cache():
            return "runs, but the device's cache could not be emptied"
        fill_memory(llm, 0xFF)
        (restored,) = answers_and_hits(llm, prompt, NUM_TOKENS)
        if restored != cached:
            return f"WRONG: restored {restored} is not cached {cached}"
    return f"works (blocks of {llm.llm_engine.vllm_config.cache_config.block_size})"


def _sentence(error: BaseException) -> str:
    """The first line of an error, or what it says was wrong where that is a list of vLLM's."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    said = next((line for line in lines if line.startswith("Value error, ")), lines[0])
    return said.removeprefix("Value error, ").partition(" [type=")[0]


def _try_family(family: Family, answers: Connection) -> None:
    """In a process of its own: sends (way, what happened) for each way."""
    sys.path.insert(0, str(ROOT / "tests" / "engine"))
    import torch

    torch.set_num_threads(1)  # the models are too small to share among threads
    with tempfile.TemporaryDirectory() as folder:
        try:
            settings = family.settings(Path(folder))
        except Exception as error:
            for way in WAYS:
                answers.send((way, f"not tried: {type(error).__name__}: {_sentence(error)}"))
            return
        for way, more in WAYS.items():
            answers.send((way, serve(settings | more)))


def try_family(family: Family, seconds: float, run: Any = _try_family) -> dict[str, str]:
    """Way -> what happened; what was not known in time says so."""
    context = multiprocessing.get_context("spawn")  # a fork of what torch has threads in may hang
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(family, theirs))
    process.start()
    theirs.close()
    found: dict[str, str] = {}
    end = time.monotonic() + seconds
    missing = f"not known after {seconds:g} s"
    try:
        while len(found) < len(WAYS) and ours.poll(max(0.0, end - time.monotonic())):
            way, cell = ours.recv()
            found[way] = cell
            print(f"    {way}: {cell}", flush=True)
    except EOFError:
        process.join()
        missing = f"the process died (exit code {process.exitcode})"
    process.kill()
    process.join()
    return {way: found.get(way, missing) for way in WAYS}


def main() -> int:
    """Returns 1 if an answer was wrong."""
    known = families()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="family", help=f"some of {', '.join(known)}")
    parser.add_argument("--seconds", type=float, default=240, help="limit for a family (default: 240)")
    args = parser.parse_args()
    if unknown := set(args.families) - set(known):
        parser.error(f"expected families of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    from .readme import rendered

    results = json.loads(RESULT.read_text())["families"] if RESULT.exists() else {}
    names = args.families or list(known)
    for i, name in enumerate(names, 1):
        print(f"{i}/{len(names)} {name}", flush=True)
        cells = try_family(known[name], args.seconds)
        results[name] = {"family": known[name].label, **cells}
        write(RESULT, {"families": {name: results[name] for name in known if name in results}})
    DOCUMENT.write_text(rendered(DOCUMENT.read_text()))
    return int(any("WRONG" in cell for cells in results.values() for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Which families of models this package serves: docs/models.md's table, from tiny models on the CPU platform.

    python -m benchmarks.models [family ...] [--seconds 240]

Starts every family of models.json with random weights in three ways: with NVFP4, with XLayerConnector, and
with both. A prompt is answered from the device's cache; with the connector, once more after that cache was
emptied and filled with 0xFF. "Works" means that as many tokens came from the cache, and that tokens and
logprobs are equal. A refusal at start is quoted. Each family has a process of its own and a time limit;
results go to results/cpu-models.json, beside those of families that were not named.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

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


def serve(folder: Path, dtype: str, settings: dict) -> str:
    """What happened to a model served that way, for a cell of the table."""
    from hybrid_fixture import answers_and_hits, fill_memory
    from model_fixture import random_prompts
    from vllm import LLM
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
    from vllm.distributed.parallel_state import destroy_model_parallel

    from vllm_xlayer.compat.engine import come_to_rest

    llm = None
    try:
        llm = LLM(
            str(folder),
            skip_tokenizer_init=True,
            dtype=dtype,  # type: ignore[arg-type]
            max_model_len=1024,
            max_num_seqs=4,
            max_num_batched_tokens=128,
            kv_cache_memory_bytes=16 << 20,
            **settings,
        )
        fill_memory(llm, 0xFF)
        prompt = random_prompts([PROMPT_TOKENS])
        answers_and_hits(llm, prompt, 1)
        (cached,) = answers_and_hits(llm, prompt, NUM_TOKENS)
        if cached[2] == 0:
            return "runs, but nothing was cached"
        block = llm.llm_engine.vllm_config.cache_config.block_size
        if "kv_transfer_config" in settings:
            come_to_rest(llm)
            if not llm.reset_prefix_cache():
                return "runs, but the device's cache could not be emptied"
            fill_memory(llm, 0xFF)
            (restored,) = answers_and_hits(llm, prompt, NUM_TOKENS)
            if restored != cached:
                return f"WRONG: restored {restored} is not cached {cached}"
        return f"works (blocks of {block})"
    except (ValueError, NotImplementedError) as error:
        return f"refused: {_sentence(error)}"
    except Exception as error:
        return f"does not run: {type(error).__name__}: {_sentence(error)}"
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        destroy_model_parallel()


def _sentence(error: BaseException) -> str:
    """The first line of an error, or what it says was wrong where that is a list of vLLM's."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    said = next((line for line in lines if line.startswith("Value error, ")), lines[0])
    return said.removeprefix("Value error, ").partition(" [type=")[0]


def _try_family(family: str, config: dict[str, Any], answers: Connection) -> None:
    """In a process of its own: sends (way, what happened) for each way."""
    from hybrid_fixture import save_hybrid

    with tempfile.TemporaryDirectory() as folder:
        try:
            save_hybrid(family, Path(folder))
        except Exception as error:
            for way in WAYS:
                answers.send((way, f"not tried: {type(error).__name__}: {_sentence(error)}"))
            return
        for way, settings in WAYS.items():
            answers.send((way, serve(Path(folder), config["dtype"], settings)))


def try_family(family: str, config: dict[str, Any], seconds: float) -> dict[str, str]:
    """Way -> what happened; what was not known in time says so."""
    context = multiprocessing.get_context("fork")  # with all that was imported
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_try_family, args=(family, config, theirs))
    process.start()
    theirs.close()
    found, end = dict.fromkeys(WAYS, f"not known after {seconds:.0f} s"), time.monotonic() + seconds
    try:
        for _ in WAYS:
            if not ours.poll(max(0.0, end - time.monotonic())):
                break
            way, cell = ours.recv()
            found[way] = cell
    except EOFError:
        found = {way: cell if "not known" not in cell else "the process died" for way, cell in found.items()}
    process.kill()
    process.join()
    return found


def main() -> int:
    configs = json.loads(CONFIGS.read_text())
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="family", help=f"some of {', '.join(configs)}")
    parser.add_argument("--seconds", type=float, default=240, help="limit for a family (default: 240)")
    args = parser.parse_args()
    if unknown := set(args.families) - set(configs):
        parser.error(f"expected families of {', '.join(configs)}, got {', '.join(sorted(unknown))}")
    sys.path.insert(0, str(ROOT / "tests" / "engine"))
    import hybrid_fixture  # noqa: F401  imported once, for all processes
    import vllm.v1.engine.core  # noqa: F401

    from .readme import rendered

    known = json.loads(RESULT.read_text())["families"] if RESULT.exists() else {}
    families = args.families or list(configs)
    for i, family in enumerate(families, 1):
        began = time.monotonic()
        cells = try_family(family, configs[family], args.seconds)
        known[family] = {"architecture": configs[family]["architectures"][0], **cells}
        print(f"{i}/{len(families)} {family}, {time.monotonic() - began:.0f} s: {cells}", flush=True)
        write(RESULT, {"families": {name: known[name] for name in configs if name in known}})
    DOCUMENT.write_text(rendered(DOCUMENT.read_text()))
    return int(any("WRONG" in cell for cells in known.values() for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Which families of models this package serves: a Markdown table, from tiny models on the CPU platform.

    python -m benchmarks.models [family ...]

Starts every family of models.json with random weights in three ways: with NVFP4, with XLayerConnector, and
with both. A prompt is answered from the device's cache; with the connector, once more after that cache was
emptied and filled with 0xFF. "Works" means that as many tokens came from the cache, and that tokens and
logprobs are equal. A refusal at start is quoted.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "engine"))

from hybrid_fixture import answers_and_hits, fill_memory, save_hybrid
from model_fixture import random_prompts

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
    from vllm import LLM
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

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


def _sentence(error: BaseException) -> str:
    """The first line of an error, safe inside a table."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0].replace("|", "\\|")


def main(families: list[str]) -> None:
    """Print the table, a line as soon as it is known."""
    configs = json.loads((HERE / "models.json").read_text())
    if unknown := set(families) - set(configs):
        raise SystemExit(f"expected families of {', '.join(configs)}, got {', '.join(sorted(unknown))}")
    print(f"| family | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}", flush=True)
    for family in families or configs:
        with tempfile.TemporaryDirectory() as folder:
            save_hybrid(family, Path(folder))
            cells = [serve(Path(folder), configs[family]["dtype"], settings) for settings in WAYS.values()]
        print(f"| {configs[family]['architectures'][0]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

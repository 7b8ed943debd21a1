"""Newest tokens in 16 bits in engines on a GPU: what decode reads is what was written, in CUDA graphs, too.

Every answer is shorter than a row, so all of it is read as it was: an NVFP4 cache then answers as a 16-bit
one does, but for the rounding of another kernel. One process an engine.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from side_by_side import side_by_side

pytestmark = pytest.mark.gpu

ENGINE_TESTS = Path(__file__).parents[1] / "engine"
SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hybrid_fixture import CONFIGS, answers, save_hybrid_config
from model_fixture import random_prompts
from vllm import LLM

folder = Path(sys.argv[2])
settings = save_hybrid_config(CONFIGS[sys.argv[3]] | {"dtype": "bfloat16"}, folder)
llm = LLM(str(folder), skip_tokenizer_init=True, max_model_len=512, seed=0, gpu_memory_utilization=0.2,
          kv_cache_memory_bytes=256 << 20, enable_prefix_caching=False, max_num_seqs=8, **settings,
          **json.loads(sys.argv[4]))
assert llm.llm_engine.vllm_config.use_v2_model_runner
others = random_prompts([90, 70, 30, 110, 5, 60, 80, 20, 100, 40], seed=1)
answers(llm, others, 12)  # leave what is not theirs
prompts = random_prompts([5, 90, 16, 33, 64, 1, 100, 47], seed=2)
print("REPORT" + json.dumps({
    "together": answers(llm, prompts, 16),
    "alone": [answers(llm, [prompt], 16)[0] for prompt in prompts],
}))
"""
GRAPHS = dict(compilation_config=dict(mode=0, cudagraph_mode="FULL_DECODE_ONLY"))
"""Decode in full graphs, with layers that are not compiled: they round as eager ones do."""
EAGER = dict(enforce_eager=True)
SETTINGS = dict(qwen3_next=dict(additional_config=dict(gdn_prefill_backend="triton")))
"""Of a model: FlashInfer would be compiled first."""


def run(folder: Path, model: str, newest_tokens: int = 0, **settings) -> dict[str, list]:
    environment = os.environ | {
        "VLLM_XLAYER_NEWEST_TOKENS": str(newest_tokens),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    command = [
        sys.executable, "-c", SCRIPT, str(ENGINE_TESTS), tempfile.mkdtemp(dir=folder), model,
        json.dumps(settings | SETTINGS.get(model, {})),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, list] = json.loads(done.stdout.partition("REPORT")[2])
    return report


def difference(some: dict[str, list], others: dict[str, list]) -> float:
    """Mean of what logprobs differ by, up to the first token that does."""
    differences: list[float] = []
    for way in ("together", "alone"):
        for (tokens, logprobs), (others_tokens, others_logprobs) in zip(some[way], others[way], strict=True):
            for one, other, p, q in zip(tokens, others_tokens, logprobs, others_logprobs, strict=True):
                differences.append(abs(p - q))
                if one != other:
                    break
    return sum(differences) / len(differences)


@pytest.mark.parametrize("model", ["llama", "qwen3_next"])
def test_what_is_read_is_what_was_written(tmp_path, model):
    engine = partial(run, tmp_path, model)
    newest_tokens = partial(engine, kv_cache_dtype="nvfp4", newest_tokens=128)
    sixteen_bits, pages, newest, graphs = side_by_side(
        partial(engine, **EAGER),
        partial(engine, kv_cache_dtype="nvfp4", **EAGER),
        partial(newest_tokens, **EAGER),
        partial(newest_tokens, **GRAPHS),
    )
    lost = difference(pages, sixteen_bits)
    print(model, "pages", lost, *(difference(way, sixteen_bits) for way in (newest, graphs)))
    assert difference(newest, sixteen_bits) < lost / 4
    assert difference(graphs, sixteen_bits) < lost / 4

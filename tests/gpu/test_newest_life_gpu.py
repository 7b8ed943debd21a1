"""Newest tokens in 16 bits in an engine on a GPU: nothing stale may be read, whatever becomes of requests.

NEWEST_TOKENS_SECONDS=600 pytest tests/gpu/test_newest_life_gpu.py is the long search.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

SECONDS = float(os.environ.get("NEWEST_TOKENS_SECONDS", "10"))
"""How long requests come and go, for each kind of engine."""
SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import newest_fixture
import pytest
from hybrid_fixture import CONFIGS, save_hybrid_config
from model_fixture import llama_config, save_eagle, save_random_model
from newest_fixture import live
from newest_oracles import RowOracle
from vllm import LLM

folder, (drafts, mutation, seconds) = sys.argv[2], json.loads(sys.argv[3])
patch = pytest.MonkeyPatch()
patch.setattr("vllm_xlayer.attention.newest.num_rows", lambda config: 3)  # for four requests
settings = dict(num_gpu_blocks_override=21)
if drafts == "hybrid":  # whose states take blocks, too, and which another runner's code serves
    settings = dict(num_gpu_blocks_override=63)
    settings |= save_hybrid_config(CONFIGS["lfm2"] | {"dtype": "bfloat16"}, Path(folder))
else:
    save_random_model(llama_config(), folder)
speculation = {
    "plain": lambda: None,
    "hybrid": lambda: None,
    # Model runner V2 drafts as many tokens for each request and step. Only where a step has fewer than the
    # one before it, what rejected drafts were written over is among the newest tokens: let the batch's size
    # decide.
    "drafts": lambda: dict(
        method="ngram", num_speculative_tokens=6, prompt_lookup_min=1, prompt_lookup_max=3,
        num_speculative_tokens_per_batch_size=[(1, 1, 1), (2, 2, 6), (3, 3, 1), (4, 4, 6)],
    ),
    "drafter": lambda: dict(
        method="eagle", num_speculative_tokens=3, model=str(save_eagle(Path(folder + "-eagle"), 0))
    ),
}[drafts]()
llm = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", kv_cache_dtype="nvfp4", seed=0,
          max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64,
          enable_prefix_caching=True, enforce_eager=True,
          gpu_memory_utilization=0.1, kv_cache_memory_bytes=64 << 20,
          speculative_config=speculation, **settings)
assert llm.llm_engine.vllm_config.use_v2_model_runner
oracle = RowOracle(patch)
if mutation:
    getattr(newest_fixture, mutation)(patch)
# Drawn tokens: what a model this small is most sure of repeats itself, and no draft is wrong.
seed, counts = live(llm, oracle, seconds, temperature=1.0)
print("REPORT" + json.dumps([seed, counts, oracle.counts, oracle.wrong[:5]]))
"""


def search(folder: Path, drafts: str, mutation: str | None, seconds: float) -> list:
    """[the last life's seed, what happened, what was read, what was wrong]"""
    environment = os.environ | {
        "VLLM_XLAYER_NEWEST_TOKENS": "32",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    fixtures = str(Path(__file__).parents[1] / "engine")
    asked = json.dumps([drafts, mutation, seconds])
    command = [sys.executable, "-c", SCRIPT, fixtures, str(folder / "model"), asked]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=seconds + 900, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: list = json.loads(done.stdout.partition("REPORT")[2])
    return report


@pytest.mark.parametrize("drafts", ["plain", "drafts", "drafter", "hybrid"])
def test_no_row_has_another_content(tmp_path, drafts):
    seed, happened, counts, wrong = search(tmp_path, drafts, None, SECONDS)
    print(happened, counts)
    assert not wrong, (seed, wrong)
    assert counts["read"] > 5 * counts["attended"] > 0, counts
    assert min(happened[what] for what in ("aborted", "preempted", "reset", "cached", "finished")) > 0


@pytest.mark.parametrize(
    "mutation",
    [
        "no_reset_on_reuse",
        "no_reset_on_resumption",
        "no_reset_after_a_prefix_hit",
        "no_reset_after_a_rejected_draft",
    ],
)
def test_the_search_finds(tmp_path, mutation):
    """Each thing that keeps rows right, left out: the test above would fail."""
    assert search(tmp_path, "drafts", mutation, seconds=30)[3]

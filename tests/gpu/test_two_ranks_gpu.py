"""Two ranks on two GPUs, decoding with full graphs: loads that are reported early by one and late by the
other, and one rank's that fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason=f"needs two GPUs, got {torch.cuda.device_count()}"
    ),
]
HERE = Path(__file__).parent

SCRIPT = """
import json, sys
import rank_hooks
from model_fixture import llama_config, random_prompts, save_random_model, vllm_greedy
from vllm import LLM
from vllm_xlayer.compat.engine import come_to_rest, empty_device_cache

folder, settings = sys.argv[1], json.loads(sys.argv[2])
save_random_model(llama_config(hidden_size=512, head_dim=128, num_attention_heads=4), folder)
llm = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=512, seed=0,
          gpu_memory_utilization=0.2, kv_cache_memory_bytes=64 << 20, tensor_parallel_size=2,
          kv_transfer_config=dict(kv_connector="XLayerConnector", kv_role="kv_both",
                                  kv_connector_extra_config=dict(cpu_bytes_to_use=64 << 20)), **settings)
come_to_rest(llm)  # the host tier is pinned
prompts = random_prompts([100, 16, 33, 300])

def answers():
    return [vllm_greedy(llm, [prompt], 16)[0] for prompt in prompts]

def restored():
    empty_device_cache(llm)
    llm.collective_rpc(rank_hooks.spoil_pool)
    found = answers()
    come_to_rest(llm)
    return found, llm.collective_rpc(rank_hooks.counts)

report = {"computed": answers(), "cached": answers(), "restored": restored()}
llm.collective_rpc(rank_hooks.slow_down, args=(1,))
report["early"] = restored()
llm.collective_rpc(rank_hooks.fail_loads, args=(0,))
report["failed"] = restored()
print("REPORT" + json.dumps(report))
llm.llm_engine.engine_core.shutdown()
"""
GRAPHS = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}


def run(folder: Path, **settings) -> dict:
    paths = [str(HERE), str(HERE.parent / "engine"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_BATCH_INVARIANT": "0",  # which tests/engine set where they run before: it refuses NVFP4
    }
    command = [sys.executable, "-c", SCRIPT, str(folder / "model"), json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, cwd=folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return json.loads(done.stdout.partition("REPORT")[2].splitlines()[0])


def check(report: dict, early: bool = True) -> None:
    computed, cached = report["computed"], report["cached"]
    answers, counts = report["restored"]
    assert answers == cached
    rows = [loaded for *_, loaded in counts]
    assert rows[0] == rows[1] > 0
    answers, counts = report["early"]
    assert answers == cached
    assert [loaded for *_, loaded in counts] == [2 * n for n in rows]
    if early:
        assert all(reported > 0 for reported, *_ in counts), "of either rank"
    answers, counts = report["failed"]
    assert answers == computed
    assert counts[0][1] > 0 and counts[1][1] == 0


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "nvfp4"])
def test_early_loads_and_one_ranks_failures(tmp_path, kv_cache_dtype):
    check(run(tmp_path, kv_cache_dtype=kv_cache_dtype, **GRAPHS))

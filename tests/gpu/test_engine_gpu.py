"""The engine on a GPU: rows on both model runners, NVFP4, restored prompts. One process an engine."""

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

SCRIPT = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
from model_fixture import llama_config, random_prompts, save_random_model, vllm_outputs
from vllm import LLM
from vllm_xlayer.compat.engine import come_to_rest, empty_device_cache

folder, settings = sys.argv[2], json.loads(sys.argv[3])
save_random_model(llama_config(hidden_size=512, head_dim=128, num_attention_heads=4), folder)
llm = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=512, seed=0,
          gpu_memory_utilization=0.2, kv_cache_memory_bytes=64 << 20, **settings)
come_to_rest(llm)  # the host tier is pinned
prompts = random_prompts(json.loads(sys.argv[4]))
report = {"runner": "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1"}

def together():
    return [list(o.outputs[0].token_ids) for o in vllm_outputs(llm, prompts, 16)]

def one_by_one():
    return [list(vllm_outputs(llm, [p], 16)[0].outputs[0].token_ids) for p in prompts]

report["cold"] = together()
report["cached"] = together()
report["cached alone"] = one_by_one()
context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
report["layers"] = [
    [list(c.shape), list(c.stride()), c.storage_offset(), c.element_size()]
    for c in (layer.kv_cache for layer in context.values())
]
report["backends"] = [l.attn_backend.__name__ for l in context.values()]
early = []

def slow_down_copies(row_bytes):
    # Two milliseconds for two rows, and loads are reported as soon as their first two have come.
    from vllm_xlayer.connector.copy import early_loads, transfers
    from vllm_xlayer.connector.copy.choice import Way
    copy_blocks, about_to_end = transfers.ops.copy_blocks, early_loads.EarlyLoads._about_to_end

    def slow(*args):
        torch.cuda._sleep(4_000_000)
        copy_blocks(*args)

    def noted(self, seconds_left):
        results = about_to_end(self, seconds_left)
        early.extend(results)
        return results

    transfers.ops.copy_blocks, early_loads.EarlyLoads._about_to_end = slow, noted
    transfers.BATCH_BYTES = dict.fromkeys(Way, 2 * row_bytes)
    transfers.IDLE_BATCH_BYTES = 2 * row_bytes
    early_loads.IDLE_SECONDS = early_loads.BUSY_SECONDS = 1e9

if "kv_transfer_config" in settings:
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    connector = get_kv_transfer_group()
    report["row_bytes"] = connector.layout.row_bytes
    for name, answers in (("restored", together), ("restored alone", one_by_one)):
        empty_device_cache(llm)
        connector.pool.fill_(0xFF)  # NaN as bf16 and as an NVFP4 scale
        report[name] = answers()
    report["rows_loaded"] = connector.connector_worker.worker.rows_loaded
    slow_down_copies(report["row_bytes"])
    empty_device_cache(llm)
    connector.pool.fill_(0xFF)
    report["restored early"] = one_by_one()
    report["early"] = len(early)
print("REPORT" + json.dumps(report))
"""

LENGTHS = [5, 100, 16, 33, 300, 1]

ROWS = dict(
    kv_transfer_config=dict(
        kv_connector="XLayerConnector",
        kv_role="kv_both",
        kv_connector_extra_config=dict(cpu_bytes_to_use=64 << 20),
    )
)


def run(tmp_path, runner: str, newest_tokens: int = 0, **settings) -> dict:
    environment = os.environ | {
        "VLLM_XLAYER_NEWEST_TOKENS": str(newest_tokens),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "V2" else "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    fixtures, model = str(Path(__file__).parents[1] / "engine"), tempfile.mkdtemp(dir=tmp_path)
    command = [sys.executable, "-c", SCRIPT, fixtures, model, json.dumps(settings)]
    command.append(json.dumps(LENGTHS))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.partition("REPORT")[2])
    assert report["runner"] == runner
    return report


@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "nvfp4"])
def test_rows_on_both_runners(tmp_path, runner, kv_cache_dtype):
    eager = dict(enforce_eager=True, kv_cache_dtype=kv_cache_dtype)
    engine = partial(run, tmp_path, runner, **eager)
    stock, rows = side_by_side(engine, partial(engine, **ROWS))
    page = 2 * 16 * (2 * 128 * 2 if kv_cache_dtype == "auto" else 144)
    assert rows["row_bytes"] == 2 * page
    for i, (shape, strides, offset, size) in enumerate(rows["layers"]):
        assert strides[0] * size == 2 * page and offset * size == i * page
        assert shape[0] == rows["layers"][0][0][0]
    assert all(strides[0] * size == page for _, strides, _, size in stock["layers"])
    if kv_cache_dtype == "nvfp4":
        assert set(rows["backends"]) == {"NVFP4Backend"}
    assert rows["cold"] == stock["cold"]  # the same K and V in both layouts
    assert rows["rows_loaded"] > 0
    # The prompt of 300 tokens has nine batches, 16 ms of copying after the first; others may have ended.
    assert rows["early"] >= 1 and rows["restored early"] == rows["restored alone"]
    if kv_cache_dtype == "auto":
        assert rows["restored"] == rows["cached"] == rows["cold"] == stock["cached"]
        return
    # NVFP4: the tokens of a step see each other exact and the others quantised, so what is compared must have
    # the same tokens left to compute, and nothing beside it that changes the order of sums.
    assert rows["restored alone"] == rows["cached alone"] == stock["cached alone"]


def test_nvfp4_with_compilation_and_graphs(tmp_path):
    """Attention stays outside the graphs; everything else may be compiled and captured."""
    engine = partial(run, tmp_path, "V2", kv_cache_dtype="nvfp4")
    eager, compiled = side_by_side(partial(engine, enforce_eager=True), engine)
    # Compiled layers round differently, so later tokens may part; the first ones agree.
    assert [a[0] for a in compiled["cold"]] == [a[0] for a in eager["cold"]]


GRAPHS = dict(compilation_config=dict(mode=0, cudagraph_mode="FULL_DECODE_ONLY"))
"""Decode in full graphs, with layers that are not compiled: they round as eager ones do."""


def test_newest_tokens_are_read_in_graphs_as_without(tmp_path):
    """Captured steps write and read the rows of the requests that run then; and a restored prompt, which has
    none at first, is answered as a cached one."""
    pages = partial(run, tmp_path, "V2", kv_cache_dtype="nvfp4", **ROWS)
    newest = partial(pages, newest_tokens=64)
    eager, graphs, without, compiled = side_by_side(
        partial(newest, enforce_eager=True),
        partial(newest, **GRAPHS),
        partial(pages, enforce_eager=True),
        newest,  # piecewise graphs around the attention, too
    )
    for alone in ("cached alone", "restored alone"):
        assert graphs[alone] == eager[alone] == graphs["cached alone"]
        assert eager[alone] != without[alone], "nobody read a newest token"
    assert compiled["restored alone"] == compiled["cached alone"]
    assert [a[0] for a in compiled["cold"]] == [a[0] for a in eager["cold"]]

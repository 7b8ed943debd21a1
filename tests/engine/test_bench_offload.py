"""What `bench offload` takes from an engine is what it says: first tokens, what they wait for, copies."""

import pytest
from faults import live_connector

from benchmarks.beside_loads import host_seconds, set_loads
from vllm_xlayer.bench.first_token import SPANS, TURNS, restores
from vllm_xlayer.bench.offload import WORKER, decodes, steps
from vllm_xlayer.bench.offload_tables import BESIDE
from vllm_xlayer.bench.shapes import has_experts
from vllm_xlayer.bench.tier_worker import row_copies, tier
from vllm_xlayer.connector.copy import transfers
from vllm_xlayer.connector.copy.choice import Way
from vllm_xlayer.ops import CopyMethod

pytestmark = pytest.mark.anywhere
COPY = ("asked", "submitted", "told")
"""Of SPANS: what a prompt on the device does not wait for."""
JOB = dict(steps=4, rounds=1, connector=True, same_answers=False)
"""Of decoding."""


@pytest.fixture
def llm(make_llm, tiny_llama, request):
    transfer = dict(
        kv_connector="XLayerConnector", kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": 16 << 20, "offload_prompt_only": False},
    )  # fmt: skip
    return make_llm(
        tiny_llama, kv_transfer_config=transfer, worker_extension_cls=WORKER,
        **getattr(request, "param", {}),
    )  # fmt: skip


def test_first_tokens(llm):
    found = restores(llm, tokens=16 * 8 - 7, repeats=2)
    assert found["rows_restored"] == TURNS * 2 * 7
    for kind, turns in (("cold", 1), ("cached", TURNS), ("restored", TURNS)):
        assert len(found[kind]) == len(found["spans"][kind]) == turns * 2
        for seconds, spans in zip(found[kind], found["spans"][kind], strict=True):
            assert sum(spans.values()) == pytest.approx(seconds)
            expected = [name for name in SPANS if kind == "restored" or name not in COPY]
            assert list(spans) == expected and min(spans.values()) >= 0
    assert len(found["links"]) == TURNS


@pytest.mark.parametrize(
    "llm", [{"num_gpu_blocks_override": 12, "max_model_len": 160}], indirect=True, ids=["small cache"]
)
def test_prompts_that_are_not_on_the_device_are_not_taken_for_it(llm):
    with pytest.raises(RuntimeError, match=r"all prompts on the device, got \d+ rows loaded"):
        restores(llm, tokens=16 * 8 - 7, repeats=2)


def test_decoding_beside_copies(llm):
    found = decodes(llm, [[1, 2, 3] * 20, [4, 5, 6] * 20], JOB)
    copied = {name: found[name]["copied_per_second"][0] for name in ("alone", *BESIDE)}
    assert copied["alone"] == 0 and all(copied[name] > 0 for name in BESIDE)
    assert all(found[name]["seconds"][0] > 0 for name in copied)
    assert tier(llm)["stored"] >= found["rows_stored"] > 0


def test_answers_are_the_same_where_they_choose_experts(llm, monkeypatch):
    """Every request says one token, another than its neighbour's; else what the model says."""
    asked: list[list[int] | None] = []
    add = llm.llm_engine.add_request

    def add_request(name, prompt, sampling):
        asked.append(sampling.allowed_token_ids)
        return add(name, prompt, sampling)

    monkeypatch.setattr(llm.llm_engine, "add_request", add_request)
    half = llm.llm_engine.model_config.get_vocab_size() // 2
    steps(llm, [[1, 2, 3], [4, 5, 6]], JOB | dict(same_answers=True), "alone")
    steps(llm, [[1, 2, 3]], JOB, "alone")
    assert asked == [[0], [half], None]
    assert has_experts("qwen3-next") and has_experts("gpt-oss-20b") and not has_experts("llama-3.1-8b")


def test_loads_are_copied_as_a_case_says(llm, monkeypatch):
    """Those of the tier, and those beside steps, in whichever round."""
    monkeypatch.setattr(transfers, "BATCH_BYTES", dict(transfers.BATCH_BYTES))
    monkeypatch.setattr(transfers, "IDLE_BATCH_BYTES", 0)
    row_copies.cache_clear()
    load = live_connector().connector_worker.worker._load
    for method, mib in (("KERNEL", 8), ("ENGINE", 128)):
        llm.collective_rpc(set_loads, args=(method, mib))
        steps(llm, [[1, 2, 3] * 20], JOB, "loads")
        beside = row_copies(True, tier(llm)["row_bytes"], load.src.device)
        assert load._method == beside._direction._method == CopyMethod[method]
        assert transfers.BATCH_BYTES[Way.H2D] == transfers.IDLE_BATCH_BYTES == mib << 20
        (seconds,) = llm.collective_rpc(host_seconds)
        assert seconds > 0
    row_copies.cache_clear()

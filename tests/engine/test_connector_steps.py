"""What the connector leaves out of a step is not missed. Runner V1, CPU reference platform."""

from dataclasses import replace

import pytest
from hybrid_fixture import save_hybrid
from model_fixture import random_prompts, vllm_greedy
from vllm.v1.core.sched.output import CachedRequestData, KVConnectorBlockState, SchedulerOutput
from vllm.v1.engine import input_processor

from vllm_xlayer.compat.engine import come_to_rest, empty_device_cache
from vllm_xlayer.connector import scheduler as connector_scheduler
from vllm_xlayer.connector.copy import directions
from vllm_xlayer.connector.copy.transfers import HostDirection
from vllm_xlayer.connector.scheduler import RowConnectorScheduler
from vllm_xlayer.connector.step_news import without_idle

PROMPTS = random_prompts([60, 100, 16, 33, 200, 1, 47, 64])
NUM_TOKENS = 70
VLLMS = RowConnectorScheduler.__base__
ROW = 2 * 2 * 2 * 16 * 32 * 4


def start(make_llm, model, settings=None, **extra):
    """An engine with blocks for some of the requests, so that the others are preempted; prompts in parts."""
    extra = {"cpu_bytes_to_use": 16 << 20, "offload_prompt_only": False} | extra
    transfer = dict(kv_connector="XLayerConnector", kv_role="kv_both", kv_connector_extra_config=extra)
    defaults = dict(max_num_batched_tokens=64, max_model_len=320, num_gpu_blocks_override=30)
    return make_llm(model, kv_transfer_config=transfer, **(defaults | (settings or {})))


@pytest.fixture
def steps(monkeypatch):
    """For every step: requests that vLLM looked at, and the job ids, device blocks and chunks it moved."""
    found = []
    real = VLLMS.build_connector_meta

    def build_connector_meta(self, scheduler_output):
        meta = real(self, scheduler_output)
        jobs = [*meta.load_jobs.items(), *meta.store_jobs.items()]
        moved = [(i, job.src_spec.block_ids.tolist(), job.dst_spec.block_ids.tolist()) for i, job in jobs]
        found.append((len(scheduler_output.num_scheduled_tokens), moved, meta.jobs_to_flush))
        return meta

    monkeypatch.setattr(VLLMS, "build_connector_meta", build_connector_meta)
    return found


@pytest.mark.parametrize(
    "extra",
    [{}, {"offload_prompt_only": True}, {"blocks_per_chunk": 3}, {"cpu_bytes_to_use": 9 * ROW}],
    ids=["all tokens", "prompts only", "chunks of three blocks", "a tier that is full"],
)
def test_the_same_transfers_as_if_every_request_was_looked_at(
    make_llm, tiny_llama, monkeypatch, steps, extra
):
    assert_same_transfers(monkeypatch, steps, lambda: start(make_llm, tiny_llama, **extra))


HYBRIDS = {
    "blocks": dict(num_gpu_blocks_override=40),
    "parts of blocks": dict(
        num_gpu_blocks_override=16, block_size=64, prefix_match_unit=16, max_num_batched_tokens=512
    ),
}


@pytest.mark.parametrize("settings", HYBRIDS.values(), ids=HYBRIDS)
def test_the_same_of_a_hybrid_model(make_llm, monkeypatch, steps, tmp_path, settings):
    """States are handed over with a step, and parts of blocks copied in it."""
    folder = save_hybrid("lfm2", tmp_path)
    assert_same_transfers(monkeypatch, steps, lambda: start(make_llm, folder, settings))


def assert_same_transfers(monkeypatch, steps, start):
    """Of an engine that leaves requests out and of one that does not; start() makes one.

    Requests that finish in one step come to the tier in the order of a set of their names. vLLM 0.31 evicts
    by that order, so both engines give their requests the same names.
    """
    monkeypatch.setattr(input_processor, "random_uuid", lambda: "same")

    def run():
        llm = start()
        steps.clear()
        for _ in range(2):
            vllm_greedy(llm, PROMPTS, NUM_TOKENS)
        come_to_rest(llm)
        return list(steps)

    ours = run()
    monkeypatch.setattr(connector_scheduler, "without_idle", lambda output, has_news: output)
    all_of_them = run()
    assert [what for _, *what in ours] == [what for _, *what in all_of_them]
    assert sum(bool(moved) for _, moved, _ in ours) > 10
    assert sum(n for n, *_ in ours) < 0.6 * sum(n for n, *_ in all_of_them)


def test_who_has_news_stays():
    """A block, a return after preemption, a state handed over, or news that only the caller knows of."""
    requests = ["idle", "block", "resumed", "state", "news"]
    cached = CachedRequestData(
        req_ids=requests,
        resumed_req_ids={"resumed"},
        new_token_ids=[],
        all_token_ids={},
        new_block_ids=[([3],) if request == "block" else None for request in requests],
        num_computed_tokens=[10, 11, 12, 13, 14],
        num_output_tokens=[0, 1, 2, 3, 4],
    )
    states = KVConnectorBlockState(set(requests), lambda request: ([1],), {"state": [(1, 7, 16)]})
    step = replace(
        SchedulerOutput.make_empty(),
        scheduled_cached_reqs=cached,
        num_scheduled_tokens=dict.fromkeys([*requests, "new"], 1),
        kv_connector_block_state=states,
        kv_cache_block_copies=[object()],
    )
    kept = without_idle(step, lambda request, tokens: request == "news")
    assert kept.scheduled_cached_reqs.req_ids == requests[1:]
    assert kept.scheduled_cached_reqs.num_computed_tokens == [11, 12, 13, 14]
    assert list(kept.num_scheduled_tokens) == [*requests[1:], "new"]
    assert kept.kv_connector_block_state is states
    assert kept.kv_cache_block_copies is step.kv_cache_block_copies


def test_whether_the_model_ran_is_known(make_llm, tiny_llama, monkeypatch):
    """A step that only waits for a load, and steps that compute, as stores and loads are told."""
    llm = make_llm(tiny_llama, kv_transfer_config=dict(kv_connector="XLayerConnector", kv_role="kv_both"))
    vllm_greedy(llm, PROMPTS[4:5], 1)
    empty_device_cache(llm)
    told = []
    real = HostDirection.advance

    def advance(self, model_ran):
        told.append(model_ran)
        return real(self, model_ran)

    monkeypatch.setattr(HostDirection, "advance", advance)
    vllm_greedy(llm, PROMPTS[4:5], 3)
    assert told[:8] == 2 * [False] + 6 * [True]


@pytest.mark.parametrize("disk", [False, True])
def test_loads_are_early_only_where_no_thread_writes_host_memory(
    make_llm, tiny_llama, monkeypatch, tmp_path, disk
):
    """A row that is still read could be overwritten by one from the disk, which no stream orders."""
    made = []
    real = directions.make_direction

    def make_direction(src, dst, device, early=False):
        made.append(early)
        return real(src, dst, device, early)

    monkeypatch.setattr(directions, "make_direction", make_direction)
    start(make_llm, tiny_llama, **(dict(disk_path=str(tmp_path), disk_bytes_to_use=1 << 26) if disk else {}))
    assert made == [False, not disk]  # stores, loads

"""Loads that are reported before they end, on streams that only the test moves (fake_streams)."""

import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from test_one_copy import offloading_config
from test_transfer_pacing import PER_BATCH, POOL, ROW, device, submit  # noqa: F401

from vllm_xlayer.connector import spec as offload
from vllm_xlayer.connector.copy import directions, early_loads, transfers
from vllm_xlayer.connector.copy.choice import Way

GPU = torch.device("cuda", 0)
LEFT, IDLE_LEFT = 3, 6
"""Batches that may be left when a load is reported: the fake device needs a millisecond for each."""


@pytest.mark.parametrize("writer", [None, "a disk tier", "another rank", "another connector"])
def test_none_where_somebody_else_writes(monkeypatch, writer):
    """To a chunk that is given away while the link still reads it, or a block while it is still written."""
    made = []
    monkeypatch.setattr(offload, "worker_memory", lambda *_: (torch.zeros(4, ROW, dtype=torch.uint8), None))
    monkeypatch.setattr(directions, "make_direction", lambda *_, early=False: made.append(early))
    disk = SimpleNamespace(in_process=True) if writer == "a disk tier" else None
    config = offloading_config(replicated_layout=writer == "another rank")
    spec = offload.RowOffloadingSpec(config, disk, engine="a", takes_failures=True)
    spec.early_loads = writer != "another connector"  # which writes to blocks
    pool = torch.zeros(4, ROW, dtype=torch.uint8)
    refs = [[SimpleNamespace(page_size_bytes=ROW)]]
    spec._make_worker(SimpleNamespace(tensors=[SimpleNamespace(tensor=pool)], group_data_refs=refs))
    assert made == [False, writer is None]  # stores, loads


@pytest.fixture
def load(device, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Way, "of", lambda src, dst: Way.H2D)
    monkeypatch.setattr(early_loads, "cuda", device.as_cuda())
    monkeypatch.setattr(early_loads, "BUSY_SECONDS", LEFT * 1e-3)
    monkeypatch.setattr(early_loads, "IDLE_SECONDS", IDLE_LEFT * 1e-3)
    src = torch.randint(0, 256, (POOL, ROW), dtype=torch.uint8)
    made = early_loads.EarlyLoads(src, torch.zeros_like(src), GPU)
    made.before_launch()
    made.advance()
    return made


@pytest.mark.parametrize("model_ran, left", [(True, LEFT), (False, IDLE_LEFT)])
def test_reported_when_little_is_left(device, load, model_ran, left):  # noqa: F811
    submit(load, [10 * PER_BATCH])
    for _ in range(10 - left):
        assert load.advance(model_ran) == []
        device.run_a_copy()
    (result,) = load.advance(model_ran)
    assert result.success and result.transfer_size == 10 * PER_BATCH * ROW
    assert result.transfer_time == pytest.approx(10e-3)  # as those that have ended
    for _ in range(left):
        assert device.runnable()
        device.run_a_copy()
        assert load.advance() == []
    assert not load._running and not load._told and not load._bytes_running


@pytest.mark.parametrize("seed", range(20))
def test_each_load_once_and_the_model_sees_all_of_it(device, load, seed):  # noqa: F811
    """After every report the model's stream gets a kernel that looks at the load's rows."""
    pick, seen = random.Random(seed), {}
    sizes = [1, 50, 7, 0, 8, 1, 100, 300]
    ids = submit(load, sizes).split(sizes)

    def look(job):
        seen[job] = torch.equal(load.dst[ids[job]], load.src[ids[job]])

    def ask():
        for result in load.advance():
            assert result.success and result.transfer_size == sizes[result.job_id] * ROW
            assert result.job_id not in reported
            reported.append(result.job_id)
            with device.use(device.model):
                device.put("kernel", lambda job=result.job_id: look(job))

    reported, early = [], 0
    ask()
    while runnable := device.runnable() + device.runnable("kernel"):
        device.run(pick.choice(runnable))
        ask()
        early += len(reported) > len(seen) and bool(device.runnable())
    assert sorted(reported) == list(range(len(sizes)))
    assert seen == dict.fromkeys(range(len(sizes)), True)
    assert early  # else this test is about nothing


@pytest.mark.parametrize("seed", range(20))
def test_host_rows_are_overwritten_after_they_are_read(device, load, monkeypatch, seed):  # noqa: F811
    """A store to the rows of a load that was reported, as when they are given to another prompt."""
    pick = random.Random(seed)
    expected = load.src.clone()
    monkeypatch.setattr(Way, "of", lambda src, dst: Way.D2H)
    store = transfers.StreamDirection(torch.full_like(load.src, 7), load.src, GPU)
    ids = submit(load, [10 * PER_BATCH])
    while not load.advance():
        device.run(pick.choice(device.runnable()))
    assert device.runnable()
    store.submit(99, ids, ids)
    store.advance()
    while runnable := device.runnable():
        device.run(pick.choice(runnable))
        store.advance()
    assert torch.equal(load.dst[ids], expected[ids]) and bool((load.src[ids] == 7).all())


@pytest.mark.parametrize("early", [True, False])
def test_blocks_that_are_given_away_once_they_are_reported(device, load, early):  # noqa: F811
    """The request is aborted, and a connector that follows no stream reads another's rows into its blocks.

    What is left of the load comes after that, so beside such a connector loads are not early."""
    if not early:
        load = transfers.StreamDirection(load.src, load.dst, GPU)
    ids = submit(load, [10 * PER_BATCH])
    while not load.advance():
        device.run_a_copy()
    load.dst[ids] = 99
    while runnable := device.runnable():
        device.run(runnable[0])
    assert bool((load.dst[ids] == 99).all()) is not early


def test_not_where_the_model_runs_on_another_stream(device, load):  # noqa: F811
    """The one that asks would wait for the load, and the model would not."""
    submit(load, [10 * PER_BATCH])
    with device.use(device.stream()):
        for _ in range(9):
            assert load.advance() == []
            device.run_a_copy()
    assert [r.job_id for r in load.advance()] == [0]
    assert device.runnable()


def test_not_before_anything_is_known(device, load):  # noqa: F811
    """What a batch takes is not known before the first one of all loads has ended."""
    submit(load, [2 * PER_BATCH])
    assert load.advance() == []
    device.run_a_copy()
    assert [r.job_id for r in load.advance()] == [0]
    device.run_a_copy()
    assert load.advance() == []


def test_a_small_load_is_reported_when_it_is_submitted(device, load):  # noqa: F811
    """Once it is known how long it will take; the model's stream waits for all of it."""
    submit(load, [PER_BATCH])
    load.advance()
    device.run_a_copy()
    load.advance()
    ids = submit(load, [LEFT * PER_BATCH])
    (result,) = load.advance()
    assert result.success and result.transfer_size == LEFT * PER_BATCH * ROW
    assert result.transfer_time == pytest.approx(LEFT * 1e-3)
    with device.use(device.model):
        device.put("kernel", lambda: seen.append(torch.equal(load.dst[ids], load.src[ids])))
    seen: list[bool] = []
    while runnable := device.runnable("kernel") or device.runnable():
        device.run(runnable[0])
    assert seen == [True]


def test_what_is_refused_is_not_reported_as_done(device, load):  # noqa: F811
    device.refuse = lambda number: number == 2
    submit(load, [3 * PER_BATCH])
    results = load.advance()
    while device.runnable():
        device.run_a_copy()
        results += load.advance()
    assert [r.success for r in results] == [False]


def test_a_device_that_breaks_after_the_report(device, load):  # noqa: F811
    submit(load, [10 * PER_BATCH])
    while not load.advance():
        device.run_a_copy()
    device.broken = True
    with pytest.raises(RuntimeError, match="after it was reported"):
        load.advance()


def test_draining_forgets_what_was_reported(device, load):  # noqa: F811
    submit(load, [10 * PER_BATCH])
    while not load.advance():
        device.run_a_copy()
    load.drain()
    assert not device.runnable() and not load._told and load.advance() == []

"""Paced transfers, on streams that only the test moves (fake_streams)."""

import random

import pytest
import torch

pytest.importorskip("vllm")

from fake_streams import Device

from vllm_xlayer.connector.copy import pacing, transfers
from vllm_xlayer.connector.copy.choice import Way
from vllm_xlayer.ops import CopyMethod

ROW, POOL = 64, 4000
PER_BATCH = 7
GPU = torch.device("cuda", 0)


@pytest.fixture
def device(monkeypatch):
    made = Device()
    monkeypatch.setattr(pacing, "cuda", made.as_cuda())
    monkeypatch.setattr(transfers, "BATCH_BYTES", dict.fromkeys(Way, PER_BATCH * ROW))
    monkeypatch.setattr(transfers, "LEAST_QUEUED", 40 * PER_BATCH * ROW)
    monkeypatch.setattr(transfers, "IDLE_BATCH_BYTES", PER_BATCH * ROW)
    monkeypatch.setattr(transfers.time, "perf_counter", lambda: made.clock * 1e-3)
    made.refuse = lambda number: False
    made.batches = []

    def copy_blocks(src, dst, src_ids, dst_ids, method):
        assert method is CopyMethod.ENGINE

        def move(ids=slice(None)):
            dst[dst_ids[ids]] = src[src_ids[ids]]

        made.batches.append(len(src_ids))
        if made.refuse(len(made.batches) - 1):
            made.put("copy", lambda: move(slice(len(src_ids) // 2)))  # a part of it was submitted
            raise RuntimeError("refused")
        made.put("copy", move)

    monkeypatch.setattr(transfers.ops, "copy_blocks", copy_blocks)
    return made


@pytest.fixture(params=[Way.H2D, Way.D2H], ids=lambda way: way.name)
def way(request):
    return request.param


@pytest.fixture
def direction(device, way, monkeypatch):
    return make(monkeypatch, way)


def make(monkeypatch, way):
    monkeypatch.setattr(Way, "of", lambda src, dst: way)
    src = torch.randint(0, 256, (POOL, ROW), dtype=torch.uint8)
    return transfers.StreamDirection(src, torch.zeros_like(src), GPU)


def submit(direction, sizes, first_job=0):
    """Jobs of so many rows, no row twice; returns the ids of all of them."""
    ids = torch.randperm(POOL)[: sum(sizes)]
    for job, part in enumerate(ids.split(list(sizes)), first_job):
        direction.submit(job, part, part)
    return ids


def finish(device, direction, pick=None):
    """Runs copies, asking after each what is finished, until nothing is left."""
    results = direction.advance()
    while streams := device.runnable():
        assert len(streams) <= 2
        if pick is None:
            device.run_a_copy()
        else:
            device.run(pick(streams))
        results += direction.advance()
    return results


SIZES = [1, 50, 7, 0, 8, 1, 1, 300]


@pytest.mark.parametrize("seed", range(10))
def test_two_batches_may_run_and_all_arrive(device, direction, seed):
    ids = submit(direction, SIZES)
    results = finish(device, direction, random.Random(seed).choice)
    assert [(r.job_id, r.success, r.transfer_size) for r in results] == [
        (job, True, size * ROW) for job, size in enumerate(SIZES)
    ]
    assert torch.equal(direction.dst[ids], direction.src[ids])
    assert direction.rows == sum(SIZES) and max(device.batches) == PER_BATCH
    assert not direction.dst[torch.isin(torch.arange(POOL), ids, invert=True)].any()


def test_each_batch_waits_for_the_one_two_before(device, direction):
    """One of the two that may run is left lying: only one more becomes possible, not a stream of them."""
    submit(direction, [20 * PER_BATCH])
    direction.advance()
    left, *_ = device.runnable()
    for expected in (1, 0):
        others = [s for s in device.runnable() if s is not left]
        assert len(others) == expected
        for stream in others:
            device.run(stream)
    assert len(device.runnable()) == 1


@pytest.mark.parametrize("after", range(9))
def test_a_small_copy_waits_for_three_batches_at_most(device, direction, after):
    """With an engine that stays with a stream as long as it can, and takes the small copy's last. The chain
    goes on from job to job."""
    submit(direction, [60, 1, 60, 60])
    direction.advance()
    for _ in range(after):
        device.run_a_copy()
    seen = []
    with device.use(device.stream()):
        device.put("copy", lambda: seen.append(device.copies))
    while not seen:
        device.run_a_copy()
    assert seen[0] - after <= 3
    assert device.runnable()


def test_copies_run_after_what_the_model_has_so_far(device, direction):
    for job in range(2):
        value = job + 1
        device.put("kernel", lambda value=value: direction.src.fill_(value))
        submit(direction, [PER_BATCH * 5], first_job=job)
        direction.advance()
        assert not device.runnable()
        assert direction.advance() == []
        device.run(device.model)
        (result,) = finish(device, direction)
        assert result.job_id == job and int(direction.dst.max()) == value
    device.put("kernel", lambda: None)  # and not after what comes later
    assert not device.runnable() and not direction._running


def test_a_job_is_finished_when_its_last_batch_is(device, direction):
    submit(direction, [PER_BATCH * 3 + 1])
    for _ in range(4):
        assert direction.advance() == []
        device.run_a_copy()
    (result,) = direction.advance()
    assert result.transfer_time == pytest.approx(4e-3)  # a millisecond a batch, though two may run


def test_stores_of_a_step_share_batches(device, monkeypatch):
    store = make(monkeypatch, Way.D2H)
    submit(store, [1] * 64)
    assert not device.batches
    results = finish(device, store)
    assert device.batches == [7] * 9 + [1]
    assert sum(r.transfer_time for r in results) == pytest.approx(10e-3)


@pytest.mark.parametrize("batch_bytes", [1, ROW - 1, ROW, 2 * ROW - 1, 10 * ROW + 5])
@pytest.mark.parametrize("rows", [0, 1, 9, 10, 11, 101])
def test_batches_are_bounded_and_full(device, direction, monkeypatch, batch_bytes, rows):
    monkeypatch.setattr(transfers, "BATCH_BYTES", dict.fromkeys(Way, batch_bytes))
    ids = submit(direction, [rows])
    assert [r.transfer_size for r in finish(device, direction)] == [rows * ROW]
    assert torch.equal(direction.dst[ids], direction.src[ids])
    assert sum(device.batches) == rows
    assert all(n <= 1 or n * ROW <= batch_bytes for n in device.batches)
    assert all((n + 1) * ROW > batch_bytes for n in device.batches[:-1])


def test_what_the_kernel_cannot_do():
    """Pageable host memory; on a GPU also what tests/gpu/test_copies_gpu.py tries."""
    assert not transfers.kernel_can(torch.zeros(4, 4608, dtype=torch.uint8))


def test_loads_have_large_batches_while_no_model_runs(device, monkeypatch):
    monkeypatch.setattr(transfers, "IDLE_BATCH_BYTES", 100 * ROW)
    load, store = (make(monkeypatch, way) for way in (Way.H2D, Way.D2H))
    ids = submit(load, [300])
    load.advance(model_ran=False)
    assert device.batches == [100, 100, 100]
    assert [r.success for r in finish(device, load)] == [True]
    assert torch.equal(load.dst[ids], load.src[ids])
    submit(store, [100])
    store.advance(model_ran=False)
    assert max(device.batches[3:]) == PER_BATCH


def test_loads_wait_for_earlier_steps_and_not_for_the_one_launched_before_them(device, monkeypatch):
    """vLLM hands them over after the launch; their blocks may have been another request's a step before."""
    load = make(monkeypatch, Way.H2D)
    for job in range(2):  # as well after a step without loads
        device.put("kernel", lambda: load.dst.fill_(0))  # the step before
        load.before_launch()
        device.put("kernel", lambda: None)  # this step: it does not end here
        ids = submit(load, [20 * PER_BATCH], first_job=job)
        load.advance()
        assert not device.runnable()
        device.run(device.model)
        while streams := device.runnable():
            device.run(streams[0])
        assert torch.equal(load.dst[ids], load.src[ids])
        assert [r.job_id for r in load.advance()] == [job]
        device.run(device.model)


def test_loads_wait_for_the_model_where_nobody_said_when_it_was_launched(device, monkeypatch):
    load = make(monkeypatch, Way.H2D)
    load.before_launch()
    load.advance()  # that step had none
    device.put("kernel", lambda: None)
    submit(load, [PER_BATCH])
    load.advance()
    assert not device.runnable()


def test_a_device_that_breaks_before_the_launch_fails_the_load(device, monkeypatch):
    load = make(monkeypatch, Way.H2D)

    def broken():
        raise RuntimeError("the device is broken")

    monkeypatch.setattr(load._chain, "follow", broken)
    load.before_launch()
    submit(load, [PER_BATCH])
    assert [r.success for r in load.advance()] == [False]


def test_stores_may_queue_a_share_of_a_step(device, monkeypatch):
    store = make(monkeypatch, Way.D2H)
    least = transfers.LEAST_QUEUED // ROW
    ids = submit(store, [3990])
    store.advance()
    assert least <= sum(device.batches) < least + PER_BATCH  # no rate is known yet

    def queued_after(milliseconds):
        while device.runnable():
            device.run_a_copy()
        store.advance()
        device.clock += milliseconds
        before = sum(device.batches)
        store.advance()
        return store._bytes_running // ROW, sum(device.batches) - before

    # Seven rows a millisecond: a quarter of a second's step is more than the least.
    queued, sent = queued_after(1000)
    assert 250 * 7 <= queued < 250 * 7 + PER_BATCH and sent > 0
    monkeypatch.setattr(transfers, "MOST_QUEUED", 500 * ROW)
    queued, _ = queued_after(1e6)
    assert 500 <= queued < 500 + PER_BATCH
    (result,) = finish(device, store)
    assert result.success and torch.equal(store.dst[ids], store.src[ids])


def test_waiting_is_for_what_was_asked_for_and_before(device, direction, way):
    submit(direction, [100, 1000, 1000])
    direction.wait([0])
    assert [r.job_id for r in direction.advance()] == [0]
    assert direction._running
    direction.wait([1, 77])
    if way is Way.D2H:
        assert 1100 <= sum(device.batches) < 1100 + PER_BATCH
    assert [r.job_id for r in direction.advance()] == [1]


def test_draining_submits_nothing_more(device, direction):
    submit(direction, [3000])
    direction.advance()
    sent = len(device.batches)
    direction.drain()
    assert not device.runnable() and direction.advance() == []
    assert len(device.batches) == sent
    submit(direction, [20])
    assert [r.success for r in finish(device, direction)] == [True]


@pytest.mark.parametrize("refused", [0, 1, 9])
def test_a_refused_batch(device, direction, refused):
    """Its job's memory is not touched any more when that is said to have failed; others are copied."""
    device.refuse = lambda number: number == refused
    at_failure = []
    fail = direction.fail

    def failing(*args):
        at_failure.append(direction.dst.clone())
        fail(*args)

    direction.fail = failing
    sizes = [PER_BATCH, 100, PER_BATCH]
    parts = submit(direction, sizes).split(sizes)
    results = {r.job_id: r.success for r in finish(device, direction)}
    failed = 0 if refused == 0 else 1
    assert results == {0: True, 1: True, 2: True} | {failed: False}
    (then,) = at_failure
    assert torch.equal(direction.dst[parts[failed]], then[parts[failed]])
    for job, part in enumerate(parts):
        assert torch.equal(direction.dst[part], direction.src[part]) == (job != failed)
    assert not direction._unsent and not direction._bytes_running


def test_jobs_that_share_a_refused_batch_fail(device, monkeypatch):
    store = make(monkeypatch, Way.D2H)
    device.refuse = lambda number: number == 0
    submit(store, [3, 3, 3, 3])
    assert {r.job_id: r.success for r in finish(device, store)} == {0: False, 1: False, 2: False, 3: True}


def test_a_broken_device(device, direction):
    """Every job fails once, and no exception leaves."""
    submit(direction, [50, 1])
    assert direction.advance() == []
    device.broken = True
    direction.wait([0, 1])
    assert [(r.job_id, r.success) for r in direction.advance()] == [(0, False), (1, False)]
    assert not direction._bytes_running
    assert direction.advance() == []
    direction.drain()


def test_rows_larger_than_a_piece_are_cut_and_only_their_used_bytes_move(device, direction, monkeypatch):
    """Jobs of rows of several lengths share batches; none is larger than a batch and a piece."""
    monkeypatch.setattr(transfers, "PIECE_BYTES", 16)
    monkeypatch.setattr(transfers, "BATCH_BYTES", dict.fromkeys(Way, 40))
    lengths = [ROW, 16 * 3, 16]
    ids = torch.arange(9)
    for job in range(3):
        mine = ids[3 * job : 3 * job + 3]
        direction.submit(job, mine, mine.flip(0), [(1, length) for length in lengths])
    results = finish(device, direction)
    assert [r.transfer_size for r in results] == [sum(lengths)] * 3 and all(r.success for r in results)
    wanted = torch.zeros_like(direction.dst)
    for job in range(3):
        for row, length in enumerate(lengths):
            wanted[3 * job + 2 - row, :length] = direction.src[3 * job + row, :length]
    assert torch.equal(direction.dst, wanted)
    assert direction.rows == 9 and not direction._bytes_running
    assert len(device.batches) > 2 * 9

"""Copies between pool and host tier on a GPU: transfers cut into batches."""

import pytest
import torch

from vllm_xlayer.connector.copy import directions, transfers
from vllm_xlayer.connector.copy.choice import Way
from vllm_xlayer.ops import CopyMethod

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


def test_rows_that_the_kernel_can_copy():
    def rows(*size):
        return torch.zeros(size, dtype=torch.uint8).pin_memory()

    assert transfers.kernel_can(rows(4, 4608)) and transfers.kernel_can(rows(4, 4608).cuda())
    assert not transfers.kernel_can(rows(4, 4600))
    assert not transfers.kernel_can(rows(4, 4620)[:, :4608])
    assert not transfers.kernel_can(rows(4, 4640)[:, 8:4616])


@pytest.mark.parametrize("method", list(CopyMethod))
def test_a_store_and_a_load_in_many_batches(monkeypatch, method):
    """A store reads what the stream of the model writes before it, and is not finished before that."""
    monkeypatch.setattr(transfers, "BATCH_BYTES", dict.fromkeys(Way, 10 * 4608))
    monkeypatch.setattr(transfers, "choose", lambda way, piece_bytes: method)
    used, real = [], transfers.ops.copy_blocks

    def copy_blocks(src, dst, src_ids, dst_ids, method):
        used.append((len(src_ids), method))
        real(src, dst, src_ids, dst_ids, method)

    monkeypatch.setattr(transfers.ops, "copy_blocks", copy_blocks)
    rows = torch.randint(0, 256, (501, 4608), dtype=torch.uint8)
    pool = torch.zeros_like(rows, device=GPU)
    host = torch.zeros_like(rows).pin_memory()
    store = directions.make_direction(pool, host, GPU)
    load = directions.make_direction(host, pool, GPU)
    ids = torch.randperm(501)
    written = rows.cuda()
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)  # cycles: the store would be long done
    pool.copy_(written)
    store.submit(1, ids, ids.flip(0))
    assert store.advance() == []
    store.wait([1])
    (result,) = store.advance()
    assert result.success and result.transfer_size == rows.nbytes
    assert torch.equal(host[ids.flip(0)], rows[ids])
    pool.zero_()
    load.submit(2, ids.flip(0), ids)
    load.wait([2])
    assert load.advance()[0].success
    assert torch.equal(pool.cpu(), rows)
    assert used == 2 * ([(10, method)] * 50 + [(1, method)])


@pytest.mark.parametrize("way", [Way.H2D, Way.D2H], ids=lambda way: way.name)
def test_a_small_copy_gets_in_between(monkeypatch, way):
    """Submitted on another stream after all batches of a long transfer, it is done long before the last.

    All wait for the same kernel, so that nothing is copied before everything is submitted: it is tried again
    where the host took longer than that.
    """
    monkeypatch.setattr(transfers, "LEAST_QUEUED", 1 << 40)  # all of it on the device at once
    pool = torch.zeros((1024, 589824), dtype=torch.uint8, device=GPU)
    host = torch.zeros(pool.shape, dtype=torch.uint8, pin_memory=True)
    small = [torch.zeros(256, dtype=torch.uint8, pin_memory=True), torch.zeros(256, dtype=torch.uint8).cuda()]
    src, dst = (host, pool) if way is Way.H2D else (pool, host)
    direction, other = directions.make_direction(src, dst, GPU), torch.cuda.Stream(GPU)
    (near, far) = small if way is Way.H2D else small[::-1]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for job in range(5):
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        begin.record()
        direction.submit(job, torch.arange(1024), torch.randperm(1024))
        direction.advance()
        other.wait_event(begin)
        with torch.cuda.stream(other):
            far.copy_(near, non_blocking=True)
            end.record()
        in_time = not begin.query()
        direction.wait([job])
        all_of_it = begin.elapsed_time(direction._running[-1].paced.end)
        assert direction.advance()[0].success
        if in_time:
            break
    assert in_time, "the host took longer to submit than the kernel ran, five times"
    assert begin.elapsed_time(end) < all_of_it / 4


def test_a_load_that_is_reported_before_it_ends(monkeypatch):
    """What the current stream does after the report sees all rows, though the last ones arrive later."""
    host = torch.randint(0, 256, (1024, 589824), dtype=torch.uint8).pin_memory()
    pool = torch.zeros(host.shape, dtype=torch.uint8, device=GPU)
    load = directions.make_direction(host, pool, GPU, early=True)
    ids = torch.randperm(1024)
    early = 0
    for job in range(5):
        pool.zero_()
        load.before_launch()
        load.submit(job, ids, ids)
        while not (results := load.advance()):
            pass
        early += not load._running[-1].paced.end.query() if load._running else 0
        seen = pool.sum(dim=1, dtype=torch.int64)
        assert [(r.job_id, r.success, r.transfer_size) for r in results] == [(job, True, host.nbytes)]
        assert torch.equal(seen.cpu(), host.sum(dim=1, dtype=torch.int64))
        load.wait([job])
        assert load.advance() == [] and not load._running
    assert early

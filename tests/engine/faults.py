"""What the fault tests do to an engine: slow and failing copies, steps by hand, and the tier's accounts."""

import time
from collections import deque

from vllm_xlayer.connector import transfers
from vllm_xlayer.connector.accounting import check_accounts
from vllm_xlayer.connector.transfers import HostDirection


class SlowDirection(HostDirection):
    """Copies only when it has been asked ``delay`` times what is finished, or when it must (wait, drain).

    The bytes move late too, so that a block given away too early shows.
    """

    delay = 3

    def __init__(self, src, dst):
        super().__init__(src, dst)
        self.running = deque()

    def submit(self, job_id, src_ids, dst_ids):
        self.running.append([self.delay, job_id, src_ids, dst_ids])

    def take_finished(self):
        for job in self.running:
            job[0] -= 1
        while self.running and self.running[0][0] <= 0:
            self._copy(self.running.popleft())
        return super().take_finished()

    def _copy(self, job):
        super().submit(*job[1:])

    def wait(self, job_ids):
        wanted = set(job_ids)
        for job in [job for job in self.running if job[1] in wanted]:
            self.running.remove(job)
            self._copy(job)

    def drain(self):
        while self.running:
            self._copy(self.running.popleft())
        super().drain()


def slow_down(monkeypatch, delay=3):
    """Engines made from now on have transfers that stay under way for `delay` steps."""
    direction = type("Slow", (SlowDirection,), {"delay": delay})
    monkeypatch.setattr(transfers, "make_direction", lambda src, dst, device: direction(src, dst))


class Copies:
    """Stands in for ops.copy_blocks: fails where told to, and counts."""

    def __init__(self, monkeypatch, pool_of):
        from vllm_xlayer import ops

        self._real, self._pool_of = ops.copy_blocks, pool_of
        self.fail_loads = self.fail_stores = lambda n: False
        self.loads = self.stores = self.failed = 0
        monkeypatch.setattr(transfers.ops, "copy_blocks", self)

    def __call__(self, src, dst, src_ids, dst_ids, *method):
        is_load = dst.data_ptr() == self._pool_of().data_ptr()
        number = self.loads if is_load else self.stores
        if is_load:
            self.loads += 1
        else:
            self.stores += 1
        if (self.fail_loads if is_load else self.fail_stores)(number):
            self.failed += 1
            half = len(src_ids) // 2  # as a batch may fail half way
            self._real(src, dst, src_ids[:half], dst_ids[:half], *method)
            raise RuntimeError(f"injected copy error {number % 2}")
        self._real(src, dst, src_ids, dst_ids, *method)


def live_connector():
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def core_of(llm):
    return llm.llm_engine.engine_core.engine_core


def scheduler_side(llm):
    """The connector's scheduler side."""
    return core_of(llm).scheduler.connector.connector_scheduler


def manager_of(llm):
    return scheduler_side(llm).manager


SETTLE_SECONDS = 60
"""For all that is under way to end, on the slowest disk (one fsync can take seconds on a busy one)."""


def settle(llm):
    """Step until nothing is under way, then check the accounts of tier and device cache."""
    engine, core = llm.llm_engine, core_of(llm)
    deadline = time.monotonic() + SETTLE_SECONDS
    while engine.has_unfinished_requests() or core.scheduler.has_requests() or _pushing(llm):
        assert time.monotonic() < deadline, f"the engine did not come to rest in {SETTLE_SECONDS} s"
        engine.step()
        if not engine.has_unfinished_requests():
            time.sleep(0.001)  # only the tiers are busy: their threads need the processor, not more steps
    check_accounts(scheduler_side(llm), idle=True)
    pool = core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # block 0 is never handed out
    assert not core.scheduler.failed_recving_kv_req_ids and not core.scheduler.finished_recving_kv_req_ids


def _pushing(llm):
    return core_of(llm).scheduler.connector.has_pending_push_work()


def forget_device_cache(llm):
    """So that the next prompts come from the tier, and what is not loaded shows as NaN."""
    settle(llm)
    assert llm.reset_prefix_cache()
    live_connector().pool.fill_(0xFF)

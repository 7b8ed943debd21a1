"""What the fault tests do to an engine: slow and failing copies, steps by hand, the tier's accounts.

And what they count. TALLY holds it for the test that is running: conftest empties it before, and reports it
after.
"""

import time
from collections import Counter, deque

from model_fixture import ON_GPU, transformers_greedy, vllm_greedy
from vllm import SamplingParams

from vllm_xlayer.connector.copy import directions, transfers
from vllm_xlayer.connector.copy.early_loads import EarlyLoads
from vllm_xlayer.connector.copy.transfers import HostDirection, StreamDirection
from vllm_xlayer.connector.host.accounts import AccountingError, check_accounts

COUNTS = ("tries", "requests", "wrong", "lost", "leaked")
"""How often the fault happened; answers compared with those without the connector, and how many of them were
not the same, or never came; problems in the accounts."""
TALLY: Counter[str] = Counter()
ANSWER_SECONDS = 600
"""A request that is not answered after so long is lost."""


class Slow:
    """Before a direction: copies only when it was asked ``delay`` times what is finished, or when it must
    (wait, drain).

    The bytes move late too, so that a block given away too early shows.
    """

    delay = 3

    def __init__(self, *args):
        super().__init__(*args)
        self.running = deque()

    def submit(self, job_id, *rows):
        self.running.append([self.delay, job_id, *rows])

    def advance(self, model_ran=True):
        for job in self.running:
            job[0] -= 1
        while self.running and self.running[0][0] <= 0:
            self._copy(self.running.popleft())
        return super().advance(model_ran)

    def _copy(self, job):
        super().submit(*job[1:])

    def wait(self, job_ids):
        wanted = set(job_ids)
        for job in [job for job in self.running if job[1] in wanted]:
            self.running.remove(job)
            self._copy(job)
        super().wait(wanted)

    def drain(self):
        while self.running:
            self._copy(self.running.popleft())
        super().drain()


def slow_direction(delay):
    """Stands in for directions.make_direction."""
    kinds = (HostDirection, StreamDirection, EarlyLoads)
    on_host, on_stream, early_loads = (
        type(f"Slow{kind.__name__}", (Slow, kind), {"delay": delay}) for kind in kinds
    )

    def make(src, dst, device, early=False):
        if device.type != "cuda":
            return on_host(src, dst)
        return (early_loads if early else on_stream)(src, dst, device)

    return make


def slow_down(monkeypatch, delay=3):
    """Engines made from now on have transfers that stay under way for `delay` steps."""
    monkeypatch.setattr(directions, "make_direction", slow_direction(delay))


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
            TALLY["tries"] += 1
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


def without_connector(make_llm, model, prompts, num_tokens, **settings):
    """Answers of a run without the connector. On the CPU they are transformers' as well."""
    answers = vllm_greedy(make_llm(model, **settings), prompts, num_tokens)
    if not ON_GPU:
        assert answers == transformers_greedy(model, prompts, num_tokens)
    return answers


def greedy(num_tokens):
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


def add(llm, names, prompts, sampling):
    for name, prompt in zip(names, prompts, strict=True):
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)


def finish(llm, outputs=()):
    """Steps until all is answered or lost: {name: RequestOutput}, also what `outputs` has already."""
    engine, outputs = llm.llm_engine, list(outputs)
    deadline = time.monotonic() + ANSWER_SECONDS
    while engine.has_unfinished_requests() and time.monotonic() < deadline:
        outputs += engine.step()
    return {output.request_id: output for output in outputs if output.finished}


def compare(outputs, answers):
    """Counts and asserts that these are the answers: {name: RequestOutput}, {name: tokens}."""
    got = {name: list(output.outputs[0].token_ids) for name, output in outputs.items()}
    wrong = [name for name, answer in answers.items() if name in got and got[name] != answer]
    lost = [name for name in answers if name not in got]
    TALLY["requests"] += len(answers)
    TALLY["wrong"] += len(wrong)
    TALLY["lost"] += len(lost)
    assert not wrong and not lost, f"of {len(answers)} requests wrong {wrong}, lost {lost}"


def check(llm, prompts, answers):
    """All in one batch; how many tokens of each were found in a cache."""
    names = [f"check {i}" for i in range(len(prompts))]
    add(llm, names, prompts, greedy(len(answers[0])))
    outputs = finish(llm)
    compare(outputs, dict(zip(names, answers, strict=True)))
    return [outputs[name].num_cached_tokens for name in names]


def under_way(llm, what):
    """Requests with a transfer under way: "load" or "store"."""
    jobs = scheduler_side(llm)._jobs.values()
    return {job.req_id for job in jobs if job.is_store == (what == "store")}


def step_until(llm, condition, outputs=None):
    deadline = time.monotonic() + SETTLE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        found = llm.llm_engine.step()
        if outputs is not None:
            outputs += found


SETTLE_SECONDS = 60
"""For all that is under way to end, on the slowest disk (one fsync can take seconds on a busy one)."""


def settle(llm):
    """Step until nothing is under way, then check the accounts of tier and device cache."""
    engine, core = llm.llm_engine, core_of(llm)
    deadline = time.monotonic() + SETTLE_SECONDS
    while engine.has_unfinished_requests() or core.scheduler.has_requests() or core.batch_queue:
        assert time.monotonic() < deadline, f"the engine did not come to rest in {SETTLE_SECONDS} s"
        engine.step()
        if not engine.has_unfinished_requests():
            time.sleep(0.001)  # only the tiers are busy: their threads need the processor, not more steps
    check_accounts(scheduler_side(llm), idle=True)
    pool = core.scheduler.kv_cache_manager.block_pool
    lost = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # block 0 is never handed out
    if lost:
        raise AccountingError([f"a block of the device is not free when idle ({lost} in all)"] * abs(lost))
    assert not core.scheduler.failed_recving_kv_req_ids and not core.scheduler.finished_recving_kv_req_ids


def forget_device_cache(llm):
    """So that the next prompts come from the tier, and what is not loaded shows as NaN."""
    settle(llm)
    assert llm.reset_prefix_cache()
    live_connector().pool.fill_(0xFF)

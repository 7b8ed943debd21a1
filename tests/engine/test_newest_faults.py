"""Faults on the way to the host tier and back, of an engine that keeps newest tokens in 16 bits.

Such an engine has two right answers to a prompt: that of one who computes it, and that of one who finds it in
a cache, whose newest tokens are none of its own. Alone in its batch a prompt must get one of them bit for
bit, log-probabilities included; beside others, whose number rounds, the tokens of one: on a GPU up to where
two tokens were as likely.
"""

from contextlib import contextmanager
from typing import NamedTuple

import pytest
from faults import (
    TALLY,
    Copies,
    add,
    compare,
    core_of,
    finish,
    forget_device_cache,
    greedy,
    live_connector,
    settle,
    slow_down,
    step_until,
    under_way,
)
from model_fixture import ON_GPU, random_prompts
from newest_oracles import PageOracle, RowOracle
from vllm import SamplingParams, envs
from vllm.v1.core.sched.interface import PauseState

PROMPTS = random_prompts([40, 64, 100, 129, 200])
NUM_TOKENS, NEWEST = 24, 64
CONNECTOR = dict(
    kv_connector="XLayerConnector", kv_role="kv_both",
    kv_connector_extra_config={"cpu_bytes_to_use": 64 << 20},
)  # fmt: skip
TIE = 1 / 8 if ON_GPU else 0.0
"""Log-probabilities nearer than that may change places beside other requests: 16-bit sums round with the
batch there, and a key or value that is rounded otherwise may become another 4-bit number."""
fault = pytest.mark.fault


class Right(NamedTuple):
    """Of each of PROMPTS: (tokens, the two largest log-probabilities at each)."""

    computed: list[tuple]
    cached: list[tuple]


def asked(llm):
    """Each prompt alone, as Right has answers; what is not loaded shows as NaN."""
    sampling = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, logprobs=2
    )
    found = []
    for prompt in PROMPTS:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        likely = [
            sorted((entry.logprob for entry in step.values()), reverse=True)[:2]
            for step in output.outputs[0].logprobs
        ]
        found.append((list(output.outputs[0].token_ids), likely))
        settle(llm)
    return found


def fits(tokens, answer):
    """Whether these are an answer's tokens, up to where two were as likely: what follows is not known."""
    for got, wanted, (best, second) in zip(tokens, *answer, strict=True):
        if got != wanted:
            return best - second < TIE
    return True


@pytest.fixture(scope="module")
def engine(make_llm, tiny_llama, request):
    """(engine, Right): transfers stay under way for some steps, and PROMPTS are in the host tier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_XLAYER_NEWEST_TOKENS", str(NEWEST))
        patch.setenv("VLLM_XLAYER_DEBUG", "1")
        patch.setenv("VLLM_BATCH_INVARIANT", "0")  # which conftest sets on a GPU: it refuses NVFP4
        envs.disable_envs_cache()  # vLLM keeps its variables from the first engine on
        request.addfinalizer(envs.disable_envs_cache)
        slow_down(patch, 3)
        llm = make_llm(tiny_llama, kv_cache_dtype="nvfp4", max_num_seqs=8, kv_transfer_config=CONNECTOR)
        right = Right(asked(llm), asked(llm))
        differ = [one[1] != other[1] for one, other in zip(*right, strict=True)]
        assert all(differ), "which of them an answer is, is to be seen"
        yield llm, right


@pytest.fixture
def copies(monkeypatch):
    return Copies(monkeypatch, lambda: live_connector().pool)


def check_alone(llm, *answers):
    """Each prompt gets one of these, bit for bit; how many got the first."""
    got = asked(llm)
    wrong = [i for i, one in enumerate(got) if one not in [right[i] for right in answers]]
    TALLY["requests"] += len(got)
    TALLY["wrong"] += len(wrong)
    assert not wrong
    return sum(one == first for one, first in zip(got, answers[0], strict=True))


def check_together(outputs, right, which):
    """These prompts' tokens fit either answer."""
    got = {name: list(output.outputs[0].token_ids) for name, output in outputs.items()}
    either = {}
    for name, answers in ((f"r{i}", (right.computed[i], right.cached[i])) for i in which):
        fit = name in got and any(fits(got[name], answer) for answer in answers)
        either[name] = got[name] if fit else answers[0][0]
    compare(outputs, either)


@fault("newest tokens: copy error")
def test_failed_loads_are_computed(engine, copies):
    llm, right = engine
    forget_device_cache(llm)
    copies.fail_loads = lambda n: n % 2 == 0
    assert check_alone(llm, *right) == copies.failed == 3
    copies.fail_loads = lambda n: False
    forget_device_cache(llm)
    check_alone(llm, right.cached)


@fault("newest tokens: copy error")
def test_failed_stores_are_never_loaded(engine, copies):
    llm, right = engine
    forget_device_cache(llm)
    llm.reset_prefix_cache(reset_connector=True)
    copies.fail_stores = lambda n: True
    check_alone(llm, right.computed)
    forget_device_cache(llm)
    copies.fail_stores = lambda n: False
    check_alone(llm, right.computed)
    assert copies.loads == 0 and copies.failed > 0
    forget_device_cache(llm)
    check_alone(llm, right.cached)


@fault("newest tokens: abort during load")
def test_others_are_answered_when_loads_are_aborted(engine):
    """Also those that come after, and have the rows of the aborted ones."""
    llm, right = engine
    for _ in range(3):
        forget_device_cache(llm)
        names = [f"r{i}" for i in range(len(PROMPTS))]
        add(llm, names, PROMPTS, greedy(NUM_TOKENS))
        step_until(llm, lambda: under_way(llm, "load"))
        busy = under_way(llm, "load")
        gone = names[::2]
        TALLY["tries"] += sum(any(other.startswith(f"{name}-") for other in busy) for name in gone)
        llm.llm_engine.abort_request(gone)
        add(llm, gone, PROMPTS[::2], greedy(NUM_TOKENS))
        check_together(finish(llm), right, range(len(PROMPTS)))
    forget_device_cache(llm)
    check_alone(llm, right.cached)
    assert TALLY["tries"]


@fault("newest tokens: reset_prefix_cache during load")
@pytest.mark.parametrize("tier_too", [False, True], ids=["device cache", "tier too"])
def test_reset_during_loads(engine, tier_too):
    llm, right = engine
    forget_device_cache(llm)
    add(llm, [f"r{i}" for i in range(len(PROMPTS))], PROMPTS, greedy(NUM_TOKENS))
    outputs = []
    step_until(llm, lambda: under_way(llm, "load"), outputs)
    TALLY["tries"] += 1
    llm.reset_prefix_cache(reset_connector=tier_too)
    check_together(finish(llm, outputs), right, range(len(PROMPTS)))
    forget_device_cache(llm)
    check_alone(llm, right.cached, right.computed)
    forget_device_cache(llm)
    check_alone(llm, right.cached)


def hold_blocks_and_wait(scheduler):
    """The requests whose rows are on their way; or have come, and they wait for their turn in a step."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    holding = {request for manager in managers for request, blocks in manager.req_to_blocks.items() if blocks}
    return holding - {request.request_id for request in scheduler.running}


@contextmanager
def paused(llm, outputs):
    """No step begins, and those under way are over: until then vLLM frees no block that they may write."""
    scheduler = core_of(llm).scheduler
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    step_until(llm, lambda: scheduler.processed_step_seq == scheduler.sched_step_seq, outputs)
    yield
    scheduler.set_pause_state(PauseState.UNPAUSED)


@fault("newest tokens: preemption")
def test_preempted_requests_read_no_row_of_before(engine, monkeypatch):
    """They go on with what the tier has of them, in other rows: each token that is read from a row is what
    was last written where the block table has it."""
    llm, right = engine
    oracle = (RowOracle if ON_GPU else PageOracle)(monkeypatch)
    for steps in (3, 9, 17):
        forget_device_cache(llm)
        add(llm, [f"r{i}" for i in range(len(PROMPTS))], PROMPTS, greedy(40))
        outputs = []
        step_until(llm, lambda: len(core_of(llm).scheduler.running) == len(PROMPTS), outputs)
        for _ in range(steps):
            outputs += llm.llm_engine.step()
        # vLLM resets nothing while such a one, which the others preempted, has blocks.
        step_until(llm, lambda: not hold_blocks_and_wait(core_of(llm).scheduler), outputs)
        with paused(llm, outputs):
            TALLY["tries"] += len(core_of(llm).scheduler.running)
            llm.reset_prefix_cache(reset_running_requests=True)
        outputs = finish(llm, outputs)
        TALLY["requests"] += len(PROMPTS)
        TALLY["lost"] += len(PROMPTS) - len(outputs)
        TALLY["wrong"] += len(oracle.wrong)
        assert len(outputs) == len(PROMPTS) and not oracle.wrong
    assert TALLY["tries"] and oracle.counts["read"]
    monkeypatch.undo()
    forget_device_cache(llm)
    check_alone(llm, right.cached)

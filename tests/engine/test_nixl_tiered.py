"""Hand-over and tiers as one connector: of a prompt the tiers load what they have, the link the rest.

Whatever of a prompt is neither loaded nor computed is 0xFF, which is a NaN: a request that goes on before
both parts are here answers something else.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("nixl", reason="needs nixl: pip install vllm-xlayer[nixl]")

from faults import TALLY, Copies, core_of, step_until
from metrics_fixture import record_every_step, scrape
from model_fixture import ON_GPU, random_prompts, vllm_greedy
from nixl_fixture import blocks_kept, forget_prompts
from nixl_tiers_fixture import Pair, tiered_connector
from vllm.v1.request import RequestStatus

pytestmark = pytest.mark.anywhere

PROMPTS = random_prompts([97, 33, 193])
"""Whole blocks and one token more: then an engine with a prompt in its cache computes what one does that has
loaded it, the last token, and with NVFP4 the answers are those too."""
ROWS = [7, 3, 13]
HEADS = [48, 16, 96]
"""Tokens that the tiers have."""
HELD, REST = 3 + 1 + 6, 4 + 2 + 7
KINDS = {"bf16": {}, "nvfp4": dict(dtype="float32", kv_cache_dtype="nvfp4")}
if ON_GPU:  # where with NVFP4 a prompt's answer depends on who shares its batch
    del KINDS["nvfp4"]


@pytest.fixture(scope="module", params=KINDS)
def pair(request, make_llm, tiny_llama):
    settings = dict(disable_log_stats=False) | KINDS[request.param]
    with Pair(make_llm, tiny_llama, PROMPTS, tiered_connector(4 << 20), **settings) as pair:
        record_every_step(pair.decode)
        pair.exact = request.param == "bf16"
        assert pair.cached == pair.computed or not pair.exact
        yield pair


@pytest.fixture
def exact(pair):
    """Where prompts that are computed get the answers of those that are loaded."""
    if not pair.exact:
        pytest.skip("is tried with 16 bits: NVFP4 gives a computed prompt other answers")
    return pair


class HeldBack:
    """Stands before a direction of the tiers: what is submitted waits, and no byte moves, until `go`."""

    def __init__(self, real):
        self.real, self.jobs, self.holds = real, [], True

    def submit(self, *job):
        self.jobs.append(job)

    def go(self):
        self.holds = False

    def advance(self, model_ran=True):
        if not self.holds:
            self._send()
        return self.real.advance(model_ran)

    def wait(self, job_ids):
        self._send()
        self.real.wait(job_ids)

    def _send(self):
        while self.jobs:
            self.real.submit(*self.jobs.pop(0))

    def __getattr__(self, name):
        return getattr(self.real, name)


@contextmanager
def tiers_held_back(pair):
    real = pair.tiers._load
    pair.tiers._load = held = HeldBack(real)
    try:
        yield held
    finally:
        held.go()
        step_until(pair.decode, lambda: not held.jobs)
        pair.tiers._load = real


@contextmanager
def link_held_back(pair):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair.reads.wire, "state", lambda handle: "PROC")
        yield SimpleNamespace(go=patch.undo)


@contextmanager
def both_under_way(pair, handed_over):
    """(the tiers' part, the link's), of all prompts: held back."""
    with tiers_held_back(pair) as tiers, link_held_back(pair) as link:
        pair.add(handed_over)
        step_until(pair.decode, lambda: pair.reads.reads.chunks and tiers.jobs)
        yield tiers, link


def let_go(pair, part):
    """Of the link's and the tiers' part of all requests, until nothing of it is under way."""
    part.go()
    if isinstance(part, HeldBack):
        step_until(pair.decode, lambda: not part.jobs)
    else:
        step_until(pair.decode, lambda: not pair.reads.reads.reads)
    step(pair)


def step(pair, times=10):
    for _ in range(times):
        pair.decode.llm_engine.step()


def waiting(pair):
    """Requests that vLLM has not been told are here."""
    scheduler = core_of(pair.decode).scheduler
    assert not scheduler.finished_recving_kv_req_ids and not scheduler.failed_recving_kv_req_ids
    states = [request.status for request in scheduler.requests.values()]
    return states.count(RequestStatus.WAITING_FOR_REMOTE_KVS)


def test_the_tiers_load_what_they_have_and_the_link_the_rest(pair):
    pair.hold(HEADS)
    before = scrape("xlayer_")
    assert pair.ask(pair.hand_over()) == (REST, HELD)
    assert not pair.reads.failures
    after = scrape("xlayer_")
    counted = {name: after[name] - before.get(name, 0) for name in after}
    assert counted["xlayer_handover_rows_total"] == REST
    assert counted["xlayer_transfer_rows_total{direction=load,tier=host}"] == HELD
    assert sum(ROWS) == REST + HELD
    stored = counted["xlayer_transfer_rows_total{direction=store,tier=host}"]
    assert stored == sum(len(prompt) // 16 for prompt in PROMPTS) - HELD, "what was read, and that only"
    pair.begin()
    assert pair.ask() == (0, sum(ROWS) - len(ROWS)), "and later all comes from the tiers"


def test_device_tiers_and_link_in_one_prompt(pair):
    pair.hold([0, 0, 96])
    vllm_greedy(pair.decode, [PROMPTS[2][:33]], 1)  # two blocks, which stay on the device
    assert pair.ask(pair.hand_over()) == (7 + 3 + 7, 4)


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ([96, 32, 192], (3, 6 + 2 + 12)),  # a block's one token is in no tier
        ([0, 0, 0], (23, 0)),
        ([96, 0, 16], (1 + 3 + 12, 6 + 1)),
    ],
    ids=["whole prompts", "nothing", "of some"],
)
def test_whatever_the_tiers_have(pair, heads, expected):
    pair.hold(heads)
    assert pair.ask(pair.hand_over()) == expected
    assert not pair.reads.failures


def test_a_prompt_that_nobody_hands_over_comes_from_the_tiers(exact):
    exact.hold(HEADS)
    assert exact.ask() == (0, HELD)


def test_a_prompt_that_is_on_the_device(pair):
    pair.hold(HEADS)
    pair.ask(pair.hand_over())
    pair.begin()
    pair.add()
    pair.finish()
    read, loaded = pair.rows_read, pair.tiers.rows_loaded
    assert pair.ask(pair.hand_over()) and (pair.rows_read - read, pair.tiers.rows_loaded) == (3, loaded)


@pytest.mark.parametrize("first", ["link", "tiers"])
def test_a_request_goes_on_when_both_parts_are_here(pair, first):
    pair.hold(HEADS)
    handed_over = pair.hand_over()
    with both_under_way(pair, handed_over) as (tiers, link):
        step(pair)
        assert waiting(pair) == len(PROMPTS)
        let_go(pair, link if first == "link" else tiers)
        assert waiting(pair) == len(PROMPTS), "one part is still under way"
    pair.finish()
    assert not pair.reads.failures
    pair.check_nothing_is_kept()


@pytest.mark.fault("hand-over: abort while reading")
@pytest.mark.parametrize("first", ["link", "tiers"])
def test_the_client_goes_away_while_both_are_under_way(pair, first):
    pair.hold(HEADS)
    handed_over = pair.hand_over()
    with both_under_way(pair, handed_over) as (tiers, link):
        TALLY["tries"] += 1
        pair.decode.llm_engine.abort_request([f"r{i}" for i in range(len(PROMPTS))])
        step(pair)
        assert blocks_kept(pair.decode) == sum(ROWS)
        let_go(pair, link if first == "link" else tiers)
        assert blocks_kept(pair.decode) == sum(ROWS), "one part is still written to"
    pair.check_nothing_is_kept()
    pair.hold(HEADS)
    assert pair.ask(pair.hand_over()) == (REST, HELD)


@pytest.mark.fault("hand-over: reset_prefix_cache while reading")
@pytest.mark.parametrize("tiers_too", [False, True])
def test_the_caches_are_reset_while_both_are_under_way(pair, tiers_too):
    pair.hold(HEADS)
    handed_over = pair.hand_over()
    with both_under_way(pair, handed_over):
        TALLY["tries"] += 1
        assert not pair.decode.reset_prefix_cache(reset_connector=tiers_too), "their blocks are in use"
        step(pair)
    pair.finish()
    assert not pair.reads.failures
    pair.check_nothing_is_kept()


@pytest.mark.fault("hand-over: failed, with tiers")
@pytest.mark.parametrize("first", ["link", "tiers"])
def test_the_tiers_fail(exact, first, monkeypatch):
    """The request is computed, and the other engine need not keep what has been read in vain."""
    exact.hold(HEADS)
    handed_over = exact.hand_over()
    copies = Copies(monkeypatch, lambda: exact.pool)
    copies.fail_loads = lambda n: True
    read = exact.rows_read
    with both_under_way(exact, handed_over) as (tiers, link):
        let_go(exact, link if first == "link" else tiers)
        assert waiting(exact) == len(PROMPTS)
    exact.finish()
    assert 0 < copies.failed == copies.loads and exact.rows_read - read == REST
    exact.check_nothing_is_kept()


@pytest.mark.fault("hand-over: failed, with tiers")
@pytest.mark.parametrize("first", ["link", "tiers"])
def test_the_link_fails(exact, first):
    """What the tiers have is loaded once more, the rest computed."""
    exact.hold(HEADS)
    handed_over = exact.hand_over_damaged()
    loaded = exact.tiers.rows_loaded
    with both_under_way(exact, handed_over) as (tiers, link):
        let_go(exact, link if first == "link" else tiers)
        assert waiting(exact) == len(PROMPTS)
    exact.finish()
    assert exact.reads.failures == {"seal": len(PROMPTS)} and exact.tiers.rows_loaded - loaded == 2 * HELD
    exact.check_nothing_is_kept()


@pytest.mark.fault("hand-over: failed, with tiers")
def test_both_fail(exact, monkeypatch):
    exact.hold(HEADS)
    handed_over = exact.hand_over_damaged()
    copies = Copies(monkeypatch, lambda: exact.pool)
    copies.fail_loads = lambda n: True
    exact.ask(handed_over)
    assert 0 < copies.failed == copies.loads  # on a GPU requests share copies
    assert exact.reads.failures == {"seal": len(PROMPTS)}


@pytest.mark.fault("hand-over: failed, with tiers")
def test_rows_of_other_prompts_are_not_put_behind_those_of_the_tiers(exact):
    exact.hold(HEADS)
    handed_over = exact.hand_over()
    exact.prefill.call(forget_prompts)
    TALLY["tries"] += len(PROMPTS)
    assert exact.ask(handed_over) == (REST, 2 * HELD)
    assert exact.reads.failures == {"seal": len(PROMPTS)}


def test_without_its_tiers_all_is_read(exact, monkeypatch):
    """As where no host memory is to be had."""
    exact.hold(HEADS)
    manager = exact.tiers_scheduler.connector_scheduler.manager
    monkeypatch.setattr(manager, "problem", "")
    manager.turn_off("switched off by a test")
    assert exact.ask(exact.hand_over()) == (sum(ROWS), 0)


@pytest.mark.fault("hand-over: prefill engine killed")
def test_the_other_engine_is_killed(exact):
    """What the tiers have is loaded once more, the rest computed. The pair has no prefill engine after it."""
    exact.hold(HEADS)
    handed_over = exact.hand_over()
    exact.prefill.kill()
    TALLY["tries"] += 1
    loaded = exact.tiers.rows_loaded
    exact.add(handed_over)
    exact.finish()
    failed, loaded = sum(exact.reads.failures.values()), exact.tiers.rows_loaded - loaded
    assert failed == len(PROMPTS) or (ON_GPU and failed < len(PROMPTS)), "a GPU's rows may still be read"
    rows = sorted(n // 16 for n in HEADS)  # loaded once more, of those that failed
    assert HELD + sum(rows[:failed]) <= loaded <= HELD + sum(rows[len(rows) - failed :])
    exact.check_nothing_is_kept(prefill=False)

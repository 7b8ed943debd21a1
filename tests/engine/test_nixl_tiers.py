"""Hand-over and tiers in one decode engine, in vLLM's MultiConnector, which gives a prompt to one of them."""

import pytest

pytest.importorskip("nixl", reason="needs nixl: pip install vllm-xlayer[nixl]")

from faults import TALLY, Copies
from model_fixture import random_prompts
from nixl_fixture import flip_a_bit
from nixl_tiers_fixture import Pair, multi_connector

pytestmark = pytest.mark.anywhere

PROMPTS = random_prompts([100, 33, 200])
ROWS = [-(-len(prompt) // 16) for prompt in PROMPTS]
WHOLE_ROWS = sum(len(prompt) // 16 for prompt in PROMPTS)


@pytest.fixture(scope="module")
def pair(make_llm, tiny_llama):
    with Pair(make_llm, tiny_llama, PROMPTS, multi_connector(4 << 20)) as pair:
        assert pair.cached == pair.computed
        yield pair


def test_a_prompt_is_read_and_later_comes_from_host_memory(pair):
    pair.begin(tiers_too=True)
    assert pair.ask(pair.hand_over()) == (sum(ROWS), 0)
    assert not pair.reads.failures
    pair.begin()
    assert pair.ask() == (0, WHOLE_ROWS), "rows that were read have been stored"


def test_the_hand_over_goes_first(pair):
    pair.begin()
    assert pair.ask(pair.hand_over()) == (sum(ROWS), 0), "though host memory has all of it"


@pytest.mark.fault("hand-over: failed, with tiers")
def test_a_prompt_that_cannot_be_read_comes_from_host_memory(pair):
    pair.begin()
    assert pair.ask(pair.hand_over_damaged()) == (sum(ROWS), WHOLE_ROWS)
    assert pair.reads.failures == {"seal": len(PROMPTS)}


@pytest.mark.fault("hand-over: failed, with tiers")
def test_rows_that_were_not_right_are_not_stored(pair):
    pair.begin(tiers_too=True)
    handed_over = pair.hand_over()
    firsts = [params["remote_block_ids"][0][0] for params in handed_over]
    for block in firsts:
        pair.prefill.call(flip_a_bit, block, 1001)
        TALLY["tries"] += 1
    assert pair.ask(handed_over) == (sum(ROWS), 0), "computed: neither has it"
    for block in firsts:
        pair.prefill.call(flip_a_bit, block, 1001)  # back: they are in the prefill engine's prefix cache
    assert pair.reads.failures == {"seal": len(PROMPTS)}
    pair.begin()
    assert pair.ask() == (0, WHOLE_ROWS)


@pytest.mark.fault("hand-over: failed, with tiers")
def test_both_fail(pair, monkeypatch):
    pair.begin()
    handed_over = pair.hand_over_damaged()
    copies = Copies(monkeypatch, lambda: pair.pool)
    copies.fail_loads = lambda n: True
    pair.ask(handed_over)
    assert copies.failed and pair.reads.failures == {"seal": len(PROMPTS)}

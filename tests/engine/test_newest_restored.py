"""Newest tokens in 16 bits beside the host tier: a prompt that comes back is the one that was kept.

Like is compared with like: a prompt that was found has no newest tokens of its own, whoever found it, and one
that is computed has.
"""

import pytest
from faults import Copies, forget_device_cache, live_connector
from hybrid_fixture import answers_and_hits
from model_fixture import random_prompts

pytestmark = pytest.mark.usefixtures("reference_platform")

PROMPTS = random_prompts([40, 64, 100, 129, 200])
NUM_TOKENS = 24
CONNECTOR = dict(
    kv_connector="XLayerConnector", kv_role="kv_both",
    kv_connector_extra_config={"cpu_bytes_to_use": 64 << 20},
)  # fmt: skip


@pytest.fixture(scope="module")
def llm(make_llm, tiny_llama):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_XLAYER_NEWEST_TOKENS", "32")
        patch.setenv("VLLM_XLAYER_DEBUG", "1")
        yield make_llm(tiny_llama, kv_cache_dtype="nvfp4", max_num_seqs=4, kv_transfer_config=CONNECTOR)


def asked(llm):
    """(tokens, log-probabilities, tokens found) of each prompt, alone: no batch rounds them."""
    return [answers_and_hits(llm, [prompt], NUM_TOKENS)[0] for prompt in PROMPTS]


def forget(llm):
    """All but the host tier; whoever reads a row that did not come reads NaN."""
    forget_device_cache(llm)
    live_connector().pool.fill_(0xFF)


def test_restored_equals_cached_bit_for_bit(llm):
    computed, cached = asked(llm), asked(llm)
    forget(llm)
    assert asked(llm) == cached
    found = [hits for *_, hits in cached]
    assert found == [(len(prompt) - 1) // 16 * 16 for prompt in PROMPTS]
    # The newest tokens of what was found are read from pages: were there no rows, these were equal, too.
    assert [one[1] for one in computed] != [one[1] for one in cached]


def test_what_does_not_come_back_is_computed_with_its_newest_tokens(llm, monkeypatch):
    forget(llm)
    llm.llm_engine.reset_prefix_cache(reset_connector=True)
    computed = asked(llm)
    assert sum(hits for *_, hits in computed) == 0
    copies = Copies(monkeypatch, lambda: live_connector().pool)
    copies.fail_loads = lambda n: True
    forget(llm)
    again = asked(llm)
    assert [one[:2] for one in again] == [one[:2] for one in computed]
    assert copies.failed == copies.loads > 0

"""Hand-over and tiers in one decode engine, in vLLM's MultiConnector: who loads what, and where one fails."""

import pytest

pytest.importorskip("nixl", reason="needs nixl: pip install vllm-xlayer[nixl]")

from faults import TALLY, Copies, compare, core_of, finish, live_connector
from model_fixture import random_prompts, vllm_greedy
from nixl_fixture import (
    ON_DEVICE,
    OtherEngine,
    add_all,
    blocks_in_use,
    flip_a_bit,
    free_port,
    side_channel,
    transfer,
)

from vllm_xlayer.compat.engine import empty_device_cache
from vllm_xlayer.connector.host.accounts import check_accounts

pytestmark = pytest.mark.anywhere

NUM_TOKENS = 8
PROMPTS = random_prompts([100, 33, 200])
ROWS = [-(-len(prompt) // 16) for prompt in PROMPTS]
WHOLE_ROWS = sum(len(prompt) // 16 for prompt in PROMPTS)
NOT_HANDED_OVER = [None] * len(PROMPTS)
SETTINGS = dict(skip_tokenizer_init=True, max_model_len=512, seed=0, **ON_DEVICE)
BOTH = dict(
    kv_connector="MultiConnector", kv_role="kv_both", kv_load_failure_policy="recompute",
    kv_connector_extra_config={"connectors": [
        transfer(), dict(kv_connector="XLayerConnector", kv_role="kv_both",
                         kv_connector_extra_config={"cpu_bytes_to_use": 4 << 20}),
    ]},
)  # fmt: skip


class Pair:
    """A decode engine with tiers, here, and a prefill engine beside it."""

    def __init__(self, make_llm, model):
        with side_channel(free_port()):
            self.decode = make_llm(model, kv_transfer_config=BOTH, **SETTINGS)
        nixl, tiers = live_connector().sub_connectors
        self.reads, self.pool = nixl.connector_worker, tiers.pool
        self.tiers = tiers.connector_worker.worker
        _, self.tiers_scheduler = core_of(self.decode).scheduler.connector.sub_connectors
        self.prefill = OtherEngine(
            model, kv_transfer_config=transfer(), kv_cache_memory_bytes=4 << 20, **SETTINGS
        )
        self.answers = {f"r{i}": a for i, a in enumerate(vllm_greedy(self.decode, PROMPTS, NUM_TOKENS))}
        self.rows_read, land = 0, self.reads.wire.land

        def spy(begun, buffer, rows):
            self.rows_read += len(rows)
            return land(begun, buffer, rows)

        self.reads.wire.land = spy

    def begin(self, tiers_too=False):
        """Nothing is on the device, nor in the tiers if that is said; what is not loaded shows as NaN."""
        empty_device_cache(self.decode)
        if tiers_too:
            assert self.decode.reset_prefix_cache(reset_connector=True)
        self.pool.fill_(0xFF)
        self.reads.failures.clear()

    def ask(self, handed_over=NOT_HANDED_OVER):
        """(rows read from the other engine, rows loaded from host memory), once the answers are right and
        nothing is kept."""
        read, loaded = self.rows_read, self.tiers.rows_loaded
        add_all(self.decode, PROMPTS, handed_over, NUM_TOKENS)
        outputs = {name.split("-")[0]: output for name, output in finish(self.decode).items()}
        compare(outputs, self.answers)
        self.check_nothing_is_kept()
        return self.rows_read - read, self.tiers.rows_loaded - loaded

    def hand_over(self):
        return [self.prefill.prefill(prompt) for prompt in PROMPTS]

    def check_nothing_is_kept(self):
        empty_device_cache(self.decode)  # refused while a block is in use
        check_accounts(self.tiers_scheduler.connector_scheduler, idle=True)
        kept = len(self.reads.reads.quarantined) + len(self.reads.reads.reads) + len(self.reads.tags)
        kept += self.prefill.call(blocks_in_use)
        TALLY["leaked"] += kept
        assert kept == 0


@pytest.fixture(scope="module")
def pair(make_llm, tiny_llama):
    pair = Pair(make_llm, tiny_llama)
    yield pair
    pair.prefill.kill()


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
    handed_over = pair.hand_over()
    for params in handed_over:
        pair.prefill.call(flip_a_bit, params["remote_block_ids"][0][-1], 1001)
        TALLY["tries"] += 1
    assert pair.ask(handed_over) == (sum(ROWS), WHOLE_ROWS)
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
    handed_over = pair.hand_over()
    for params in handed_over:
        pair.prefill.call(flip_a_bit, params["remote_block_ids"][0][-1], 1001)
        TALLY["tries"] += 1
    copies = Copies(monkeypatch, lambda: pair.pool)
    copies.fail_loads = lambda n: True
    pair.ask(handed_over)
    assert copies.failed and pair.reads.failures == {"seal": len(PROMPTS)}

"""Rows from a prefill engine to a decode engine over NIXL: equal tokens, one descriptor a row, and faults.

Whatever happens to the other engine, its link or its memory: a request is answered, as one engine answers it,
and neither engine keeps a block.
"""

import signal
import time

import pytest

pytest.importorskip("nixl", reason="needs nixl: pip install vllm-xlayer[nixl]")

from faults import TALLY, add, compare, core_of, finish, live_connector
from model_fixture import ON_GPU, llama_config, random_prompts, save_random_model, vllm_greedy
from nixl_fixture import (
    ON_DEVICE,
    OtherEngine,
    abort_prompt,
    begin_read,
    blocks_in_use,
    blocks_kept,
    end_leases,
    flip_a_bit,
    forget_prompts,
    free_port,
    sampling,
    side_channel,
)
from nixl_fixture import transfer as transfer_config

from vllm_xlayer.connector.nixl.agent import ONE_THREAD
from vllm_xlayer.connector.nixl.staging import BESIDE_STEPS, IDLE

pytestmark = pytest.mark.anywhere

NUM_TOKENS = 8
PROMPTS = random_prompts([97, 33, 193, 17, 49, 241])
"""Whole blocks and one token more: then an engine with a prompt in its cache computes what one does that has
read it, the last token, and with NVFP4 the answers are those too."""
ALL = range(len(PROMPTS))
BLOCKS = [-(-len(prompt) // 16) for prompt in PROMPTS]
POOL_BLOCKS = 160
"""Of the prefill engine: few, so that they are soon given to other prompts."""
LEASE_SECONDS = 120
"""Longer than any test, on a busy machine too."""
if ON_GPU:  # where a batch's answers are those of one prompt only without NVFP4
    KINDS = {"TCP": ON_DEVICE, "direct": ON_DEVICE}
    LINKS = {"TCP": {"UCX_TLS": "tcp,cuda_copy"}, "direct": {}}
else:
    KINDS = {"TCP": dict(dtype="bfloat16"), "direct": dict(dtype="float32", kv_cache_dtype="nvfp4")}
    LINKS = {"TCP": {"UCX_TLS": "tcp"}, "direct": {}}
"""Variables of both engines: one pair has nothing but TCP, the other what UCX chooses."""


class Pair:
    """A decode engine here, a prefill engine beside it, and what the decode engine alone answers."""

    def __init__(self, make_llm, model, kind):
        self.kind = kind
        self.settings = dict(
            skip_tokenizer_init=True, max_model_len=512, seed=0, **KINDS[kind],
            kv_transfer_config=transfer_config(kv_lease_duration=LEASE_SECONDS),
        )  # fmt: skip
        with side_channel(free_port(), **LINKS[kind]):
            self.decode = make_llm(model, **self.settings)
        self.worker = live_connector().connector_worker
        row = self.worker.layout.row_bytes
        self.settings |= dict(kv_cache_memory_bytes=POOL_BLOCKS * row)
        self.prefill = OtherEngine(model, environment=LINKS[kind], **self.settings)
        self.gone = None
        self.computed = vllm_greedy(self.decode, PROMPTS, NUM_TOKENS)
        self.read = vllm_greedy(self.decode, PROMPTS, NUM_TOKENS)
        assert "kv_cache_dtype" in KINDS[kind] or self.read == self.computed
        self.forget()

    def kill_prefill(self):
        """Once; what it had said of all prompts is in `gone` afterwards."""
        if self.gone is None:
            self.gone = hand_over(self)
            self.prefill.kill()

    def forget(self):
        """So that what is not read shows as NaN."""
        self.settle()
        assert self.decode.reset_prefix_cache()
        self.worker.pool.fill_(0xFF)

    def ask(self, handed_over, which=ALL):
        """Adds requests; `handed_over`: what the prefill engine said of each of PROMPTS."""
        for i in which:
            params = dict(handed_over[i])
            add(self.decode, [f"r{i}"], [PROMPTS[i]], sampling(NUM_TOKENS, params))

    def check(self, handed_over, which=ALL, computed=False):
        """All in one batch; asserts that the answers are one engine's, from its cache or `computed`."""
        self.ask(handed_over, which)
        outputs = {name.split("-")[0]: output for name, output in finish(self.decode).items()}
        answers = self.computed if computed else self.read
        compare(outputs, {f"r{i}": answers[i] for i in which})

    def settle(self):
        """Steps until nothing is under way; counts what did not come back."""
        core, deadline = core_of(self.decode), time.monotonic() + 300
        while (
            core.scheduler.has_requests() or self.worker.reads.quarantined
        ) and time.monotonic() < deadline:
            self.decode.llm_engine.step()
            self.worker.reads.poll()
        pool = core.scheduler.kv_cache_manager.block_pool
        kept = {
            "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "buffers": 4 - len(self.worker.reads.free),
            "reads": len(self.worker.reads.reads) + len(self.worker._recving_metadata),
            "tags": len(self.worker.tags),
        }
        TALLY["leaked"] += sum(kept.values())
        assert not any(kept.values()), kept

    def check_failures(self):
        """All requests were computed, and each is counted. Rows of a GPU come without the other engine's
        help, also while it hangs, and for a while after its end: then any of them may have been read."""
        failed = sum(self.worker.failures.values())
        assert failed == len(PROMPTS) or (ON_GPU and failed < len(PROMPTS)), self.worker.failures
        self.worker.failures.clear()

    def check_while_it_hangs(self, handed_over):
        """All requests are computed, and counted. Or the rows came all the same: through shared memory UCX
        needs no help of the other engine, once it has found that way."""
        self.ask(handed_over)
        outputs = {name.split("-")[0]: output for name, output in finish(self.decode).items()}
        failed = sum(self.worker.failures.values())
        assert failed in (0, len(PROMPTS)), self.worker.failures
        answers = self.computed if failed else self.read
        compare(outputs, {f"r{i}": answers[i] for i in ALL})
        self.worker.failures.clear()

    def check_prefill_keeps_nothing(self, prefill):
        kept = prefill.call(blocks_in_use)
        TALLY["leaked"] += kept
        assert kept == 0


@pytest.fixture(scope="module", params=KINDS)
def pair(request, make_llm, tiny_llama):
    pair = Pair(make_llm, tiny_llama, request.param)
    yield pair
    pair.prefill.kill()


@pytest.fixture
def reads(pair, monkeypatch):
    """(rows, descriptors) of every transfer that NIXL is given."""
    made, agent = [], pair.worker.nixl_wrapper
    original = agent.make_prepped_xfer

    def spy(operation, local_list, local_ids, remote_list, remote_ids, **kwargs):
        assert operation == "READ" and len(local_ids) == len(remote_ids)
        made.append(len(local_ids))
        return original(operation, local_list, local_ids, remote_list, remote_ids, **kwargs)

    monkeypatch.setattr(agent, "make_prepped_xfer", spy)
    return made


def hand_over(pair, prefill=None):
    pair.forget()
    return [(prefill or pair.prefill).prefill(prompt) for prompt in PROMPTS]


@pytest.mark.fault("hand-over: TCP only")
def test_equal_tokens_with_one_descriptor_a_row(pair, reads, caplog_vllm):
    """The first: where two engines have only TCP, it is said when they meet."""
    pair.check(hand_over(pair))
    said = [text for text in caplog_vllm.messages if "come over TCP" in text]
    if tls := LINKS[pair.kind].get("UCX_TLS"):
        assert len(said) == 1 and f"UCX_TLS={tls} there allows nothing else: unset it" in said[0]
        TALLY["tries"] += 1
    else:
        assert not said
    # And one for the table of seals.
    assert sorted(reads) == sorted(blocks + 1 for blocks in BLOCKS)
    assert pair.worker.failures == {}
    assert pair.worker.nixl_wrapper.backend_options["UCX"] == ONE_THREAD
    pair.settle()
    pair.check_prefill_keeps_nothing(pair.prefill)


def test_what_the_decode_engine_has_is_not_read(pair, reads):
    pair.check(hand_over(pair))
    del reads[:]
    pair.settle()
    pair.check([pair.prefill.prefill(prompt) for prompt in PROMPTS])
    read = sum(max(0, count - 1) for count in reads)
    assert read < len(PROMPTS) * 2, "at most the last blocks"
    pair.settle()
    pair.check_prefill_keeps_nothing(pair.prefill)


def test_a_step_that_computes_nothing_waits_longer_for_rows(pair, monkeypatch):
    """Others' tokens wait for a poll; where there are none, rows wait for the steps between polls."""
    handed_over, stays, poll = hand_over(pair), [], pair.worker.reads.poll
    with monkeypatch.context() as patch:
        patch.setattr(pair.worker.wire, "state", lambda handle: "PROC")
        patch.setattr(pair.worker.reads, "poll", lambda: stays.append(pair.worker.reads.stay) or poll())
        pair.ask(handed_over, [0])
        deadline = time.monotonic() + 60
        while not pair.worker.reads.chunks and time.monotonic() < deadline:  # they have not met yet
            pair.decode.llm_engine.step()
        pair.decode.llm_engine.step()
        assert stays[-1] == IDLE and pair.worker.reads.chunks
        pair.decode.llm_engine.add_request("other", {"prompt_token_ids": PROMPTS[1]}, sampling(4))
        pair.decode.llm_engine.step()
        assert BESIDE_STEPS in stays[-2:]
    finish(pair.decode)
    pair.prefill.call(end_leases)  # nobody has asked for the other prompts
    pair.settle()
    pair.check_prefill_keeps_nothing(pair.prefill)


@pytest.mark.fault("hand-over: torn row")
def test_a_torn_row_is_found_and_the_prompt_computed(pair):
    handed_over = hand_over(pair)
    for params, blocks in zip(handed_over, BLOCKS, strict=True):
        (ids,) = params["remote_block_ids"]
        assert len(ids) == blocks
        pair.prefill.call(flip_a_bit, ids[-1], 1001)
        TALLY["tries"] += 1
    pair.check(handed_over, computed=True)
    assert sum(pair.worker.failures.values()) == len(PROMPTS)
    pair.worker.failures.clear()
    pair.settle()
    pair.check_prefill_keeps_nothing(pair.prefill)


@pytest.mark.fault("hand-over: stale row")
def test_rows_of_other_prompts_are_found_after_the_lease_has_ended(pair):
    handed_over = hand_over(pair)
    pair.prefill.call(forget_prompts)
    TALLY["tries"] += len(PROMPTS)
    pair.check(handed_over, computed=True)
    assert sum(pair.worker.failures.values()) == len(PROMPTS)
    pair.worker.failures.clear()
    pair.settle()


@pytest.mark.fault("hand-over: abort in the prefill engine")
@pytest.mark.parametrize("steps", [0, 1])
def test_the_prefill_engines_client_goes_away(pair, steps):
    """Before its prompt is computed, and after: its rows are not kept for anybody."""
    TALLY["tries"] += 1
    assert pair.prefill.call(abort_prompt, PROMPTS[5], steps) == 0
    pair.check(hand_over(pair))
    assert not pair.worker.failures
    pair.settle()
    pair.check_prefill_keeps_nothing(pair.prefill)


class TestTheOtherEngine:
    """What happens to it or to the link."""

    @pytest.fixture(autouse=True)
    def one_kind(self, request):
        if request.node.callspec.params["pair"] != "direct":
            pytest.skip("is tried with one pair; on a CPU with NVFP4, whose computed answers are others")

    @pytest.mark.fault("hand-over: prefill engine hung")
    def test_it_hangs(self, pair, monkeypatch):
        pair.check(hand_over(pair))  # they have met
        handed_over = hand_over(pair)
        pair.prefill.stop(signal.SIGSTOP)
        TALLY["tries"] += 1
        try:
            with monkeypatch.context() as patch:
                patch.setattr(pair.worker.reads, "timeout", 1.0)
                pair.check_while_it_hangs(handed_over)
        finally:  # else all tests after this one wait for it
            pair.prefill.go_on()
        pair.settle()
        pair.check_prefill_keeps_nothing(pair.prefill)
        pair.check(hand_over(pair))
        assert not pair.worker.failures, "it is trusted again"

    @pytest.mark.fault("hand-over: link down")
    def test_the_link_breaks(self, pair, monkeypatch):
        handed_over = hand_over(pair)

        def broken(handle):
            TALLY["tries"] += 1
            raise RuntimeError("injected: link down")

        with monkeypatch.context() as patch:
            patch.setattr(pair.worker.nixl_wrapper, "check_xfer_state", broken)
            pair.check(handed_over, computed=True)
        assert sum(pair.worker.failures.values()) == len(PROMPTS)
        pair.worker.failures.clear()
        pair.settle()
        pair.check_prefill_keeps_nothing(pair.prefill)

    @pytest.mark.fault("hand-over: abort while reading")
    def test_the_client_goes_away(self, pair, monkeypatch):
        handed_over = hand_over(pair)
        original, engine = pair.worker.wire.state, pair.decode.llm_engine
        with monkeypatch.context() as patch:
            patch.setattr(pair.worker.wire, "state", lambda handle: "PROC")
            pair.ask(handed_over)
            for _ in range(5):
                engine.step()
            assert pair.worker.reads.chunks
            TALLY["tries"] += 1
            engine.abort_request([f"r{i}" for i in range(len(PROMPTS))])
            for _ in range(5):
                engine.step()
        assert pair.worker.wire.state == original
        pair.settle()
        pair.check(hand_over(pair))
        pair.settle()
        pair.check_prefill_keeps_nothing(pair.prefill)

    @pytest.mark.fault("hand-over: reset_prefix_cache while reading")
    def test_the_prefix_cache_is_reset(self, pair, monkeypatch):
        handed_over = hand_over(pair)
        with monkeypatch.context() as patch:
            patch.setattr(pair.worker.wire, "state", lambda handle: "PROC")
            pair.ask(handed_over)
            for _ in range(5):
                pair.decode.llm_engine.step()
            assert pair.worker.reads.chunks
            TALLY["tries"] += 1
            assert not pair.decode.reset_prefix_cache(), "blocks that are written are not given away"
        outputs = {name.split("-")[0]: output for name, output in finish(pair.decode).items()}
        compare(outputs, {f"r{i}": pair.read[i] for i in ALL})
        assert not pair.worker.failures
        pair.settle()
        pair.check_prefill_keeps_nothing(pair.prefill)

    @pytest.mark.fault("hand-over: decode engine killed while reading")
    def test_the_decode_engine_is_killed(self, pair, tiny_llama):
        """Its rows are kept for it until its lease ends, and no longer; others are served meanwhile."""
        said = pair.prefill.prefill(PROMPTS[5])
        decode = OtherEngine(tiny_llama, **pair.settings)
        try:
            assert decode.call(begin_read, PROMPTS[5], said) == BLOCKS[5]
        finally:
            decode.kill()
        TALLY["tries"] += 1
        assert pair.prefill.call(blocks_kept) == BLOCKS[5], "nobody has said that they are read"
        pair.check(hand_over(pair))
        assert not pair.worker.failures
        pair.prefill.call(end_leases)
        pair.settle()
        pair.check_prefill_keeps_nothing(pair.prefill)

    @pytest.mark.fault("hand-over: prefill engine killed")
    def test_it_is_killed(self, pair):
        """The pair has no prefill engine after it."""
        pair.kill_prefill()
        TALLY["tries"] += 1
        pair.check(pair.gone, computed=True)
        pair.check_failures()
        pair.settle()

    @pytest.mark.fault("hand-over: prefill engine restarted with other weights")
    def test_another_one_is_at_its_address(self, pair, tmp_path):
        pair.kill_prefill()
        other = save_random_model(llama_config(rope_theta=5e5), tmp_path)
        restarted = OtherEngine(other, pair.prefill.port, **pair.settings)
        try:
            pair.check(hand_over(pair, restarted), computed=True)
            TALLY["tries"] += 1
            pair.forget()
            pair.check(pair.gone, computed=True)  # what the one that is gone has said
            TALLY["tries"] += 1
        finally:
            restarted.kill()
        pair.settle()

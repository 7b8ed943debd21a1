"""Requests whose kv_transfer_params are not what a prefill engine says are computed, and the engine goes on.

Each would end the engine, or wait for ever, in vLLM's own scheduler or worker.
"""

import pytest

pytest.importorskip("nixl", reason="needs nixl: pip install vllm-xlayer[nixl]")

from faults import compare, core_of, finish, live_connector, step_until
from metrics_fixture import record_every_step, scrape
from model_fixture import random_prompts, vllm_greedy
from nixl_fixture import (
    CONNECTOR,
    ON_DEVICE,
    PREFILL,
    OtherEngine,
    blocks_in_use,
    end_leases,
    free_port,
    sampling,
    side_channel,
    transfer,
)
from nixl_tiers_fixture import tiered_connector
from vllm.v1.engine import EngineCoreRequest

from vllm_xlayer.compat.engine import empty_device_cache

pytestmark = pytest.mark.anywhere

NUM_TOKENS = 4
PROMPTS = random_prompts([97, 96, 33])
"""The second ends with a block."""
BLOCKS = 7
CONNECTORS = {CONNECTOR: transfer(), "XLayerTieredNixlConnector": tiered_connector(4 << 20)}

CHANGES = {
    **{f"no {name}": {name: "missing"} for name in (
        "remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids",
    )},
    "engine id": dict(remote_engine_id=["e"]),
    "request id": dict(remote_request_id=7),
    "host": dict(remote_host={"name": 1}),
    "port": dict(remote_port="none"),
    "no lists": dict(remote_block_ids=list(range(1, BLOCKS + 1))),
    "text": dict(remote_block_ids="1234567"),
    "texts": dict(remote_block_ids=[["1"] * BLOCKS]),
    "large": dict(remote_block_ids=[[1 << 63] * BLOCKS]),
    "more": dict(remote_block_ids=[[*range(1, BLOCKS + 2)]]),
    "fewer": dict(remote_block_ids=[[*range(1, BLOCKS)]]),
    "no blocks": dict(remote_block_ids=[[]]),
    "two groups": dict(remote_block_ids=[[*range(1, BLOCKS + 1)]] * 2),
    "ranks": dict(tp_size=None),
    "many ranks": dict(tp_size=1 << 40),
    "stages": dict(pp_size="2"),
    "context": dict(dcp_size=2),
    "generation": dict(remote_registration_generation="new"),
    "flag": dict(do_remote_prefill="yes"),
    "both": dict(do_remote_decode=True),
}  # fmt: skip
"""Of what the prefill engine says of the first prompt."""
OTHERS = {
    "nothing else": dict(do_remote_prefill=True),
    "rows to read beside decode": dict(
        do_remote_decode=True, remote_block_ids=[[1]], remote_engine_id="e", remote_request_id="r",
        remote_host="127.0.0.1", remote_port=1, remote_num_tokens=97,
    ),
    "odd decode": dict(do_remote_decode="yes"),
}  # fmt: skip


def changed(said, change):
    return {name: value for name, value in (said | change).items() if value != "missing"}


class Engines:
    def __init__(self, make_llm, model, connector):
        settings = dict(skip_tokenizer_init=True, max_model_len=512, seed=0, **ON_DEVICE)
        with side_channel(free_port()):
            self.decode = make_llm(
                model, kv_transfer_config=CONNECTORS[connector], disable_log_stats=False, **settings
            )
        record_every_step(self.decode)
        one = live_connector()
        self.worker = getattr(one, "link", one).connector_worker
        scheduler = core_of(self.decode).scheduler.connector
        self.link = getattr(scheduler, "link", scheduler).connector_scheduler
        self.prefill = OtherEngine(model, kv_transfer_config=transfer(), **settings)
        self.answers = vllm_greedy(self.decode, PROMPTS, NUM_TOKENS)

    def begin(self):
        """Nothing is cached here, and what is not loaded shows as NaN."""
        empty_device_cache(self.decode)
        self.decode.reset_prefix_cache(reset_connector=True)
        self.worker.pool.fill_(0xFF)
        self.link.warned.clear()
        return scrape("xlayer_handover_")

    def ask(self, asked, prompt=0):
        """asked: name -> kv_transfer_params. All in one batch; asserts that the answers are right."""
        for name, params in asked.items():
            engine = self.decode.llm_engine
            engine.add_request(name, {"prompt_token_ids": PROMPTS[prompt]}, sampling(NUM_TOKENS, params))
        outputs = {name.rpartition("-")[0] or name: one for name, one in finish(self.decode).items()}
        compare(outputs, dict.fromkeys(asked, self.answers[prompt]))

    def settle(self):
        """Asserts that nothing is kept, but for what a prefill engine waits for a client to fetch."""
        for _ in range(2):
            self.decode.llm_engine.step()
        leases = self.worker._reqs_to_send  # of requests that asked for a decode engine
        leases.update(dict.fromkeys(leases, 0.0))
        kept = blocks_in_use(self.decode) + len(self.worker.tags) + len(self.link._heartbeat_req_engine)
        self.prefill.call(end_leases)
        kept += self.prefill.call(blocks_in_use)
        assert kept == 0


@pytest.fixture(scope="module", params=CONNECTORS)
def engines(request, make_llm, tiny_llama):
    engines = Engines(make_llm, tiny_llama, request.param)
    yield engines
    engines.prefill.kill()


def rows_read(before):
    name = "xlayer_handover_rows_total"
    return scrape("xlayer_handover_")[name] - before.get(name, 0)


def refused(before):
    name = "xlayer_handover_failures_total{reason=params}"
    return scrape("xlayer_handover_")[name] - before.get(name, 0)


def test_they_are_computed_and_named_once(engines, caplog_vllm):
    before, said = engines.begin(), engines.prefill.prefill(PROMPTS[0])
    asked = {name: changed(said, change) for name, change in CHANGES.items()} | OTHERS
    for again in ("", " again"):
        engines.ask({name + again: dict(params) for name, params in asked.items()})
    assert rows_read(before) == 0 and refused(before) == 2 * len(asked)
    lines = [text for text in caplog_vllm.messages if "kv_transfer_params: " in text]
    kinds = {text.partition("kv_transfer_params: ")[2].partition(", got")[0] for text in lines}
    assert len(lines) == len(kinds) == len(engines.link.warned) and len(kinds) < len(asked)
    engines.settle()
    # And one that fits is read.
    engines.begin()
    engines.ask({"fits": engines.prefill.prefill(PROMPTS[0])})
    assert rows_read(before) == BLOCKS and refused(before) == 2 * len(asked)
    engines.settle()


@pytest.mark.parametrize("prompt", range(len(PROMPTS)))
def test_what_a_prefill_engine_says_fits(engines, prompt):
    before = engines.begin()
    engines.ask({"fits": engines.prefill.prefill(PROMPTS[prompt])}, prompt)
    assert rows_read(before) == -(-len(PROMPTS[prompt]) // 16) and refused(before) == 0
    engines.settle()


def test_what_only_the_other_engine_can_tell(engines):
    """Such fields fit: it is asked, by nobody's name or in vain, and the prompt is computed."""
    before, said = engines.begin(), engines.prefill.prefill(PROMPTS[0])
    changes = {
        "unknown host": dict(remote_host="no such host", remote_engine_id="a"),
        "unknown name": dict(remote_host="nowhere.invalid", remote_engine_id="b"),
        "unknown engine": dict(remote_engine_id="c"),
        "this engine": dict(
            remote_engine_id=engines.link.engine_id, remote_port=engines.link.side_channel_port
        ),
        "outside its pool": dict(remote_block_ids=[[(1 << 31) - 1] * BLOCKS]),
        "others' blocks": dict(remote_block_ids=[[0] * BLOCKS]),
        "unknown request": dict(remote_request_id="HB:nobody:x"),
    }
    engines.ask({name: changed(said, change) for name, change in changes.items()})
    assert refused(before) == 0
    engines.settle()
    engines.begin()
    engines.ask({"fits": engines.prefill.prefill(PROMPTS[0])})
    assert not engines.link.warned
    engines.settle()


@pytest.mark.parametrize("change", [{}, {"remote_block_ids": "missing"}], ids=["fits", "does not"])
def test_a_request_that_was_rejected_before_it_began(engines, change):
    """vLLM's front end hands on its kv_transfer_params with another prompt, and aborts it at once: where they
    fit, the prefill engine is told that it need not keep its blocks."""
    before, said = engines.begin(), engines.prefill.prefill(PROMPTS[0])
    told = []
    with pytest.MonkeyPatch.context() as patch:
        send = engines.worker.nixl_wrapper.send_notif
        patch.setattr(
            engines.worker.nixl_wrapper,
            "send_notif",
            lambda *args, notif_msg: told.append(notif_msg) or send(*args, notif_msg=notif_msg),
        )
        core = core_of(engines.decode)
        request = EngineCoreRequest(
            request_id="rejected", prompt_token_ids=[0], mm_features=None,
            sampling_params=sampling(1, changed(said, change)), pooling_params=None, arrival_time=0.0,
            lora_request=None, cache_salt=None, data_parallel_rank=None, abort_immediately=True,
        )  # fmt: skip
        core.add_request(*core.preprocess_add_request(request))
        engines.ask({"another": None})
        if not change:
            step_until(engines.decode, lambda: told)
            assert engines.prefill.call(blocks_in_use) == 0
    assert refused(before) == bool(change) and bool(told) == (not change)
    engines.settle()


@pytest.mark.parametrize("params", [0, [], "text", 7], ids=repr)
def test_no_object_at_all(engines, params):
    """As a request's vllm_xargs can bring it; what is true, vLLM's front end refuses by itself."""
    before, core = engines.begin(), core_of(engines.decode)
    settings = sampling(NUM_TOKENS)
    settings.extra_args = {"kv_transfer_params": params}
    request = EngineCoreRequest(
        request_id="odd", prompt_token_ids=PROMPTS[2], mm_features=None, sampling_params=settings,
        pooling_params=None, arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None,
    )  # fmt: skip
    core.add_request(*core.preprocess_add_request(request))
    engines.ask({"another": dict(PREFILL)}, 2)
    assert refused(before) == 1
    engines.settle()

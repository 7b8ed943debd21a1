"""Hybrids with XLayerConnector: what comes back from the tiers answers as what is cached on the device.

Equal tokens and logprobs, and as many tokens left to compute; of LFM2, whose short convolutions keep a state.
Whatever is not restored is 0xFF, which is a NaN in every dtype.
"""

import pytest
from faults import greedy, settle
from hybrid_fixture import (
    CONFIGS,
    answers_and_hits,
    check_against_transformers,
    fill_memory,
    groups,
    save_hybrid,
)
from model_fixture import random_prompts

from vllm_xlayer.connector.scheduler import RowConnectorScheduler

NUM_TOKENS, BLOCK = 12, 16
LENGTHS = [3, 15, 16, 17, 31, 32, 33, 100, 160, 161]
"""Shorter than a block, whole blocks, one token less and more."""
PROMPTS = random_prompts(LENGTHS, seed=7)
SETTINGS = {"auto": {}, "nvfp4": {"kv_cache_dtype": "nvfp4"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hybrid("lfm2", tmp_path_factory.mktemp("lfm2"))


@pytest.fixture(autouse=True)
def checked_accounts(monkeypatch):
    """After every step of every engine here the accounts of the host tier must balance."""
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")


def start(make_llm, folder, kind, extra=None, **settings):
    """An engine whose memory is 0xFF; with the connector unless extra is None."""
    defaults = dict(max_num_batched_tokens=64, max_num_seqs=4, kv_cache_memory_bytes=8 << 20)
    if extra is not None:
        settings["kv_transfer_config"] = dict(
            kv_connector="XLayerConnector", kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": 16 << 20} | extra,
        )  # fmt: skip
    llm = make_llm(folder, **(defaults | SETTINGS[kind] | settings))
    fill_memory(llm, 0xFF)
    return llm


def live_connector():
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def rows_loaded():
    return live_connector().connector_worker.worker.rows_loaded


def empty_device(llm):
    assert llm.reset_prefix_cache()
    fill_memory(llm, 0xFF)


def one_by_one(llm, prompts, num_tokens=NUM_TOKENS):
    """Answers that do not depend on who shares a batch."""
    return [answers_and_hits(llm, [prompt], num_tokens)[0] for prompt in prompts]


def fill(llm, prompts):
    """Computes prompts twice: of one of whole blocks vLLM 0.31 keeps no state to go on from at first."""
    for _ in range(2):
        one_by_one(llm, prompts, 1)


def stock_answers(make_llm, folder, kind, prompts, step=BLOCK, **settings):
    """Answers of an engine without connector, from prompts that are cached on the device."""
    llm = start(make_llm, folder, kind, **settings)
    fill(llm, prompts)
    found = one_by_one(llm, prompts)
    for prompt, (*_, hit) in zip(prompts, found, strict=True):
        could = (len(prompt) - 1) // step * step
        assert hit in ((could,) if len(prompt) % step else (0, could))
    return found


@pytest.fixture(scope="module", params=SETTINGS)
def cached(request, make_llm, folder):
    """(kind, answers of an engine without connector from prompts that are cached on the device)."""
    return request.param, stock_answers(make_llm, folder, request.param, PROMPTS)


@pytest.fixture(scope="module")
def served(cached, make_llm, folder):
    """(engine with the connector that has answered all prompts, answers of those cached on the device)."""
    kind, answers = cached
    llm = start(make_llm, folder, kind, {})
    fill(llm, PROMPTS)
    return llm, answers


def test_rows_hold_what_a_group_uses(served):
    layout = live_connector().layout
    kinds = [group.kinds for group in layout.groups]
    assert sorted(kinds).count(("MambaSpec",)) == 2 and len(kinds) == 3 and layout.uniform is None
    used = live_connector().connector_worker.worker.used_bytes
    assert used == [layout.used_bytes(i) for i in range(3)] and max(used) <= layout.row_bytes


def test_restored_from_host_is_as_cached(served):
    llm, answers = served
    empty_device(llm)
    before = rows_loaded()
    assert one_by_one(llm, PROMPTS) == answers
    # Of the attention group every block, of each group with states the last one.
    assert rows_loaded() - before == sum(hit // BLOCK + 2 for *_, hit in answers if hit)


def test_in_one_batch_and_in_other_orders(served):
    llm, answers = served
    for shift in (0, 3, 7):
        empty_device(llm)
        order = [(i + shift) % len(PROMPTS) for i in range(len(PROMPTS))]
        found = answers_and_hits(llm, [PROMPTS[i] for i in order], NUM_TOKENS)
        assert [(answer[0], answer[2]) for answer in found] == [(answers[i][0], answers[i][2]) for i in order]


@pytest.mark.parametrize("local", [16, 48, 64, 96, 128])
def test_a_local_prefix_and_the_rest_from_the_host(served, local):
    llm, answers = served
    if llm.llm_engine.vllm_config.cache_config.cache_dtype == "nvfp4" and local in (48, 96):
        pytest.skip("NVFP4: a prefix in other chunks has other values, as each chunk sees itself unquantised")
    at = LENGTHS.index(160)
    assert llm.reset_prefix_cache(reset_connector=True)  # what other tests have stored, in other chunks
    fill(llm, PROMPTS)
    empty_device(llm)
    one_by_one(llm, [PROMPTS[at][: local + 1]], 1)  # brings this much to the device
    before = rows_loaded()
    assert one_by_one(llm, [PROMPTS[at]]) == [answers[at]]
    assert rows_loaded() - before == (answers[at][2] - local) // BLOCK + 2


def test_every_groups_rows_matter(served):
    """The power check: a wrong bit in every byte of one group's pages in the host must show."""
    llm, answers = served
    at = LENGTHS.index(100)
    scheduler = live_connector_scheduler(llm)
    host = live_connector().connector_worker.worker.host
    for group in range(len(groups(llm))):
        empty_device(llm)
        chunks = [
            block.chunk_id
            for key, block in scheduler.manager.host.chunks().items()
            if key in keys_of(scheduler, llm, PROMPTS[at], group)
        ]
        assert chunks
        saved = host[chunks].clone()
        for page in live_connector().layout.groups[group].pages:
            host[chunks, page.offset : page.end] ^= 0x10
        ((_, logprobs, hit),) = one_by_one(llm, [PROMPTS[at]])
        host[chunks] = saved
        assert hit == answers[at][2] and logprobs != answers[at][1], f"group {group}"
    empty_device(llm)
    assert one_by_one(llm, [PROMPTS[at]]) == [answers[at]]


def live_connector_scheduler(llm) -> RowConnectorScheduler:
    return llm.llm_engine.engine_core.engine_core.scheduler.connector.connector_scheduler


def keys_of(scheduler, llm, prompt, group):
    """Keys of a prompt's whole blocks in one group, as a request has them."""
    from vllm import SamplingParams
    from vllm.v1.kv_offload.base import make_offload_key
    from vllm.v1.request import Request

    core = llm.llm_engine.engine_core.engine_core
    request = Request("keys", prompt, SamplingParams(), None, block_hasher=core.request_block_hasher)
    return {make_offload_key(hash_, group) for hash_ in request.block_hashes}


def test_restored_from_disk_after_a_restart(cached, make_llm, folder, tmp_path):
    kind, answers = cached
    disk = dict(disk_path=str(tmp_path / "tier"), disk_bytes_to_use=64 << 20)
    llm = start(make_llm, folder, kind, disk)
    fill(llm, PROMPTS)
    assert one_by_one(llm, PROMPTS) == answers
    llm = start(make_llm, folder, kind, disk)
    assert one_by_one(llm, PROMPTS) == answers
    assert live_connector_scheduler(llm).manager.disk.counts["hit"] > 0


@pytest.mark.parametrize("kind", SETTINGS)
def test_prompts_shorter_than_a_block_with_a_match_unit(make_llm, folder, kind):
    """Blocks of 64 tokens, found in steps of 16: parts of a block are stored and restored."""
    lengths = [15, 17, 40, 64, 65, 90, 129, 150]
    prompts = random_prompts(lengths, seed=11)
    unit = dict(block_size=64, prefix_match_unit=16, max_num_batched_tokens=512)
    answers = stock_answers(make_llm, folder, kind, prompts, 16, **unit)
    llm = start(make_llm, folder, kind, {}, **unit)
    fill(llm, prompts)
    assert one_by_one(llm, prompts) == answers
    if kind == "auto":
        check_against_transformers(folder, prompts, [answer[:2] for answer in answers], 5e-4)
    empty_device(llm)
    lookups = live_connector_scheduler(llm).activity.lookups
    before = lookups.hits
    assert one_by_one(llm, prompts) == answers
    assert lookups.hits - before == sum(
        hit for *_, hit in answers
    )  # tokens: most prompts have less than a block


@pytest.mark.parametrize("most", [0, 16, 64, 80])
def test_a_request_may_want_less_stored_than_its_parts_of_blocks(make_llm, folder, most):
    prompts = random_prompts([40, 100, 161], seed=12)
    llm = start(make_llm, folder, "auto", {}, block_size=64, prefix_match_unit=16, max_num_batched_tokens=512)
    sampling = greedy(4)
    sampling.extra_args = {"kv_transfer_params": {"max_offload_tokens": most}}
    for prompt in prompts:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 4
    settle(llm)
    empty_device(llm)
    hits = [hit for *_, hit in one_by_one(llm, prompts)]
    assert max(hits) <= most and any(hits) == (most >= 64)


def test_small_caches_preemption_and_eviction(make_llm, folder):
    """Rows change owners all the time, between groups too, on the device and in the host."""
    prompts = random_prompts([60, 61, 62, 63, 90, 91], seed=13)
    llm = start(make_llm, folder, "auto", enable_prefix_caching=False)
    answers = [answer[0] for answer in one_by_one(llm, prompts, 24)]
    extra = dict(cpu_bytes_to_use=40 * row_bytes(llm))
    llm = start(make_llm, folder, "auto", extra, num_gpu_blocks_override=34, max_model_len=128)
    for shift in range(6):
        order = prompts[shift:] + prompts[:shift]
        found = answers_and_hits(llm, order, 24)
        assert [answer[0] for answer in found] == answers[shift:] + answers[:shift]
    assert rows_loaded() > 0


def row_bytes(llm):
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    return config.kv_cache_tensors[0].size // config.num_blocks


def test_without_prefix_caching_the_connector_refuses(make_llm, folder):
    with pytest.raises(
        ValueError, match=r"states can be found again only with prefix caching .* set --enable"
    ):
        start(make_llm, folder, "auto", {}, enable_prefix_caching=False)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h"])
def test_other_states_restored_are_as_cached(make_llm, tmp_path, name, kind):
    """Gated delta nets and Mamba 2, whose blocks are larger; from the host, with NVFP4 from the disk too."""
    sizes = dict(kv_cache_memory_bytes=32 << 20, max_num_batched_tokens=512, max_model_len=1024)
    sizes["dtype"] = CONFIGS[name]["dtype"]
    disk = dict(disk_path=str(tmp_path / "tier"), disk_bytes_to_use=64 << 20) if kind == "nvfp4" else {}
    folder = save_hybrid(name, tmp_path / "model")
    llm = start(make_llm, folder, kind, disk, **sizes)
    block = llm.llm_engine.vllm_config.cache_config.block_size
    prompts = random_prompts([block + 1, 2 * block + 5, 3 * block - 1], seed=3)
    one_by_one(llm, prompts, 1)
    cached = one_by_one(llm, prompts)
    assert [hit for *_, hit in cached] == [block, 2 * block, 2 * block]
    empty_device(llm)
    before = rows_loaded()
    assert one_by_one(llm, prompts) == cached and rows_loaded() > before
    if disk:
        llm = start(make_llm, folder, kind, disk, **sizes)
        assert one_by_one(llm, prompts) == cached
        assert live_connector_scheduler(llm).manager.disk.counts["hit"] > 0

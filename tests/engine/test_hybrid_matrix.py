"""Hybrids with XLayerConnector: one group's rows are lost and another's kept, prompts part, loads end early.

Answers, and how much of a prompt was found, must be those of an engine without connector whose device cache
holds all; where something is lost, those of the prompt computed anew, in 16 bits.
"""

import pytest
import torch
from hybrid_fixture import answers_and_hits, groups, layer_tensors, save_hybrid
from model_fixture import random_prompts
from test_hybrid_connector import (
    SETTINGS,
    empty_device,
    fill,
    keys_of,
    live_connector_scheduler,
    one_by_one,
    row_bytes,
    rows_loaded,
    start,
    stock_answers,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler

from vllm_xlayer.connector.scheduler import RowConnectorScheduler

BLOCK = 16
PROMPTS = random_prompts([100, 160, 161], seed=17)
STEM, *ENDS = random_prompts([100, 30, 45, 20], seed=19)
PARTED = [STEM + end for end in ENDS]
"""Prompts that part after 100 tokens, within a block."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hybrid("lfm2", tmp_path_factory.mktemp("lfm2"))


@pytest.fixture(autouse=True)
def checked_accounts(monkeypatch):
    """After every step of every engine here the accounts of the host tier must balance."""
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")


@pytest.fixture(scope="module")
def cached(make_llm, folder):
    """Answers of an engine without connector, in 16 bits, from prompts that are cached on the device."""
    return stock_answers(make_llm, folder, "auto", PROMPTS)


@pytest.fixture(scope="module")
def engine(make_llm, folder, cached):
    return start(make_llm, folder, "auto", {})


@pytest.fixture
def llm(engine):
    """The engine, which has computed all prompts and nothing else."""
    assert engine.reset_prefix_cache(reset_connector=True)
    fill(engine, PROMPTS)
    return engine


def tokens(answers):
    return [answer[0] for answer in answers]


def forget(llm, prompt, group):
    """The host's copies of one group's blocks of a prompt are gone, as when the tier needs their room."""
    manager = live_connector_scheduler(llm).manager.host
    keys = keys_of(live_connector_scheduler(llm), llm, prompt, group) & set(manager.chunks())
    assert keys
    for key in keys:
        assert manager._forget(key)


def evict(llm, prompt, group):
    """The device's copies of one group's blocks of a prompt are gone, and their memory is 0xFF."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    core = llm.llm_engine.engine_core.engine_core
    request = Request("evicted", prompt, SamplingParams(), None, block_hasher=core.request_block_hasher)
    pool = core.scheduler.kv_cache_manager.block_pool
    found = [pool.get_cached_block(hash_, [group]) for hash_ in request.block_hashes]
    blocks = {block.block_id for block, *_ in filter(None, found)}
    assert blocks
    pool.evict_blocks(blocks)
    memory = torch.empty(0, dtype=torch.uint8)
    memory.set_(layer_tensors(llm, groups(llm)[group][0])[0].untyped_storage())
    memory.view(-1, row_bytes(llm))[sorted(blocks)] = 0xFF


@pytest.mark.parametrize("group", range(3))
def test_a_groups_copies_in_the_host_are_lost(llm, cached, group):
    assert len(groups(llm)) == 3
    for prompt, answer in zip(PROMPTS, cached, strict=True):
        empty_device(llm)
        forget(llm, prompt, group)
        (found,) = one_by_one(llm, [prompt])
        assert found[0] == answer[0] and found[2] < answer[2]
        # It was computed, stored again, and is found as before.
        empty_device(llm)
        fill(llm, [prompt])
        empty_device(llm)
        assert one_by_one(llm, [prompt]) == [answer]


@pytest.mark.parametrize("group", range(3))
def test_a_groups_blocks_on_the_device_are_lost(llm, cached, group):
    """States are there and keys are not, or keys and not the states: the rest comes from the host."""
    before = rows_loaded()
    for prompt, answer in zip(PROMPTS, cached, strict=True):
        evict(llm, prompt, group)
        assert one_by_one(llm, [prompt]) == [answer]
    assert rows_loaded() > before


def add(llm, name, prompt):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_load_is_cut_off(llm, cached, steps):
    """While rows of all groups are on their way the requests are aborted."""
    engine = llm.llm_engine
    empty_device(llm)
    for i, prompt in enumerate(PROMPTS):
        add(llm, f"cut {i}", prompt)
    before = rows_loaded()
    for _ in range(steps):
        engine.step()
    engine.abort_request([f"cut {i}" for i in range(len(PROMPTS))])
    while engine.has_unfinished_requests():
        engine.step()
    one_by_one(llm, [STEM], 1)  # what was on its way has come
    assert rows_loaded() > before
    empty_device(llm)
    assert one_by_one(llm, PROMPTS) == cached


def test_as_much_is_found_as_by_vllms_own_lookup(llm, cached, monkeypatch):
    """Ours asks the tier for many keys at once and reckons with a prompt's last token."""
    beyond = [prompt + tail for prompt, tail in zip(PROMPTS, ENDS, strict=True)]
    asked = [*PROMPTS, *(prompt[:n] for prompt in PROMPTS for n in (15, 16, 17, 64, 65, 96, 97)), *beyond]

    def hits():
        found = []
        for prompt in asked:
            empty_device(llm)
            found += [hit for *_, hit in one_by_one(llm, [prompt], 1)]
        return found

    # Asking stores, too: the second time all that is asked has been stored.
    hits()
    ours = hits()
    for name in ("get_num_new_matched_tokens", "_maximal_prefix_lookup"):
        monkeypatch.setattr(RowConnectorScheduler, name, getattr(OffloadingConnectorScheduler, name))
    assert hits() == ours and max(ours) == 192


# Engines of their own: the one above ends with the first of these.


def test_prompts_that_part_within_a_block(make_llm, folder):
    """Of the last of them is found what two others share, on the device as in the host."""
    first, second, third = PARTED
    found = {}
    for extra in (None, {}):
        llm = start(make_llm, folder, "auto", extra)
        for prompt in (first, second, first, second):
            one_by_one(llm, [prompt], 1)
        if extra is not None:
            empty_device(llm)
        found[extra is None] = one_by_one(llm, [third])
    assert tokens(found[True]) == tokens(found[False])
    assert found[False][0][2] == found[True][0][2] == len(STEM) // BLOCK * BLOCK


def test_two_at_a_time_that_part_within_a_block(make_llm, folder):
    llm = start(make_llm, folder, "auto", enable_prefix_caching=False)
    expected = tokens(one_by_one(llm, PARTED))
    llm = start(make_llm, folder, "auto", {})
    fill(llm, PARTED)
    for prompts in (PARTED, PARTED[::-1]):
        empty_device(llm)
        before = rows_loaded()
        found = answers_and_hits(llm, prompts, 12)
        assert tokens(found) == (expected if prompts is PARTED else expected[::-1])
        assert rows_loaded() > before


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("interval", [None, 4 * BLOCK])
def test_more_states_are_kept(make_llm, folder, kind, interval):
    """With states every so many tokens, or wherever a step ended, beginnings of prompts are found, too."""
    settings = dict(prefix_cache_retention_interval=interval)
    begins = [prompt[: 4 * BLOCK + 1] for prompt in PROMPTS]
    found = {}
    for extra in (None, {}):
        llm = start(make_llm, folder, kind, extra, **settings)
        fill(llm, PROMPTS)
        answers = []
        for prompt in [*PROMPTS, *begins]:
            if extra is not None:
                empty_device(llm)
            answers += one_by_one(llm, [prompt])
        found[extra is None] = answers
    assert found[False] == found[True]
    assert [hit for *_, hit in found[True]] == [6 * BLOCK, 9 * BLOCK, 10 * BLOCK] + [4 * BLOCK] * 3

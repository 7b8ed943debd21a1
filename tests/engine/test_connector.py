"""XLayerConnector in vLLM's engine: rows, restored prompts, refusals. Runner V1, CPU reference platform."""

import itertools

import pytest
import torch
from model_fixture import (
    SHAPE,
    llama_config,
    random_prompts,
    save_random_model,
    transformers_greedy,
    vllm_greedy,
    vllm_outputs,
)
from transformers import Gemma2Config, MambaConfig

from vllm_xlayer.layout import NegotiationError

NUM_TOKENS = 24
PROMPTS = random_prompts([5, 100, 16, 33, 300, 1])


def connector(**extra):
    """kv_transfer_config for LLM(...)."""
    extra = {"cpu_bytes_to_use": 16 << 20} | extra
    return dict(kv_connector="XLayerConnector", kv_role="kv_both", kv_connector_extra_config=extra)


def live_connector():
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def layer_caches(llm):
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {name: layer.kv_cache for name, layer in context.items()}


def tokens(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def llama_answers(tiny_llama):
    return transformers_greedy(tiny_llama, PROMPTS, NUM_TOKENS)


@pytest.mark.parametrize(
    ("settings", "page"),
    [
        ({}, 2 * 2 * 16 * 32 * 4),
        ({"dtype": "bfloat16"}, 2 * 2 * 16 * 32 * 2),
        ({"kv_cache_dtype": "nvfp4"}, 2 * 16 * 36),
    ],
    ids=["float32", "bfloat16", "nvfp4"],
)
def test_the_cache_lies_in_rows(make_llm, tiny_llama, settings, page):
    llm = make_llm(tiny_llama, kv_transfer_config=connector(), **settings)
    layout, pool = live_connector().layout, live_connector().pool
    caches = layer_caches(llm)
    assert layout.layout.value == "BLHNC" and layout.row_bytes == 2 * page
    assert pool.shape == (llm.llm_engine.vllm_config.cache_config.num_gpu_blocks, 2 * page)
    for i, cache in enumerate(caches.values()):
        size = cache.element_size()
        assert cache.untyped_storage().data_ptr() == pool.data_ptr()
        assert cache.storage_offset() * size == i * page
        assert cache.stride(0) * size == 2 * page and cache[0].is_contiguous()


def test_greedy_tokens_are_those_of_the_stock_cache(make_llm, tiny_llama, llama_answers):
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    for cache in layer_caches(llm).values():
        cache.fill_(float("nan"))
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == llama_answers


@pytest.mark.parametrize("blocks_per_chunk", [1, 3])
def test_restored_prompts_give_the_computed_tokens(make_llm, tiny_llama, llama_answers, blocks_per_chunk):
    extra = connector(blocks_per_chunk=blocks_per_chunk)
    llm = make_llm(tiny_llama, kv_transfer_config=extra)
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == llama_answers
    assert llm.reset_prefix_cache()
    for cache in layer_caches(llm).values():
        cache.fill_(float("nan"))  # so that what is not restored shows
    restored = vllm_outputs(llm, PROMPTS, NUM_TOKENS)
    assert tokens(restored) == llama_answers
    span = 16 * blocks_per_chunk
    # Whole chunks, but never a prompt's last token.
    assert [output.num_cached_tokens for output in restored] == [(len(p) - 1) // span * span for p in PROMPTS]
    assert live_connector().connector_worker.worker.rows_loaded > 0


def test_restored_rows_are_the_stored_bytes(make_llm, tiny_llama):
    """NVFP4: a restored prompt answers as one cached on the device: both read the same pages."""
    llm = make_llm(tiny_llama, kv_cache_dtype="nvfp4", kv_transfer_config=connector())
    pool = live_connector().pool
    pool.fill_(0xFF)  # scales of 0xFF are NaN
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    cached = vllm_outputs(llm, PROMPTS, NUM_TOKENS)
    assert llm.reset_prefix_cache()
    pool.fill_(0xFF)
    before = live_connector().connector_worker.worker.rows_loaded
    restored = vllm_outputs(llm, PROMPTS, NUM_TOKENS)
    assert tokens(restored) == tokens(cached)
    loaded = live_connector().connector_worker.worker.rows_loaded - before
    assert loaded == sum((len(p) - 1) // 16 for p in PROMPTS)


def test_prompts_of_whole_blocks_are_cached_alike(make_llm, tiny_llama):
    """On the device without the connector, with it, and restored: the same is left to compute. A prompt that
    is on the device waits for no load."""
    prompts = random_prompts([16, 32, 160])
    stock = make_llm(tiny_llama, kv_cache_dtype="nvfp4")
    vllm_greedy(stock, prompts, NUM_TOKENS)
    answers = vllm_greedy(stock, prompts, NUM_TOKENS)
    llm = make_llm(tiny_llama, kv_cache_dtype="nvfp4", kv_transfer_config=connector())
    vllm_greedy(llm, prompts, NUM_TOKENS)
    assert vllm_greedy(llm, prompts, NUM_TOKENS) == answers
    worker = live_connector().connector_worker.worker
    assert worker.rows_loaded == 0
    assert llm.reset_prefix_cache()
    live_connector().pool.fill_(0xFF)
    assert vllm_greedy(llm, prompts, NUM_TOKENS) == answers
    assert worker.rows_loaded == 0 + 1 + 9


def test_nvfp4_tokens_do_not_depend_on_the_layout(make_llm, tiny_llama):
    stock = vllm_greedy(make_llm(tiny_llama, kv_cache_dtype="nvfp4"), PROMPTS, NUM_TOKENS)
    llm = make_llm(tiny_llama, kv_cache_dtype="nvfp4", kv_transfer_config=connector())
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == stock


def test_hybrid_models_share_page_slots(make_llm, tmp_path):
    config = Gemma2Config(
        **(SHAPE | dict(tie_word_embeddings=True, num_hidden_layers=4)),
        sliding_window=48,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    save_random_model(config, tmp_path)
    answers = transformers_greedy(tmp_path, PROMPTS, NUM_TOKENS)
    llm = make_llm(tmp_path, kv_transfer_config=connector())
    layout = live_connector().layout
    assert len(layout.groups) == 2 and [len(slot.layers) for slot in layout.uniform.slots] == [2, 2]
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
    assert llm.reset_prefix_cache()
    for cache in layer_caches(llm).values():
        cache.fill_(float("nan"))
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
    assert live_connector().connector_worker.worker.rows_loaded > 0


def test_preemption_and_a_tiny_host_tier(make_llm, tiny_llama):
    """Neither cache holds all prompts: blocks are preempted, evicted, stored and restored all the time."""
    prompts = random_prompts([60, 61, 62, 63, 90, 91, 92, 93])
    answers = transformers_greedy(tiny_llama, prompts, 24)
    row = 2 * 2 * 2 * 16 * 32 * 4
    llm = make_llm(
        tiny_llama,
        num_gpu_blocks_override=24,
        max_model_len=128,
        kv_transfer_config=connector(cpu_bytes_to_use=10 * row),
    )
    for order in itertools.islice(itertools.permutations(range(8)), 0, 40320, 9000):
        assert vllm_greedy(llm, [prompts[i] for i in order], 24) == [answers[i] for i in order]


def test_aborted_requests_leave_nothing_behind(make_llm, tiny_llama, llama_answers):
    from vllm import SamplingParams

    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    engine = llm.llm_engine
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free_blocks = pool.get_num_free_blocks()
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    assert llm.reset_prefix_cache()
    sampling = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)
    for steps in range(4):  # while waiting for rows, while computing, while decoding
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(f"{steps}-{i}", {"prompt_token_ids": prompt}, sampling)
        for _ in range(steps):
            engine.step()
        engine.abort_request([f"{steps}-{i}" for i in range(len(PROMPTS))])
        while engine.has_unfinished_requests():
            engine.step()
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == llama_answers
    assert pool.get_num_free_blocks() == free_blocks


def test_checkpoint_scales_reach_the_cache(make_llm, tiny_llama):
    """The writer divides by the layer's global scales, the reader multiplies: a power of two is nothing."""
    llm = make_llm(tiny_llama, kv_cache_dtype="nvfp4", enable_prefix_caching=False)
    plain = vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    before = next(iter(layer_caches(llm).values())).clone()
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    for layer in context.values():
        layer._k_scale.fill_(0.25)
        layer._v_scale.fill_(2.0)
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == plain
    assert not torch.equal(next(iter(layer_caches(llm).values())), before)


def test_an_unknown_connector_is_refused(make_llm, tiny_llama):
    with pytest.raises(ValueError, match="NoSuchConnector"):
        make_llm(tiny_llama, kv_transfer_config=connector() | dict(kv_connector="NoSuchConnector"))


def test_head_size_is_refused_with_nvfp4(make_llm, tmp_path):
    save_random_model(llama_config(head_dim=24), tmp_path)
    with pytest.raises(ValueError, match="24"):
        make_llm(tmp_path, kv_cache_dtype="nvfp4")


def test_mamba_is_refused(make_llm, tmp_path):
    config = MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, state_size=8)
    save_random_model(config, tmp_path)
    with pytest.raises(ValueError, match="models without attention"):
        make_llm(tmp_path, kv_transfer_config=connector())


def test_an_allocation_that_differs_is_refused(make_llm, tiny_llama, monkeypatch):
    """If vLLM ever allocated something else than it resolved, nothing may be stored from it."""
    from vllm_xlayer.connector import connector as module
    from vllm_xlayer.layout import AllocationError

    real = module.allocations
    monkeypatch.setattr(
        module, "allocations", lambda caches: real({name: cache.clone() for name, cache in caches.items()})
    )
    with pytest.raises(AllocationError, match=r"expected shape .* strides \(16384, .* got shape"):
        make_llm(tiny_llama, kv_transfer_config=connector())


def test_a_backend_without_rows_is_named(make_llm, tiny_llama, monkeypatch):
    from vllm.v1.kv_cache_interface import KVCacheLayout

    from vllm_xlayer.attention.cpu import CpuReferenceBackend

    only = [KVCacheLayout.LBHNC]
    monkeypatch.setattr(CpuReferenceBackend, "supported_kv_cache_layouts", classmethod(lambda cls: only))
    with pytest.raises(NegotiationError, match=r"all refused by attention backend .* LBHNC only"):
        make_llm(tiny_llama, kv_transfer_config=connector())


def test_a_layout_left_over_in_the_environment_is_named(make_llm, tiny_llama, monkeypatch):
    """As older vLLMs needed it in places; it goes before every connector's wish."""
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "HND")
    with pytest.raises(NegotiationError, match="VLLM_KV_CACHE_LAYOUT: it is HND"):
        make_llm(tiny_llama, kv_transfer_config=connector())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"cpu_byte_to_use": 1 << 30}, "expected cpu_bytes_to_use, got unknown key 'cpu_byte_to_use'"),
        ({"sync_load_budget_bytes": 1}, "sync_load_budget_bytes: expected nothing"),
        ({"block_size": 40}, "block_size.*40"),
    ],
)
def test_bad_settings_are_refused(make_llm, tiny_llama, extra, message):
    with pytest.raises(ValueError, match=message):
        make_llm(tiny_llama, kv_transfer_config=connector(**extra))


def test_our_spec_in_vllms_connector_is_refused(make_llm, tiny_llama):
    """Named as vLLM lets any spec be named. It would work until a copy fails, and then end the engine."""
    extra = dict(spec_name="RowOffloadingSpec", spec_module_path="vllm_xlayer.connector.spec")
    transfer = connector(**extra) | dict(kv_connector="OffloadingConnector")
    with pytest.raises(ValueError, match=r"expected kv_connector XLayerConnector.*ends the engine.*LBHNC"):
        make_llm(tiny_llama, kv_transfer_config=transfer)

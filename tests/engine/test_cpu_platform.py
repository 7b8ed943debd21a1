"""vLLM's engine on the CPU reference platform against transformers, and its bookkeeping."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hybrid_fixture import CONFIGS, save_hybrid_config
from model_fixture import (
    SHAPE,
    gpt_oss_config,
    llama_config,
    random_prompts,
    save_random_model,
    transformers_greedy,
    vllm_greedy,
    vllm_outputs,
)
from transformers import Gemma2Config, Gemma3TextConfig, MistralConfig, Qwen2Config, Qwen3Config

from vllm_xlayer.kv_scales import DEFAULT

NUM_TOKENS = 24
PROMPTS = random_prompts([5, 100, 16, 33, 300, 1])


@pytest.fixture(scope="module")
def llama_answers(tiny_llama):
    return transformers_greedy(tiny_llama, PROMPTS, NUM_TOKENS)


def engine_core(llm):
    return llm.llm_engine.engine_core.engine_core


def kv_caches(llm):
    return engine_core(llm).model_executor.driver_worker.worker.model_runner.kv_caches


@pytest.mark.parametrize(
    "config",
    [
        llama_config(head_dim=64, num_hidden_layers=3),
        Qwen2Config(**SHAPE),
        Qwen3Config(**SHAPE),
        MistralConfig(**SHAPE, sliding_window=24),
        Gemma2Config(
            **(SHAPE | dict(tie_word_embeddings=True)),
            sliding_window=24,
            query_pre_attn_scalar=32,
            attn_logit_softcapping=5.0,
            layer_types=["sliding_attention", "full_attention"],
        ),
        Gemma3TextConfig(
            **(SHAPE | dict(tie_word_embeddings=True, num_hidden_layers=4)),
            sliding_window=24,
            query_pre_attn_scalar=32,
            layer_types=["sliding_attention"] * 3 + ["full_attention"],
        ),
        gpt_oss_config(),
    ],
    ids=lambda config: config.model_type,
)
def test_greedy_tokens_equal_transformers(make_llm, tmp_path, config):
    save_random_model(config, tmp_path)
    answers = vllm_greedy(make_llm(tmp_path), PROMPTS, NUM_TOKENS)
    assert answers == transformers_greedy(tmp_path, PROMPTS, NUM_TOKENS)


def test_requests_do_not_depend_on_their_batch(make_llm, tiny_llama, llama_answers):
    llm = make_llm(tiny_llama, enable_prefix_caching=False)
    assert [vllm_greedy(llm, [prompt], NUM_TOKENS)[0] for prompt in PROMPTS] == llama_answers
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == llama_answers


@pytest.mark.parametrize("sliding_window", [None, 24])
def test_chunked_prefill(make_llm, tmp_path, sliding_window):
    """Chunks of 32 tokens, mixed with decodes: every chunk boundary falls inside a window."""
    save_random_model(MistralConfig(**SHAPE, sliding_window=sliding_window), tmp_path)
    llm = make_llm(tmp_path, max_num_batched_tokens=32, max_num_seqs=4)
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == transformers_greedy(tmp_path, PROMPTS, NUM_TOKENS)


def test_prefix_cache_hit(make_llm, tiny_llama, llama_answers):
    llm = make_llm(tiny_llama)
    cold = vllm_outputs(llm, PROMPTS, NUM_TOKENS)
    warm = vllm_outputs(llm, PROMPTS, NUM_TOKENS)
    assert [output.num_cached_tokens for output in cold] == [0] * len(PROMPTS)
    # Whole blocks of 16, and at least one token is left to compute.
    assert [output.num_cached_tokens for output in warm] == [(len(p) - 1) // 16 * 16 for p in PROMPTS]
    assert [list(output.outputs[0].token_ids) for output in warm] == llama_answers


def test_unused_memory_is_never_read(make_llm, tiny_llama, llama_answers):
    llm = make_llm(tiny_llama)
    for cache in kv_caches(llm):
        cache.fill_(float("nan"))
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == llama_answers
    assert any(cache.isnan().any() for cache in kv_caches(llm))


def test_preemption_in_a_tiny_cache(make_llm, tiny_llama, preempted):
    prompts = random_prompts([60, 61, 62, 63])
    # 4 prompts of 4 blocks fit; their continuations do not.
    llm = make_llm(tiny_llama, num_gpu_blocks_override=20, max_model_len=128)
    assert vllm_greedy(llm, prompts, 40) == transformers_greedy(tiny_llama, prompts, 40)
    assert preempted


def test_abort_leaves_no_state(make_llm, tiny_llama, llama_answers):
    from vllm import SamplingParams

    llm = make_llm(tiny_llama, enable_prefix_caching=False)
    engine, pool = llm.llm_engine, engine_core(llm).scheduler.kv_cache_manager.block_pool
    free_blocks = pool.get_num_free_blocks()
    sampling = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, detokenize=False)
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
    for _ in range(5):
        engine.step()
    assert pool.get_num_free_blocks() < free_blocks
    engine.abort_request([str(i) for i in range(len(PROMPTS))])
    while engine.has_unfinished_requests():
        engine.step()
    assert pool.get_num_free_blocks() == free_blocks
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == llama_answers


def test_engines_one_after_another(make_llm, tiny_llama, llama_answers, tmp_path):
    save_random_model(llama_config(head_dim=64, num_key_value_heads=1), tmp_path)
    assert vllm_greedy(make_llm(tiny_llama), PROMPTS, NUM_TOKENS) == llama_answers
    other = vllm_greedy(make_llm(tmp_path, block_size=32), PROMPTS, NUM_TOKENS)
    assert other == transformers_greedy(tmp_path, PROMPTS, NUM_TOKENS)
    assert vllm_greedy(make_llm(tiny_llama), PROMPTS, NUM_TOKENS) == llama_answers


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_models(make_llm, tiny_llama, llama_answers, dtype):
    """16-bit rounding may flip a greedy token; the logits of the first one stay near float32's."""
    llm = make_llm(tiny_llama, dtype=dtype)
    assert {cache.dtype for cache in kv_caches(llm)} == {getattr(torch, dtype)}
    answers = vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    first_tokens = [answer[0] for answer in answers]
    assert first_tokens == [answer[0] for answer in llama_answers]


def test_kv_cache_dtype_by_name(make_llm, tiny_llama):
    """vLLM takes no other 16-bit cache beside a model than the model's own."""
    llm = make_llm(tiny_llama, dtype="bfloat16", kv_cache_dtype="bfloat16")
    assert {cache.dtype for cache in kv_caches(llm)} == {torch.bfloat16}
    # An attention layer is printed with what its backend knows.
    assert "num_heads=4" in repr(engine_core(llm).model_executor.driver_worker.worker.model_runner.model)


def test_kv_cache_size(make_llm, tiny_llama, monkeypatch):
    page = 2 * 16 * 2 * 32 * 4  # K and V, tokens, heads, head size, bytes of float32
    sizes = dict(asked=make_llm(tiny_llama, kv_cache_memory_bytes=1 << 20).llm_engine.vllm_config)
    assert sizes["asked"].cache_config.num_gpu_blocks == (1 << 20) // (2 * page)
    llm = make_llm(tiny_llama, kv_cache_memory_bytes=None, max_num_seqs=3)
    # Three full requests and one more: 512 tokens are 32 blocks.
    assert [cache.shape[0] for cache in kv_caches(llm)] == [4 * 32] * 2
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    llm = make_llm(tiny_llama, kv_cache_memory_bytes=None)
    assert kv_caches(llm)[0].shape[0] == (1 << 30) // (2 * page)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(kv_cache_dtype="fp8"), "expected one of auto, bfloat16, float16, nvfp4, nvfp4_4over6, got fp8"),
        (dict(block_size=24), "block_size: expected a multiple of 16, got 24"),
        (dict(decode_context_parallel_size=2, tensor_parallel_size=4), "context parallelism"),
        (
            dict(speculative_config=dict(method="ngram_gpu", num_speculative_tokens=2, prompt_lookup_max=3)),
            "expected method ngram, eagle, mtp, got ngram_gpu",
        ),
        (dict(attention_config=dict(backend="FLASH_ATTN")), "FLASH_ATTN needs a GPU"),
    ],
)
def test_refused_at_start(make_llm, tiny_llama, settings, reason):
    with pytest.raises(ValueError, match=reason):
        make_llm(tiny_llama, **settings)


def test_the_name_that_this_package_has_on_a_gpu(make_llm, tiny_llama):
    llm = make_llm(tiny_llama, kv_cache_dtype="nvfp4", attention_config=dict(backend="CUSTOM"))
    assert len(vllm_greedy(llm, random_prompts([5]), 4)[0]) == 4


SCRIPT = """
import sys
from model_fixture import random_prompts, vllm_greedy
from vllm import LLM
if __name__ == "__main__":
    llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", max_model_len=512)
    print("TOKENS", vllm_greedy(llm, random_prompts([5, 100]), 8))
"""


def test_engine_in_a_process_of_its_own(reference_platform, tiny_llama, tmp_path):
    script = tmp_path / "serve.py"
    script.write_text(SCRIPT)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_llama)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = transformers_greedy(tiny_llama, random_prompts([5, 100]), 8)
    assert f"TOKENS {expected}" in done.stdout


def global_scales(model):
    """Of each layer, in the worker."""
    layers = [module for module in model.modules() if hasattr(module, "_k_scale")]
    return [(float(layer._k_scale), float(layer._v_scale)) for layer in layers]


def test_nvfp4_cache(make_llm, tiny_llama, llama_answers):
    llm = make_llm(tiny_llama, kv_cache_dtype="nvfp4", enable_prefix_caching=False)
    for cache in kv_caches(llm):
        assert (cache.dtype, cache.shape[1:]) == (torch.uint8, (2, 16, 36))
        assert cache.shape[0] == (32 << 20) // (2 * 2 * 16 * 36)  # 3.56 times float16's blocks
        cache.fill_(0xFF)  # unused memory: block scales that are NaN
    assert llm.apply_model(global_scales) == [[DEFAULT, DEFAULT]]
    answers = vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    # A whole prompt in one chunk attends to nothing that was quantised.
    assert [answer[0] for answer in answers] == [answer[0] for answer in llama_answers]
    assert answers != llama_answers
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers


def test_nvfp4_4over6_says_how_scales_are_picked(make_llm, tiny_llama, monkeypatch):
    def answers(kv_cache_dtype):
        llm = make_llm(tiny_llama, kv_cache_dtype=kv_cache_dtype, enable_prefix_caching=False)
        return vllm_greedy(llm, PROMPTS, NUM_TOKENS)

    by_name = answers("nvfp4_4over6")
    assert by_name != answers("nvfp4")  # the best of nine
    monkeypatch.setenv("VLLM_XLAYER_SCALE_CHOICE", "four_over_six")
    assert by_name == answers("nvfp4")


def test_nvfp4_prefix_hit_equals_a_chunk_boundary(make_llm, tiny_llama, pages_alone):
    """64 tokens from the cache, whether an earlier request or an earlier chunk wrote them."""
    (prompt,) = random_prompts([100], seed=1)
    chunked = make_llm(tiny_llama, kv_cache_dtype="nvfp4", max_num_batched_tokens=64, max_num_seqs=4)
    (expected,) = vllm_greedy(chunked, [prompt], NUM_TOKENS)
    llm = make_llm(tiny_llama, kv_cache_dtype="nvfp4")
    vllm_greedy(llm, [prompt[:64]], 1)
    (output,) = vllm_outputs(llm, [prompt], NUM_TOKENS)
    assert output.num_cached_tokens == 64
    assert list(output.outputs[0].token_ids) == expected


def test_nvfp4_without_some_layers(make_llm, tiny_llama, llama_answers):
    settings = dict(kv_cache_dtype="nvfp4", kv_cache_dtype_skip_layers=["0"])
    llm = make_llm(tiny_llama, **settings)
    assert [cache.dtype for cache in kv_caches(llm)] == [torch.float32, torch.uint8]
    answers = vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    assert [answer[0] for answer in answers] == [answer[0] for answer in llama_answers]
    settings["kv_cache_dtype_skip_layers"] = ["0", "1"]
    assert vllm_greedy(make_llm(tiny_llama, **settings), PROMPTS, NUM_TOKENS) == llama_answers


def test_nvfp4_needs_the_extension(make_llm, tiny_llama, monkeypatch):
    from vllm_xlayer import ops

    def missing():
        raise ops.ExtensionMissingError("expected the compiled extension")

    monkeypatch.setattr(ops, "load", missing)
    with pytest.raises(ops.ExtensionMissingError, match="expected the compiled extension"):
        make_llm(tiny_llama, kv_cache_dtype="nvfp4")


@pytest.mark.parametrize(
    "config",
    [MistralConfig(**SHAPE, sliding_window=24), gpt_oss_config()],
    ids=lambda config: config.model_type,
)
def test_nvfp4_sliding_window(make_llm, tmp_path, config):
    save_random_model(config, tmp_path)
    answers = vllm_greedy(make_llm(tmp_path, kv_cache_dtype="nvfp4"), PROMPTS, NUM_TOKENS)
    expected = transformers_greedy(tmp_path, PROMPTS, NUM_TOKENS)
    assert [answer[0] for answer in answers] == [answer[0] for answer in expected]


def test_a_model_that_chooses_another_backend_is_refused(make_llm, tmp_path):
    """MiMo-V2's K and V heads differ in size, so it takes a backend whose kernels need a GPU."""
    settings = save_hybrid_config(CONFIGS["mimo_v2"], tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0.*attention backend.*got TRITON_ATTN_DIFFKV.*need a GPU"):
        make_llm(tmp_path, dtype="bfloat16", **settings)

"""What shapes KV is in a tier's identity; engines whose KV must not outlive them are refused."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from identity_fixture import DATA, engine, of, save
from vllm.config import AttentionConfig

from vllm_xlayer import kv_scales
from vllm_xlayer.connector.disk import identity
from vllm_xlayer.connector.disk.identity import tier_identity
from vllm_xlayer.connector.disk.weight_files import NoIdentity


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"speculative_config": SimpleNamespace(method="custom_class", draft_model_config=None)},
            "expected ngram, ngram_gpu, suffix or a draft model, .* got method custom_class",
        ),
        (
            {"cache_config.prefix_caching_hash_algo": "xxhash"},
            "expected one of sha256, sha256_cbor, got xxhash",
        ),
        ({"parallel_config.world_size": 4}, "tensor parallelism only, got 4 ranks .* other layers"),
        ({"model_config.multimodal_config.mm_encoder_attn_dtype": "fp8"}, "scales from the first images"),
        ({"ec_transfer_config": SimpleNamespace(is_ec_consumer=True)}, "other engines' encoders"),
    ],
)
def test_kv_that_must_not_be_kept(changes, reason):
    with pytest.raises(NoIdentity, match=reason):
        tier_identity(engine(**changes), None, 1)


NVFP4 = {"cache_config.cache_dtype": "nvfp4"}
SHAPES_KV = {
    "vllm": {},  # below
    "config": {"model_config.hf_config": SimpleNamespace(to_dict=lambda: {"rope_theta": 1e6})},
    "model_impl": {"model_config.model_impl": "transformers"},
    "runner": {"model_config.runner_type": "pooling"},
    "convert": {"model_config.convert_type": "embed"},
    "class_overrides": {"model_config.model_class_overrides": {"A": "B"}},
    "dtype": {"model_config.dtype": torch.float16},
    "quantization": {"model_config.quantization": "fp8"},
    "quantization_config": {"model_config.quantization_config": {"bits": 4}},
    "load_format": {"load_config.load_format": "bitsandbytes"},
    "load_config": {"load_config.model_loader_extra_config": {"a": 1}},
    "seed": {"load_config.load_format": "dummy", "model_config.seed": 1},
    "max_model_len": {"model_config.max_model_len": 8192},
    "sliding_window": {"model_config.disable_sliding_window": True},
    "skipped_layers": {"cache_config.kv_cache_dtype_skip_layers": ["0"]},
    "scale_choice": {},  # below
    "kv_scales": {},  # below
    "nvfp4_pages": {},  # below
    "newest_tokens": {},  # below
    "backend": {"attention_config.backend": "TRITON_ATTN"},
    "backend_per_kind": {"attention_config.backend_per_kind": {"full": "TRITON_ATTN"}},
    "context_parallel": {"parallel_config.cp_kv_cache_interleave_size": 16},
    "attention": {"attention_config.use_prefill_query_quantization": True},
    "platform": {"additional_config": {"a": 1}},
    "multimodal": {"model_config.multimodal_config.mm_processor_kwargs": {"num_crops": 4}},
}


def test_nothing_that_shapes_kv_is_left_out_here():
    all_of_it = engine(**NVFP4, **SHAPES_KV["attention"])
    assert SHAPES_KV.keys() == identity.shaping_settings(all_of_it).keys()


@pytest.mark.parametrize(
    "changes",
    [
        *[pytest.param(changes, id=name) for name, changes in SHAPES_KV.items() if changes],
        {"cache_config.sliding_window": 128},
        {"parallel_config.decode_context_parallel_size": 2},
        {"parallel_config.prefill_context_parallel_size": 2},
        {"cache_config.cache_dtype": "fp8"},
        {"parallel_config.world_size": 1, "parallel_config.tensor_parallel_size": 1},
        {"fingerprint": "BLNHC"},
        {"page_dtype": "nvfp4"},
        {"one_copy": True},
        *[{f"attention_config.{name}": "changed"} for name in identity.ATTENTION
          if hasattr(AttentionConfig(), name)],
        *[{f"model_config.multimodal_config.{name}": "changed"} for name in identity.MULTIMODAL
          if name != "mm_encoder_attn_dtype"],
        {
            "model_config.multimodal_config.mm_encoder_attn_dtype": "fp8",
            "model_config.multimodal_config.mm_encoder_fp8_scale_path": "scales.json",
        },
    ],
    ids=lambda changes: "".join(changes),
)  # fmt: skip
def test_each_thing_that_shapes_kv_is_in_the_digest(tmp_path, changes):
    folder = save(tmp_path / "model", DATA)
    assert of(folder).digest == of(folder).digest
    assert of(folder, **changes).digest != of(folder).digest


@pytest.mark.parametrize(
    ("capability", "rotated"), [(9, True), (8, True), (10, False), (12, False), (None, True)]
)
def test_rows_of_rotated_keys_are_not_those_of_kernels_that_do_not_rotate(
    tmp_path, monkeypatch, capability, rotated
):
    """Ours rotate K; those that vLLM prefers on newer GPUs do not. 16-bit rows are the same everywhere."""
    folder = save(tmp_path / "model", DATA)
    here, plain = of(folder, **NVFP4).digest, of(folder).digest
    device = None if capability is None else SimpleNamespace(major=capability)
    there = SimpleNamespace(is_cuda=lambda: capability is not None, get_device_capability=lambda: device)
    monkeypatch.setattr("vllm.platforms.current_platform", there)
    assert (of(folder, **NVFP4).digest == here) is rotated
    assert of(folder).digest == plain


@pytest.mark.parametrize("name", ["KEY_ROTATION", "PACKED"])
def test_rows_of_pages_kept_otherwise_are_other_rows(tmp_path, monkeypatch, name):
    """As another version of this package may keep them."""
    folder = save(tmp_path / "model", DATA)
    here, plain = of(folder, **NVFP4).digest, of(folder).digest
    monkeypatch.setattr(f"vllm_xlayer.compat.rows.{name}", "otherwise")
    assert of(folder, **NVFP4).digest != here
    assert of(folder).digest == plain


NOT_OF_AN_ITEM = {
    "allow_missing_mm_embeddings", "enable_mm_embeds", "interleave_mm_strings", "language_model_only",
    "limit_per_prompt", "mm_encoder_only", "mm_encoder_fp8_scale_save_margin",
    "mm_encoder_fp8_scale_save_path", "mm_hasher_algorithm", "mm_ipc_gpu_memory_gb", "mm_processor_cache_gb",
    "mm_processor_cache_type", "mm_shm_cache_max_object_size_mb", "mm_tensor_ipc", "skip_mm_profiling",
}  # fmt: skip
"""What may be asked of a prompt, how it becomes tokens and names, and where items lie: keys have what comes
of it."""


def test_every_multimodal_setting_of_vllms_is_known():
    """A new one is looked at before it is in one of the two lists."""
    from vllm.config import MultiModalConfig

    assert not {f.name for f in fields(MultiModalConfig)} - {*identity.MULTIMODAL} - NOT_OF_AN_ITEM


NOT_WHAT_IS_COMPUTED = {
    "flash_attn_max_num_splits_for_cuda_graph", "flex_attn_block_m", "flex_attn_block_n",
    "flex_attn_kv_block_size", "flex_attn_q_block_size", "indexer_tp_shard_min_rows", "minimax_m3_indexer_cp",
    "sparse_mla_force_mqa", "sparse_mla_prefill_workspace_factor", "tokenspeed_mla_min_split_kv",
    "tq_max_kv_splits_for_cuda_graph",
}  # fmt: skip
"""In which order the same sums are made."""
SAID_ELSEWHERE = {
    "backend", "backend_per_kind",  # in the identity
    "hisparse_config", "indexer_kv_dtype",  # in the layout: what lies where, and of which dtype
}  # fmt: skip


def test_every_attention_setting_of_vllms_is_known():
    """A new one is looked at before it is in one of the lists."""
    names = {f.name for f in fields(AttentionConfig)}
    assert not names - {*identity.ATTENTION} - NOT_WHAT_IS_COMPUTED - SAID_ELSEWHERE


STATES = {
    "backend": {"mamba_config.backend": "FLASHINFER"},
    "stochastic_rounding": {"mamba_config.enable_stochastic_rounding": True},
    "replayssm": {"cache_config.use_replayssm": True},
    "match_unit": {"cache_config.prefix_match_unit": 16},
}


def test_nothing_that_shapes_states_is_left_out_here():
    assert STATES.keys() == identity.state_settings(engine()).keys()


@pytest.mark.parametrize("changes", STATES.values(), ids=STATES)
def test_what_shapes_states_is_in_the_digest_of_hybrids_only(tmp_path, changes):
    folder = save(tmp_path / "model", DATA)
    assert of(folder, states=True, **changes).digest != of(folder, states=True).digest
    assert of(folder, **changes).digest == of(folder).digest


RECORDED = "a8a7f7263a9b317cc0edb1f383adb18c"


def test_engines_without_states_keep_their_digest(monkeypatch):
    """Of text: as it was before hybrids had a disk tier. What is in a folder stays valid."""
    monkeypatch.setattr(identity, "version", lambda name: "0.33.0")
    monkeypatch.delenv("VLLM_XLAYER_SCALE_CHOICE", raising=False)
    text_only = engine(**{"model_config.multimodal_config": None})
    assert identity._settings_digest(text_only, "code", False) == RECORDED


def test_versions_environment_and_files_are_in_the_digest(tmp_path, monkeypatch):
    folder = save(tmp_path / "model", DATA)
    digests = [of(folder).digest]
    for name in ("preprocessor_config.json", "modeling.py"):
        for text in ("one", "two"):
            (folder / name).write_text(text)
            digests.append(of(folder).digest)
    monkeypatch.setenv("VLLM_XLAYER_SCALE_CHOICE", "amax_6")
    digests.append(of(folder).digest)
    scaled = [of(folder, **NVFP4).digest]
    for v in (1.0, 0.5):
        path = tmp_path / f"scales {v}.json"
        kv_scales.write(path, {"layer": kv_scales.Scales(1.0, v)})
        monkeypatch.setenv("VLLM_XLAYER_KV_SCALES", str(path))
        assert of(folder).digest == digests[5]  # other caches do not use them
        scaled.append(of(folder, **NVFP4).digest)
    for tokens in ("16", "0"):
        monkeypatch.setenv("VLLM_XLAYER_NEWEST_TOKENS", tokens)
        assert of(folder).digest == digests[5]
        scaled.append(of(folder, **NVFP4).digest)
    monkeypatch.setenv("VLLM_XLAYER_NEWEST_TOKENS", "64")
    assert of(folder, **NVFP4).digest == scaled[2]  # as many as there are by themselves
    monkeypatch.setattr(identity, "version", lambda name: "0.0.1")
    digests.append(of(folder).digest)
    (folder / "README.md").write_text("does not matter")
    assert len({*digests, *scaled}) == len(digests) + len(scaled) and of(folder).digest == digests[-1]


def test_every_field_of_an_identity_is_in_its_digest(tmp_path):
    found = of(save(tmp_path / "model", DATA))
    for field in fields(found):
        other = 99 if isinstance(getattr(found, field.name), int) else "other"
        assert replace(found, **{field.name: other}).digest != found.digest, field.name

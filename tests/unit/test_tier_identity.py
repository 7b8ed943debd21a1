"""The weights digest sees updates; engines whose KV must not outlive them are refused."""

import json
import operator
import os
import time
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm_xlayer import kv_scales
from vllm_xlayer.connector.disk import identity, weight_files
from vllm_xlayer.connector.disk.identity import tier_identity
from vllm_xlayer.connector.disk.weight_files import NoIdentity, loaded_weights, weights_digest


def save(folder, data, name="model.safetensors", header=None, time=1000):
    folder.mkdir(exist_ok=True)
    text = json.dumps(header or {"a": {"dtype": "F32", "shape": [len(data) // 4]}}).encode()
    path = folder / name
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    os.utime(path, (time, time))
    return folder


DATA = bytes(i % 253 for i in range(300_000))


def test_equal_folders_are_equal(tmp_path):
    assert weights_digest(save(tmp_path / "a", DATA)) == weights_digest(save(tmp_path / "b", DATA))


@pytest.mark.parametrize(
    "change",
    [
        dict(data=DATA + b"1234"),
        dict(data=DATA[:150_000] + bytes(5_000) + DATA[155_000:]),
        dict(data=DATA[:-1] + b"\0"),
        dict(header={"b": {"dtype": "F32", "shape": [75_000]}}),
        dict(name="model-1.safetensors"),
        dict(time=1001),
    ],
    ids=["longer", "middle", "end", "header", "name", "time"],
)
def test_changes_are_seen(tmp_path, change):
    before = weights_digest(save(tmp_path / "a", DATA))
    assert weights_digest(save(tmp_path / "b", **(dict(data=DATA) | change))) != before


def test_the_name_of_a_cached_blob_counts(tmp_path):
    """Hugging Face's cache links to blobs named by a hash of all of their content."""
    digests = set()
    for blob in ("aaa", "bbb"):
        save(tmp_path, DATA, name=blob)
        folder = tmp_path / f"snapshot of {blob}"
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(tmp_path / blob)
        digests.add(weights_digest(folder))
    assert len(digests) == 2


def test_weights_that_may_have_been_loaded_before_they_were_written_are_this_process_own(
    tmp_path, monkeypatch
):
    """Who loads the files that an engine found replaced as it started must not find that engine's KV."""
    said = []
    monkeypatch.setattr(weight_files.logger, "warning", lambda *message: said.append(message))
    folder = save(tmp_path / "model", DATA)
    change = (folder / "model.safetensors").stat().st_ctime

    def at(began, life="a"):
        monkeypatch.setattr(weight_files, "process_began", lambda: began)
        monkeypatch.setattr(weight_files, "THIS_LIFE", life)
        return loaded_weights(folder)

    assert at(change + 1) == at(change + 2, "b") == weights_digest(folder)
    assert not said
    assert at(change - 1) == at(change - 2) and at(change - 1) != weights_digest(folder)
    assert at(change - 1, "b") != at(change - 1, "a")
    assert "were written since this engine began to start" in said[0][0] and said[0][1] == folder
    (tmp_path / "old").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "old" / "model.safetensors")
    moved = (tmp_path / "old" / "model.safetensors").stat().st_ctime
    time.sleep(0.05)
    (folder / "model.safetensors").symlink_to(tmp_path / "old" / "model.safetensors")
    assert at(moved + 0.02, "b") != at(moved + 0.02, "a")  # the link is newer than what it leads to


def test_no_weights(tmp_path):
    with pytest.raises(NoIdentity, match="expected weight files"):
        weights_digest(tmp_path)


def engine(**changes):
    """A configuration of vLLM's, as far as it matters: names with dots change one thing."""
    multimodal = SimpleNamespace(**dict.fromkeys(identity.MULTIMODAL))
    model = SimpleNamespace(
        model="model", hf_config=SimpleNamespace(to_dict=lambda: {"rope_theta": 1e4}), model_impl="vllm",
        runner_type="generate", convert_type="none", model_class_overrides={}, dtype=torch.bfloat16,
        quantization=None, quantization_config=None, seed=0,
        max_model_len=4096, disable_sliding_window=False, multimodal_config=multimodal, revision=None,
    )  # fmt: skip
    config = SimpleNamespace(
        model_config=model,
        load_config=SimpleNamespace(load_format="auto", model_loader_extra_config={}, download_dir=None),
        cache_config=SimpleNamespace(
            cache_dtype="auto", prefix_caching_hash_algo="sha256",
            sliding_window=None, kv_cache_dtype_skip_layers=[], use_replayssm=False, prefix_match_unit=None,
            kv_sharing_fast_prefill=False,
        ),
        parallel_config=SimpleNamespace(
            world_size=2, tensor_parallel_size=2, decode_context_parallel_size=1,
            prefill_context_parallel_size=1, cp_kv_cache_interleave_size=1, use_ubatching=False,
        ),
        attention_config=SimpleNamespace(backend=None, backend_per_kind={}),
        mamba_config=SimpleNamespace(
            backend="TRITON", enable_stochastic_rounding=False, stochastic_rounding_philox_rounds=0
        ),
        device_config=SimpleNamespace(device_type="cpu"),
        lora_config=None, speculative_config=None, ec_transfer_config=None, additional_config={},
    )  # fmt: skip
    for name, value in changes.items():
        part, _, field = name.rpartition(".")
        setattr(operator.attrgetter(part)(config) if part else config, field, value)
    return config


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


def of(folder, **changes):
    layout = SimpleNamespace(
        fingerprint=changes.pop("fingerprint", "BLHNC"),
        attention=[SimpleNamespace(dtype=changes.pop("page_dtype", "bfloat16"))],
        groups=[SimpleNamespace(block_size=16)],
        has_opaque=changes.pop("states", False),
    )
    one_copy = changes.pop("one_copy", False)
    return tier_identity(engine(**{"model_config.model": str(folder)} | changes), layout, 1, one_copy)


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
    "platform": {"additional_config": {"a": 1}},
    "multimodal": {"model_config.multimodal_config.mm_processor_kwargs": {"num_crops": 4}},
}


def test_nothing_that_shapes_kv_is_left_out_here():
    assert SHAPES_KV.keys() == identity.shaping_settings(engine(**NVFP4)).keys()


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


def drafted(folder, **changes):
    """With speculative decoding by a draft model; names with dots change one thing."""
    draft = SimpleNamespace(
        model=str(folder), revision=None, dtype=torch.bfloat16, quantization=None,
        hf_config=SimpleNamespace(to_dict=lambda: {"layers": 1}),
    )  # fmt: skip
    speculative = SimpleNamespace(
        method="eagle", num_speculative_tokens=2, parallel_drafting=False, draft_model_config=draft
    )
    for name, value in changes.items():
        part, _, field = name.rpartition(".")
        setattr(operator.attrgetter(part)(speculative) if part else speculative, field, value)
    return {"speculative_config": speculative}


DRAFTS = {
    "method": {"method": "mtp"},
    "tokens": {"num_speculative_tokens": 3},
    "parallel": {"parallel_drafting": True},
    "config": {"draft_model_config.hf_config": SimpleNamespace(to_dict=lambda: {"layers": 2})},
    "dtype": {"draft_model_config.dtype": torch.float16},
    "quantization": {"draft_model_config.quantization": "fp8"},
}


def test_what_shapes_a_drafts_kv_is_in_the_digest(tmp_path):
    folder, draft = save(tmp_path / "model", DATA), save(tmp_path / "draft", DATA)
    digests = [of(folder).digest, of(folder, **drafted(draft)).digest]
    digests += [of(folder, **drafted(draft, **changes)).digest for changes in DRAFTS.values()]
    (draft / "modeling.py").write_text("code")
    digests.append(of(folder, **drafted(draft)).digest)
    digests.append(of(folder, **drafted(save(tmp_path / "another", DATA[:-1] + b"\0"))).digest)
    assert len(set(digests)) == len(digests)
    config = engine(**drafted(draft))
    known = identity.draft_settings(config.speculative_config, config.load_config)
    assert DRAFTS.keys() | {"code", "weights"} == known.keys()


def test_drafts_from_the_text_itself_leave_the_identity_alone(tmp_path):
    folder = save(tmp_path / "model", DATA)
    assert of(folder, **drafted(tmp_path / "nothing", method="ngram")).digest == of(folder).digest


def save_in_cache(cache, name, data):
    """As Hugging Face keeps a model's newest revision."""
    repo = cache / f"models--{name.replace('/', '--')}"
    commit = f"{len(list(cache.glob('*/snapshots/*'))):040x}"
    for folder in ("refs", "snapshots"):
        (repo / folder).mkdir(parents=True, exist_ok=True)
    save(repo / "snapshots" / commit, data)
    (repo / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("of_draft", [False, True], ids=["model", "draft"])
def test_weights_are_those_of_the_download_folder(tmp_path, monkeypatch, of_draft):
    """The usual cache may have another revision, which vLLM does not load."""
    usual, download = tmp_path / "usual", tmp_path / "download"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(usual))
    for cache in (usual, download):
        save_in_cache(cache, "org/model", DATA)
    changes = {"load_config.download_dir": str(download)}
    if of_draft:
        changes |= drafted("org/model")
    here = save(tmp_path / "model", DATA) if of_draft else "org/model"
    before = of(here, **changes)
    assert of(here, **changes) == before
    save_in_cache(download, "org/model", DATA[:-1] + b"\0")
    assert of(here, **changes).digest != before.digest
    # A drafter may have a folder of its own.
    if of_draft and hasattr(identity.SpeculativeConfig, "draft_load_config"):
        changes["speculative_config"].draft_load_config = SimpleNamespace(download_dir=str(usual))
        assert of(here, **changes).digest == before.digest


def test_a_model_of_modelscope(tmp_path, monkeypatch):
    """Hugging Face's cache may have one of that name, too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    save_in_cache(tmp_path, "org/model", DATA)
    assert of("org/model").weights
    # Not by the environment: vLLM reads that once, if an engine was here before.
    monkeypatch.setattr("vllm.envs.VLLM_USE_MODELSCOPE", True, raising=False)
    with pytest.raises(NoIdentity, match="ModelScope"):
        of("org/model")


@pytest.mark.parametrize("load_format", ["tensorizer", "ipc_cache", "modelexpress", "a_plugins"])
def test_weights_that_do_not_come_from_the_models_folder(tmp_path, load_format):
    folder = save(tmp_path / "model", DATA)
    with pytest.raises(NoIdentity, match=f"load_format: expected .* got {load_format}"):
        of(folder, **{"load_config.load_format": load_format})


def test_every_load_format_of_vllms_is_known(tmp_path):
    """A new one is looked at before it is listed, or refused."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    elsewhere = {"tensorizer", "ipc_cache", "modelexpress"}
    assert not set(_LOAD_FORMAT_TO_MODEL_LOADER) - set(identity.FOLDER_FORMATS) - elsewhere


def test_a_draft_model_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NoIdentity, match=r"the files of model .*nowhere are not found here"):
        of(save(tmp_path / "model", DATA), **drafted(tmp_path / "nowhere"))


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

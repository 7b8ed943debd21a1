"""Where a tier's identity has the weights from: download folders, load formats, drafts."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from identity_fixture import DATA, drafted, engine, of, save

from vllm_xlayer.connector.disk import identity
from vllm_xlayer.connector.disk.weight_files import NoIdentity

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

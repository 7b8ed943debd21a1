"""What `vllm-xlayer doctor` says of this vLLM and of a model, without an engine."""

import json
from argparse import Namespace

import pytest
from hybrid_fixture import save_hybrid

from vllm_xlayer import doctor, ops
from vllm_xlayer.compat import private
from vllm_xlayer.compat.model import rows_of_model
from vllm_xlayer.layout import Layout
from vllm_xlayer.patches import PATCHES


def test_everything_private_is_listed_with_its_state(reference_platform, monkeypatch):
    gone = private.Private("a feature", "vllm.no_such_module", "why", "how", "never", attributes=("_x",))
    table = private.table()
    monkeypatch.setattr(private, "table", lambda: (*table, gone))
    said = {record["target"]: record for record in doctor._vllm()["private"]}
    assert set(said) == {record.target for record in (*PATCHES, *table, gone)}
    off = said.pop(gone.target)
    assert off["state"] == "off" and "no_such_module" in off["reason"]
    assert {record["state"] for record in said.values()} <= {"applied", "not needed", "fits"}, said


@pytest.mark.parametrize(
    ("gpus", "cuda", "code"), [(["a GPU"], False, 1), (["a GPU"], True, 0), ([], False, 0)]
)
def test_cpu_ops_alone_are_an_error_beside_a_gpu(monkeypatch, capsys, gpus, cuda, code):
    monkeypatch.setattr(doctor, "_gpus", lambda: gpus)
    monkeypatch.setattr(doctor, "_vllm", dict)
    monkeypatch.setattr(ops, "build_info", lambda: {"cuda": cuda, "archs": []})
    assert doctor.run(Namespace(model=None, engines=None, json=False)) == code
    assert ("expected CUDA ops" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("VLLM_XLAYER_NEWEST_TOKENS", "32", None),
        ("VLLM_XLAYER_NEWEST_TOKENS", "3", "expected 0, 16, 32, 64 or 128, got '3'"),
        ("VLLM_XLAYER_NEWEST_TOKEN", "32", "got VLLM_XLAYER_NEWEST_TOKEN"),
    ],
)
def test_variables_with_which_no_engine_starts_are_an_error(monkeypatch, capsys, name, value, says):
    monkeypatch.setattr(doctor, "_vllm", dict)
    monkeypatch.setenv(name, value)
    assert doctor.run(Namespace(model=None, engines=None, json=True)) == (says is not None)
    found = json.loads(capsys.readouterr().out)["environment"]
    assert found[name] == value and ("error" in found) == (says is not None)
    assert says is None or says in found["error"]


def test_a_page_is_what_the_backend_makes_of_it(reference_platform, tiny_llama):
    """vLLM's spec alone counts a byte an element; the backend says that it is 4.5 bits."""
    found = rows_of_model(str(tiny_llama), "nvfp4", None)
    (group,) = found.decision.descriptor.uniform.groups
    assert group.page_bytes == 2 * 16 * 2 * (16 + 2) and not found.assumed
    assert found.layers == group.layers and len(group.layers) == 2
    assert found.decision.descriptor.layout is Layout.BLHNC
    assert "attention backend CpuReferenceBackend" in found.decision.accepted_by


@pytest.mark.parametrize(
    ("name", "dtype"), [("qwen3_next", "nvfp4"), ("gemma4", "auto"), ("deepseek_v2", "auto")]
)
def test_a_models_rows_are_those_of_its_engine(reference_platform, make_llm, tmp_path, name, dtype):
    """Of several groups, of pages that differ, and of those that only the engine understands."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    make_llm.shut_down()
    folder = save_hybrid(name, tmp_path)
    said = rows_of_model(str(folder), dtype, None).decision.descriptor
    transfer = dict(kv_connector="XLayerConnector", kv_role="kv_both")
    make_llm(folder, dtype="auto", kv_cache_dtype=dtype, kv_transfer_config=transfer)
    assert said == get_kv_transfer_group().layout


def test_the_report_of_a_model(reference_platform, make_llm, tmp_path, capsys):
    model = save_hybrid("lfm2", tmp_path)
    args = dict(model=str(model), kv_cache_dtype="nvfp4", block_size=None, layer=0, head=0, token=0)
    report = doctor._model(Namespace(**args))
    assert "error" not in report and "2 pages of MambaSpec" in report["drawing"]
    assert "--layer: expected 0 to 5" in doctor._model(Namespace(**args | dict(layer=6)))["error"]


@pytest.mark.parametrize("model", ["/no/such/folder", "./no-such-folder"])
def test_a_folder_that_is_not_there(model):
    expected = f"--model: expected a folder or a name, found no folder {model!r}"
    assert doctor._model(Namespace(model=model)) == {"error": expected}


def test_layers_that_cannot_be_built_are_taken_for_alike(
    reference_platform, make_llm, tiny_llama, tmp_path, monkeypatch
):
    """And the report says so; of a hybrid nothing is assumed."""
    from vllm.model_executor.model_loader import utils

    def initialize_model(config):
        raise RuntimeError("needs a device")

    monkeypatch.setattr(utils, "initialize_model", initialize_model)
    found = rows_of_model(str(tiny_llama), "nvfp4", None)
    assert found.assumed == "RuntimeError: needs a device" and found.layers == ("layer 0", "layer 1")
    with pytest.raises(ValueError, match=r"could not be built without weights: RuntimeError: needs a device"):
        rows_of_model(str(save_hybrid("lfm2", tmp_path)), "nvfp4", None)

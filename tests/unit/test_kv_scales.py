"""Global scales: which one a layer gets, what a file may say, and that the default keeps what it promises."""

import json
from types import SimpleNamespace

import pytest
import torch

from vllm_xlayer import kv_scales, ops
from vllm_xlayer.kv_scales import DEFAULT, NONE, Scales, ScalesError, scales_of
from vllm_xlayer.nvfp4 import ScaleChoice, ScaleOrder, content_bytes
from vllm_xlayer.patches.kv_scales import set_scales

LAYER = "model.layers.0.self_attn.attn"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "scales.json"
    kv_scales.write(path, {LAYER: Scales(4.0, 0.125)})
    return path


def test_a_file_comes_before_the_checkpoint_and_that_before_the_default(file):
    assert scales_of(LAYER, Scales(0.5, 0.25), file) == (4.0, 0.125)
    assert scales_of(LAYER, Scales(0.5, 0.25), None) == (0.5, 0.25)
    assert scales_of(LAYER, NONE, None) == DEFAULT != NONE


def test_a_layer_that_the_file_lacks(file):
    with pytest.raises(ScalesError, match=r"expected scales of layer model\.layers\.1, got none"):
        scales_of("model.layers.1", NONE, file)


def test_a_drafters_layer_is_not_in_the_file(file, monkeypatch, caplog):
    monkeypatch.setenv("VLLM_XLAYER_KV_SCALES", str(file))
    drafters = layer(name="drafter.0", speculates=True)
    set_scales(loads(Scales(2.0, 3.0)), drafters, torch.bfloat16)
    assert scales(drafters) == (2.0, 3.0) and "no scales of layer drafter.0" in caplog.text
    with pytest.raises(ScalesError):
        set_scales(loads(NONE), layer(name="another model's"), torch.bfloat16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not JSON", "expected KV scales, got JSONDecodeError"),
        ("[]", r"expected format .*, got \[\]"),
        ('{"format": "another"}', "got 'another'"),
        (json.dumps({"format": kv_scales.FORMAT, "layers": {"a": {"k": 1.0}}}), "a: expected k and v"),
        (json.dumps({"format": kv_scales.FORMAT, "layers": {"a": {"k": 1, "v": 0}}}), "positive numbers"),
        (json.dumps({"format": kv_scales.FORMAT, "layers": {"a": 3}}), "a: expected k and v.*got 3"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ScalesError, match=message):
        kv_scales.read(path)


def layer(ours=True, name=LAYER, target=None, layers=None, speculates=False):
    """layers: name -> those that are there, where this one is put."""
    layers = {} if layers is None else layers
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers),
        speculative_config=SimpleNamespace() if speculates else None,
    )
    impl = SimpleNamespace(uses_global_scales=True, vllm_config=config) if ours else SimpleNamespace()
    layers[name] = SimpleNamespace(
        layer_name=name, impl=impl, kv_sharing_target_layer_name=target,
        _k_scale=torch.tensor(7.0), _v_scale=torch.tensor(7.0),
    )  # fmt: skip
    return layers[name]


def loads(given):
    """What vLLM does, with these scales in the checkpoint."""

    def load(layer, act_dtype):
        layer._k_scale.fill_(given.k)
        layer._v_scale.fill_(given.v)

    return load


def scales(layer):
    return float(layer._k_scale), float(layer._v_scale)


@pytest.mark.parametrize("with_file", [True, False], ids=["file", "checkpoint"])
def test_a_layer_that_reads_anothers_pages_has_its_scales(file, monkeypatch, with_file):
    if with_file:
        monkeypatch.setenv("VLLM_XLAYER_KV_SCALES", str(file))
    layers = {}
    first, reader = layer(layers=layers), layer(name="reader", target=LAYER, layers=layers)
    for _ in range(2):
        set_scales(loads(Scales(2.0, 3.0)), first, torch.bfloat16)
        set_scales(loads(NONE), reader, torch.bfloat16)  # a checkpoint has none where there is no K and V
        assert scales(reader) == scales(first) == ((4.0, 0.125) if with_file else (2.0, 3.0))


@pytest.mark.parametrize("loaded", [NONE, Scales(2.0, 3.0)], ids=["none", "the checkpoint's"])
def test_scales_are_set_after_each_loading(loaded):
    ours, theirs = layer(), layer(ours=False)
    for _ in range(2):
        set_scales(loads(loaded), ours, torch.bfloat16)
        set_scales(loads(loaded), theirs, torch.bfloat16)
        assert scales(ours) == (DEFAULT if loaded == NONE else loaded) and scales(theirs) == loaded


def error_in_a_cache(k, v, scales):
    """Relative errors of K and V [T, H, D] written to a cache and read from it."""
    tokens, heads, head_size = k.shape
    cache = torch.full((-(-tokens // 16), heads, 16, content_bytes(head_size)), 0xFF, dtype=torch.uint8)
    k_scale, v_scale = (torch.tensor(x) for x in scales)
    ops.reshape_and_cache_nvfp4(
        k, v, cache, torch.arange(tokens), k_scale, v_scale, ScaleOrder.LINEAR, ScaleChoice.BEST_OF_9
    )
    read = torch.empty(tokens, heads, head_size), torch.empty(tokens, heads, head_size)
    ops.gather_nvfp4(
        cache, torch.arange(len(cache), dtype=torch.int32)[None], torch.tensor([0], dtype=torch.int32),
        torch.tensor([0, tokens], dtype=torch.int32), k_scale, v_scale, *read, ScaleOrder.LINEAR,
    )  # fmt: skip
    return [float((found - x).norm() / x.norm()) for found, x in zip(read, (k, v), strict=True)]


def test_small_v_and_sinks_of_k_survive_the_default():
    """V with a standard deviation of 0.002, and a first key in the thousands beside ordinary ones. With a
    scale of 1 for both, V does not survive; with one that suits V for both, the key is cut off."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(48, 2, 64, generator=generator)
    v = 0.002 * torch.randn(48, 2, 64, generator=generator)
    k[0, :, ::16] = 2600.0
    assert error_in_a_cache(k, v, DEFAULT)[1] < 0.09
    sink_error, small_error = error_in_a_cache(k, v, NONE)
    assert small_error > 0.2 and sink_error < 0.09
    assert error_in_a_cache(k[1:], v[1:], DEFAULT)[0] < 0.085
    assert error_in_a_cache(k, v, DEFAULT)[0] < 0.09
    assert error_in_a_cache(k, v, (DEFAULT.v, DEFAULT.v))[0] > 0.9

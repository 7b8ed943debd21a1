"""Debug mode's counts of groups that the global scales do not suit, on CPU tensors."""

from types import SimpleNamespace

import pytest
import torch
from backend_cases import Case
from test_nvfp4_backend import cpu_impl
from test_nvfp4_metadata import batch, config

pytest.importorskip("vllm")

from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_xlayer import nvfp4
from vllm_xlayer.attention import scale_counts
from vllm_xlayer.attention.metadata import NVFP4MetadataBuilder
from vllm_xlayer.attention.scale_counts import ScaleCounts, ScaleReport

pytestmark = pytest.mark.usefixtures("pages_alone")

HEADS, SIZE, TOKENS = 2, 64, 5
GROUPS = 4 * HEADS * SIZE // 16
"""Of the tokens that are written."""


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(scale_counts.logger, "warning", lambda line, *args: lines.append(line % args))
    return lines


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(scale_counts.time, "monotonic", lambda: now.seconds)
    return now


def layer(name: str = "a", k: float = 1.0, v: float = 2.0, **more) -> SimpleNamespace:
    return SimpleNamespace(layer_name=name, _k_scale=torch.tensor(k), _v_scale=torch.tensor(v), **more)


def step(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Key, value, slots: one group of K saturates, two of V, three of V underflow; the last token is padding
    and the row after it belongs to no token."""
    key, value = torch.ones(2, TOKENS + 1, HEADS, SIZE).to(dtype)
    key[1, 0, :32] = 800.0  # rotated: 32 * 800 / 4 in one element, and zeros
    value[0, 0, 0], value[2, 1, 63] = 6 * 448 * 2 + 32, -torch.inf
    value[3, 0, 16:64] = 6 * 2**-6 * 2 * 0.9
    value[3, 1] = 0  # zeros are no loss
    key[4], value[4] = torch.inf, 1e-6
    key[5], value[5] = torch.inf, 1e-6
    return key, value, torch.tensor([0, 1, 2, 3, -1])


def test_what_is_written_is_counted_by_the_backend(monkeypatch):
    case = Case(((0, TOKENS),), num_kv_heads=HEADS, head_size=SIZE)
    cache = torch.zeros(1, HEADS, 16, nvfp4.content_bytes(SIZE), dtype=torch.uint8)
    assert cpu_impl(case).scale_counts is None
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    impl = cpu_impl(case)
    for times in (1, 2):
        impl.do_kv_cache_update(layer(), *step(torch.bfloat16)[:2], cache, step()[2])
        expected = [[times * GROUPS, times, 0], [times * GROUPS, 2 * times, 3 * times]]
        assert impl.scale_counts.counts.tolist() == expected


def test_counting_never_waits_for_the_device():
    """What would (a value that is read, a shape that depends on values) ends in an error here; so a CUDA
    graph can capture it."""
    with FakeTensorMode():
        counts = ScaleCounts("cpu")
        shape = (TOKENS, HEADS, SIZE)
        scales = SimpleNamespace(_k_scale=torch.empty(1), _v_scale=torch.empty(1))
        counts.add(scales, torch.empty(shape), torch.empty(shape), torch.empty(TOKENS, dtype=torch.int64))


def test_it_is_said_at_once_and_then_ever_more_rarely(said, clock):
    counts = ScaleCounts("cpu")
    watched = layer(impl=SimpleNamespace(scale_counts=counts))
    report = ScaleReport([watched])
    report.say()
    assert said == []
    counts.add(watched, *step())
    report.say()
    (line,) = said
    assert "a: K, scale 1: 1 of 32 saturated (3.12 %)" in line
    assert "a: V, scale 2: 2 of 32 saturated (6.25 %), 3 of 32 underflowed (9.38 %)" in line
    assert "vllm-xlayer quality MODEL --calibrate FILE" in line
    lines = []
    for _ in range(600):  # ten minutes
        clock.seconds += 1
        counts.add(watched, *step())
        report.say()
        lines.append(len(said))
    assert [lines.index(n) + 1 for n in range(2, lines[-1] + 1)] == [60, 180, 420]


def test_nothing_new_is_not_said_again(said, clock):
    counts = ScaleCounts("cpu")
    watched = layer(impl=SimpleNamespace(scale_counts=counts))
    counts.add(watched, *step())
    report = ScaleReport([watched])
    for _ in range(5):
        report.say()
        clock.seconds += 1e4
    assert len(said) == 1


def test_the_worst_layers_are_named(said):
    layers = [layer(str(i), impl=SimpleNamespace(scale_counts=ScaleCounts("cpu"))) for i in range(4)]
    for times, watched in enumerate(layers):
        for _ in range(times):
            watched.impl.scale_counts.add(watched, *step())
    ScaleReport(layers).say()
    (line,) = said
    assert line.index("3: V") < line.index("2: V") and "0:" not in line and "K or V of 3 more" in line


def test_each_step_may_say_it(monkeypatch, said):
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    settings = config()
    for name, watched in settings.compilation_config.static_forward_context.items():
        watched.impl.scale_counts = ScaleCounts("cpu")
        watched.__dict__.update(vars(layer(name)))
    spec = FullAttentionSpec(block_size=16, num_kv_heads=HEADS, head_size=128, dtype=torch.uint8)
    builder = NVFP4MetadataBuilder(spec, ["a", "b"], settings, torch.device("cpu"))
    builder.build(0, batch([1], [5]))
    assert said == []
    watched.impl.scale_counts.add(watched, *step())
    builder.build(0, batch([1], [6]))
    assert len(said) == 1 and "b: K, scale 1" in said[0]

"""The experiment with K's transforms: what it calls attention is attention, transforms undo themselves."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import transforms
from benchmarks.transforms import Means, Reader, nvfp4, quantisers, rotated
from vllm_xlayer.nvfp4 import rotate, rotate_back

N, HEADS, KV_HEADS, D = 40, 4, 2, 64


@pytest.fixture
def reader(monkeypatch):
    monkeypatch.setattr(transforms, "QUERIES", 16)
    reader = object.__new__(Reader)  # without a model
    reader.keep, reader.newest = lambda layer, k, v: (k, v), 0
    return reader


def heads(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, N, D, generator=generator).bfloat16().float()


def attend(reader, q, k, v):
    out, _ = reader._attend(SimpleNamespace(layer_idx=0), q, k, v, None, scaling=D**-0.5)
    return out.transpose(1, 2)


@pytest.mark.parametrize("newest", [0, 1, 5, N])
def test_a_query_sees_its_newest_tokens_as_they_are(reader, newest):
    q, k, v = heads(HEADS, 0), heads(KV_HEADS, 1), heads(KV_HEADS, 2)
    other_k, other_v = heads(KV_HEADS, 3), heads(KV_HEADS, 4)
    reader.keep, reader.newest = lambda layer, k, v: (other_k, other_v), newest
    got = attend(reader, q, k, v)
    for at in range(N):
        exact = torch.arange(at + 1) > at - newest
        seen = [
            torch.where(exact[:, None], new[0, :, : at + 1], old[0, :, : at + 1]).repeat_interleave(2, 0)
            for new, old in ((k, other_k), (v, other_v))
        ]
        p = (torch.einsum("hd,hnd->hn", q[0, :, at].double(), seen[0].double()) * D**-0.5).softmax(-1)
        expected = torch.einsum("hn,hnd->hd", p, seen[1].double())
        torch.testing.assert_close(got[0, :, at].double(), expected, atol=1e-5, rtol=1e-5)


def test_the_rotation_keeps_lengths_and_undoes_itself():
    x = heads(KV_HEADS, 5)
    for block in (16, 32, 64):
        torch.testing.assert_close(rotated(rotated(x, block), block), x)
        torch.testing.assert_close(rotated(x, block).norm(dim=-1), x.norm(dim=-1))
        assert (rotated(x, block) - x).abs().max() > 0.5
    one = torch.zeros(1, 32)
    one[0, 3] = 1
    assert torch.equal(rotated(one, 16).abs(), torch.tensor([[0.25] * 16 + [0.0] * 16]))


def test_the_rotation_by_32_is_the_caches():
    """As the experiment makes it, and as the writer does."""
    x = heads(KV_HEADS, 9)
    torch.testing.assert_close(rotated(x, 32) * 2**0.5, rotate(x))
    torch.testing.assert_close(rotate_back(rotate(x)), x)


def test_every_way_keeps_k_and_v_about_as_they_are():
    """With a mean as large as real models' K has."""
    k, v = heads(KV_HEADS, 6) + 3 * heads(KV_HEADS, 7)[:, :, :1], heads(KV_HEADS, 8)
    means = Means()
    means.look(0, k, v)
    torch.testing.assert_close(means.of(0), k.mean(2, keepdim=True), atol=0.05, rtol=0.01)
    errors = {}
    for title, keep in quantisers(means).items():
        kept_k, kept_v = keep(0, k, v)
        errors[title] = float((kept_k - k).norm() / k.norm())
        assert float((kept_v - v).norm() / v.norm()) < 0.12
    assert errors["NVFP4"] == float((nvfp4(k) - k).norm() / k.norm())
    assert max(errors.values()) < 0.12 and errors["mean of K subtracted"] < errors["NVFP4"] / 2


def test_the_table_has_a_column_a_text_and_number_of_exact_tokens():
    change = [0.011, 0.009, 0.013]
    variants = [
        dict(title=title, newest=n, change=change, divergence=0.01)
        for title, n in (("exact", 0), ("fp8", 0), ("a", 0))
    ]
    variants.append(dict(title="a", newest=64, change=[0.004, 0.003, 0.005], divergence=0.004))
    result = dict(model="m", text=["t.txt"], windows=6, length=1024, date="d", commit="c", variants=variants)
    lines = transforms.table(result, result | {"model": "demo"}).splitlines()
    assert lines[2].split(" | ")[1:4] == [
        "t.txt, none exact",
        "t.txt, 64 exact",
        "the demo's model, none exact",
    ]
    assert lines[4] == "| fp8 | 1.10 % (0.90 .. 1.30), 0.0100 |  | 1.10 % (0.90 .. 1.30), 0.0100 |  |"
    assert lines[5].startswith("| a | 1.10 % (0.90 .. 1.30), 0.0100 | 0.40 % (0.30 .. 0.50), 0.0040 |")

"""`vllm-xlayer bench gather` in a small form on the CPU, and that its check sees a token read wrongly."""

import json

import pytest
import torch

pytest.importorskip("vllm")

from vllm_xlayer import ops
from vllm_xlayer.bench import __main__, gather
from vllm_xlayer.bench.inputs import Inputs
from vllm_xlayer.bench.layer import Layer


def test_in_small_on_the_cpu(tmp_path, capsys):
    file = tmp_path / "gather.json"
    assert __main__.main(["gather", "--scale", "256", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["commit"] and found["hardware"] and set(found["error"]) == {"attention", "attention_newest"}
    assert [batch["name"] for batch in found["batches"]] == [batch.name for batch in gather.BATCHES]
    for batch in found["batches"]:
        has_prefix = "(0 +" not in batch["name"]
        assert set(batch["bytes"]) == ({"gather", "gather_newest"} if has_prefix else set())
        assert all(taken > 0 for taken in batch["seconds"].values())
    assert set(found["workspaces"]) == {str(mib) for mib in gather.WORKSPACES}
    assert [batch["name"] for batch in found["ways"]] == [batch.name for batch in gather.BOTH_WAYS]
    assert all(taken > 0 for batch in found["ways"] for taken in batch["seconds"].values())
    printed = capsys.readouterr().out
    assert "page 7,424" in printed and "in their pages" in printed


@pytest.mark.parametrize("in_pages", [True, False])
def test_attention_in_pages_and_from_the_workspace_are_told_apart(monkeypatch, in_pages):
    """Neither column is the other's: the kernel for pages runs in one of them only, and its result counts."""
    inputs, ran = Inputs(gather.Batch(1, 160, 16).shape(1), 1, "cpu"), []
    right = ops.nvfp4_prefix_attention
    monkeypatch.setattr(
        "vllm_xlayer.attention.impl.ops.nvfp4_prefix_attention",
        lambda *args, **how: (ran.append(args[3].tolist()), right(*args, **how)),
    )
    layer = Layer(inputs, 1 << 20, in_pages=in_pages)
    layer.attend[0]()
    assert ran == ([[160]] if in_pages else [])


@pytest.mark.parametrize("wrong", ["key", "newest_from", "newest_rows", "seq_lens"])
def test_a_token_from_elsewhere_does_not_pass(monkeypatch, wrong):
    right = ops.gather_nvfp4

    def other(*args):
        names = ("key", "value", "query_starts", "seq_lens", "newest", "newest_rows", "newest_from")
        given = dict(zip(names, args[10:], strict=True))
        changed = {
            "key": lambda: given["key"].flip(0), "newest_from": lambda: given["newest_from"] + 10**6,
            "newest_rows": lambda: given["newest_rows"].roll(1), "seq_lens": lambda: given["seq_lens"] + 8,
        }  # fmt: skip
        given[wrong] = changed[wrong]()
        right(*args[:10], **given)

    assert gather.error_of("attention_newest", "cpu") <= gather.MAX_ERROR["attention_newest"]
    monkeypatch.setattr("vllm_xlayer.attention.impl.ops.gather_nvfp4", other)
    assert not gather.error_of("attention_newest", "cpu") <= gather.MAX_ERROR["attention_newest"]


def test_bytes_of_a_gather():
    """16 new tokens, 64 in a row of which those are 16: 48 others are read from there."""
    shape = gather.Batch(1, 160, 16).shape(1)
    layer = Layer(Inputs(shape, 1, "cpu"), 1 << 20, 64)
    page, dense = 8 * (128 + 16), 2 * 2 * 8 * 128
    assert gather.moved(shape, layer, 64) == 112 * page + 64 * dense + 176 * dense
    assert gather.moved(shape, layer, 0) == 160 * page + 16 * dense + 176 * dense


def test_a_small_workspace_cuts_the_batch():
    shape = gather.Batch(2, 160, 16).shape(1)
    layer = Layer(Inputs(shape, 1, "cpu"), 100 * 4096)
    assert [piece.num_keys for piece in layer.pieces] == [76, 100] * 2 and layer.gathered_tokens == 352
    assert torch.equal(layer.pieces[1].seq_starts, torch.tensor([76], dtype=torch.int32))

"""The weights digest sees updates; engines whose KV must not outlive them are refused."""

import json
import os
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm_xlayer.connector.identity import NoIdentity, tier_identity, weights_digest


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


def test_no_weights(tmp_path):
    with pytest.raises(NoIdentity, match="expected weight files"):
        weights_digest(tmp_path)


def engine(**changes):
    settings = dict(lora=None, speculative=None, algorithm="sha256", world=2) | changes
    return SimpleNamespace(
        lora_config=settings["lora"],
        speculative_config=settings["speculative"],
        cache_config=SimpleNamespace(prefix_caching_hash_algo=settings["algorithm"]),
        parallel_config=SimpleNamespace(world_size=settings["world"], tensor_parallel_size=2),
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(lora=object()), "LoRA"),
        (dict(speculative=object()), "speculative"),
        (dict(algorithm="xxhash"), "expected one of sha256, sha256_cbor, got xxhash"),
        (dict(world=4), "tensor parallelism only"),
    ],
)
def test_kv_that_must_not_be_kept(changes, reason):
    with pytest.raises(NoIdentity, match=reason):
        tier_identity(engine(**changes), None, 1)

"""Damage anywhere in an entry of the disk tier is a miss; random use of the folder agrees with a model."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_xlayer.connector.disk.format import HEADER_BYTES, EntryError, TierIdentity
from vllm_xlayer.connector.disk.store import DiskStore

IDENTITY = TierIdentity(
    layout="l", kv_dtype="nvfp4", model="m", settings="s", weights="w", tp_size=1, block_size=16,
    blocks_per_chunk=1,
)  # fmt: skip
BYTES = 777
SIZE = HEADER_BYTES + BYTES
KEY = b"key of a chunk, 36 bytes long, whole"


def payload(i):
    return memoryview(bytes((7 * i + j) % 256 for j in range(BYTES)))


@pytest.fixture(scope="module")
def store():
    folder = Path(tempfile.mkdtemp())
    yield DiskStore(folder, 100 * SIZE, IDENTITY, BYTES)
    shutil.rmtree(folder)


def damaged(store, change):
    """Reads an entry after a change to its bytes; the reason why it cannot be used."""
    store.write(KEY, payload(0))
    path = Path(store.path_of(KEY))
    data = change(bytearray(path.read_bytes()))
    path.write_bytes(data)
    with pytest.raises(EntryError) as caught:
        store.read(KEY, memoryview(bytearray(BYTES)))
    assert not path.exists()
    return caught.value.reason


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 8 * SIZE - 1))
def test_a_flipped_bit_is_a_miss(store, bit):
    def flip(data):
        data[bit // 8] ^= 1 << bit % 8
        return data

    expected = "format" if bit < 64 else "damaged header" if bit < 8 * HEADER_BYTES else "damaged payload"
    assert damaged(store, flip) == expected


def test_a_flipped_bit_in_every_byte_of_the_header_is_a_miss(store):
    for at in range(HEADER_BYTES):

        def flip(data, at=at):
            data[at] ^= 1 << at % 8
            return data

        assert damaged(store, flip) in ("format", "damaged header")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, SIZE - 1))
def test_a_shortened_entry_is_a_miss(store, length):
    assert damaged(store, lambda data: data[:length]) == "short"


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=50), st.integers(0, SIZE))
def test_inserted_bytes_are_a_miss(store, extra, at):
    assert damaged(store, lambda data: data[:at] + extra + data[at:]) in (
        "short", "format", "damaged header",
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2 * SIZE))
def test_any_other_file_is_a_miss(store, data):
    damaged(store, lambda _: data)


@settings(max_examples=200, deadline=None)
@example([("write", 2), ("write", 3), ("write", 0), ("write", 1), ("write", 0)])  # a full one, replacing
@given(
    st.lists(st.tuples(st.sampled_from(["write", "read", "touch", "rescan", "restart"]), st.integers(0, 7)))
)
def test_random_use_agrees_with_a_model(steps):
    """A bound of four entries: the model is a list, the most recently used last."""
    folder = Path(tempfile.mkdtemp())
    try:
        store, model = DiskStore(folder, 4 * SIZE, IDENTITY, BYTES), []
        for what, i in steps:
            key = bytes([i]) * 36
            if what == "write":
                store.write(key, payload(i))
                model = [*(k for k in model if k != i), i][-4:] if i in model or len(model) < 4 else [
                    *model[1:], i,
                ]  # fmt: skip
            elif what == "read" and i in model:
                into = bytearray(BYTES)
                store.read(key, memoryview(into))
                assert into == payload(i)
                model = [*(k for k in model if k != i), i]
            elif what == "touch":
                store.touch([key])
                model = [*(k for k in model if k != i), i] if i in model else model
            elif what == "rescan":
                store.rescan()
            elif what == "restart":
                again = DiskStore(folder, 4 * SIZE, IDENTITY, BYTES)
                assert {k for k in range(8) if again.contains(bytes([k]) * 36)} == set(model)
            assert store.total == len(model) * SIZE == sum(p.stat().st_size for p in folder.rglob("*.row"))
            assert {k for k in range(8) if store.contains(bytes([k]) * 36)} == set(model)
    finally:
        shutil.rmtree(folder)

"""The weights digest sees updates, and what was loaded before they came."""

import time

import pytest

pytest.importorskip("vllm")

from identity_fixture import DATA, save

from vllm_xlayer.connector.disk import weight_files
from vllm_xlayer.connector.disk.weight_files import NoIdentity, loaded_weights, weights_digest


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


def test_small_tensors_count(tmp_path):
    """Of a model's many tensors most are norms and biases, which samples spread over a file do not hit."""
    place, tensors, data = 0, {}, bytearray(64 << 20)
    for i in range(24):
        for name, size in ((f"{i}.norm", 8192), (f"{i}.weight", 2 << 20)):
            tensors[name] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [place, place + size]}
            place += size
    tensors["__metadata__"] = {"format": "pt"}
    folder = save(tmp_path / "model", bytes(data[:place]), header=tensors)
    before = [weights_digest(folder, of_this_copy) for of_this_copy in (True, False)]
    for name in ("7.norm", "23.weight"):
        begin = tensors[name]["data_offsets"][0]
        changed = data[:place]
        changed[begin + 100] = 1
        folder = save(tmp_path / "model", bytes(changed), header=tensors)
        after = [weights_digest(folder, of_this_copy) for of_this_copy in (True, False)]
        assert before[0] != after[0] and before[1] != after[1], name


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

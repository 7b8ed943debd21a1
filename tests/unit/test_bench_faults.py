"""`benchmarks.faults` adds up what the tests counted, and says when it is not nothing."""

import sys

import pytest

from benchmarks import faults
from benchmarks.markdown_tier import fault_tables

CASE = """
import pytest

@pytest.fixture(autouse=True)
def tally(request, record_property):
    yield
    record_property("fault", request.node.get_closest_marker("fault").args[0])
    for name, value in zip({counts}, request.node.get_closest_marker("fault").args[1:]):
        record_property(name, value)

@pytest.mark.fault("disk full", 3, 10, 0, 0, 0)
def test_good(): pass

@pytest.mark.fault("disk full", 1, 5, 0, 0, 0)
def test_good_too(): pass

@pytest.mark.fault("soak", 2, 100, 1, 2, 3)
def test_bad(): assert False

@pytest.mark.fault("preemption", 9, 9, 9, 9, 9)
@pytest.mark.skip(reason="is not counted")
def test_skipped(): pass
"""


def report(tmp_path, text):
    import subprocess

    (tmp_path / "test_it.py").write_text(text.format(counts=faults.COUNTS))
    xml = tmp_path / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--rootdir",
        str(tmp_path),
        f"--junitxml={xml}",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=tmp_path, check=False, capture_output=True)
    return xml


def test_counts_are_added_up(tmp_path):
    found, _ = faults.counted(report(tmp_path, CASE))
    assert set(found) == set(faults.FAULTS)
    names = ("tests", "failed", *faults.COUNTS)
    assert [found["disk full"][n] for n in names] == [2, 0, 4, 15, 0, 0, 0]
    assert [found["soak"][n] for n in names] == [1, 1, 2, 100, 1, 2, 3]
    assert not any(found["preemption"].values())


def test_a_fault_without_a_row_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="disc full"):
        faults.counted(report(tmp_path, CASE.replace('"disk full", 3', '"disc full", 3')))


def test_the_table_says_what_was_not_tried():
    """Faults without a try, and such as were added after the file was written."""
    row = dict.fromkeys(("tests", "failed", *faults.COUNTS), 0)
    known = {name: row | {"tries": int(name != "disk full")} for name in faults.FAULTS if name != "soak"}
    about = dict(hardware="a GPU", date="today", commit="abc", versions=dict(vllm="1", torch="2"))
    text = fault_tables({**about, "faults": known, "soak_seconds": 1})
    assert text.splitlines()[-1] == "Not tried there: disk full; soak."
    complete = {name: row | {"tries": 1} for name in faults.FAULTS}
    assert "Not tried" not in fault_tables({**about, "faults": complete, "soak_seconds": 1})


@pytest.mark.parametrize(
    ("name", "device"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), (None, "cpu")]
)
def test_results_files_are_named_after_the_gpu(name, device, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: name is not None)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    assert faults.device() == device

"""`benchmarks.soak` on the CPU platform, for seconds; it runs for minutes, on a GPU too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import right_answers
from benchmarks.soak import added_up
from benchmarks.soak_hybrids import is_bad
from benchmarks.soak_speculation import TIE, Right

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; sys.path.append(sys.argv.pop(1)); from benchmarks.soak import main; sys.exit(main())"
"""As `python -m benchmarks.soak`, but with the package that is installed, not the sources beside it."""
MIX_UP = """
from vllm_xlayer import ops
real = ops.copy_blocks
def copy(src, dst, src_ids, dst_ids, *method):
    real(src, dst, src_ids.flip(0), dst_ids, *method)
ops.copy_blocks = copy
"""
"""Rows that are copied together change places."""
RIGHT = Right([1, 2, 3], [1.0, TIE / 2, 1.0])
HYBRIDS = right_answers.Right([1, 2], [{1: -1.0, 3: -2.0, 4: -3.0}, {2: -1.0, 5: -1.25, 6: -5.0}])


@pytest.mark.parametrize(
    ("tokens", "fits"),
    [([1, 2, 3], True), ([1, 2, 4], False), ([2, 2, 3], False), ([1, 9, 9], True)],
    ids=["equal", "another", "another at once", "another where two were as likely"],
)
def test_an_answer_fits_up_to_a_tie(tokens, fits):
    assert RIGHT.fits(tokens) is fits


@pytest.mark.parametrize(
    ("tokens", "likely", "distance"),
    [
        ([1, 2], HYBRIDS.likely, 0.0),
        ([1, 2], [HYBRIDS.likely[0], {2: -1.0, 5: -1.25, 7: -4.5}], 0.0),
        ([1, 2], [HYBRIDS.likely[0], {2: -1.0, 5: -1.5, 7: -4.5}], 0.25),
        ([1, 5], [HYBRIDS.likely[0], {2: -1.25, 5: -1.125, 6: -5.0}], 0.25),
        ([1, 9], [HYBRIDS.likely[0], {9: -1.0, 2: -1.0, 5: -1.25}], 2.0),
        ([3, 2], [{1: -1.5, 3: -1.5, 4: -3.0}, {8: -1.0, 9: -1.25, 7: -5.0}], 0.5),
        ([1, 2], [HYBRIDS.likely[0], {2: float("nan"), 5: -1.25, 6: -5.0}], float("inf")),
    ],
    ids=["equal", "the last of three", "second", "second first", "from nowhere", "first", "no number"],
)
def test_how_far_a_hybrids_answer_is_off(tokens, likely, distance):
    assert HYBRIDS.distance(right_answers.Right(tokens, likely), 2) == distance
    assert HYBRIDS.distance(right_answers.Right(tokens, likely), 0) == 0.0


def test_what_a_hybrids_soak_must_not_count():
    good = dict(wrong=0, lost=0, leaked=0, power=[{"noticed": 1}, {"noticed": 2}])
    assert not is_bad(good)
    assert all(is_bad(good | {name: 1}) for name in ("wrong", "lost", "leaked"))
    assert is_bad(good | {"power": [{"noticed": 1}, {"noticed": 0}]}), "nothing is said of the second group"


def test_what_several_counted():
    parts = [{"seed": seed, "seconds": 1.5, "wrong": seed, "commit": "c"} for seed in (1, 2)]
    assert added_up(parts) == {"seconds": 3.0, "wrong": 3}


def run(folder, *arguments, before=""):
    """How a soak ended, and the results file's contents."""
    found = folder / "soak.json"
    command = [sys.executable, "-c", before + COMMAND, str(ROOT), *arguments, "--json", str(found)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert found.exists(), done.stdout + done.stderr
    return done, json.loads(found.read_text())


def test_soak_for_seconds(reference_platform, tmp_path):
    done, counted = run(tmp_path, "--minutes", "0.05")
    assert done.returncode == 0, done.stdout + done.stderr
    assert counted["wrong"] == counted["lost"] == counted["leaked"] == 0
    assert min(counted[name] for name in ("answers", "tries", "accepted_drafts", "noticed")) > 0
    assert counted["newest_layers"] == 2, "the model's, and the one that drafts"


@pytest.mark.parametrize(("model", "groups"), [("lfm2", 5), ("qwen3_next", 4)])
def test_hybrids_for_seconds(reference_platform, tmp_path, model, groups):
    """With NVFP4, whose right answers are several; an entry of another model stays."""
    other = {"date": "then", "commit": "abc", "soaks": {"other auto": {"model": "other"}}}
    (tmp_path / "soak.json").write_text(json.dumps(other))
    done, counted = run(tmp_path, "--model", model, "--caches", "nvfp4", "--minutes", "0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    soaks = counted["soaks"]
    assert soaks.pop("other auto") == {"model": "other", "date": "then", "commit": "abc"}
    (soaked,) = soaks.values()
    assert soaked["wrong"] == soaked["lost"] == soaked["leaked"] == 0
    assert min(soaked[name] for name in ("answers", "tries", "rows_loaded")) > 0
    assert len(soaked["power"]) == groups
    assert all(group["noticed"] > group["of"] / 2 for group in soaked["power"])


def test_rows_that_change_places_are_noticed(reference_platform, tmp_path):
    done, counted = run(tmp_path, "--model", "lfm2", "--caches", "auto", "--minutes", "0.3", before=MIX_UP)
    assert done.returncode == 1 and "wrong: " in done.stdout, done.stdout + done.stderr
    assert counted["soaks"]["lfm2 auto"]["wrong"] > 0

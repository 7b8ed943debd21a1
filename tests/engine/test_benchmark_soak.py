"""`benchmarks.soak` on the CPU platform, for seconds; it runs for half an hour on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import TIE, Right, added_up

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; sys.path.append(sys.argv.pop(1)); from benchmarks.soak import main; sys.exit(main())"
"""As `python -m benchmarks.soak`, but with the package that is installed, not the sources beside it."""
RIGHT = Right([1, 2, 3], [1.0, TIE / 2, 1.0])


@pytest.mark.parametrize(
    ("tokens", "fits"),
    [([1, 2, 3], True), ([1, 2, 4], False), ([2, 2, 3], False), ([1, 9, 9], True)],
    ids=["equal", "another", "another at once", "another where two were as likely"],
)
def test_an_answer_fits_up_to_a_tie(tokens, fits):
    assert RIGHT.fits(tokens) is fits


def test_what_several_counted():
    parts = [{"seed": seed, "seconds": 1.5, "wrong": seed, "commit": "c"} for seed in (1, 2)]
    assert added_up(parts) == {"seconds": 3.0, "wrong": 3}


def test_soak_for_seconds(reference_platform, tmp_path):
    found = tmp_path / "soak.json"
    command = [sys.executable, "-c", COMMAND, str(ROOT), "--minutes", "0.05", "--json", str(found)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads(found.read_text())
    assert counted["wrong"] == counted["lost"] == counted["leaked"] == 0
    assert min(counted[name] for name in ("answers", "tries", "accepted_drafts", "noticed")) > 0
    assert counted["newest_layers"] == 2, "the model's, and the one that drafts"

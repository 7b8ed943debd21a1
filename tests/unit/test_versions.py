"""What is worse than with vLLM 0.26 is said with a reason, and the old figures are those of git's history."""

import json
import subprocess

import pytest

from benchmarks import versions
from benchmarks.versions import FILES, OLD_FILE, Figure

OLD = json.loads(OLD_FILE.read_text())


def results():
    return [json.loads((versions.RESULTS / file).read_text()) for file in FILES.values()]


def test_the_old_figures_are_those_of_the_old_commit():
    try:
        found = versions.old_figures()
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip(f"needs git's history, with {versions.OLD_COMMIT}")
    assert found == OLD
    assert {figure["vllm"] for figure in OLD["figures"].values()} == {"0.26.0"}


def test_every_worse_figure_has_its_line_and_no_other_has():
    text = versions.section(OLD, *results())
    new = {figure.name: figure for figure in versions.figures(dict(zip(FILES, results(), strict=True)))}
    shown = {line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")}
    worse = set()
    for name, old in OLD["figures"].items():
        before, now = old["value"], new[name].value
        if (now > before if new[name].unit in ("ms", "us") else now < before) and abs(
            now / before - 1
        ) > 0.01:
            worse.add(name)
    assert shown == worse | {""}
    times = [name for name in worse if new[name].unit == "ms"]
    assert times
    for name in times:
        before, now = 1e3 * OLD["figures"][name]["value"], 1e3 * new[name].value
        assert f"| {name} | {before:,.2f} ms | {now:,.2f} ms | {100 * (now / before - 1):+.1f} % | " in text


def test_a_worse_figure_without_a_reason_is_an_error(monkeypatch):
    """Whatever this one has become: as if it had been half as long before."""
    name = "decode step 64 x 8,192"
    now = json.loads((versions.RESULTS / "h200-engine.json").read_text())["caches"]["nvfp4"]["decodes"][0]
    half = now["step_seconds"] / 2
    old = {**OLD, "figures": {name: {**OLD["figures"][name], "value": half}}}
    for reason in [begin for begin in versions.REASONS if name.startswith(begin)]:
        monkeypatch.delitem(versions.REASONS, reason)
    with pytest.raises(ValueError, match=rf"{name}: expected a reason .* {1e3 * half:.2f} ms"):
        versions.section(old, *results())


def test_every_reason_is_used():
    text = versions.section(OLD, *results())
    assert all(reason in text for reason in versions.REASONS.values())


def test_more_is_better_but_of_times():
    assert Figure("engine", "a step", 1.1, "ms").worse_by(1.0) == pytest.approx(0.1)
    assert Figure("capacity", "tokens", 90, "tokens").worse_by(100) == pytest.approx(0.1)
    assert Figure("capacity", "ratio", 3.5, "x").worse_by(3.4) < 0

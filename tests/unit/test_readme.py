"""The README's and RESULTS' numbers are those of the committed results files."""

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import readme
from benchmarks.plot import SOURCE, copy_plot, decode_plot, digest
from benchmarks.readme import COPY_PLOT, DOCUMENTS, PLOT, QUALITY_PLOT, TABLES, rendered
from vllm_xlayer import provenance as module
from vllm_xlayer.provenance import provenance

# The source tree's: the installed package has no README beside it.
ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_tables_agree_with_the_results(path):
    text = path.read_text()
    assert "<!-- " in text and rendered(text) == text, "run `python -m benchmarks.readme`"


def test_every_table_is_shown_somewhere():
    texts = "".join(path.read_text() for path in DOCUMENTS)
    assert all(f"<!-- {name}: begin -->" in texts for name in TABLES)


@pytest.mark.parametrize(
    ("plot", "path"),
    [
        (PLOT, DOCUMENTS[0]),
        (COPY_PLOT, DOCUMENTS[1]),
        (QUALITY_PLOT, DOCUMENTS[3]),
        (QUALITY_PLOT, DOCUMENTS[0]),
    ],
    ids=["decode", "copy", "quality", "quality, README"],
)
def test_the_picture_is_of_these_results(plot, path):
    image = pytest.importorskip("PIL.Image")
    results, png = plot
    if plot is COPY_PLOT and not results.exists():
        pytest.skip("no such results yet")
    assert image.open(png).text[SOURCE] == digest(results), "run `python -m benchmarks.readme`"
    assert f"results/{png.name}" in path.read_text()


@pytest.mark.parametrize(
    ("draw", "results"), [(decode_plot, PLOT[0]), (copy_plot, COPY_PLOT[0])], ids=["decode", "copy"]
)
def test_a_legend_covers_no_panel(draw, results, tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []
    save = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda f, *args, **kw: drawn.append(f) or save(f, *args, **kw)
    )
    draw(results, tmp_path / "plot.png")
    (figure,) = drawn
    (legend,) = figure.legends
    panels = figure.axes
    assert len(panels) > 1 and not any(panel.get_legend() for panel in panels)
    labels = {label for panel in panels for label in panel.get_legend_handles_labels()[1]}
    assert {text.get_text() for text in legend.get_texts()} == labels
    box = legend.get_window_extent()
    assert not any(box.overlaps(panel.get_tightbbox()) for panel in panels)
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_a_section_without_results_is_empty(tmp_path, monkeypatch):
    text = "a\n<!-- copy: begin -->\nold\n<!-- copy: end -->\nb\n"
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert rendered(text) == "a\n<!-- copy: begin -->\n<!-- copy: end -->\nb\n"
    with pytest.raises(FileNotFoundError):  # the others must be there
        rendered(text.replace("copy", "write"))


def test_the_two_commands_are_the_ones_ci_knows():
    text = README.read_text()
    commands = re.findall(r"```bash\n(.*?)\n```", text, re.S)
    assert "vllm-xlayer demo" in commands[0]
    assert commands[1].strip() == "pytest"
    ci = (README.parent / ".ci/run").read_text()
    assert ci.splitlines()[-1].split()[0] == "pytest"


def test_a_copy_without_git_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("VLLM_XLAYER_COMMIT", "0123abc")
    assert provenance()["commit"] == "0123abc"


def test_the_commit_is_not_that_of_a_repository_it_is_installed_in(monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_XLAYER_COMMIT", raising=False)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    user = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *user, "commit", "-q", "--allow-empty", "-m", "a"], cwd=tmp_path, check=True)
    installed = tmp_path / "provenance.py"
    installed.write_text("")
    monkeypatch.setattr(module, "__file__", str(installed))
    assert provenance()["commit"] == "unknown"
    subprocess.run(["git", "add", installed], cwd=tmp_path, check=True)
    assert re.fullmatch(r"[0-9a-f]{7,}\+changes", provenance()["commit"])


def test_results_are_not_changes_of_the_code(monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_XLAYER_COMMIT", raising=False)
    results, code = tmp_path / "benchmarks/results/a.json", tmp_path / "vllm_xlayer/provenance.py"
    for file in (results, code):
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    identity = ["-c", "user.name=a", "-c", "user.email=a"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(module, "__file__", str(code))
    results.write_text("[]")
    assert re.fullmatch(r"[0-9a-f]{7,}", provenance()["commit"])
    code.write_text("[]")
    assert provenance()["commit"].endswith("+changes")

"""What this package measured with vLLM 0.26 and again with the present one: what is slower or less, and why.

``python -m benchmarks.versions`` takes the figures of 0.26 from git's history, where its results files are,
into results/vllm-0.26.json. The table is made of that file and of the present results; a figure that is
worse and has no reason in REASONS is an error.
"""

import json
import statistics
import subprocess
from collections.abc import Iterator
from typing import Any, NamedTuple

from vllm_xlayer.bench.first_token import added
from vllm_xlayer.bench.offload_tables import step_lines
from vllm_xlayer.bench.write import TITLES as WRITERS

from . import RESULTS, ROOT
from .markdown import OURS, table

OLD_COMMIT = "a9f7579"
"""The last one for vLLM 0.26."""
OLD_FOLDER = "vllm_xlayer/bench/results"
"""Where results were then."""
OLD_FILE = RESULTS / "vllm-0.26.json"
FILES = {
    name: f"h200-{name}.json"
    for name in ("engine", "decode", "write", "capacity", "offload", "prefill", "load", "copy")
}
"""What was measured with both."""
COPIES = {
    "H2D": "to the device", "D2H": "to the host", "D2D": "inside the device", "BOTH": "in both directions",
}  # fmt: skip
WORSE = 0.01
"""A change that is not worth a reason."""


class Figure(NamedTuple):
    """A number of a results file: a time, where less is better, or an amount, where more is."""

    file: str
    name: str
    value: float
    unit: str

    @property
    def is_time(self) -> bool:
        return self.unit in SCALES

    def worse_by(self, old: float) -> float:
        """The part by which it is worse than the old value; negative if it is better."""
        return self.value / old - 1 if self.is_time else 1 - self.value / old

    def shown(self, value: float) -> str:
        if not self.is_time:
            others = {"tokens": f"{value:,.0f}", "x": f"{value:.2f}x", "GB/s": f"{value / 1e9:,.1f} GB/s"}
            return others[self.unit]
        return f"{value * SCALES[self.unit]:,.{DIGITS[self.unit]}f} {self.unit}"


SCALES = {"ms": 1e3, "us": 1e6}
DIGITS = {"ms": 2, "us": 1}

REASONS = {
    "decode step 1 x": "A layer's attention takes 1 us longer with the newest 64 tokens in 16 bits, the "
    "default since, its writing 0.5 us: 0.05 ms of the step. Hosts differ by more (5.30 ms at commit "
    "a0744d8).",
    "decode, ": "Newest 64 tokens in 16 bits, the default since, and queries that are rotated "
    "([NOTES](../csrc/kernels/nvfp4_attention/NOTES.md)).",
    "write": "K is rotated since: 80 additions and 16 shuffles a group "
    "([NOTES](../csrc/kernels/nvfp4_write/NOTES.md)).",
    "tokens that fit": "Newest tokens take at most 2.5 % of the GPU's memory, and vLLM takes more of it, "
    "too: of bf16 834,608 tokens fitted, and 824,432 do.",
    "times the tokens": "Newest tokens' memory.",
    "first token of": "The host's time, which launches such a step kernel by kernel (the GPU computes for 7 "
    "ms, `benchmarks.steps`), in one engine's process a third slower than in another: all cached, fp8 took "
    "37 ms in this run, and bf16 28.",
    "first token": "The host's time, which launches such a step kernel by kernel: some 25 of each layer's "
    "launches put newest and own tokens over dequantised ones. Since commit 1e70f51 one does: 25 ms of "
    "16,384 cached tokens in `benchmarks.steps`, where bf16 took 68 on the same host. Not measured anew by "
    "this benchmark.",
    "beside rows from the host": "Beside pieces of 64 MiB, which are no rows, a step takes 5.6 % longer than "
    "alone, beside rows 4.7 %. The bound of 3 % was missed with 0.26 (3.5 %), too.",
    "without the connector": "Of 0.11 ms our kernels are 0.05, as of `bench engine`'s step. Hosts differ by "
    "as much.",
    "beside": "As without the connector; the rest is not known.",
    "copies inside": "On the device alone all but the smallest have the rate they had; one large copy was "
    "1.3 % slower on this host. What the host takes for a call of small pieces scatters most.",
    "copies": "Not known; one large copy has the same rate within 1 %.",
}
"""Why a figure is worse, by what its name begins with; the first that fits."""


def figures(results: dict[str, dict[str, Any]]) -> Iterator[Figure]:
    """What can be compared, of the contents of FILES."""
    caches = results["engine"]["caches"]
    for i, step in enumerate(caches["nvfp4"]["decodes"]):
        name = f"decode step {step['requests']} x {step['tokens']:,}"
        fp8 = caches["fp8"]["decodes"][i]["step_seconds"]
        yield Figure("engine", name, step["step_seconds"], "ms")
        yield Figure("engine", f"{name}, fp8 / ours", fp8 / step["step_seconds"], "x")
    for shape in results["decode"]["shapes"]:
        seconds = shape["seconds"]
        yield Figure("decode", f"decode, {shape['name']}", seconds.get(OURS, seconds["nvfp4"]), "us")
    for line in results["write"]["writes"]:
        for choice, title in WRITERS.items():
            if "ours" in title:
                name = f"write {line['tokens']:,} tokens, {title.partition(', ')[2]}"
                yield Figure("write", name, line["seconds"][choice], "us")
    ours = results["capacity"]["caches"]["nvfp4 + XLayerConnector"]
    yield Figure("capacity", "tokens that fit", ours["tokens"], "tokens")
    yield Figure("capacity", "times the tokens of bf16", results["capacity"]["capacity_ratio"], "x")
    for kind in ("cold", "cached", "restored"):
        yield Figure("capacity", f"first token {kind}", ours[f"ttft_{kind}"], "ms")
    engines = results["offload"]["engines"]
    restore = engines["with"]["restore"]
    places = {"cold": "computed", "cached": "on the device", "restored": "in the host tier"}
    for kind, title in places.items():
        yield Figure("offload", f"{title}, first token", statistics.median(restore[kind]), "ms")
    yield Figure("offload", "host tier - device, first token", added(restore), "ms")
    for title, step_seconds, *_ in step_lines(engines):
        yield Figure("offload", f"{title}, decode step", step_seconds, "ms")

    prefill = results["prefill"]
    nvfp4, long = prefill["caches"]["nvfp4"], f"first token of {prefill['long']:,}"
    batch = f"prefill {prefill['requests']} x {prefill['tokens']:,}"
    for key, title in (("batch", batch), ("half", f"{long}, half cached"), ("cached", f"{long}, all cached")):
        yield Figure("prefill", title, statistics.median(nvfp4[f"{key}_seconds"]), "ms")
    # As parts of fp8's: more contexts were offered with 0.26.
    ours, fp8 = (results["load"]["caches"][name] for name in ("nvfp4", "fp8"))
    rates = [cache["fit"] / cache["step_seconds"] for cache in (ours, fp8)]
    yield Figure("load", "output of as many contexts as fit, ours / fp8", rates[0] / rates[1], "x")
    new = fp8["new"]["seconds"] / ours["new"]["seconds"]
    yield Figure("load", "new contexts, fp8 / ours", new, "x")
    for way, title in COPIES.items():
        for line in results["copy"]["ways"][way]:
            name = f"copies {title}, {line['piece_bytes']:,} bytes a piece"
            yield Figure("copy", name, line["stream"]["ours"], "GB/s")


def section(old: dict[str, Any], *new: dict[str, Any]) -> str:
    """Markdown of every figure that is worse than with vLLM 0.26, and why.

    Raises:
        ValueError: one of them has no reason.
    """
    results = dict(zip(FILES, new, strict=True))
    found = [figure for figure in figures(results) if figure.name in old["figures"]]
    lines: list[tuple[str, list[str]]] = []
    notes: dict[str, int] = {}
    for figure in found:
        before = old["figures"][figure.name]["value"]
        if figure.worse_by(before) <= WORSE:
            continue
        why = next((text for begin, text in REASONS.items() if figure.name.startswith(begin)), None)
        if why is None:
            raise ValueError(f"{figure.name}: expected a reason why it is worse than {figure.shown(before)}")
        change = f"{100 * (figure.value / before - 1):+.1f} %"
        number = str(notes.setdefault(why, len(notes) + 1))
        lines.append((figure.name, [figure.shown(before), figure.shown(figure.value), change, number]))
    versions = " and ".join(sorted({contents["versions"]["vllm"] for contents in new}))
    reasons = "\n".join(f"{number}. {why}" for why, number in notes.items())
    rest, kinds = len(found) - len(lines), "`, `".join(FILES)
    return f"""\
## Worse than with vLLM 0.26

Of {len(found)} figures of `bench {kinds}` that were measured with vLLM 0.26 (commit {old["commit"]})
and with {versions}, {rest} are better, or worse by 1 % at most. The others, with the number of a reason
(the H200s were of several hosts, whose own times differ):

{table(["", "0.26", "now", "change", "why"], lines)}

{reasons}

The figures of 0.26, each with file, date and commit, are in results/vllm-0.26.json
(`python -m benchmarks.versions`)."""


def old_figures() -> dict[str, Any]:
    """Those of OLD_COMMIT, from git's history.

    Raises:
        subprocess.CalledProcessError: this is no repository that has it.
    """
    results = {name: json.loads(_of_old_commit(file)) for name, file in FILES.items()}
    found = {}
    for figure in figures(results):
        measured = results[figure.file]
        found[figure.name] = {
            "value": figure.value,
            "file": FILES[figure.file],
            "date": measured["date"],
            "commit": measured["commit"],
            "hardware": measured["hardware"],
            "vllm": measured["versions"]["vllm"],
        }
    return {"commit": OLD_COMMIT, "folder": OLD_FOLDER, "figures": found}


def _of_old_commit(file: str) -> str:
    command = ["git", "show", f"{OLD_COMMIT}:{OLD_FOLDER}/{file}"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    OLD_FILE.write_text(json.dumps(old_figures(), indent=1) + "\n")

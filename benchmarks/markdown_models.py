"""The tables of model families and of latents in docs/models.md, from the results of `benchmarks.models` and
`benchmarks.latents`."""

from collections.abc import Iterable
from typing import Any

COMPARED = """*Works*: a prompt was answered from the cache, and with the connector once more from host memory
alone, with equal tokens and logprobs; wrong blocks of any group were seen to change them."""
CPU_INTRODUCTION = f"""### Started and compared

`python -m benchmarks.models` starts each of these on the CPU reference platform, as a tiny model with random
weights, and writes this table. {COMPARED}
*Not here*: the reference platform has no kernels for it, which says nothing of a GPU.
"""
GPU_INTRODUCTION = f"""### The same on a GPU

In 16 bits, with vLLM's kernels and this package's. {COMPARED}
"""
LARGE_INTRODUCTION = """### With CUDA graphs and a large cache

On a GPU, as above, but decode in CUDA graphs and a cache of so many GiB, whose last blocks were used:
`python -m benchmarks.models FAMILY --cache-gib GIB`.
"""
LATENTS_INTRODUCTION = """### Latent attention on a GPU

`python -m benchmarks.latents`, with latents of real width. *In rows*: as in vLLM's own layout, tokens and
logprobs, cold and cached. *Restored*: from host memory as cached on the device.
"""
WAYS = ("NVFP4", "XLayerConnector", "both")
FP8 = (
    "vLLM's own FLASH_ATTN_DIFFKV, which the model chooses, takes the flag and keeps fp8: a byte an element, "
    "not NVFP4"
)
CHUNKED = "the class that vLLM makes from this package's backend for layers that attend in chunks"
REMARKS = {
    ("MiMoV2FlashForCausalLM", "NVFP4", "866e501"): FP8,
    ("Llama4ForCausalLM", "NVFP4", "bb881fd"): CHUNKED,
    ("Llama4ForCausalLM", "both", "bb881fd"): CHUNKED,
}
"""(row, way, commit) -> what its cell does not say of itself."""
PLATFORM, ABSENT = "CPU reference platform: ", "are not supported for now"
"""What a sentence of the platform begins with, and what vLLM says of an unknown model."""


LONGEST = 400
"""Characters of a refusal that are shown."""


def table(results: dict[str, Any]) -> str:
    """A row a family, from the CPU reference platform."""
    return _table(CPU_INTRODUCTION, ("family", *WAYS), results["families"].values(), results)


def gpu_table(results: dict[str, Any]) -> str:
    """The same, from a GPU."""
    return _table(GPU_INTRODUCTION, ("family", *WAYS), results["families"].values(), results)


def large_table(results: dict[str, Any]) -> str:
    """The same, with CUDA graphs and a large cache."""
    return _table(LARGE_INTRODUCTION, ("family", "GiB", *WAYS), results["families"].values(), results)


def counted(gpu: dict[str, Any], cpu: dict[str, Any]) -> str:
    """How many families were compared on a GPU, and how many on the CPU reference platform only; kinds of
    drafts are no families."""
    there, here = (
        {row["family"]: row for row in results["families"].values() if ", " not in row["family"]}
        for results in (gpu, cpu)
    )
    alone = [row for name, row in here.items() if name not in there]
    said = (
        f"With tiny weights {_work_in_all(there.values())} of {len(there)} families work with NVFP4, with "
        "XLayerConnector and with both on an H200, gpt-oss, Gemma and hybrids among them"
    )
    if not alone:
        return said
    return (
        f"{said}; {len(alone)} more were compared on the CPU reference platform only, of which "
        f"{_work_in_all(alone)} do"
    )


def _work_in_all(rows: Iterable[dict[str, str]]) -> int:
    return sum(all(row[way].startswith("works") for way in WAYS) for row in rows)


def counted_in_readme(gpu: dict[str, Any], cpu: dict[str, Any]) -> str:
    """The README's limit."""
    return f"- **Real weights: one small model.** {counted(gpu, cpu)} ([models](docs/models.md))."


def counted_in_limits(gpu: dict[str, Any], cpu: dict[str, Any]) -> str:
    """That of docs/limits.md."""
    return f"- **Real weights of SmolLM2 only.** {counted(gpu, cpu)} ([models](models.md))."


def latents_table(results: dict[str, Any]) -> str:
    """A row a backend and dtype, from a GPU."""
    return _table(LATENTS_INTRODUCTION, ("case", "in rows", "restored"), results["cases"].values(), results)


def soak_section(*results: dict[str, Any]) -> str:
    """What soaks of speculation counted, one after the other."""
    columns = {
        "requests": "requests", "answers": "answers", "tries": "aborts, resets, failed copies",
        "rows_loaded": "rows restored", "accepted_drafts": "drafts accepted",
    }  # fmt: skip
    zeros = ("wrong", "lost", "leaked")
    lines, made = [], []
    for soak in results:
        where = soak["hardware"] if "GPU" not in soak["hardware"] else "CPU reference platform"
        engines = f" of {soak['engines']} engines" if "engines" in soak else ""
        noticed = f"{soak['noticed']} of {soak['noticed_of']}"
        cells = [f"{where}, {soak['seconds'] / 60:.0f} minutes{engines}"]
        cells += [*(f"{soak[name]:,}" for name in columns), noticed, *(f"{soak[name]:,}" for name in zeros)]
        lines.append(f"| {' | '.join(cells)} |")
        made.append(
            f"{where}: {soak['preempted']:,} answers of preempted requests are not among those compared. "
            f"{_made(soak)}"
        )
    head = ["", *columns.values(), "planted wrong answers that are noticed", *zeros]
    table = "\n".join([f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|", *lines])
    said = "\n\n".join(made)
    return f"""\
### Speculation, soaked

`python -m benchmarks.soak`: NVFP4, MTP's drafts, a device cache of three requests, a host tier not much
larger, aborts, resets and failing copies. How much *wrong* is worth, the column before it says: of prompts
whose cached blocks were changed on purpose, how many got an answer that is called wrong. **The rest goes
unseen in the soak, too**: it differs where two tokens were as likely, or not at all. A zero says that hardly
any wrong block was read, not that none was.

{table}

{said}"""


def hybrids_soak_section(results: dict[str, Any]) -> str:
    """What soaks of models with states beside attention counted, a row a model and cache."""
    return f"""\
### Hybrid models, soaked

`python -m benchmarks.soak --model lfm2`, `--model qwen3_next`, `--model qwen3_next_mtp` (which drafts): tiny
models with random weights, a device cache of about four requests, a host tier not much larger, aborts, resets
and failing copies. Tokens and the logprobs of the likeliest ones are compared with those of an engine without
connector that answers each prompt alone. *Rounding*: how far logprobs move without a connector, in nats, with
as small a cache and for as long: in batches, of one to sixteen requests since there is a row with drafts here
and of sixteen before, and of requests that are preempted, whose tokens are then computed again by other
kernels. Twice of it counts as equal, 0.0001 at least. What *wrong* is worth is said for each KV cache group:
of cached prompts one block of which was given another prompt's bytes, how many got an answer that is called
wrong; the others go unseen in the soak, too.

So that a prompt has few right answers, Qwen3-Next's states are in float32, and with NVFP4 attention is LFM2's
last layer, as it is Qwen3-Next's. What a preempted request answers with NVFP4 after it went on is not
compared.

{hybrids_soak_table(results)}"""


def hybrids_soak_table(results: dict[str, Any]) -> str:
    """The table of it alone."""
    columns = {
        "requests": "requests", "answers": "answers", "restored": "of requests that waited for rows",
        "preempted": "of preempted requests", "tries": "aborts, resets, failed copies",
        "rows_loaded": "rows restored",
    }  # fmt: skip
    zeros = ("wrong", "lost", "leaked")
    head = ["", *columns.values(), "rounding", "planted wrong blocks that are noticed", *zeros]
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    named = {f"{row['model']}, {row['cache']}": row for row in results["soaks"].values()}
    for name, row in named.items():
        cells = [f"{name}, {row['seconds'] / 60:.1f} minutes", *(f"{row[key]:,}" for key in columns)]
        cells += [_rounding(row["rounding"]), _noticed(row["power"]), *(f"{row[key]:,}" for key in zeros)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _made(results, list(named.items()))])


def _rounding(moved: dict[str, Any]) -> str:
    """Of answers without a connector, and how many were looked at."""
    others = moved["answers"] - moved["preempted"]
    return (
        f"{moved['by_batches']:.1g} ({others:,} answers); preempted {moved['by_preemption']:.1g} "
        f"({moved['preempted']:,})"
    )


def _noticed(power: list[dict[str, Any]]) -> str:
    """Of groups with states, and of those of attention."""
    kinds: dict[str, list[str]] = {}
    for group in power:
        kind = "states" if group["group"] == "Mamba" else "attention"
        kinds.setdefault(kind, []).append(f"{group['noticed']} of {group['of']}")
    return "; ".join(f"{kind} {', '.join(found)}" for kind, found in kinds.items())


def _made(results: dict[str, Any], rows: Iterable[tuple[str, dict[str, str]]] = ()) -> str:
    """What the numbers were taken on, and when; which rows, given with their names, are of another commit."""
    versions = results["versions"]
    commits: dict[str, list[str]] = {}
    dates: dict[str, str] = {}
    for name, row in rows:
        commit = row.get("commit", results["commit"])
        commits.setdefault(commit, []).append(name)
        dates[commit] = max(dates.get(commit, ""), row.get("date", results["date"]))
    most, *others = sorted(commits, key=lambda commit: -len(commits[commit])) or [results["commit"]]
    date = dates.get(most, results["date"])
    made = f"vLLM {versions['vllm']}, torch {versions['torch']}, {results['hardware']}, {date}, commit {most}"
    return "; ".join([made, *(f"{', '.join(commits[c])}: {dates[c]}, commit {c}" for c in others)]) + "."


def _table(introduction: str, keys: tuple[str, ...], found: Iterable[dict[str, str]], results: Any) -> str:
    """Rows with the first key's label; sentences of refusals stand below, each once."""
    notes: dict[str, int] = {}
    heads = ["", *keys[1:]]
    rows = [introduction, f"| {' | '.join(heads)} |".replace("|  |", "| |"), "|---" * len(keys) + "|"]
    found = list(found)
    for row in found:
        commit = row.get("commit", results["commit"])
        cells = [row[keys[0]]]
        for key in keys[1:]:
            cells.append(_cell(row[key], notes, REMARKS.get((row[keys[0]], key, commit))))
        rows.append(f"| {' | '.join(cells)} |")
    said = [f"{number}. {sentence}" for sentence, number in notes.items()]
    made = _made(results, [(row[keys[0]], row) for row in found])
    return "\n".join([*rows, "", made, *([""] if said else []), *said])


def _cell(found: str, notes: dict[str, int], remark: str | None = None) -> str:
    """What happened, with the number of the sentence that says more."""
    what, _, sentence = found.partition(": ")
    if remark is not None:
        sentence = f"{sentence}; {remark}" if sentence else remark
    if not sentence:
        return found
    if ABSENT in sentence:
        return "not in this vLLM"
    if sentence.startswith(PLATFORM):
        what, sentence = "not here", sentence.removeprefix(PLATFORM)
    if len(sentence) > LONGEST:
        sentence = f"{sentence[:LONGEST].rpartition(' ')[0]} ... (the whole sentence is in the results file)"
    return f"{what} ({notes.setdefault(sentence.replace('|', '/'), len(notes) + 1)})"

"""The table of model families in docs/models.md, from `benchmarks.models`' results."""

from typing import Any

INTRODUCTION = """### Started and compared

`python -m benchmarks.models` starts each of these three times on the CPU reference platform. *Works*: a
prompt was answered from the cache, and with the connector once more from host memory, with equal tokens and
logprobs.
"""
WAYS = ("NVFP4", "XLayerConnector", "both")


def table(results: dict[str, Any]) -> str:
    """A row an architecture; sentences of refusals stand below, each once."""
    notes: dict[str, int] = {}
    rows = [INTRODUCTION, "| architecture | NVFP4 | XLayerConnector | both |", "|---|---|---|---|"]
    for family in results["families"].values():
        cells = [_cell(family[way], notes) for way in WAYS]
        rows.append(f"| {family['architecture']} | {' | '.join(cells)} |")
    said = [f"{number}. {sentence}" for sentence, number in notes.items()]
    versions = results["versions"]
    made = (
        f"Tiny models with random weights, vLLM {versions['vllm']}, {results['hardware']}, "
        f"{results['date']}, commit {results['commit']}."
    )
    return "\n".join([*rows, "", made, *([""] if said else []), *said])


def _cell(found: str, notes: dict[str, int]) -> str:
    """What happened, with the number of the sentence that says more."""
    what, _, sentence = found.partition(": ")
    if not sentence:
        return found
    return f"{what} ({notes.setdefault(sentence.replace('|', '/'), len(notes) + 1)})"

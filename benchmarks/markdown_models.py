"""The table of model families in docs/models.md, from `benchmarks.models`' results."""

from typing import Any

INTRODUCTION = """### Started and compared

`python -m benchmarks.models` starts each of these on the CPU reference platform, as a tiny model with random
weights, and writes this table. *Works*: a prompt was answered from the cache, and with the connector once
more from host memory alone, with equal tokens and logprobs. *Not here*: the reference platform has no
kernels for it, which says nothing of a GPU.
"""
WAYS = ("NVFP4", "XLayerConnector", "both")
PLATFORM, ABSENT = "CPU reference platform: ", "are not supported for now"
"""What a sentence of the platform begins with, and what vLLM says of an unknown model."""


def table(results: dict[str, Any]) -> str:
    """A row a family; sentences of refusals stand below, each once."""
    notes: dict[str, int] = {}
    rows = [INTRODUCTION, f"| | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    for found in results["families"].values():
        cells = [_cell(found[way], notes) for way in WAYS]
        rows.append(f"| {found['family']} | {' | '.join(cells)} |")
    said = [f"{number}. {sentence}" for sentence, number in notes.items()]
    versions = results["versions"]
    made = (
        f"vLLM {versions['vllm']}, torch {versions['torch']}, {results['hardware']}, {results['date']}, "
        f"commit {results['commit']}."
    )
    return "\n".join([*rows, "", made, *([""] if said else []), *said])


def _cell(found: str, notes: dict[str, int]) -> str:
    """What happened, with the number of the sentence that says more."""
    what, _, sentence = found.partition(": ")
    if not sentence:
        return found
    if ABSENT in sentence:
        return "not in this vLLM"
    if sentence.startswith(PLATFORM):
        what, sentence = "not here", sentence.removeprefix(PLATFORM)
    return f"{what} ({notes.setdefault(sentence.replace('|', '/'), len(notes) + 1)})"

"""Held-out documents for lm_eval: ``python -m vllm_xlayer.demo.documents`` writes tasks/data/*.jsonl.

Same text as in training (benchmarks/training/batches.py), made of keys that it never draws. A JSON line is a
shared prefix (a table and three answered examples) with the questions asked of it:

    {"prefix": "R\\nkqz=4821\\n...?\\nabd=9931\\n...", "questions": [["kqz=", "4821"], ...]}

so eight prompts begin with the same bytes, and prompts are from about 120 to 2,000 bytes long.
"""

import json
import random
from pathlib import Path
from typing import TypedDict

KEYS = 26**3
"""Names of three letters: 676 a + 26 b + c."""
HELD_OUT = 16
"""Documents are made of the keys that are a multiple of this; training never draws those."""
CUE = 8
"""Letters of a line that the copy task's question shows."""
HOPS = 4
"""Links that the trace task's answer follows."""
HEADERS = {"recall": "R\n", "copy": "C\n", "trace": "T\n"}
QUERIES = "?\n"
SIZES = (1980, 130, 700, 1600, 300, 1200, 1840, 160, 480, 950, 210, 1400)
"""Bytes of each prefix, about; mixed, so that the first few are a fair sample."""
EXAMPLES = 3
QUESTIONS = 8
TEST_SEED = 20260
TASK_NAMES = tuple(HEADERS)


class Prefix(TypedDict):
    prefix: str
    questions: list[tuple[str, str]]
    """(question, answer) pairs: prefix + question is a prompt."""


def _name(key: int) -> str:
    return "".join(chr(ord("a") + i) for i in (key // 676, key // 26 % 26, key % 26))


def _names(rng: random.Random, count: int) -> list[str]:
    return [_name(key) for key in rng.sample(range(0, KEYS, HELD_OUT), count)]


def records(task: str, size: int, rng: random.Random) -> tuple[list[str], list[tuple[str, str]]]:
    """Table lines, and a (question, answer) of each, for a prefix of about ``size`` bytes."""
    if task == "recall":
        names = _names(rng, max(EXAMPLES + QUESTIONS, (size - 4 - 9 * EXAMPLES) // 9))
        values = [f"{rng.randrange(10000):04d}" for _ in names]
        pairs = [(f"{n}=", v) for n, v in zip(names, values, strict=True)]
        return [a + b for a, b in pairs], pairs
    if task == "copy":
        width = rng.randint(CUE + 24, CUE + 48)
        count = max(EXAMPLES + QUESTIONS, (size - 4) // (width + 1) - EXAMPLES)
        alphabet = "abcdefghijklmnopqrstuvwxyz"
        lines = [n + "".join(rng.choices(alphabet, k=width - 3)) for n in _names(rng, count)]
        return lines, [(line[:CUE], line[CUE:]) for line in lines]
    names = _names(rng, max(EXAMPLES + QUESTIONS, (size - 4 - 4 * (HOPS + 1) * EXAMPLES) // 8))
    loop = names + names[:HOPS]
    lines = [f"{a}>{b}" for a, b in zip(names, loop[1:], strict=False)]
    pairs = [(f"{n}>", ">".join(loop[i + 1 : i + 1 + HOPS])) for i, n in enumerate(names)]
    rng.shuffle(lines)
    return lines, pairs


def prefixes(task: str, seed: int, sizes: tuple[int, ...] = SIZES) -> list[Prefix]:
    """Shared prefixes of ``task`` ("recall", "copy" or "trace"), one for each size in bytes.

    Questions are not among the examples. A table has at least ``EXAMPLES + QUESTIONS`` lines, so
    the shortest prefixes come out longer than asked.
    """
    if task not in HEADERS:
        raise ValueError(f"task: expected one of {', '.join(HEADERS)}, got {task}")
    out: list[Prefix] = []
    for size in sizes:
        rng = random.Random(f"{task} {size} {seed}")
        lines, pairs = records(task, size, rng)
        asked = rng.sample(pairs, EXAMPLES + QUESTIONS)
        shown = "".join(question + answer + "\n" for question, answer in asked[:EXAMPLES])
        text = HEADERS[task] + "".join(line + "\n" for line in lines) + QUERIES + shown
        out.append({"prefix": text, "questions": asked[EXAMPLES:]})
    return out


def main() -> None:
    """Writes the shipped documents, the same bytes each time."""
    folder = Path(__file__).parent / "tasks" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASK_NAMES:
        lines = [json.dumps(p) + "\n" for p in prefixes(task, TEST_SEED)]
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{task}: {len(lines)} prefixes, {sum(map(len, lines))} bytes")


if __name__ == "__main__":
    main()

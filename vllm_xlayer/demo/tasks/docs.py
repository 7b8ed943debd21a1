"""Reads a task's documents from data/ beside this file, wherever the package is installed, offline.

The YAML files name ``load`` as lm_eval's ``custom_dataset``; a ``data_files`` path could not be
written there, since lm_eval resolves it against the working directory.
"""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def load(data: str, **_: Any) -> dict[str, Dataset]:
    """Split name -> documents ``{"prefix", "question", "answer"}`` of data/``data``.jsonl.

    lm_eval also passes the model's arguments and the task's metadata; they don't matter here.
    """
    path = Path(__file__).parent / "data" / f"{data}.jsonl"
    groups = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    docs = [
        {"prefix": group["prefix"], "question": question, "answer": answer}
        for group in groups
        for question, answer in group["questions"]
    ]
    return {"test": Dataset.from_list(docs)}

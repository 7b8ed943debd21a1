"""The training rows, the held-out documents and the lm_eval tasks made of them."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.training.batches import PAD_ID, batch
from vllm_xlayer.demo import TASKS, tasks_path
from vllm_xlayer.demo.documents import CUE, EXAMPLES, HELD_OUT, HOPS, QUESTIONS, SIZES, TEST_SEED, prefixes


def key_number(name: str) -> int:
    a, b, c = (ord(letter) - ord("a") for letter in name)
    return 676 * a + 26 * b + c


def answers_of(text: str) -> dict[str, str]:
    """What a row's table says to each question, worked out from its text alone."""
    task, table, _ = text[0], *text[2:].split("?\n")
    lines = table.splitlines()
    if task == "R":
        return {line[:4]: line[4:] for line in lines}
    if task == "C":
        return {line[:CUE]: line[CUE:] for line in lines}
    links = dict(line.split(">") for line in lines)
    answers = {}
    for name in links:
        chain = [name]
        while len(chain) <= HOPS:
            chain.append(links[chain[-1]])
        answers[name + ">"] = ">".join(chain[1:])
    return answers


def questions_of(text: str) -> list[tuple[str, str]]:
    """The answered questions behind the table, the last one left out since it may be cut off."""
    queries = text.split("?\n")[1].split("\n")[:-1]
    width = CUE if text[0] == "C" else 4
    return [(query[:width], query[width:]) for query in queries]


@pytest.mark.parametrize("length", [128, 512, 2560])
def test_training_rows_are_answered_from_their_own_table(length: int) -> None:
    text, counted = batch(16, length, random.Random(3), torch.Generator().manual_seed(3))
    assert text.shape == counted.shape == (16, length + 1)
    tasks = set()
    for row, mask in zip(text.tolist(), counted.tolist(), strict=True):
        string = "".join(chr(i) for i in row if i != PAD_ID)
        tasks.add(string[0])
        answers, asked = answers_of(string), questions_of(string)
        assert all(answers[question] == answer for question, answer in asked)
        # The loss counts the answers, each with its newline, and nothing else.
        kept = "".join(chr(i) for i, keep in zip(row, mask, strict=True) if keep)
        expected = "".join(answer + "\n" for _, answer in asked)
        assert kept.startswith(expected)
        assert "\n" not in kept[len(expected) :]
    assert tasks == set("RCT")


def test_training_keys_are_distinct_and_not_held_out() -> None:
    text, _ = batch(16, 2560, random.Random(4), torch.Generator().manual_seed(4))
    for row in text.tolist():
        table = "".join(chr(i) for i in row if i < 256).split("?\n")[0].splitlines()[1:]
        keys = [key_number(line[:3]) for line in table]
        assert len(set(keys)) == len(keys)
        assert all(key % HELD_OUT for key in keys)


def test_batches_follow_from_the_seed() -> None:
    one, two, other = (
        batch(8, 128, random.Random(s), torch.Generator().manual_seed(s))[0] for s in (5, 5, 6)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("task", ["recall", "copy", "trace"])
def test_documents_are_answered_from_their_prefix_and_held_out(task: str) -> None:
    groups = prefixes(task, TEST_SEED)
    assert len(groups) == len(SIZES)
    lengths = [len(group["prefix"]) for group in groups]
    assert max(lengths) > 1800 and max(lengths) < 2000 and min(lengths) < 700
    for group in groups:
        prefix = group["prefix"]
        answers = answers_of(prefix)
        shown = questions_of(prefix)
        assert len(shown) == EXAMPLES and len(group["questions"]) == QUESTIONS
        for question, answer in shown + group["questions"]:
            assert answers[question] == answer
        # Asked nowhere before: the answer is in the table alone.
        assert not {q for q, _ in shown} & {q for q, _ in group["questions"]}
        table = prefix.split("?\n")[0].splitlines()[1:]
        assert all(key_number(line[:3]) % HELD_OUT == 0 for line in table)


def test_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of recall, copy, trace, got sum"):
        prefixes("sum", 0)


@pytest.mark.parametrize("task", ["recall", "copy", "trace"])
def test_shipped_documents_are_what_the_script_writes(task: str) -> None:
    lines = (tasks_path() / "data" / f"{task}.jsonl").read_text().splitlines()
    made = [json.loads(json.dumps(group)) for group in prefixes(task, TEST_SEED)]
    assert [json.loads(line) for line in lines] == made


def test_lm_eval_loads_the_tasks_offline(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    manager = tasks.TaskManager(include_path=str(tasks_path()), include_defaults=False)
    loaded = tasks.get_task_dict(list(TASKS), manager)
    assert set(loaded) == set(TASKS)
    for name, task in loaded.items():
        docs = list(task.test_docs())
        assert len(docs) == len(SIZES) * QUESTIONS
        first = prefixes(name.removeprefix("xlayer_"), TEST_SEED)[0]
        assert task.doc_to_text(docs[0]) == first["prefix"] + first["questions"][0][0]
        assert task.doc_to_target(docs[0]) == first["questions"][0][1]


def test_module_prints_the_include_path(tmp_path: Path) -> None:
    # -m imports from the current folder first: not from a source tree.
    command = [sys.executable, "-m", "vllm_xlayer.demo.tasks"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert out.stdout.strip() == str(tasks_path())

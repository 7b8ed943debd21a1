"""`benchmarks.every` asks in order of value, within its time, and goes on after what fails."""

import argparse
import json
import sys
import time

import pytest

from benchmarks import every
from vllm_xlayer.bench import __main__


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What was asked: (question, seconds). Takes no time."""
    found = []

    def ask(command, seconds):
        found.append((command[3], round(seconds)))
        assert command[command.index("--json") + 1] == str(tmp_path / f"gpu-{command[3]}.json")
        return "failed with 1" if command[3] == "engine" else "done"

    monkeypatch.setattr(every, "ask", ask)
    monkeypatch.setattr(every, "device", lambda: "gpu")
    return found


def arguments(tmp_path, *given):
    parser = argparse.ArgumentParser()
    every.add_arguments(parser)
    return parser.parse_args([*given, "--out", str(tmp_path)])


def test_all_questions_in_order_of_value(asked, tmp_path):
    assert every.run(arguments(tmp_path, "--minutes", "60")) == 1  # one failed
    assert asked == [(question.name, question.seconds) for question in every.QUESTIONS]


def test_no_question_gets_more_than_what_is_left(asked, tmp_path, capsys):
    assert every.run(arguments(tmp_path, "copy", "decode", "--minutes", "1")) == 0
    assert asked == [("decode", 60 - every.END_SECONDS), ("copy", 60 - every.END_SECONDS)]
    asked.clear()
    assert every.run(arguments(tmp_path, "copy", "--minutes", "0.5")) == 1
    assert not asked and "copy: no time left" in capsys.readouterr().out


def test_an_unknown_question_is_named(asked, tmp_path, capsys):
    assert every.run(arguments(tmp_path, "decoding")) == 2 and not asked
    assert "got decoding" in capsys.readouterr().out


def test_every_question_takes_its_arguments():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="question")
    for name, module in __main__.QUESTIONS.items():
        module.add_arguments(commands.add_parser(name))
    for question in every.QUESTIONS:
        parser.parse_args([question.name, *question.arguments, "--json", "x"])


def test_what_was_written_before_the_limit_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(every, "END_SECONDS", 0.2)
    file = tmp_path / "x.json"
    program = f"import pathlib, time; pathlib.Path({str(file)!r}).write_text('[1]'); time.sleep(600)"
    begin = time.monotonic()
    assert every.ask([sys.executable, "-c", program], 10) == "stopped after 10 s"
    assert time.monotonic() - begin < 500 and json.loads(file.read_text()) == [1]
    assert every.ask([sys.executable, "-c", "raise SystemExit(3)"], 60) == "failed with 3"
    assert every.ask([sys.executable, "-c", ""], 60) == "done"

"""`vllm-xlayer bench`: its help, and what a question says that needs a GPU where there is none."""

import argparse

import pytest
import torch

from vllm_xlayer.bench import __main__ as command


@pytest.mark.parametrize("question", sorted(command.NEED_A_GPU))
def test_a_question_says_that_it_needs_a_gpu(question, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([question]) == 1
    assert capsys.readouterr().err == f"{question}: expected an NVIDIA GPU, got none\n"
    assert not list(tmp_path.iterdir())


def test_help_says_what_is_measured(capsys):
    for question, module in command.QUESTIONS.items():
        with pytest.raises(SystemExit):
            command.main([question, "--help"])
        assert module.__doc__.strip() in capsys.readouterr().out


def test_the_others_are_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for question, module in command.QUESTIONS.items():
        monkeypatch.setattr(module, "run", lambda args, question=question: asked.append(question) or 0)
    for question in command.QUESTIONS:
        command.main([question])
    assert asked == [question for question in command.QUESTIONS if question not in command.NEED_A_GPU]


@pytest.mark.parametrize("question", command.QUESTIONS)
def test_every_option_says_what_it_is(question):
    parser = argparse.ArgumentParser()
    command.QUESTIONS[question].add_arguments(parser)
    assert [action.dest for action in parser._actions if not action.help] == []

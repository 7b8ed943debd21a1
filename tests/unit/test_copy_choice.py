"""Copy engine or kernel: the rule, against the rates that were measured."""

import json

import pytest
import torch

from benchmarks import RESULTS
from vllm_xlayer import doctor
from vllm_xlayer.connector.copy.choice import ENGINE_FROM, Way, choose, rule
from vllm_xlayer.ops import CopyMethod

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MEASURED = sorted(RESULTS.glob("*-copy.json"))
LEAST = 0.95
"""Of the better method's rate: nearer than that they are the same for a transfer."""


def rates(path, way):
    """(bytes of a piece, method -> bytes a second in a stream of calls) of a file that `bench copy` wrote."""
    for line in json.loads(path.read_text())["ways"][way.name]:
        yield line["piece_bytes"], {method: line["stream"][method.name.lower()] for method in CopyMethod}


@pytest.mark.parametrize("way", list(Way), ids=lambda way: way.name)
@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_the_rule_is_near_the_better_method_everywhere(path, way):
    lines = dict(rates(path, way))
    assert len(lines) >= 7
    for piece_bytes, rate in lines.items():
        assert rate[choose(way, piece_bytes)] >= LEAST * max(rate.values()), f"{piece_bytes} bytes"


def test_there_are_measurements():
    assert len(MEASURED) >= 2


def test_the_engine_takes_large_pieces_over_the_link_only():
    for way in (Way.H2D, Way.D2H):
        assert choose(way, ENGINE_FROM - 16) is CopyMethod.KERNEL
        assert choose(way, ENGINE_FROM) is CopyMethod.ENGINE
    assert choose(Way.D2D, 1 << 30) is CopyMethod.KERNEL


def test_ways_are_told_apart():
    assert [Way.of(CPU, GPU), Way.of(GPU, CPU), Way.of(GPU, GPU)] == list(Way)
    with pytest.raises(ValueError, match="got cpu and cpu"):
        Way.of(CPU, CPU)


def test_doctor_shows_the_rule(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.copies() == "no GPU: nothing to choose"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor.copies() == rule() and "65,536 bytes" in rule()

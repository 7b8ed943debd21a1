"""`bench load` keeps what it measured of other caches before, if it asked the same."""

import json

import pytest

from vllm_xlayer.bench import load
from vllm_xlayer.provenance import hardware

ASKED = {"shape": "tiny", "requests": 2}


@pytest.fixture
def path(tmp_path):
    before = {**ASKED, "hardware": hardware(), "caches": {"fp8": {"fit": 1}, "nvfp4": {"fit": 2}}}
    (tmp_path / "load.json").write_text(json.dumps(before))
    return tmp_path / "load.json"


def test_other_caches_are_kept(path):
    assert load.kept(path, ASKED, ["nvfp4"]) == {"fp8": {"fit": 1}}


@pytest.mark.parametrize("change", [{"requests": 3}, {"hardware": "another GPU"}])
def test_not_of_another_question_or_machine(path, change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert load.kept(path, ASKED, ["nvfp4"]) == {}


def test_nothing_is_kept_where_there_is_no_file(tmp_path):
    assert load.kept(tmp_path / "none.json", ASKED, ["nvfp4"]) == {}

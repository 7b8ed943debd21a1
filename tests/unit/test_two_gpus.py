"""`benchmarks.two_gpus`: all in order of value, times alone, and what is found is kept and combined."""

import json
import os
import time
from argparse import ArgumentParser

import pytest

from benchmarks import faults, handover_answers, suite, two_gpus
from benchmarks.handover import Step
from benchmarks.markdown import two_ranks
from benchmarks.markdown_handover import section
from benchmarks.markdown_tier import fault_tables
from benchmarks.two_gpus_parts import ASKED, FAULT_TESTS, TESTS, Part, combined, plan
from vllm_xlayer.bench import handover as times
from vllm_xlayer.provenance import provenance

PARTS = plan()
WRITES = """
import json, pathlib, sys, time
begin = time.monotonic()
time.sleep(float(sys.argv[1]))
found = {"begin": begin, "end": time.monotonic(), "asked": sys.argv[1:-2]}
pathlib.Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(found))
print("the last words")
sys.exit(int(sys.argv[2]))
"""


def test_the_files_are_those_that_the_documents_are_made_of():
    from benchmarks.readme import TABLES

    known = {file for files, _ in TABLES.values() for file in files}
    assert {f"h200-x2-{part.file}.json" for part in PARTS} <= known
    wanted = {file for file in known if "-x2-handover" in file}
    assert wanted <= {f"h200-x2-{part.file}.json" for part in PARTS}


def test_nvfp4_times_come_first_and_times_are_alone():
    kinds = ["times" if part.step.alone else "other" for part in PARTS]
    assert kinds[0] == "times" and kinds[-2:] == ["times"] * 2 and set(kinds[1:-2]) == {"other"}
    assert PARTS[0].name == "handover: times, nvfp4"
    assert len({part.stem for part in PARTS}) == len(PARTS)
    assert [part for part in PARTS if part.file == "handover"] == [PARTS[0], *PARTS[-2:]]


def test_the_parts_take_their_arguments():
    for part in PARTS:
        parser = ArgumentParser(exit_on_error=False)
        module, arguments = part.step.module, [*part.step.arguments, "--json", "x.json"]
        if module == "vllm_xlayer.bench":
            assert arguments.pop(0) == "handover"
            times.add_arguments(parser)
            args = parser.parse_args(arguments)
            assert (args.tokens, args.ways) == ([16384, 65536], ["rows", "pages", "computed"])
            assert args.devices == ["0", "1"]
        elif module == "benchmarks.handover_answers":
            assert part.devices is not None and part.engines == len(",".join(part.devices).split(","))
            assert arguments[arguments.index("--devices") + 1 :][:2] == part.devices
        else:
            {"benchmarks.suite": suite, "benchmarks.faults": faults}[module].add_arguments(parser)
            args = parser.parse_args(arguments)
            assert args.paths and all((suite.TESTS / path).is_file() for path in args.paths)
    assert handover_answers.__name__ in {part.step.module for part in PARTS}


def test_faults_that_are_asked_are_in_the_tests_that_are_run():
    text = "".join((suite.TESTS / path).read_text() for paths in FAULT_TESTS.values() for path in paths)
    assert [name for name in ASKED if f'fault("{name}")' not in text] == []
    assert all((suite.TESTS / path).exists() for paths in TESTS.values() for path in paths)


def part(name, takes=0.0, code=0, alone=False, **more):
    settings = dict(file="handover", seconds=1.0, limit=20.0, engines=2, devices=["0", "1"]) | more
    return Part(step=Step(name, "step_writes", [str(takes), str(code)], alone), **settings)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs parts; (exit code, what each found)."""
    (tmp_path / "step_writes.py").write_text(WRITES)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    monkeypatch.setattr(two_gpus, "device", lambda: "h200")

    def run(*parts, seconds=60.0):
        code = two_gpus.run(list(parts), tmp_path / "out", seconds)
        return code, json.loads((tmp_path / "out/h200-x2-handover.json").read_text())["steps"]

    return run


def test_what_may_run_beside_each_other_does(run):
    code, found = run(part("a", alone=True), part("b", 2), part("c", 2), part("d", alone=True))
    assert code == 0 and list(found) == ["a", "b", "c", "d"]
    a, b, c, d = found.values()
    assert a["end"] < min(b["begin"], c["begin"]) and max(b["end"], c["end"]) < d["begin"]
    assert max(b["begin"], c["begin"]) < min(b["end"], c["end"])


def test_no_more_engines_than_there_is_room_for(run, monkeypatch):
    monkeypatch.setattr(two_gpus, "AT_ONCE", 5)
    _, found = run(part("a", 2), part("b", 2), part("c", 2), part("large", engines=9))
    begun = {name: one["begin"] for name, one in found.items()}
    assert begun["c"] > min(found["a"]["end"], found["b"]["end"])
    assert begun["b"] < found["a"]["end"]
    assert begun["large"] > found["c"]["end"], "by itself, though there is never room"


def test_a_failure_leaves_the_others_and_is_said(run, capsys):
    code, found = run(part("bad", code=3, alone=True), part("good"))
    assert code == 1 and found["bad"]["problem"] == "ended with exit code 3, see above"
    assert found["bad"]["asked"] == ["0.0", "3"] and "problem" not in found["good"]
    said = capsys.readouterr().out
    assert "handover: bad: ended with exit code 3" in said and "    the last words" in said
    assert said.count("the last words") == 1


def test_what_hangs_is_ended_and_what_does_not_fit_is_not_begun(run):
    code, found = run(part("hangs", 60, limit=2.0, alone=True), part("after"))
    assert code == 1 and found["hangs"]["problem"] == "not done in 2 s" and "begin" in found["after"]
    begin = time.monotonic()
    code, found = run(part("more", seconds=100.0), part("short"), seconds=50)
    assert code == 1 and time.monotonic() - begin < 30 and "begin" in found["short"]
    assert found["more"]["problem"].startswith("not begun: 42 s were left")


def test_a_second_call_asks_for_the_rest(run, capsys):
    first = part("a"), part("b", code=3)
    _, before = run(*first)
    code, found = run(*first, part("c"))
    assert found["a"] == before["a"] and found["b"] != before["b"] and list(found) == ["a", "b", "c"]
    assert code == 1 and "a: is there already" in capsys.readouterr().out


def suite_of(files, code=0):
    return {"mark": "m", "select": None, "sanitizer": None, "exit_code": code, "seconds": 2.0, "files": files}


def test_tests_of_several_processes_are_one_file():
    found = {
        "x": suite_of({"tests.x": {"passed": 3}}), "y": suite_of({"tests.y": {"failure": 1}}, code=1),
        "z": {"problem": "not done in 9 s"},
    }  # fmt: skip
    result = provenance() | combined("suite", None, found)
    assert result["exit_code"] == 1 and result["seconds"] == 4.0 and result["problems"].keys() == {"z"}
    assert result["files"] == {"tests.x": {"passed": 3}, "tests.y": {"failure": 1}}
    assert "3 passed, 1 failed" in two_ranks(result)


def test_faults_of_several_processes_are_added_up():
    def counted(**some):
        rows = {name: dict.fromkeys(("tests", "failed", *faults.COUNTS), 0) for name in faults.FAULTS}
        for name, row in some.items():
            rows[name.replace("_", " ")] |= row
        return {"exit_code": 0, "seconds": 1.0, "soak_seconds": 24.0, "faults": rows}

    found = {
        "x": counted(copy_error_on_one_rank=dict(tests=2, tries=3, requests=10)),
        "y": counted(copy_error_on_one_rank=dict(tests=1, tries=1, requests=5, wrong=1)),
    }
    result = provenance() | combined("faults", None, found)
    row = result["faults"]["copy error on one rank"]
    assert (row["tests"], row["tries"], row["requests"], row["wrong"], row["lost"]) == (3, 4, 15, 1, 0)
    text = fault_tables(result)
    assert "3 tests, 0 failed. " in text and "| copy error on one rank | 4 | 15 | 1 | 0 | 0 |" in text
    assert "Not tried there: ranks on several hosts; hand-over" in text and "soak" not in text


def test_hand_overs_are_as_the_documents_want_them():
    found = {"answers, nvfp4": {"cache": "nvfp4", "same": 48, "answers": 48, "computed": 0, "seconds": 9.0}}
    text = section(provenance() | combined("handover-2to1", ["0,1", "0"], found))
    assert "Prefill engine on GPU 0,1, decode engine on GPU 0" in text and "nvfp4 48 of 48" in text

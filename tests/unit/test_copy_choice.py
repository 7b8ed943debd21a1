"""Copy engine or kernel: the choice from given times, and how times are kept."""

import json
import logging

import pytest
import torch
from rich.console import Console

from vllm_xlayer import doctor
from vllm_xlayer.connector import copy_measure
from vllm_xlayer.connector.copy_choice import CopyTimes, Sample, Way, choose
from vllm_xlayer.ops import CopyMethod

SIZES = (4096, 16384, 65536, 262144)
GPU = torch.device("cuda", 0)


def times(engine, kernel) -> CopyTimes:
    """Every way alike; engine, kernel: piece size -> (fixed, each) in seconds."""
    made = {CopyMethod.ENGINE: engine, CopyMethod.KERNEL: kernel}
    return CopyTimes(
        {(way, m): [Sample(size, *f(size)) for size in SIZES] for way in Way for m, f in made.items()}
    )


def engine(size):
    """1 us a piece and 50 GB/s."""
    return 0.0, 1e-6 + size / 50e9


def kernel(size):
    """40 GB/s whatever the piece."""
    return 0.0, size / 40e9


def test_the_crossover_is_where_the_kernel_gains_a_tenth():
    """1.1 x s / 40e9 = 1e-6 + s / 50e9: s = 133,333 bytes, between two sizes measured."""
    known = times(engine, kernel)
    for way in Way:
        assert known.crossover(way) == pytest.approx(133_333, abs=16)
        assert known.choose(way, 133_000, 1000) is CopyMethod.KERNEL
        assert known.choose(way, 134_000, 1000) is CopyMethod.ENGINE


def test_between_and_outside_of_the_sizes_measured():
    known = times(engine, kernel)
    assert known.seconds(Way.H2D, CopyMethod.ENGINE, 40960, 10) == pytest.approx(10 * engine(40960)[1])
    assert known.seconds(Way.H2D, CopyMethod.KERNEL, 1 << 20, 10) == pytest.approx(10 * kernel(1 << 20)[1])
    # Below the smallest a piece costs what the smallest does: never less than it may.
    assert known.seconds(Way.H2D, CopyMethod.ENGINE, 16, 10) == pytest.approx(10 * engine(4096)[1])


def test_few_pieces_may_be_chosen_for_otherwise():
    """20 us to start the kernel: worth it for many small pieces, not for one."""
    known = times(engine, lambda size: (20e-6, size / 40e9))
    assert known.choose(Way.D2H, 4096, 1) is CopyMethod.ENGINE
    assert known.choose(Way.D2H, 4096, 1000) is CopyMethod.KERNEL


@pytest.mark.parametrize(("speed", "expected"), [(1e9, 0), (1000e9, None)])
def test_no_crossover(speed, expected):
    assert times(engine, lambda size: (0.0, size / speed)).crossover(Way.H2D) == expected


def test_ways_are_told_apart():
    known = times(engine, kernel)
    slow = times(engine, lambda size: (0.0, size / 1e9))
    mixed = CopyTimes({key: (slow if key[0] is Way.D2H else known).samples[key] for key in known.samples})
    assert mixed.choose(Way.H2D, 4096, 1000) is CopyMethod.KERNEL
    assert mixed.choose(Way.D2H, 4096, 1000) is CopyMethod.ENGINE
    cpu = torch.device("cpu")
    assert [Way.of(cpu, GPU), Way.of(GPU, cpu), Way.of(GPU, GPU)] == list(Way)


def test_a_sample_is_fitted_through_two_numbers_of_pieces(monkeypatch):
    """Here between CPU tensors; the clock is made up."""
    monkeypatch.setattr(copy_measure, "_seconds", lambda first, call: [call(), 5e-6 + 2e-6 * 1024][1])
    src, dst = (torch.zeros(copy_measure.MOVED, dtype=torch.uint8) for _ in range(2))
    flat = copy_measure._sample(src, dst, 4096, CopyMethod.KERNEL)  # as long for few as for many
    assert flat.fixed == 0 and flat.each == pytest.approx(2e-6 + 5e-6 / 1024)
    lasts = iter([1e-5] * copy_measure.REPEATS + [1e-5 + 1e-12] * copy_measure.REPEATS)
    monkeypatch.setattr(copy_measure, "_seconds", lambda first, call: [call(), next(lasts)][1])
    noise = copy_measure._sample(src, dst, 4096, CopyMethod.KERNEL)  # not 4 PB/s
    assert noise.fixed == 0 and noise.each == pytest.approx(1e-5 / 1024)
    lasts = iter([5e-6 + 2e-6 * 128] * copy_measure.REPEATS + [5e-6 + 2e-6 * 1024] * copy_measure.REPEATS)
    monkeypatch.setattr(copy_measure, "_seconds", lambda first, call: [call(), next(lasts)][1])
    sample = copy_measure._sample(src, dst, 4096, CopyMethod.KERNEL)
    assert sample.fixed == pytest.approx(5e-6) and sample.each == pytest.approx(2e-6)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a GPU, as far as the cache asks; its dict may be changed."""
    told = {"host": "a", "gpu": "b", "driver": "c"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(copy_measure, "machine", lambda device: told)
    # For caplog: where vLLM has been imported, its handlers are ours, and the root logger hears nothing.
    monkeypatch.setattr(logging.getLogger("vllm_xlayer"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("vllm_xlayer"), "propagate", True)
    copy_measure.times_here.cache_clear()
    yield told
    copy_measure.times_here.cache_clear()


def test_times_are_kept_for_this_machine_only(machine):
    known = times(engine, kernel)
    assert copy_measure.cached(GPU) is None
    assert copy_measure.keep(known, GPU).startswith("kept in ")
    assert copy_measure.cached(GPU) == known
    assert [p.suffix for p in copy_measure.cache_file(machine).parent.iterdir()] == [".json"]
    machine["driver"] = "d"
    assert copy_measure.cached(GPU) is None


def damage(data: dict, what: str) -> str:
    samples = data["times"]["H2D KERNEL"]
    if what == "cut":
        return json.dumps(data)[:-40]
    if what == "not an object":
        return "[]"
    if what == "another format":
        data["format"] += 1
    elif what == "another machine":
        data["machine"]["gpu"] = "x"
    elif what == "a way less":
        del data["times"]["D2H ENGINE"]
    elif what == "a size less":
        samples.pop()
    elif what == "sizes in disorder":
        for each in data["times"].values():
            each.reverse()
    elif what == "no sample":
        for each in data["times"].values():
            each.clear()
    elif what == "not a number":
        samples[0][2] = float("nan")
    elif what == "no time at all":
        samples[0][2] = 0
    elif what == "text":
        samples[0][1] = "x"
    return json.dumps(data)


DAMAGE = ("cut", "not an object", "another format", "another machine", "a way less", "a size less",
          "sizes in disorder", "no sample", "not a number", "no time at all", "text")  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_measured_anew(machine, monkeypatch, caplog, what):
    copy_measure.keep(times(kernel, engine), GPU)
    path = copy_measure.cache_file(machine)
    path.write_text(damage(json.loads(path.read_text()), what))
    known = times(engine, kernel)
    monkeypatch.setattr(copy_measure, "measure", lambda device: known)
    with caplog.at_level(logging.WARNING, copy_measure.logger.name):
        assert copy_measure.times_here(GPU) is known
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "is not used" in caplog.text
    assert copy_measure.cached(GPU) == known


def test_measured_once(machine, monkeypatch):
    calls = []
    monkeypatch.setattr(copy_measure, "measure", lambda device: calls.append(device) or times(engine, kernel))
    for _ in range(2):
        copy_measure.times_here(GPU)
        copy_measure.times_here.cache_clear()  # as another process
    assert calls == [GPU]


def test_a_failed_measurement_leaves_the_copy_engine(machine, monkeypatch, caplog):
    def fails(device):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(copy_measure, "measure", fails)
    with caplog.at_level(logging.INFO, copy_measure.logger.name):
        for _ in range(2):
            assert copy_measure.times_here(GPU) is None
    assert len(caplog.records) == 1
    assert "the copy engine is used: out of memory" in caplog.text
    assert all(choose(None, way, 4096, 1000) is CopyMethod.ENGINE for way in Way)


def test_a_cache_that_cannot_be_written(machine, monkeypatch, caplog):
    """Measured, used, and said."""
    copy_measure.cache_file(machine).parent.parent.write_text("a file where the folder would be")
    known = times(engine, kernel)
    monkeypatch.setattr(copy_measure, "measure", lambda device: known)
    with caplog.at_level(logging.INFO, copy_measure.logger.name):
        assert copy_measure.times_here(GPU) is known
    assert "not kept" in caplog.text and "copy engine from 133," in caplog.text


def test_doctor_shows_the_choice(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._copies() == {"state": "no GPU: nothing to choose"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor._copies()["state"].startswith("not measured yet")
    copy_measure.keep(times(engine, kernel), GPU)
    report = doctor._copies()
    assert "host to device: copy engine from 133," in report["state"]
    assert report["file"] == str(copy_measure.cache_file(machine))
    console = Console(width=100, record=True)
    console.print(doctor._rates(report["GB/s"]))
    assert "65,536" in console.export_text() and json.dumps(report)
    assert report["GB/s"]["host to device"][2]["kernel"] == pytest.approx(40)

"""Rows of running requests: nobody shares one, and every start is counted in its own."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm_xlayer.attention import newest, newest_rows
from vllm_xlayer.attention.newest_rows import NO_ROW, NamedRows, RunnerRows

PLACES = 12


class OnV2:
    """Requests in the places of a runner's table; it does not say when one ends."""

    def __init__(self, rows):
        self.rows, self.running = RunnerRows(object(), PLACES, rows), {}

    def start(self, name, rng):
        free = [place for place in range(PLACES) if place not in self.running.values()]
        self.running[name] = int(rng.choice(free))
        self.rows.start(self.running[name], self.running.values())

    def end(self, name):
        del self.running[name]

    def row_of(self, name):
        step = SimpleNamespace(num_reqs=2, req_idx=np.array([self.running[name]]))
        row, padding = self.rows.rows_of(step).tolist()
        assert padding == NO_ROW
        return row


class OnV1:
    """Requests by name."""

    def __init__(self, rows):
        self.rows, self.running = NamedRows(rows, lambda: [self.asked]), {}

    def start(self, name, rng):
        self.running[name] = None
        self.rows.start([name])

    def end(self, name):
        del self.running[name]
        self.rows.end([name])

    def row_of(self, name):
        self.asked = name
        return self.rows.rows_of(SimpleNamespace(num_reqs=1)).tolist()[0]


@pytest.mark.parametrize("runner", [OnV1, OnV2])
@pytest.mark.parametrize("count", [1, 5, PLACES])
def test_rows_are_nobody_elses(runner, count):
    rng, requests = np.random.default_rng(count), runner(count)
    without = 0
    for number in range(2000):
        full = len(requests.running) == PLACES
        if full or (requests.running and rng.random() < 0.48):
            requests.end(str(rng.choice(list(requests.running))))
            continue
        before, others = requests.rows.starts.copy(), {n: requests.row_of(n) for n in requests.running}
        requests.start(str(number), rng)
        row = requests.row_of(str(number))
        # Those that run keep theirs, and nobody's but the new one's is counted.
        assert others == {n: requests.row_of(n) for n in others}
        assert row not in set(others.values()) - {NO_ROW}
        counted = np.flatnonzero(requests.rows.starts != before).tolist()
        assert counted == ([] if row == NO_ROW else [row])
        # Who has none came when all rows were in use.
        assert (row == NO_ROW) == (sum(r != NO_ROW for r in others.values()) == count)
        without += row == NO_ROW
    assert (without > 0) == (count < PLACES)


def test_a_resumed_request_starts_again():
    rows = RunnerRows(object(), PLACES, 2)
    for starts in (1, 2):
        rows.start(3, [3])
        assert sorted(rows.starts.tolist()) == [0, starts]


def test_another_table_has_rows_of_its_own(monkeypatch):
    monkeypatch.setattr(newest_rows, "_rows", None)
    newest_rows.have_rows(4)
    found = []
    for table in ("one", "one", "another"):
        newest_rows.start_on_v2(table, PLACES, 0, [0])
        found.append(newest_rows.rows_in_use())
    assert found[0] is found[1] is not found[2] and len(found[2].starts) == 4


@pytest.mark.parametrize(("gigabytes", "rows"), [(150, 447), (0.0001, 1), (1000, 1024)])
def test_rows_take_a_share_of_the_memory(monkeypatch, gigabytes, rows):
    """Of a model with 8 heads of 128 in 32 layers: 64 tokens take 8.4 MB."""
    import torch

    monkeypatch.setenv("VLLM_XLAYER_NEWEST_TOKENS", "64")
    memory = SimpleNamespace(get_device_total_memory=lambda: gigabytes * 1e9)
    monkeypatch.setattr(newest, "current_platform", memory)
    model = SimpleNamespace(
        get_num_layers=lambda _: 32, get_num_kv_heads=lambda _: 8, get_head_size=lambda: 128,
        dtype=torch.bfloat16,
    )  # fmt: skip
    config = SimpleNamespace(
        model_config=model, parallel_config=None, scheduler_config=SimpleNamespace(max_num_seqs=1024)
    )
    assert newest.num_rows(config) == rows


def test_a_hybrids_batch_is_whose_metadata_is_being_built():
    """vLLM says the places of a batch's requests to nobody; a wrapper around what builds it does."""
    from vllm_xlayer.patches.newest import tell_batch

    rows = RunnerRows(object(), PLACES, 4)
    for place in (7, 2):
        rows.start(place, [7, 2])
    step = SimpleNamespace(num_reqs=3, req_idx=None)
    built = []

    def build(states, batch, fails):
        built.append(rows.rows_of(step).tolist())
        if fails:
            raise RuntimeError("no metadata")

    told = SimpleNamespace(idx_mapping_np=np.array([2, 7]))
    tell_batch(build, None, told, False)
    with pytest.raises(RuntimeError, match="no metadata"):
        tell_batch(build, None, told, True)
    two, seven = (
        rows.rows_of(SimpleNamespace(num_reqs=1, req_idx=np.array([p]))).tolist()[0] for p in (2, 7)
    )
    assert built == [[two, seven, NO_ROW]] * 2 and two != seven
    assert rows.rows_of(step).tolist() == [NO_ROW] * 3, "what was said is of that batch only"

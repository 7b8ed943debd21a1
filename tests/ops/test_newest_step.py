"""newest_step and the writer's copy of the newest tokens, against a model of what each place holds."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from reference.pools import make_pool, scalar, strided_rows

from vllm_xlayer import ops
from vllm_xlayer.ops.newest import JUST_STARTED

ROWS, HEADS, HEAD_SIZE = 3, 2, 64


@dataclass
class Machine:
    """Rows whose places hold (start, position, version) of whoever wrote them last."""

    places: int
    starts: int = 0

    def __post_init__(self):
        self.state = torch.full((ROWS, 2), JUST_STARTED, dtype=torch.int32)
        self.held = {(row, place): None for row in range(ROWS) for place in range(self.places)}
        self.running: dict[int, int] = {}  # row -> its start's number
        self.truth: dict[int, list[int]] = {}  # row -> version of each position, as the pages have it
        self.versions = 0

    def start(self, row: int, found: int) -> None:
        """A request begins in a row, with tokens that are in the cache already."""
        self.starts += 1
        self.running[row] = self.starts
        self.truth[row] = [0] * found
        self.state[row] = JUST_STARTED

    def step(self, batch: list[tuple[int, int, int]], padding: int = 0) -> None:
        """batch: (row, first position, tokens)."""
        starts, lens, rows, slots = [0], [], [], []
        for row, first, tokens in batch:
            starts.append(starts[-1] + tokens)
            lens.append(first + tokens)
            rows.append(row)
            slots += range(len(slots), len(slots) + tokens)
        for _ in range(padding):
            starts.append(starts[-1])
            lens.append(0)
            rows.append(JUST_STARTED)
        slots += [-1] * padding
        newest_slots = torch.full((len(slots),), 7, dtype=torch.int64)
        newest_from = torch.full((len(rows),), -7, dtype=torch.int32)
        ints = [torch.tensor(x, dtype=torch.int32) for x in (starts, lens, rows)]
        ops.newest_step(*ints, torch.tensor(slots), self.state, newest_slots, newest_from, self.places)
        assert newest_slots[starts[-1] :].tolist() == [-1] * padding
        assert newest_from[len(batch) :].tolist() == [2**31 - 1] * padding
        for i, (row, first, tokens) in enumerate(batch):
            truth = self.truth[row]
            del truth[first:]
            assert len(truth) == first
            written = newest_slots[starts[i] : starts[i + 1]].tolist()
            for position, slot in enumerate(written, first):
                self.versions += 1
                truth.append(self.versions)
                if slot >= 0:
                    assert divmod(slot, self.places) == (row, position % self.places)
                    self.held[divmod(slot, self.places)] = (self.running[row], position, self.versions)
            # Of several tokens for a place only the last is written: others would race with it.
            kept = [s for s in written if s >= 0]
            assert len(set(kept)) == len(kept)
            begin, end = int(newest_from[i]), first + tokens
            assert max(0, end - self.places) <= begin
            for position in range(begin, end):
                held = self.held[row, position % self.places]
                assert held == (self.running[row], position, truth[position]), (position, held)
            self.begin = begin


@pytest.mark.parametrize("places", [16, 64])
@pytest.mark.parametrize("seed", range(40))
def test_what_may_be_read_is_what_this_request_wrote(places, seed):
    """Rows reused, prompts found in the cache, chunks, drafts rejected and written over, padding."""
    rng = np.random.default_rng(seed)
    machine = Machine(places)
    for _ in range(120):
        batch = []
        for row in rng.permutation(ROWS).tolist():
            if rng.random() < 0.3:
                continue
            if row not in machine.running or rng.random() < 0.08:
                machine.start(row, int(rng.choice([0, 16, 32, 160])))
            position = len(machine.truth[row])
            if rng.random() < 0.5:
                position = max(0, position - int(rng.integers(0, 8)))  # so many drafts were rejected
            elif rng.random() < 0.05:
                position = int(rng.integers(0, position + 1))
            batch.append((row, position, int(rng.choice([1, 1, 2, 8, 40, 130]))))
        if batch:
            machine.step(batch, padding=int(rng.integers(0, 3)))


def test_as_much_as_possible_is_read():
    """Not less than a row holds: whatever is refused costs accuracy."""
    machine = Machine(32)
    machine.start(1, 16)
    steps = [(16, 1, 16), (17, 4, 16), (19, 1, 16), (20, 100, 88), (120, 8, 96), (121, 1, 96)]
    for first, tokens, expected in steps:
        machine.step([(1, first, tokens)])
        assert machine.begin == expected


def test_a_run_without_slots_changes_nothing():
    """vLLM's dummy runs: a request table's first rows, and no slot."""
    state = torch.tensor([[3, 40], [-1, -1]], dtype=torch.int32)
    before, slots = state.clone(), torch.full((2,), 5)
    begin = torch.zeros(2, dtype=torch.int32)
    ints = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 2], [1, 1], [0, 1])]
    ops.newest_step(*ints, torch.tensor([-1, -1]), state, slots, begin, 16)
    assert torch.equal(state, before) and slots.tolist() == [-1, -1] and begin.tolist() == [2**31 - 1] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_writer_keeps_tokens_as_they_are(device, dtype):
    """In their places, nothing beside them; pages as without."""
    pool, plain = (make_pool(device, heads=HEADS, head_size=HEAD_SIZE) for _ in range(2))
    one = scalar(1.0, device)
    key, value = (strided_rows(torch.randn(5, HEADS, HEAD_SIZE).to(dtype).to(device), 3) for _ in range(2))
    slots = torch.tensor([3, 17, -1, 79, 0], device=device)
    newest = torch.full((ROWS, 2, HEADS, 16, HEAD_SIZE), torch.nan, dtype=dtype, device=device)
    newest_slots = torch.tensor([0, 47, -1, -1, 20], device=device)
    ops.reshape_and_cache_nvfp4(
        key, value, pool.cache, slots, one, one, newest=newest, newest_slots=newest_slots
    )
    ops.reshape_and_cache_nvfp4(key, value, plain.cache, slots, one, one)
    assert torch.equal(pool.raw, plain.raw)
    for token, (row, place) in ((0, (0, 0)), (1, (2, 15)), (4, (1, 4))):
        got = newest[row, :, :, place]
        assert torch.equal(got[0], key[token]) and torch.equal(got[1], value[token])
        newest[row, :, :, place] = torch.nan
    assert newest.isnan().all()

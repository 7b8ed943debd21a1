"""How the decode attention's schedule kernel cuts a batch, run on a CPU."""

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from reference.emulated import Schedule, schedule_of, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

TILE = 16
NEWEST = 512 / 144
"""Bytes of an unquantised token beside one of a page, heads of 128 or any other size."""
H200 = 528
"""Thread blocks of four warps that run at once on an H200, heads of 128."""
RUN = 5
"""Units that another run takes a part."""


@pytest.mark.parametrize(
    ("lengths", "unit", "expected"),
    [
        ([8192] * 64, 64, (128, 512)),  # 528 parts of 125 units would cut 500 of 512 lines
        ([1024] * 256, 64, (64, 512)),  # four whole lines each
        ([8192] * 16, 256, (32, 128)),  # sixteen warps: a line each
        ([65536], 256, (16, 128)),  # a sixteenth of a line each
        ([8192] * 63 + [8000], 64, (129, 528)),  # not all alike: five units a line, cut as they come
        ([8192] * 58, 64, (113, 526)),  # a whole line would be an eighth more
        ([100] * 4, 64, (2, 32)),  # no part below 128 tokens
    ],
    ids=str,
)
def test_parts_of_equal_lengths_are_whole_lines(lengths, unit, expected):
    """For eight KV heads on 132 multiprocessors: (units of a part, parts)."""
    made = schedule_of(lengths, 8, H200 if unit == 64 else 132, unit)
    assert (made.chunk, made.parts) == expected


@pytest.mark.parametrize(
    ("lengths", "unit", "lines"),
    [([8192] * 64, 64, 1), ([1024] * 256, 64, 4), ([8192] * 16, 256, 1), ([65536], 256, 1 / 16)],
    ids=str,
)
def test_newest_tokens_of_equal_lengths_leave_lines_whole(lengths, unit, lines):
    made = schedule_of(lengths, 8, H200 if unit == 64 else 132, unit, full(lengths, 64))
    assert made.chunk == made.begins[1] / 8 * lines and made.parts == len(lengths) * 8 / lines


@dataclass(frozen=True)
class Ragged:
    """A batch, cut for an H200.

    Attributes:
        newest: tokens that a row holds.
    """

    lengths: list[int]
    heads: int = 8
    newest: int = 64
    q_len: int = 1
    window: int = 0
    unit: int = 64
    parts: int = H200


RAGGED = [400 + 97 * i % 11000 for i in range(96)]
CASES = {
    "ragged": Ragged(RAGGED),
    "one KV head": Ragged(RAGGED, heads=1),
    "two hundred short, four long": Ragged([300] * 200 + [9000] * 4),
    "few long": Ragged([60000, 9000, 30000], heads=2),
    "shorter than their newest": Ragged([1, 15, 16, 17, 40, 63, 64, 65, 80] * 50),
    "windows": Ragged(RAGGED, window=500),
    "windows shorter than the newest": Ragged(RAGGED, window=20),
    "query tokens": Ragged(RAGGED, q_len=4),
    "no tokens": Ragged([0, 700, 0, 0, 40, 0]),
    "many newest": Ragged(RAGGED, newest=256),
    "sixteen warps": Ragged([9000, 4000, 700, 12000], newest=256, unit=256, parts=132),
}


def full(lengths: list[int], places: int) -> list[int]:
    """The first tokens of rows that hold as many as they can, in whole tiles."""
    return [-(-max(0, n - places) // TILE) * TILE for n in lengths]


def cut(case: Ragged, newest_from: list[int] | None) -> Schedule:
    return schedule_of(case.lengths, case.heads, case.parts, case.unit, newest_from, case.q_len, case.window)


@dataclass(frozen=True)
class Work:
    """What the parts attend to, read from a schedule as params.h says: a unit of a line in each row.

    Attributes:
        tiles: [units, tiles of a unit], their indices in the request; -1 past its end.
        line: [units], request * heads + head.
        part, cost: [units], whose it is, and what it takes in units of pages.
    """

    tiles: np.ndarray
    line: np.ndarray
    part: np.ndarray
    cost: np.ndarray


def first_seen(case: Ragged, length: int) -> int:
    return max(0, length - case.q_len - case.window + 1) if case.window else 0


def work(case: Ragged, newest_from: list[int], made: Schedule) -> Work:
    in_unit = case.unit // TILE
    found = []
    for r, length in enumerate(case.lengths):
        begin = first_seen(case, length) // case.unit
        units = np.arange(math.ceil(length / case.unit) - begin if length else 0)
        line, rest = divmod(made.begins[r + 1] - made.begins[r], case.heads)
        assert rest == 0 and line >= len(units)
        tiles = (begin + units)[:, None] * in_unit + np.arange(in_unit)
        tiles[tiles >= math.ceil(length / TILE)] = -1
        cost = np.where(tiles < 0, 0, np.where(tiles * TILE >= newest_from[r], NEWEST, 1)).sum(1) / in_unit
        for head in range(case.heads):
            part = (made.begins[r] + head * line + units) // made.chunk
            found.append(Work(tiles, np.full(len(units), r * case.heads + head), part, cost))
    return Work(*(np.concatenate([getattr(w, f.name) for w in found]) for f in fields(Work)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_tile_is_in_one_part(case):
    newest_from = full(case.lengths, case.newest)
    made = cut(case, newest_from)
    assert made.parts <= case.parts and made.counts_newest == 1
    done = work(case, newest_from, made)
    assert len(done.part) == 0 or done.part.max() < made.parts
    for r, length in enumerate(case.lengths):
        needed = range(first_seen(case, length) // TILE, math.ceil(length / TILE))
        for head in range(case.heads):
            tiles = done.tiles[done.line == r * case.heads + head]
            seen = np.sort(tiles[tiles >= 0])
            assert len(np.unique(seen)) == len(seen) and np.isin(needed, seen).all()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_part_begins_with_the_request_that_has_its_first_unit(case):
    made = cut(case, full(case.lengths, case.newest))
    expected = [
        next(r for r in range(len(case.lengths)) if made.begins[r] <= part * made.chunk < made.begins[r + 1])
        for part in range(made.parts)
    ]
    assert made.firsts == expected + [-9] * (case.parts - made.parts)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parts_cost_the_same(case):
    """No more than the mean, with what cannot be cut: a unit, and the newest tokens of a line and its run."""
    newest_from = full(case.lengths, case.newest)
    made = cut(case, newest_from)
    done = work(case, newest_from, made)
    costs = np.bincount(done.part, done.cost, minlength=made.parts)
    costs += RUN * runs(done, made.parts)
    least = 128 / case.unit  # units of a part
    # Whole units, and newest tokens as 4 times a page's: a little more than the costs' sum.
    counted = len(done.part) + (3 * case.newest / case.unit + RUN) * len(case.lengths) * case.heads
    not_cut = 1 + (NEWEST - 1) * case.newest / case.unit + RUN
    assert costs.max() <= max(counted / case.parts, least) + not_cut


def runs(done: Work, parts: int) -> np.ndarray:
    """Of each part: the lines that it has units of."""
    return np.bincount(np.unique([done.line, done.part], axis=1)[1], minlength=parts)


def test_few_long_lines_and_many_short_ones():
    """Sixteen warps, a KV head: no part has four runs where others have one of as many units."""
    case = Ragged([150 + 40 * i % 700 for i in range(80)] + [60000] * 8, heads=1, unit=256, parts=132)
    newest_from = full(case.lengths, case.newest)
    made = cut(case, newest_from)
    done = work(case, newest_from, made)
    units = np.bincount(done.part, minlength=made.parts)
    cost = units + RUN * runs(done, made.parts)
    assert runs(done, made.parts).max() > 2  # or there is nothing to see
    assert cost.max() <= made.chunk + RUN


def test_only_newest_tokens_that_are_there_count():
    """Tiles of 16 from newest_from on, requests of 16 units: three units more for four tiles; and a run."""
    newest_from = [960, 976, 985, 1000, 1009, 1024, 2**31 - 1]
    made = schedule_of([1024] * 7, 1, 7, 64, newest_from)
    assert (np.diff(made.begins) - RUN).tolist() == [19, 18, 17, 16, 16, 16, 16]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_requests_without_newest_tokens_are_cut_as_ever(case):
    none = cut(case, [2**31 - 1] * len(case.lengths))
    assert replace(none, counts_newest=0) == cut(case, None)


def test_a_fixed_split_does_not_count_them():
    lengths = [1000, 64, 0, 130]
    made = schedule_of(lengths, 2, 7, 64, full(lengths, 64), split_units=3)
    assert made.chunk == 3 and made.begins == [0, 36, 42, 42, 48]
    assert made.parts == 16 and made.firsts == [-9] * 7  # any number of parts: none is said

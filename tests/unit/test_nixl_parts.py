"""Where a prompt is cut between tiers and link, and when one that is loaded in two parts is whole."""

import random

import pytest

from vllm_xlayer.connector.nixl.parts import Joining, Parts, cut

LINK, TIERS = 0, 1


@pytest.mark.parametrize(
    ("computed", "tiers", "link", "block_sizes", "expected"),
    [
        (0, 48, 97, [16], (48, 49)),
        (32, 48, 65, [16], (48, 17)),
        (0, 96, 97, [16], (96, 1)),
        (0, 0, 97, [16], (0, 97)),
        (0, 48, 0, [16], (48, 0)),
        (0, 0, 0, [16], (0, 0)),
        (0, 96, 96, [16], (96, 0)),  # nothing is left to read
        (0, 112, 97, [16], (112, 0)),
        (0, 48, 97, [16, 48], (48, 49)),
        (0, 48, 97, [16, 32], (0, 97)),  # half a block of the second group
        (16, 48, 81, [16, 32], (48, 33)),
        (0, 40, 97, [16], (0, 97)),
    ],
)
def test_each_block_is_loaded_by_one(computed, tiers, link, block_sizes, expected):
    parts = cut(computed, tiers, link, block_sizes)
    assert parts == Parts(computed, *expected)
    assert parts.loaded == max(tiers if tiers >= link else 0, link)
    assert parts.both == (min(expected) > 0)


@pytest.mark.parametrize("order", [(LINK, TIERS), (TIERS, LINK)])
@pytest.mark.parametrize("failing", [(), (LINK,), (TIERS,), (LINK, TIERS)])
def test_a_request_is_whole_when_both_parts_are_through(order, failing):
    joining = Joining()
    joining.begin(["a"])
    first, second = order
    assert joining.ended(first, {"a"}, {"a"} if first in failing else set()) == (set(), set())
    assert joining.ended(first, {"a"}, set()) == (set(), set()), "one part is not two"
    whole, failed = joining.ended(second, {"a"}, {"a"} if second in failing else set())
    assert (whole, failed) == ({"a"}, {"a"} if failing else set())
    assert not joining.missing


def test_requests_in_one_part_pass():
    joining = Joining()
    joining.begin(["two"])
    assert joining.ended(LINK, {"one", "two", "bad"}, {"bad"}) == ({"one", "bad"}, {"bad"})
    assert joining.ended(TIERS, {"other", "two"}, set()) == ({"other", "two"}, set())


def test_a_failure_is_its_requests_only_and_forgotten_with_it():
    joining = Joining()
    joining.begin(["a", "b"])
    assert joining.ended(LINK, {"a", "b"}, {"a"}) == (set(), set())
    assert joining.ended(TIERS, {"b"}, set()) == ({"b"}, set())
    assert joining.ended(TIERS, {"a"}, set()) == ({"a"}, {"a"})
    joining.begin(["a"])  # asked again
    assert joining.ended(LINK, {"a"}, set()) == (set(), set())
    assert joining.ended(TIERS, {"a"}, set()) == ({"a"}, set())


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_many(seed):
    """Each is reported once, at its last part, and failed exactly if one of its parts did."""
    rng = random.Random(seed)
    parts = {f"r{i}": rng.choice([(LINK,), (TIERS,), (LINK, TIERS)]) for i in range(50)}
    joining = Joining()
    joining.begin(name for name, of in parts.items() if len(of) == 2)
    reports = [(part, name, rng.random() < 0.3) for name, of in parts.items() for part in of]
    rng.shuffle(reports)
    left = {name: len(of) for name, of in parts.items()}
    bad = set()
    while reports:
        part = rng.choice((LINK, TIERS))
        batch = [report for report in reports[: rng.randint(1, 5)] if report[0] == part]
        reports = [report for report in reports if report not in batch]
        for _, name, fails in batch:
            left[name] -= 1
            bad |= {name} if fails else set()
        finished = {name for _, name, _ in batch}
        whole, failed = joining.ended(part, finished, {name for _, name, fails in batch if fails})
        assert whole == {name for name in finished if left[name] == 0}
        assert failed == whole & bad
    assert not joining.missing

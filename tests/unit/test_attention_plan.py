"""plan_pieces: every key a query may see is attended to exactly once, within the capacity."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_xlayer.attention.plan import Waves, plan_pieces


@st.composite
def batches(draw):
    n = draw(st.integers(1, 8))
    query = [draw(st.sampled_from([0, 1, 1, 3, 16])) for _ in range(n)]
    context = [draw(st.integers(0, 200)) for _ in range(n)]
    window = draw(st.sampled_from([None, 1, 7, 40]))
    capacity = draw(st.integers(60, 120))
    blocks = [-(-4 * q // 5) for q in query]
    waves = draw(st.sampled_from([None, *(Waves(np.array(blocks), at_once) for at_once in (1, 3, 100))]))
    return np.array(query), np.array(context), capacity, window, waves


@settings(max_examples=300, deadline=None)
@given(batches())
def test_every_visible_key_once(batch):
    query, context, capacity, window, waves = batch
    pieces = plan_pieces(query, context + query, capacity, window, waves)
    seen: dict[int, list[tuple[int, int]]] = {}
    for p in pieces:
        assert p.lens.sum() <= capacity
        for i, req in enumerate(range(p.first, p.last)):
            if query[req] == 0:
                assert p.lens[i] == 0
                continue
            lo, hi = int(p.seq_starts[i]), int(p.seq_starts[i] + p.lens[i])
            # a piece without a mask must lie before the queries; a causal one must end with them
            assert hi == context[req] + query[req] if p.causal else hi <= context[req]
            assert p.merge == (req in seen)
            seen.setdefault(req, []).append((lo, hi))
    for req in range(len(query)):
        if query[req] == 0:
            continue
        oldest = 0 if window is None else max(0, context[req] - window + 1)
        spans = seen[req]
        assert spans[0][0] == oldest and spans[-1][1] == context[req] + query[req]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


def test_pieces_are_whole_waves():
    """64 requests of 100 new tokens over 8,192, 32 thread blocks each, in a workspace of 65,536."""
    query, seq = np.full(64, 100), np.full(64, 8292)

    def sizes(waves):
        return [p.last - p.first for p in plan_pieces(query, seq, 65536, None, waves)]

    assert sizes(None) == [7] * 9 + [1]
    assert sizes(Waves(np.full(64, 32), 132)) == [4] * 16
    assert sizes(Waves(np.full(64, 32), 120)) == [7] * 9 + [1]  # 7 requests fill 1.9 waves, 3 less of one
    assert sizes(Waves(np.full(64, 33), 132)) == [4] * 16
    assert sizes(Waves(np.full(64, 132), 132)) == [7] * 9 + [1]  # all are full: as few pieces as there can be
    assert sizes(Waves(np.full(64, 1), 10**6)) == [7] * 9 + [1]


def test_nothing_is_cut_back_that_fits():
    """One piece, whatever is left of a wave; the last one, too; requests without tokens count nothing."""
    waves = Waves(np.array([100, 100, 0, 100]), 132)
    (piece,) = plan_pieces(np.array([9, 9, 0, 9]), np.array([50, 50, 0, 50]), 200, None, waves)
    assert (piece.first, piece.last) == (0, 4)
    pieces = plan_pieces(np.array([0, 0, 9]), np.array([0, 0, 50]), 50, None, Waves(np.array([0, 0, 5]), 8))
    assert [(p.first, p.last) for p in pieces] == [(0, 3)]


def test_capacity_too_small_names_both():
    with pytest.raises(ValueError, match=r"room for 9 tokens.*got 8"):
        plan_pieces(np.array([9]), np.array([20]), 8)
    with pytest.raises(ValueError, match=r"room for 24 tokens.*got 16"):
        plan_pieces(np.array([5]), np.array([100]), 16, window=20)

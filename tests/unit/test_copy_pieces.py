"""Which bytes of which rows a transfer moves, and in which pieces."""

import pytest
import torch

from vllm_xlayer.connector.copy.pieces import pieces_of


def ids(*values):
    return torch.tensor(values, dtype=torch.int64)


def moved(pieces):
    """{(source row, destination row, byte)}, each at most once."""
    found = [
        (int(src), int(dst), byte)
        for piece in pieces
        for src, dst in zip(piece.src_ids, piece.dst_ids, strict=True)
        for byte in range(piece.begin, piece.end)
    ]
    assert len(found) == len(set(found))
    return set(found)


@pytest.mark.parametrize("most", [None, 16, 32, 4096])
def test_the_used_bytes_of_every_row_and_no_others(most):
    runs = [(2, 48), (0, 96), (1, 64)]
    pieces = list(pieces_of(ids(4, 5, 6), ids(1, 3, 2), runs, most))
    wanted = {(4, 1, b) for b in range(48)} | {(5, 3, b) for b in range(48)} | {(6, 2, b) for b in range(64)}
    assert moved(pieces) == wanted
    assert all(piece.end - piece.begin <= (most or 96) for piece in pieces)
    assert sum(piece.nbytes for piece in pieces) == len(wanted)


@pytest.mark.parametrize("room", [1, 48, 100, 10_000])
def test_a_piece_is_split_between_rows(room):
    (piece,) = pieces_of(ids(1, 2, 3), ids(3, 2, 1), [(3, 48)])
    parts, rest = [], piece
    while rest is not None:
        first, rest = rest.split(room)
        assert len(first.src_ids) == 1 or first.nbytes <= room
        parts.append(first)
    assert moved(parts) == moved([piece])


@pytest.mark.parametrize("runs", [[(2, 16)], [(3, 16), (1, 16)]])
def test_runs_that_are_not_those_of_the_ids_are_refused(runs):
    with pytest.raises(ValueError, match=rf"expected {sum(n for n, _ in runs)} rows, got 3 to copy from"):
        list(pieces_of(ids(1, 2, 3), ids(1, 2, 3), runs))

"""Training rows, made on the device in bulk. The three tasks in bytes (one token a byte):

    recall   R\n kqz=4821\n abd=9931\n ...  ?\n abd=9931\n ...         after ``=``: the value of that key
    copy     C\n <line>\n <line>\n ...      ?\n <line again>\n ...     after CUE letters: the rest of the line
    trace    T\n abc>xyz\n xyz>qrs\n ...    ?\n abc>xyz>qrs>...\n ...  after ``>``: HOPS links followed

(the spaces are only here). A row is a table, a ``?`` line, and as many queries as fit, so that one
row trains on tens of answers. Loss counts on the answers' bytes and the newline that ends them.

A *key* is three letters: 676 a + 26 b + c. Keys that are a multiple of HELD_OUT are never drawn here;
held-out documents (vllm_xlayer/demo/documents.py) are made of those alone, as keys, as links and as the first
three letters of every line to copy.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from vllm_xlayer.demo.documents import CUE, HEADERS, HELD_OUT, HOPS, KEYS, QUERIES

PAD_ID = 257


def _bytes(text: str, rows: int, device: torch.device) -> Tensor:
    return torch.tensor(list(text.encode()), device=device).expand(rows, -1)


def _keys(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """[rows, count] int64: distinct training keys in random order."""
    allowed = (torch.arange(KEYS, device=generator.device) % HELD_OUT != 0).float()
    return torch.multinomial(allowed.expand(rows, -1), count, generator=generator)


def _letters(keys: Tensor) -> Tensor:
    """[...] keys -> [..., 3] bytes."""
    return torch.stack([keys // 676, keys // 26 % 26, keys % 26], -1) + ord("a")


def _const(like: Tensor, text: str) -> Tensor:
    """``text`` as bytes behind every entry of [rows, count, w]: [rows, count, len(text)]."""
    return torch.tensor(list(text.encode()), device=like.device).expand(*like.shape[:2], -1)


def _pick(lines: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` lines a row, drawn with replacement: [rows, n, w] -> [rows, count, w]."""
    rows, n, width = lines.shape
    index = torch.randint(n, (rows, count, 1), device=lines.device, generator=generator)
    return lines.gather(1, index.expand(-1, -1, width))


def _row(task: str, table: Tensor, queries: Tensor, answer_from: int, length: int) -> tuple[Tensor, Tensor]:
    """Joins header, table [rows, n, w] and queries [rows, q, w']; cuts or pads to length + 1 bytes."""
    rows, device = len(table), table.device
    prefix = torch.cat(
        [_bytes(HEADERS[task], rows, device), table.flatten(1), _bytes(QUERIES, rows, device)], 1
    )
    text = torch.full((rows, length + 1), PAD_ID, device=device)
    counted = torch.zeros_like(text, dtype=torch.bool)
    body = torch.cat([prefix, queries.flatten(1)], 1)[:, : length + 1]
    text[:, : body.shape[1]] = body
    query_counted = torch.arange(queries.shape[2], device=device) >= answer_from
    counted[:, prefix.shape[1] : body.shape[1]] = query_counted.repeat(queries.shape[1])[
        : body.shape[1] - prefix.shape[1]
    ]
    return text, counted


def _split(
    length: int, table_width: int, query_width: int, least: int, rng: random.Random
) -> tuple[int, int]:
    """Table lines (at least ``least``) and queries that fill ``length`` + 1 bytes."""
    room = length + 1 - 4
    n = max(least, int(room / table_width * rng.uniform(0.1, 0.9)))
    return n, max(1, -(-(room - n * table_width) // query_width))


def recall(rows: int, length: int, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    n, q = _split(length, 9, 9, 2, rng)
    keys = _letters(_keys(rows, n, generator))
    digits = torch.randint(10, (rows, n, 4), device=keys.device, generator=generator) + ord("0")
    lines = torch.cat([keys, _const(keys, "="), digits, _const(keys, "\n")], 2)
    return _row("recall", lines, _pick(lines, q, generator), 4, length)


def copy(rows: int, length: int, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    width = rng.randint(CUE + 8, max(CUE + 9, min(56, length // 4)))
    n, q = _split(length, width + 1, width + 1, 1, rng)
    first = _letters(_keys(rows, n, generator))
    rest = torch.randint(26, (rows, n, width - 3), device=first.device, generator=generator) + ord("a")
    lines = torch.cat([first, rest, _const(first, "\n")], 2)
    return _row("copy", lines, _pick(lines, q, generator), CUE, length)


def trace(rows: int, length: int, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    n, q = _split(length, 8, 4 * (HOPS + 1), HOPS + 1, rng)
    keys = _keys(rows, n, generator)
    letters = _letters(keys)
    lines = torch.cat([letters, _const(letters, ">"), letters.roll(-1, 1), _const(letters, "\n")], 2)
    order = torch.rand(rows, n, device=keys.device, generator=generator).argsort(1)
    table = lines.gather(1, order[..., None].expand(-1, -1, 8))
    start = torch.randint(n, (rows, q), device=keys.device, generator=generator)
    queries = []
    for hop in range(HOPS + 1):
        name = _letters(keys.gather(1, (start + hop) % n))
        queries += [name, _const(name, "\n" if hop == HOPS else ">")]
    return _row("trace", table, torch.cat(queries, 2), 4, length)


SHARES: tuple[tuple[Callable[..., tuple[Tensor, Tensor]], float], ...] = (
    (recall, 0.2), (recall, 0.2), (copy, 0.125), (copy, 0.125), (trace, 0.175), (trace, 0.175)
)  # fmt: skip
"""Parts of a batch. Each part draws its own table size, so a task has two sizes a batch."""


def batch(rows: int, length: int, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``rows`` rows of ``length`` + 1 bytes: (text int64, counted bool), both [rows, length + 1].

    ``counted`` marks the bytes that the loss counts, as targets.
    """
    parts, done, share_sum = [], 0, 0.0
    for make, share in SHARES:
        share_sum += share
        count = round(rows * share_sum) - done
        done += count
        if count:
            parts.append(make(count, length, rng, generator))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

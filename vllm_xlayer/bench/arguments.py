"""Options that several questions have."""

import argparse
from collections.abc import Iterable

from .bounds import SHAPE
from .engines import CACHES
from .shapes import SHAPES


def shape_argument(parser: argparse.ArgumentParser, default: str = SHAPE) -> None:
    """--shape."""
    parser.add_argument(
        "--shape", choices=SHAPES, default=default,
        help="of the model, whose weights are random (default: %(default)s)",
    )  # fmt: skip


def caches_argument(parser: argparse.ArgumentParser, default: Iterable[str]) -> None:
    """--caches."""
    parser.add_argument(
        "--caches", nargs="+", choices=CACHES, default=list(default),
        help="KV caches, an engine each (default: %(default)s)",
    )  # fmt: skip

"""Lengths of requests as real traffic has them: many short ones, a few long ones."""

import random


def ragged(seed: str, count: int, median: float, most: int) -> list[int]:
    """So many lengths, log-normal around the median, 1 at least; the same for the same arguments."""
    draw = random.Random(seed)
    return [max(1, min(most, round(median * draw.lognormvariate(0, 1)))) for _ in range(count)]

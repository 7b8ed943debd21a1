"""Lengths of requests as real traffic has them: many short ones, a few long ones."""

import random


def ragged(seed: str, count: int, median: float, most: int, spread: float = 1.0, least: int = 1) -> list[int]:
    """So many lengths, log-normal around the median, cut at both ends; the same for the same arguments."""
    draw = random.Random(seed)
    return [max(least, min(most, round(median * draw.lognormvariate(0, spread)))) for _ in range(count)]

"""What a benchmark asks of its numbers, and whether they keep it."""

from dataclasses import dataclass

SHAPE = "llama-3.1-8b"
"""The bounds are for engines of this shape."""


@dataclass(frozen=True)
class Bound:
    """A number that may be at most ``limit``, or must be at least that."""

    what: str
    value: float
    limit: float
    unit: str = ""
    least: bool = False

    @property
    def kept(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    def __str__(self) -> str:
        # Three digits: a ratio of 1.034 must not read as 1.03.
        return (
            f"{self.what}: {self.value:.3f}{self.unit}, at {'least' if self.least else 'most'} "
            f"{self.limit:g}{self.unit}: "
            f"{'kept' if self.kept else 'missed'}"
        )

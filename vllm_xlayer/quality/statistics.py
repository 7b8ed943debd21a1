"""What K and V of a model look like, layer by layer, and what NVFP4 does to them.

Hooks on the attention layers of an eager engine see K and V as they are written to the cache. Each rank sums
up what it sees; sums of ranks add up.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..nvfp4 import GROUP, ScaleChoice, count_groups, decode, encode, rotate

SAMPLE_TOKENS = 1024
"""Of each layer, on which errors are computed; all tokens count for the rest."""
EXPONENTS = range(-12, 9)
"""Global scales that are tried: 2^-12 to 2^8."""
HEADROOM = 1.01
"""A larger global scale is taken as long as the squared error stays below this many times the least one."""


def squared_error(x: torch.Tensor, global_scale: float, choice: ScaleChoice) -> float:
    """Squared error of x [..., D] after NVFP4, summed over all elements."""
    exact = x.float()
    return float((decode(*encode(exact, global_scale, choice), global_scale) - exact).double().square().sum())


def best_exponent(errors: Mapping[int, float]) -> int:
    """The exponent of the global scale, a power of 2, given the squared error of each exponent.

    The largest one that is about as good as the best. Above it the error grows little by little, as ever more
    of the smallest groups get coarse scales; below it there would be less room for values larger than those
    seen, which are cut off. So a few huge values do not decide: where cutting them off costs less than what
    their scale does to all others, it is done.
    """
    least = min(errors.values())
    return max(exponent for exponent, error in errors.items() if error <= HEADROOM * least)


class Sums:
    """Running sums of one layer's K or V."""

    def __init__(self, global_scale: float, choice: ScaleChoice, rotated: bool = False) -> None:
        """rotated: what fits a scale, and what is lost, is that of K as it is kept (`nvfp4.rotate`)."""
        self.global_scale, self.choice, self.rotated = global_scale, choice, rotated
        self.values = self.tokens = self.groups = self.saturated = self.underflowed = 0
        self.largest = self.total = self.squares = 0.0
        self.channels: torch.Tensor | None = None
        self.sample: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """x [T, H, D] of some tokens."""
        exact = x.double() if x.device.type == "cpu" else x.float()
        self.tokens += len(x)
        self.values += x.numel()
        self.largest = max(self.largest, float(exact.abs().amax()))
        self.total += float(exact.sum())
        self.squares += float(exact.square().sum())
        sums = exact.sum(0)
        self.channels = sums if self.channels is None else self.channels + sums
        kept = rotate(x) if self.rotated else x
        counts = count_groups(kept, self.global_scale)
        self.groups += x.numel() // GROUP
        self.saturated += counts.saturated
        self.underflowed += counts.underflowed
        missing = SAMPLE_TOKENS - sum(map(len, self.sample))
        if missing > 0:
            self.sample.append(kept[:missing].clone())

    def result(self) -> dict[str, Any]:
        """Sums that add up over ranks, and the largest value."""
        sample = torch.cat(self.sample)
        errors = {e: squared_error(sample, 2.0**e, self.choice) for e in EXPONENTS}
        assert self.channels is not None
        return {
            "largest": self.largest,
            "values": self.values,
            "total": self.total,
            "squares": self.squares,
            "mean_squares": float(self.channels.square().sum()) / self.tokens,
            "groups": self.groups,
            "saturated": self.saturated,
            "underflowed": self.underflowed,
            "sample_squares": float(sample.double().square().sum()),
            "error": squared_error(sample, self.global_scale, self.choice),
            "errors": errors,
        }


def combine(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One layer's K or V from what its ranks summed up, as the report shows it."""

    def total(name: str) -> float:
        return sum(rank[name] for rank in ranks)

    errors = {e: sum(rank["errors"][e] for rank in ranks) for e in ranks[0]["errors"]}
    values, squares, energy = total("values"), total("squares"), total("sample_squares")
    return {
        "largest": max(rank["largest"] for rank in ranks),
        "std": max(squares / values - (total("total") / values) ** 2, 0.0) ** 0.5,
        "mean_share": total("mean_squares") / squares if squares else 0.0,
        "groups": total("groups"),
        "saturated": total("saturated"),
        "underflowed": total("underflowed"),
        "rmse": (total("error") / energy) ** 0.5 if energy else 0.0,
        "best_exponent": best_exponent(errors) if energy else 0,
        "best_rmse": (errors[best_exponent(errors)] / energy) ** 0.5 if energy else 0.0,
    }

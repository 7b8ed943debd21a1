"""Model, attention backends and connector agree on a layout, or everyone hears who refused what and why."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_xlayer.layout.descriptor import LayoutDescriptor
from vllm_xlayer.layout.spec import CacheSpec, Layout, model_problems
from vllm_xlayer.nvfp4 import ScaleOrder

MODEL = "model"
"""The party that a model's cache specs speak for."""

DEFAULT_ORDER = (Layout.BLHNC, Layout.BLNHC, Layout.LBHNC, Layout.LBNHC)
"""Candidates after the connector's. Rows first: a block is then one piece. BHLNC only where asked for."""


@dataclass(frozen=True)
class BackendOffer:
    """What one attention backend accepts.

    Args:
        name: as in a log, e.g. "FLASH_ATTN".
        accepts: for each KV dtype the layouts that its kernels read and write correctly.
        refuses: reasons, for (dtype, layout) that are not accepted. Where there is none the reason
            is that the backend did not say that it accepts it.
        scale_orders: orders of nvfp4 scales that its kernels read, best first. Empty: it reads none,
            and leaves that choice to the other backends.
    """

    name: str
    accepts: Mapping[str, frozenset[Layout]]
    refuses: Mapping[tuple[str, Layout], str] = field(default_factory=dict)
    scale_orders: tuple[ScaleOrder, ...] = ()

    @property
    def party(self) -> str:
        return f"attention backend {self.name}"

    def problem(self, layout: Layout, dtype: str) -> str | None:
        """Why the backend does not take a dtype in a layout, or None."""
        if (dtype, layout) in self.refuses:
            return self.refuses[dtype, layout]
        if dtype not in self.accepts:
            return f"does not accept kv dtype {dtype} (accepts {', '.join(self.accepts) or 'none'})"
        if layout not in self.accepts[dtype]:
            return f"accepts {dtype} only in {_names(self.accepts[dtype])}"
        return None


@dataclass(frozen=True)
class ConnectorWish:
    """What a KV connector prefers: layouts in order; with ``required`` it works with no other."""

    name: str
    layouts: tuple[Layout, ...]
    required: bool = False

    @property
    def party(self) -> str:
        return f"connector {self.name}"


@dataclass(frozen=True)
class Refusal:
    """One party's no to one candidate."""

    layout: Layout
    party: str
    reason: str

    def __str__(self) -> str:
        return f"{self.layout.value} refused by {self.party}: {self.reason}"


@dataclass(frozen=True)
class Decision:
    """What was agreed, by whom, and what was refused by whom."""

    descriptor: LayoutDescriptor
    accepted_by: tuple[str, ...]
    refusals: tuple[Refusal, ...]


class NegotiationError(ValueError):
    """No candidate was accepted by all. ``refusals`` holds each reason; the message has each of them once."""

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        self.refusals = tuple(refusals)
        candidates = list(dict.fromkeys(refusal.layout for refusal in refusals))
        reasons: dict[tuple[str, str], list[Layout]] = {}
        for refusal in refusals:
            reasons.setdefault((refusal.party, refusal.reason), []).append(refusal.layout)
        lines = [
            f"  {'all' if layouts == candidates else _names(layouts)} refused by {party}: {reason}"
            for (party, reason), layouts in reasons.items()
        ]
        super().__init__("\n".join(["no KV cache layout is accepted by all parties:", *lines]))


def negotiate(
    specs: Sequence[CacheSpec], backends: Sequence[BackendOffer], wish: ConnectorWish | None = None
) -> Decision:
    """The first candidate that every party accepts.

    Args:
        specs: one a KV cache group of the model.
        backends: every attention backend that touches these groups.
        wish: the connector's preference, None without a connector.

    Returns:
        The decision, with the refusals of *all* candidates, also of those after the chosen one.

    Raises:
        NegotiationError: every candidate was refused.
        ValueError: no group or no backend was given.
    """
    if not specs or not backends:
        raise ValueError(
            "expected at least one KV cache group and one attention backend, "
            f"got {len(specs)} and {len(backends)}"
        )
    wished = wish.layouts if wish else ()
    order, no_order = _choose_scale_order(specs, backends)
    chosen: LayoutDescriptor | None = None
    refusals: list[Refusal] = []
    for layout in dict.fromkeys((*wished, *DEFAULT_ORDER)):
        found = [*_refusals(layout, specs, backends, wish), *no_order]
        refusals += [Refusal(layout, party, reason) for party, reason in found]
        if not found and chosen is None:
            chosen = LayoutDescriptor(layout, tuple(specs), order)
    if chosen is None:
        raise NegotiationError(refusals)
    parties = [MODEL, *(backend.party for backend in backends), *([wish.party] if wish else [])]
    return Decision(chosen, tuple(parties), tuple(refusals))


def _refusals(
    layout: Layout, specs: Sequence[CacheSpec], backends: Sequence[BackendOffer], wish: ConnectorWish | None
) -> Iterator[tuple[str, str]]:
    """(party, reason) of everyone who does not take ``layout``, whatever the scale order."""
    yield from ((MODEL, problem) for problem in model_problems(layout, specs))
    for backend in backends:
        for dtype in dict.fromkeys(spec.dtype for spec in specs):
            if problem := backend.problem(layout, dtype):
                yield backend.party, problem
    if wish and wish.required and layout not in wish.layouts:
        yield wish.party, f"requires {_names(wish.layouts)}"


def _choose_scale_order(
    specs: Sequence[CacheSpec], backends: Sequence[BackendOffer]
) -> tuple[ScaleOrder | None, list[tuple[str, str]]]:
    """The first voter's best order that all voters read and the model's head sizes allow."""
    if all(spec.dtype != "nvfp4" for spec in specs):
        return None, []
    voters = [backend for backend in backends if backend.scale_orders]
    if not voters:
        return None, [(backend.party, "names no order of nvfp4 scales that it reads") for backend in backends]
    found: list[tuple[str, str]] = []
    for order in voters[0].scale_orders:
        said = [
            (voter.party, f"does not read {order.name} scales")
            for voter in voters[1:]
            if order not in voter.scale_orders
        ]
        problems = (spec.scale_order_problem(order) for spec in specs)
        said += [(MODEL, problem) for problem in problems if problem]
        if not said:
            return order, []
        found += said
    return None, found


def _names(layouts: Sequence[Layout] | frozenset[Layout]) -> str:
    return ", ".join(layout.value for layout in layouts) or "no layout"

"""What a read of rows is, for those who stage it, move its bytes and count how it ends.

No vLLM and no NIXL here.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np

Peer = tuple[str, int]
"""(engine id, rank)"""
REASONS = ("late", "seal", "lost", "busy", "params")
"""Why rows do not come: no answer in time; rows that are not what they must be; the peer or the link is gone;
an earlier read from that peer has not ended; no read begins, as the request does not say where they are."""


class Failure(NamedTuple):
    """A reason, and a text for people."""

    reason: str
    text: str


class Rows(NamedTuple):
    """Rows to read: int64 [n] each."""

    remote: np.ndarray
    """Blocks of the peer's pool."""
    local: np.ndarray
    """Blocks of ours."""
    group: np.ndarray
    """KV cache groups that they belong to."""
    tag: np.ndarray
    """What they must be sealed for."""


class Landing(Protocol):
    """What was launched for a chunk, or for a read."""

    def done(self) -> bool:
        """Whether it is over."""


class Check(Landing, Protocol):
    """Whether a read's rows are what they must be."""

    def problem(self) -> str | None:
        """After `done`: why they are not, or None."""


class Wire(Protocol):
    """What moves bytes."""

    def begin(self, peer: Peer, rows: Any) -> Any:
        """Called when a read begins, whose blocks nothing uses that is launched later; for the others."""

    def capacity(self, begun: Any, first: bool) -> int:
        """Rows of a read that one buffer holds; fewer in its first chunk, which brings seals."""

    def post(self, begun: Any, buffer: int, rows: range) -> Any:
        """Starts to read some rows of a read into a buffer, with seals if they are the first; returns a
        handle. May raise."""

    def state(self, handle: Any) -> str:
        """DONE, PROC, or an error's name. May raise, where the peer is gone."""

    def release(self, handle: Any) -> bool:
        """Lets go of a handle that is final; False where it must be kept, and asked again."""

    def land(self, begun: Any, buffer: int, rows: range) -> Landing:
        """Copies what a buffer holds into the KV cache. The buffer is free again when that is done."""

    def launched(self) -> Landing:
        """What was launched so far, for whatever read."""

    def check(self, begun: Any) -> Check:
        """Called once, when all chunks of a read are landing."""

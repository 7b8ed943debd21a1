"""A prompt in two parts, one from the tiers and one over the link: where it is cut, and when it is whole.

No vLLM here.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Parts(NamedTuple):
    """Tokens of a prompt: those on the device, then those from the tiers, then those over the link."""

    computed: int
    tiers: int
    link: int

    @property
    def loaded(self) -> int:
        return self.tiers + self.link

    @property
    def both(self) -> bool:
        return self.tiers > 0 and self.link > 0


def cut(computed: int, tiers: int, link: int, block_sizes: Sequence[int]) -> Parts:
    """What each of them loads.

    Args:
        computed: tokens that the device has.
        tiers: tokens that the tiers have beyond those.
        link: tokens that the other engine offers beyond those.
        block_sizes: tokens of a block, of every KV cache group. A block is loaded by one of the two: where
            the tiers' last token does not end a block in every group, the link has it all.
    """
    if tiers >= link:
        return Parts(computed, tiers, 0)
    if any((computed + tiers) % size for size in block_sizes):
        return Parts(computed, 0, link)
    return Parts(computed, tiers, link - tiers)


class Joining:
    """Which requests of one rank are loaded in two parts, and of those which part is not through yet."""

    def __init__(self) -> None:
        self.missing: dict[str, set[int]] = {}
        """Request -> its parts, of (0, 1), that still write to its blocks."""
        self._failed: set[str] = set()

    def begin(self, requests: Iterable[str]) -> None:
        """Both parts of these requests are loaded from now on."""
        for request in requests:
            self.missing[request] = {0, 1}

    def ended(self, part: int, finished: set[str], failed: set[str]) -> tuple[set[str], set[str]]:
        """Takes what one part says of requests, whether they are loaded in two or not.

        Args:
            finished: those whose blocks it does not write to any more, the failed among them.
            failed: those of which it has not loaded what it should.

        Returns:
            (finished, failed) of whole requests. One in two parts is in them when both are through, and has
            failed if either has.
        """
        self._failed |= failed & self.missing.keys()
        whole, not_loaded = set(), set()
        for request in finished:
            missing = self.missing.get(request, set())
            missing.discard(part)
            if missing:
                continue
            whole.add(request)
            if request in failed or request in self._failed:
                not_loaded.add(request)
            self.missing.pop(request, None)
            self._failed.discard(request)
        return whole, not_loaded

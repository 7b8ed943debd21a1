"""The patches of one process, and what became of each.

A patch whose probe does not find what it expects is not applied, one that fails while it is applied is
undone, and one warning says what will not work. Nothing is raised.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from ..compat.dependence import Patch
from .wrapping import undo_on_error

logger = logging.getLogger(__name__)


class State(Enum):
    """What became of a patch in this process."""

    APPLIED = "applied"
    NOT_NEEDED = "not needed"
    OFF = "off"


@dataclass(frozen=True)
class Record:
    """A patch with its state; the reason is empty where the state says all."""

    patch: Patch
    state: State
    reason: str = ""


class Registry:
    """Patches by their target."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}

    def report(self) -> list[Record]:
        """Every patch that `apply` was given, with its state."""
        return list(self._records.values())

    def apply(self, patches: Iterable[Patch]) -> None:
        """Applies what is not applied yet, and logs what changed. Never raises an Exception.

        What was off is tried again, as vLLM may have been only half imported.
        """
        for patch in patches:
            before = self._records.get(patch.target)
            if before is not None and before.state is State.APPLIED:
                continue
            record = self._records[patch.target] = _apply(patch)
            if record != before:
                _log(record)


def _apply(patch: Patch) -> Record:
    try:
        if reason := patch.not_needed():
            return Record(patch, State.NOT_NEEDED, reason)
        if problem := patch.problem():
            return Record(patch, State.OFF, problem)
        with undo_on_error():
            patch.apply()
    except Exception as error:  # whatever a patch does must not end the user's process
        return Record(patch, State.OFF, f"{type(error).__name__}: {error}")
    return Record(patch, State.APPLIED)


def _log(record: Record) -> None:
    patch = record.patch
    if record.state is State.OFF:
        logger.warning("%s is off: %s. So %s", patch.feature, record.reason, patch.why)
    else:
        reason = f" ({record.reason})" if record.reason else ""
        logger.info("patch for %s: %s: %s%s", patch.feature, patch.target, record.state.value, reason)


REGISTRY = Registry()
"""The registry of this process."""

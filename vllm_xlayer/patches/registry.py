"""Patches as data: what is changed in vLLM, why, until when, and what became of it in this process.

Patches are grouped into features. In each phase a feature is applied whole or not at all: if a probe does
not find what it expects, or an apply fails, what that phase already wrapped for it is unwrapped again, the
reason is recorded and one warning says what will not work. Nothing is raised until somebody who asked for
the feature calls ``require``.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum

from vllm_xlayer.patches.wrapping import undo_on_error

logger = logging.getLogger(__name__)


class Phase(Enum):
    """When a patch is applied."""

    PLUGIN = "when vLLM loads its plugins, in every process"
    WORKER = "in a worker process, before it loads the model"


class Verdict(Enum):
    """What a probe found."""

    FOUND = "found"
    NOT_NEEDED = "not needed"
    MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """A probe's answer; the reason is for people, and required unless the target was found."""

    verdict: Verdict
    reason: str = ""


FOUND = Finding(Verdict.FOUND)


def not_needed(reason: str) -> Finding:
    """vLLM does by itself what the patch is for."""
    return Finding(Verdict.NOT_NEEDED, reason)


def missing(reason: str) -> Finding:
    """vLLM is not as the patch expects."""
    return Finding(Verdict.MISSING, reason)


@dataclass(frozen=True)
class Patch:
    """One change to vLLM.

    Args:
        target: dotted name of what is changed.
        why: what goes wrong without it, one sentence.
        how: what the change does, one sentence.
        upstream: the issue or pull request that would make it superfluous, or "none".
        remove_when: how to see that it can go.
        phase: when it is applied.
        probe: looks at vLLM without changing it. An exception counts as missing.
        apply: makes the change; must be idempotent. What it does with ``wrap`` is undone if it, or a
            later patch of the feature, fails; anything else is not, so add such a patch last.
    """

    target: str
    why: str
    how: str
    upstream: str
    remove_when: str
    phase: Phase
    probe: Callable[[], Finding]
    apply: Callable[[], None]


class State(Enum):
    """What became of a patch in this process."""

    NOT_TRIED = "not tried"
    NOT_WANTED = "not wanted"
    NOT_NEEDED = "not needed"
    APPLIED = "applied"
    PROBE_FAILED = "probe failed"
    APPLY_FAILED = "apply failed"
    HELD_BACK = "held back"


_GOOD = (State.APPLIED, State.NOT_NEEDED)
_FAILED = (State.PROBE_FAILED, State.APPLY_FAILED, State.HELD_BACK)


@dataclass(frozen=True)
class Record:
    """A patch with its state; the reason is empty where the state says all."""

    feature: str
    patch: Patch
    state: State = State.NOT_TRIED
    reason: str = ""

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.patch.target}: {self.state.value}{reason}"


class FeatureUnavailable(RuntimeError):
    """A feature was asked for, and its patches are not all applied."""


class Registry:
    """The patches of one process and their states."""

    def __init__(self) -> None:
        self._records: dict[str, dict[str, Record]] = {}

    def add(self, feature: str, *patches: Patch) -> None:
        """Adds patches to a feature. Raises ValueError if the feature already has one for a target."""
        records = self._records.setdefault(feature, {})
        for patch in patches:
            if patch.target in records:
                raise ValueError(f"{feature}: expected one patch for {patch.target}, got a second one")
            records[patch.target] = Record(feature, patch)

    def report(self) -> list[Record]:
        """Every patch with its state, for ``vllm-xlayer doctor``."""
        return [record for records in self._records.values() for record in records.values()]

    def apply(self, phase: Phase, wanted: Collection[str]) -> None:
        """Applies the patches of the wanted features that belong to a phase. Never raises an Exception.

        May be called again: what is applied stays so and is not logged again; what failed is tried
        again, as vLLM may have been only half imported, and is warned of only if the reason is new.
        """
        for feature, records in self._records.items():
            before = list(records.values())
            if feature in wanted:
                self._apply_feature(feature, phase)
            else:
                for record in before:
                    if record.patch.phase is phase and record.state is State.NOT_TRIED:
                        self._set(record, State.NOT_WANTED)
            _log_changes(feature, before, list(records.values()))

    def require(self, feature: str) -> None:
        """Returns if every patch of a feature is applied or not needed.

        Raises:
            FeatureUnavailable: with the state of each that is not.
            ValueError: there is no such feature.
        """
        if feature not in self._records:
            raise ValueError(f"feature: expected one of {', '.join(self._records)}, got {feature}")
        bad = [record for record in self._records[feature].values() if record.state not in _GOOD]
        if bad:
            raise FeatureUnavailable(f"{feature} does not work with this vLLM: " + "; ".join(map(str, bad)))

    def _apply_feature(self, feature: str, phase: Phase) -> None:
        records = self._records[feature].values()
        due = [r for r in records if r.patch.phase is phase and r.state not in _GOOD]
        elsewhere = [r for r in records if r.patch.phase is not phase and r.state in _FAILED]
        to_apply: list[Record] = []
        failed: Record | None = elsewhere[0] if elsewhere else None
        for record in due:
            finding = _probe(record.patch)
            if finding.verdict is Verdict.FOUND:
                to_apply.append(record)
            elif finding.verdict is Verdict.NOT_NEEDED:
                self._set(record, State.NOT_NEEDED, finding.reason)
            else:
                failed = self._set(record, State.PROBE_FAILED, finding.reason)
        if failed is None:
            failed = self._apply_all(to_apply)
        if failed is not None:
            for record in to_apply:
                if record.patch.target != failed.patch.target:
                    self._set(record, State.HELD_BACK, f"because of {failed.patch.target}")

    def _apply_all(self, records: list[Record]) -> Record | None:
        """Applies all, or none: returns the record that failed, after undoing the others."""
        current = None
        try:
            with undo_on_error():
                for current in records:
                    current.patch.apply()
        except Exception as error:  # whatever a patch does must not end the user's process
            assert current is not None
            return self._set(current, State.APPLY_FAILED, f"{type(error).__name__}: {error}")
        for record in records:
            self._set(record, State.APPLIED)
        return None

    def _set(self, record: Record, state: State, reason: str = "") -> Record:
        new = Record(record.feature, record.patch, state, reason)
        self._records[record.feature][record.patch.target] = new
        return new


def _probe(patch: Patch) -> Finding:
    try:
        finding = patch.probe()
        if not isinstance(finding, Finding):
            raise TypeError(f"probe: expected a Finding, got {finding!r}")
        return finding
    except Exception as error:  # a probe that trips over a changed vLLM has found that it changed
        return missing(f"{type(error).__name__}: {error}")


def _log_changes(feature: str, before: list[Record], after: list[Record]) -> None:
    for old, new in zip(before, after, strict=True):
        if new == old or new.state in (State.NOT_WANTED, State.HELD_BACK):
            continue
        if new.state in _FAILED:
            logger.warning("%s will not work: %s. Without it: %s", feature, new, new.patch.why)
        else:
            logger.info("patch for %s: %s. Without it: %s", feature, new, new.patch.why)


REGISTRY = Registry()
"""The registry of this process."""

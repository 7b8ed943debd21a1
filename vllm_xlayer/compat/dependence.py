"""The record of something that this package needs of vLLM and that is not public, and its probe.

`private` and its neighbours are the tables of them. A patch is a record that also changes something.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

CONNECTOR_FEATURE = "XLayerConnector"
PLATFORM_FEATURE = "CPU reference platform"
ATTENTION_FEATURE = "NVFP4 attention"
TOOLS_FEATURE = "demo and benchmarks"
PARTIAL_HITS_FEATURE = "partial hits of one step"


class FeatureUnavailable(RuntimeError):
    """A feature was asked for that does not fit the installed vLLM; says what is missing."""


@dataclass(frozen=True)
class Private:
    """One owner of private names.

    Args:
        feature: what is off where the record does not fit.
        owner: "module:Class", or "module".
        why: what goes wrong without it, one sentence.
        how: how it is used, one sentence.
        remove_when: how to see that it can go.
        upstream: the issue or pull request that would make it superfluous, or "none known".
        methods: name -> parameters that it must take, in this order (others may stand between them).
        attributes: names that the owner's source assigns or reads.
    """

    feature: str
    owner: str
    why: str
    how: str
    remove_when: str
    upstream: str = "none known"
    methods: Mapping[str, str] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.methods, *self.attributes)

    @property
    def target(self) -> str:
        """The owner and its names, for people."""
        return f"{self.owner.replace(':', '.')}: {', '.join(self.names)}"

    def resolve(self) -> Any:
        """The owner itself. Raises ImportError or AttributeError where it is gone."""
        module, _, name = self.owner.partition(":")
        found = importlib.import_module(module)
        return getattr(found, name) if name else found

    def problem(self) -> str | None:
        """What the installed vLLM lacks of this, or None."""
        try:
            return next(self._problems(self.resolve()), None)
        except Exception as error:  # a probe that trips over a changed vLLM has found that it changed
            return f"{self.owner}: {type(error).__name__}: {error}"

    def _problems(self, owner: Any) -> Iterator[str]:
        for name, expected in self.methods.items():
            function = getattr(owner, name, None)
            if function is None:
                yield f"{self.owner} has no {name}"
                continue
            wanted, found = expected.split(), list(inspect.signature(function).parameters)
            if [p for p in found if p in wanted] != wanted:
                yield f"{self.owner}.{name}: expected parameters {', '.join(wanted)}, got {', '.join(found)}"
        for name in self.attributes:
            if not hasattr(owner, name) and not re.search(rf"\.{name}\b", _source(owner)):
                yield f"{self.owner} has no attribute {name}"


@functools.cache
def _source(owner: Any) -> str:
    """The source of a module, or of a class and the classes of vLLM that it inherits from."""
    if not isinstance(owner, type):
        return inspect.getsource(owner)
    return "\n".join(inspect.getsource(c) for c in owner.__mro__ if c.__module__.startswith("vllm."))


@dataclass(frozen=True)
class Patch(Private):
    """A record that also changes vLLM.

    Args:
        apply: makes the change; idempotent. What it does with ``wrap`` is undone if it raises.
        not_needed: why the change would do nothing here, or None; None where it always is needed.
    """

    apply: Callable[[], None] = lambda: None
    not_needed: Callable[[], str | None] = lambda: None

"""Wrap a function of somebody else's module, everywhere it is already known by name."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

SENTINEL = "__vllm_xlayer_patch__"
"""Attribute of a wrapped function: the name of the wrapper that it got."""

_CACHE_METHODS = ("cache_clear", "cache_info", "cache_parameters")

_journal: list[Callable[[], None]] | None = None
"""How to undo each wrap since ``undo_on_error`` was entered; None outside it."""


def wrap(owner: ModuleType | type, attr: str, wrapper: Callable[..., Any], package: str) -> bool:
    """Replaces ``owner.attr`` by a function that calls ``wrapper(original, *args, **kwargs)``.

    Functions of a module are also rebound in every imported module of ``package`` that holds the same
    object under any name (``from m import f``). Copies elsewhere, in a dict or a default argument, are not
    found. Static and class methods stay what they are; their wrapper gets what the function itself gets.

    Args:
        wrapper: its qualified name marks the result, so that it is never applied twice.
        package: e.g. "vllm": modules of this name and below it are searched.

    Returns:
        False if this wrapper is already there, and nothing was done.

    Raises:
        AttributeError: the owner has no such attribute.
        TypeError: it is not a function or method (a class, a property, data).
    """
    raw = inspect.getattr_static(owner, attr)
    kind = type(raw) if isinstance(raw, staticmethod | classmethod) else None
    original = raw.__func__ if kind else raw
    if not callable(original) or isinstance(original, type):
        raise TypeError(
            f"{owner.__name__}.{attr}: expected a function or method, got {type(original).__name__}"
        )
    mark = f"{wrapper.__module__}.{wrapper.__qualname__}"
    if mark in _marks(original):
        return False

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, SENTINEL, mark)
    for name in _CACHE_METHODS:  # functools.wraps leaves these behind, and vLLM calls them
        if hasattr(original, name):
            setattr(wrapped, name, getattr(original, name))
    _replace(owner, attr, kind(wrapped) if kind else wrapped)
    if isinstance(owner, ModuleType):
        for module, name in _holders(original, package):
            _replace(module, name, wrapped)
    return True


@contextmanager
def undo_on_error() -> Iterator[None]:
    """Undoes, last first, every ``wrap`` made inside it if an exception leaves it."""
    global _journal
    outer, _journal = _journal, []
    try:
        yield
    except BaseException:
        for undo in reversed(_journal):
            undo()
        raise
    finally:
        _journal = outer


def _marks(function: Any) -> Iterator[str]:
    """Names of our wrappers around a function, also below somebody else's wrapper."""
    seen = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        if mark := getattr(function, "__dict__", {}).get(SENTINEL):
            yield mark
        function = getattr(function, "__wrapped__", None)


def _replace(owner: ModuleType | type, attr: str, value: Any) -> None:
    namespace = object.__getattribute__(owner, "__dict__") if isinstance(owner, ModuleType) else vars(owner)
    had, old = attr in namespace, namespace.get(attr)

    def undo() -> None:
        if had:
            setattr(owner, attr, old)
        else:  # it was inherited
            delattr(owner, attr)

    setattr(owner, attr, value)
    if _journal is not None:
        _journal.append(undo)


def _holders(value: Any, package: str) -> Iterator[tuple[ModuleType, str]]:
    """(module, name) wherever an imported module of a package holds this very object."""
    for module_name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType):
            continue
        if module_name != package and not module_name.startswith(package + "."):
            continue
        # Not vars(module): that would trigger the import of a lazily imported one.
        namespace = object.__getattribute__(module, "__dict__")
        yield from ((module, name) for name, held in list(namespace.items()) if held is value)

"""Patches on a fake package: applied once, everywhere, whole or not at all, and never raising."""

import functools
import inspect
import logging
import sys
from types import ModuleType

import pytest

from vllm_xlayer.compat.dependence import Patch
from vllm_xlayer.patches.registry import Registry, State
from vllm_xlayer.patches.wrapping import undo_on_error, wrap

LOGGER = "vllm_xlayer.patches.registry"


@pytest.fixture
def engine():
    """Modules fakevllm.core (defines), fakevllm.user (from-imports, renamed too), otherpkg (from-imports)."""
    core, user, other, root = (
        ModuleType(name) for name in ("fakevllm.core", "fakevllm.user", "otherpkg", "fakevllm")
    )

    def size(n):
        """Doubles."""
        return 2 * n

    class Runner:
        def name(self):
            return "runner"

        @staticmethod
        def shape(n):
            return (n,)

        @classmethod
        def kind(cls):
            return cls.__name__

        @property
        def prop(self):
            return 1

    class FastRunner(Runner):
        pass

    core.size, core.Runner, core.FastRunner = size, Runner, FastRunner
    user.size, user.renamed, other.size = size, size, size
    modules = {module.__name__: module for module in (root, core, user, other)}
    sys.modules.update(modules)
    # A name in sys.modules that is no module, as some packages leave behind.
    sys.modules["fakevllm.odd"] = None
    yield core
    for name in (*modules, "fakevllm.odd"):
        del sys.modules[name]


def plus_one(original, *args, **kwargs):
    return original(*args, **kwargs) + 1


def tagged(original, *args, **kwargs):
    return ("tag", original(*args, **kwargs))


def make(apply=lambda: None, owner="fakevllm.core", name="size", parameters="n", not_needed=lambda: None):
    return Patch(
        "rows", owner, "blocks move in many pieces", "how", "never",
        methods={name: parameters}, apply=apply, not_needed=not_needed,
    )  # fmt: skip


def state_of(*patches):
    registry = Registry()
    registry.apply(patches)
    return [(record.state, record.reason) for record in registry.report()]


def raises(error):
    def apply():
        raise error

    return apply


def test_wrap_delegates_and_rebinds_from_imports_below_the_package_only(engine):
    original = engine.size
    assert wrap(engine, "size", plus_one, "fakevllm")
    assert engine.size(3) == 7
    assert sys.modules["fakevllm.user"].size is engine.size
    assert sys.modules["fakevllm.user"].renamed is engine.size
    assert sys.modules["otherpkg"].size is original
    assert engine.size.__wrapped__ is original and engine.size.__doc__ == "Doubles."
    assert list(inspect.signature(engine.size).parameters) == ["n"]


def test_wrap_twice_is_wrap_once_but_two_wrappers_stack(engine):
    assert wrap(engine, "size", plus_one, "fakevllm")
    once = engine.size
    assert not wrap(engine, "size", plus_one, "fakevllm")
    assert engine.size is once
    assert wrap(engine, "size", tagged, "fakevllm")
    assert engine.size(3) == ("tag", 7)
    assert not wrap(engine, "size", plus_one, "fakevllm")
    assert sys.modules["fakevllm.user"].size(3) == ("tag", 7)


def test_wrap_sees_itself_below_somebody_elses_wrapper(engine):
    wrap(engine, "size", plus_one, "fakevllm")
    inner = engine.size

    @functools.wraps(inner)
    def theirs(n):
        return inner(n) * 10

    engine.size = theirs
    assert not wrap(engine, "size", plus_one, "fakevllm")
    engine.size = functools.lru_cache(inner)
    assert not wrap(engine, "size", plus_one, "fakevllm")


def test_wrap_methods_of_each_kind(engine):
    runner = engine.Runner
    for attr in ("name", "shape", "kind"):
        assert wrap(runner, attr, tagged, "fakevllm")
        assert not wrap(runner, attr, tagged, "fakevllm")
    assert runner().name() == ("tag", "runner")
    assert runner.shape(3) == runner().shape(3) == ("tag", (3,))
    assert engine.FastRunner.kind() == ("tag", "FastRunner")


def test_wrap_an_inherited_method_touches_the_subclass_only(engine):
    wrap(engine.FastRunner, "name", tagged, "fakevllm")
    assert engine.FastRunner().name() == ("tag", "runner")
    assert engine.Runner().name() == "runner"


def test_wrap_keeps_the_methods_of_a_cache(engine):
    engine.size = functools.lru_cache(engine.size)
    wrap(engine, "size", plus_one, "fakevllm")
    assert engine.size(3) == engine.size(3) == 7
    assert engine.size.cache_info().hits == 1
    engine.size.cache_clear()
    assert engine.size.cache_info().hits == 0


@pytest.mark.parametrize(
    ("owner", "attr", "kind"), [("core", "Runner", "type"), ("Runner", "prop", "property")]
)
def test_wrap_refuses_what_is_no_function(engine, owner, attr, kind):
    target = engine if owner == "core" else engine.Runner
    with pytest.raises(TypeError, match=rf"{attr}: expected a function or method, got {kind}"):
        wrap(target, attr, plus_one, "fakevllm")
    with pytest.raises(AttributeError):
        wrap(target, "absent", plus_one, "fakevllm")


def test_undo_on_error_restores_everything(engine):
    before = dict(vars(engine)), dict(vars(sys.modules["fakevllm.user"]))
    with pytest.raises(RuntimeError, match="later"), undo_on_error():
        wrap(engine, "size", plus_one, "fakevllm")
        wrap(engine, "size", tagged, "fakevllm")
        wrap(engine.FastRunner, "name", tagged, "fakevllm")
        wrap(engine.Runner, "shape", tagged, "fakevllm")
        raise RuntimeError("later")
    assert (dict(vars(engine)), dict(vars(sys.modules["fakevllm.user"]))) == before
    assert "name" not in vars(engine.FastRunner)
    assert engine.Runner.shape(3) == (3,) and isinstance(vars(engine.Runner)["shape"], staticmethod)


def test_what_was_wrapped_before_an_error_scope_stays(engine):
    wrap(engine, "size", plus_one, "fakevllm")
    with pytest.raises(RuntimeError), undo_on_error():
        wrap(engine, "size", plus_one, "fakevllm")
        raise RuntimeError
    assert engine.size(3) == 7


def test_applied_once_logged_once(engine, caplog):
    registry = Registry()
    patch = make(apply=lambda: wrap(engine, "size", plus_one, "fakevllm"))
    with caplog.at_level(logging.INFO, LOGGER):
        registry.apply([patch])
        registry.apply([patch])
    assert engine.size(3) == 7
    assert [record.state for record in registry.report()] == [State.APPLIED]
    assert [r.getMessage() for r in caplog.records] == ["patch for rows: fakevllm.core: size: applied"]
    Registry().apply([patch])
    assert engine.size(3) == 7


def test_not_needed_says_why(engine):
    patch = make(apply=raises(AssertionError()), not_needed=lambda: "vLLM has it")
    assert state_of(patch) == [(State.NOT_NEEDED, "vLLM has it")]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (dict(name="absent"), "fakevllm.core has no absent"),
        (dict(parameters="m"), "fakevllm.core.size: expected parameters m, got n"),
        (dict(owner="fakevllm.gone"), "No module named 'fakevllm.gone'"),
        (dict(owner="fakevllm.core:Gone"), "has no attribute 'Gone'"),
        (dict(not_needed=raises(RuntimeError("a changed vLLM"))), "RuntimeError: a changed vLLM"),
        (dict(apply=raises(RuntimeError("half done"))), "RuntimeError: half done"),
    ],
)
def test_off_with_a_sentence_and_no_exception(engine, caplog, more, said):
    [(state, reason)] = state_of(make(**more))
    assert state is State.OFF and said in reason
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "rows is off: " in record.getMessage() and "So blocks move in many pieces" in record.getMessage()


def test_a_failed_apply_is_undone(engine):
    original = engine.size

    def apply():
        wrap(engine, "size", plus_one, "fakevllm")
        raise RuntimeError("later")

    assert state_of(make(apply=apply))[0][0] is State.OFF
    assert engine.size is original and sys.modules["fakevllm.user"].size is original


def test_one_that_is_off_does_not_stop_the_next(engine):
    other = make(name="absent")
    patch = make(apply=lambda: wrap(engine, "size", plus_one, "fakevllm"))
    assert [state for state, _ in state_of(other, patch)] == [State.OFF, State.APPLIED]


def test_what_was_off_is_tried_again_and_warned_of_once(engine, caplog):
    registry = Registry()
    patch = make(owner="fakevllm.late", name="thing", parameters="")
    registry.apply([patch])
    registry.apply([patch])
    assert len(caplog.records) == 1
    late = ModuleType("fakevllm.late")
    late.thing = lambda: None
    sys.modules["fakevllm.late"] = late
    try:
        registry.apply([patch])
    finally:
        del sys.modules["fakevllm.late"]
    assert [record.state for record in registry.report()] == [State.APPLIED]

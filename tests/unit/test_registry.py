"""Patches on a fake package: applied once, everywhere, whole or not at all, and never raising."""

import functools
import inspect
import logging
import sys
from types import ModuleType

import pytest

from vllm_xlayer.patches.registry import (
    FOUND,
    FeatureUnavailable,
    Patch,
    Phase,
    Registry,
    State,
    missing,
    not_needed,
)
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


def make(target="fakevllm.core.size", apply=lambda: None, probe=lambda: FOUND, phase=Phase.PLUGIN):
    return Patch(target, f"why {target}", "how", "none", "never", phase=phase, probe=probe, apply=apply)


def states(registry):
    return {record.patch.target: record.state for record in registry.report()}


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
    registry.add("rows", make(apply=lambda: wrap(engine, "size", plus_one, "fakevllm")))
    with caplog.at_level(logging.INFO, LOGGER):
        registry.apply(Phase.PLUGIN, {"rows"})
        registry.apply(Phase.PLUGIN, {"rows"})
    assert engine.size(3) == 7
    assert states(registry) == {"fakevllm.core.size": State.APPLIED}
    assert [r.getMessage() for r in caplog.records] == [
        "patch for rows: fakevllm.core.size: applied. Without it: why fakevllm.core.size"
    ]
    registry.require("rows")
    again = Registry()
    again.add("rows", make(apply=lambda: wrap(engine, "size", plus_one, "fakevllm")))
    again.apply(Phase.PLUGIN, {"rows"})
    assert engine.size(3) == 7


def test_not_wanted_is_untouched_and_silent_until_wanted(engine, caplog):
    registry = Registry()
    probed = []
    registry.add(
        "rows",
        make(
            apply=lambda: wrap(engine, "size", plus_one, "fakevllm"), probe=lambda: probed.append(1) or FOUND
        ),
    )
    with caplog.at_level(logging.DEBUG, LOGGER):
        registry.apply(Phase.PLUGIN, set())
    assert (engine.size(3), probed, caplog.records) == (6, [], [])
    assert states(registry) == {"fakevllm.core.size": State.NOT_WANTED}
    with pytest.raises(FeatureUnavailable, match=r"rows does not work with this vLLM: .*: not wanted"):
        registry.require("rows")
    registry.apply(Phase.PLUGIN, {"rows"})
    assert engine.size(3) == 7
    registry.apply(Phase.PLUGIN, set())
    assert states(registry) == {"fakevllm.core.size": State.APPLIED}


def test_not_needed_is_fine_and_not_applied(caplog):
    registry = Registry()
    registry.add(
        "rows", make(probe=lambda: not_needed("0.33 does it"), apply=raises(AssertionError("applied")))
    )
    with caplog.at_level(logging.INFO, LOGGER):
        registry.apply(Phase.PLUGIN, {"rows"})
    registry.require("rows")
    (record,) = registry.report()
    assert str(record) == "fakevllm.core.size: not needed (0.33 does it)"
    assert "not needed (0.33 does it)" in caplog.text


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        (lambda: missing("no such function"), "no such function"),
        (raises(KeyError("x")), "KeyError: 'x'"),
        (lambda: None, "TypeError: probe: expected a Finding, got None"),
    ],
)
def test_a_failing_probe_holds_the_whole_feature_back_and_no_other(engine, caplog, probe, reason):
    registry = Registry()
    good = make("good", apply=lambda: wrap(engine, "size", plus_one, "fakevllm"))
    registry.add("rows", good, make("bad", probe=probe))
    registry.add("nvfp4", make("other"))
    with caplog.at_level(logging.INFO, LOGGER):
        registry.apply(Phase.PLUGIN, {"rows", "nvfp4"})
        registry.apply(Phase.PLUGIN, {"rows", "nvfp4"})
    assert engine.size(3) == 6
    assert states(registry) == {
        "good": State.HELD_BACK,
        "bad": State.PROBE_FAILED,
        "other": State.APPLIED,
    }
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [f"rows will not work: bad: probe failed ({reason}). Without it: why bad"]
    registry.require("nvfp4")
    with pytest.raises(FeatureUnavailable) as caught:
        registry.require("rows")
    assert f"bad: probe failed ({reason})" in str(caught.value)
    assert "good: held back (because of bad)" in str(caught.value)


def test_an_exception_in_apply_undoes_the_feature_and_stays_inside(engine, caplog):
    registry = Registry()

    def half():
        wrap(engine.Runner, "name", tagged, "fakevllm")
        raise ValueError("half way")

    registry.add(
        "rows",
        make("first", apply=lambda: wrap(engine, "size", plus_one, "fakevllm")),
        make("second", apply=half),
        make("third", apply=raises(AssertionError("reached"))),
    )
    registry.apply(Phase.PLUGIN, {"rows"})
    assert engine.size(3) == 6 and sys.modules["fakevllm.user"].size(3) == 6
    assert engine.Runner().name() == "runner"
    assert states(registry) == {
        "first": State.HELD_BACK,
        "second": State.APPLY_FAILED,
        "third": State.HELD_BACK,
    }
    assert "rows will not work: second: apply failed (ValueError: half way)" in caplog.text


def test_what_failed_is_tried_again(engine):
    registry = Registry()
    answers = [missing("half imported"), FOUND]
    registry.add(
        "rows",
        make("size", apply=lambda: wrap(engine, "size", plus_one, "fakevllm"), probe=lambda: answers.pop(0)),
        make("other"),
    )
    registry.apply(Phase.PLUGIN, {"rows"})
    assert engine.size(3) == 6
    registry.apply(Phase.PLUGIN, {"rows"})
    assert engine.size(3) == 7
    registry.require("rows")


def test_phases_are_apart_and_a_failed_one_holds_the_next_back(engine):
    registry = Registry()
    late = make("late", phase=Phase.WORKER, apply=lambda: wrap(engine, "size", plus_one, "fakevllm"))
    registry.add("rows", make("early"), late)
    registry.apply(Phase.PLUGIN, {"rows"})
    assert states(registry) == {"early": State.APPLIED, "late": State.NOT_TRIED}
    with pytest.raises(FeatureUnavailable, match="late: not tried"):
        registry.require("rows")
    registry.apply(Phase.WORKER, {"rows"})
    assert engine.size(3) == 7
    registry.require("rows")

    broken = Registry()
    broken.add("rows", make("early", probe=lambda: missing("gone")), make("late", phase=Phase.WORKER))
    broken.apply(Phase.PLUGIN, {"rows"})
    broken.apply(Phase.WORKER, {"rows"})
    assert states(broken) == {"early": State.PROBE_FAILED, "late": State.HELD_BACK}


def test_the_process_is_not_kept_alive_against_its_will():
    registry = Registry()
    registry.add("rows", make(apply=raises(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        registry.apply(Phase.PLUGIN, {"rows"})


def test_mistakes_of_the_caller():
    registry = Registry()
    registry.add("rows", make())
    with pytest.raises(ValueError, match=r"rows: expected one patch for fakevllm.core.size, got a second"):
        registry.add("rows", make())
    with pytest.raises(ValueError, match="feature: expected one of rows, got columns"):
        registry.require("columns")

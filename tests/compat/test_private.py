"""Everything private of vLLM's that is used is declared, and is what it is declared to be."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import vllm_xlayer
from vllm_xlayer.compat import dependence, private
from vllm_xlayer.compat.dependence import FeatureUnavailable, Private
from vllm_xlayer.patches import PATCHES

RECORDS = (*private.table(), *PATCHES)
DECLARED = {name for record in RECORDS for name in record.names}
PACKAGE = Path(vllm_xlayer.__file__).parent
NOT_OF_VLLM = {
    "_C": "torch.ops",
    "_asdict": "namedtuple",
    "_dynamo": "torch",
    "_option_string_actions": "argparse",
    "_sleep": "torch.cuda",
}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.owner)
def test_is_there(record):
    if record.owner.startswith("vllm.platforms.cuda"):
        pytest.importorskip("vllm.platforms.cuda", exc_type=Exception)
    assert record.problem() is None
    assert all((record.why, record.how, record.remove_when, record.upstream, record.names))


def _accessed() -> dict[str, str]:
    """Private attributes that the package reads and nowhere defines -> a file that does."""
    defined, read = set(), {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.Attribute) and node.attr[0] == "_" and node.attr[:2] != "__":
                read[node.attr] = path.name
    return {name: file for name, file in read.items() if name not in defined}


def test_every_private_attribute_is_declared():
    undeclared = {name: file for name, file in _accessed().items() if name not in DECLARED}
    assert {name for name in undeclared if name not in NOT_OF_VLLM} == set(), undeclared


def test_every_overridden_private_method_is_declared():
    undeclared = set()
    for module in pkgutil.walk_packages([str(PACKAGE)], "vllm_xlayer."):
        if module.name.split(".")[1] not in ("attention", "connector", "platform"):
            continue
        try:
            found = importlib.import_module(module.name)
        except ImportError:
            assert module.name == "vllm_xlayer.attention.flash"  # has no classes of vLLM's; needs a GPU
            continue
        for ours in vars(found).values():
            if not inspect.isclass(ours) or ours.__module__ != module.name:
                continue
            theirs = [c for c in ours.__mro__ if c.__module__.startswith("vllm.")]
            undeclared |= {
                f"{ours.__qualname__}.{name}"
                for name, member in vars(ours).items()
                if name[0] == "_" and name[:2] != "__" and name not in DECLARED
                if callable(member) or isinstance(member, staticmethod | classmethod | property)
                if any(name in vars(c) for c in theirs)
            }
    assert undeclared == set()


class Upstream:
    def _method(self, first, added, second):
        self._attribute = first


def record(**more) -> Private:
    return Private("a feature", f"{__name__}:Upstream", "why", "how", "never", **more)


def test_a_record_fits_with_parameters_between(monkeypatch):
    monkeypatch.setattr(dependence, "_source", inspect.getsource)
    assert record(methods={"_method": "first second"}, attributes=("_attribute",)).problem() is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (dict(methods={"_gone": ""}), "Upstream has no _gone"),
        (
            dict(methods={"_method": "second first"}),
            "expected parameters second, first, got self, first, added",
        ),
        (dict(methods={"_method": "third"}), "expected parameters third, got"),
        (dict(attributes=("_gone",)), "Upstream has no attribute _gone"),
    ],
)
def test_what_does_not_fit_is_named(monkeypatch, more, said):
    monkeypatch.setattr(dependence, "_source", inspect.getsource)
    assert said in record(**more).problem()


def test_a_feature_without_its_names_is_unavailable(monkeypatch):
    gone = Private("a feature", "vllm.no_such_module", "why", "how", "never", attributes=("_x",))
    monkeypatch.setattr(private, "table", lambda: (gone, record(methods={"_gone": ""})))
    private._problems_of.cache_clear()
    try:
        with pytest.raises(FeatureUnavailable, match=r"a feature does not work .*no_such_module.*no _gone"):
            private.require("a feature")
        private.require("another feature")
    finally:
        private._problems_of.cache_clear()

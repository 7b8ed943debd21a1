"""Every file and name that docs/design/walk.md passes is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WALK = (ROOT / "docs/design/walk.md").read_text()
STOPS = sorted(set(re.findall(r"`(\w+/[\w./]+)::([\w.]+)`", WALK)))


def defined_in_python(source: str) -> set[str]:
    """Functions and classes of a module, and "Class.method"."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


def is_defined_in_cpp(source: str, name: str) -> bool:
    """A struct or class of that name, or a function: the name behind a type at a line's or a word's end."""
    code = re.sub(r"//.*", "", source)
    function = rf"^(?:[\w\s:<>(),*&]*[\w>*&)]\s+)?{name}\("
    return re.search(rf"^(?:struct|class) {name}\b|{function}", code, re.M) is not None


def test_the_walk_has_three_ways_and_many_stops():
    assert len(re.findall("^## ", WALK, re.M)) == 3 and len(STOPS) > 40
    assert WALK.count("::") == len(re.findall(r"`\w+/[\w./]+::[\w.]+`", WALK)) + 1  # one explains


@pytest.mark.parametrize(("file", "name"), STOPS, ids=lambda part: part.rsplit("/", 1)[-1])
def test_a_stop_is_there(file, name):
    source = (ROOT / file).read_text()
    if file.endswith(".py"):
        assert name in defined_in_python(source)
    else:
        assert is_defined_in_cpp(source, name)


def test_what_is_not_there_is_noticed():
    source = "class A:\n    def f(self): pass\n"
    assert defined_in_python(source) == {"A", "A.f"}
    assert is_defined_in_cpp("void f(int x);", "f") and is_defined_in_cpp("struct P {", "P")
    assert not is_defined_in_cpp("  x = f(1);\n  // void f()\n", "f")

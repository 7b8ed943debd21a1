"""Which way the package's modules depend: never upward, no circles. Nothing is imported, only read.

Every import counts, also those inside functions and those for type checkers only.
"""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "vllm_xlayer"

LAYERS = (
    {"cli"},
    {"bench", "doctor", "quality"},  # commands
    {"demo"},  # its documents are also what quality asks of the small model
    {"plugin"},
    # Above what they install: a patch knows the part of ours that it hands to vLLM; no part knows patches.
    {"patches"},
    {"connector", "platform"},
    {"attention"},  # platform names the attention that runs without a GPU
    {"compat"},
    {"ops"},
    {"layout"},
    {"config", "kv_scales", "provenance"},
    {"nvfp4"},
)
"""Rooms of the package, from the top. A module imports from its own room, and from rooms of lower layers."""

CONNECTOR_LAYERS = (
    {"nixl"},
    {"."},  # what vLLM calls: connector, scheduler, worker, spec
    {"stats"},
    {"disk"},
    {"host"},
    {"copy"},
)
"""The same of the connector's folders."""

SPEAK_VLLM = {"attention", "bench", "compat", "connector", "demo", "patches", "platform", "quality"}
"""Rooms that import vLLM. What bench, demo and quality import of it is its public interface."""

SPEAK_NO_VLLM = {
    "connector/copy": {"choice", "pacing"},
    "connector/disk": {"account", "commands", "files", "finder", "format", "store", "worker"},
    "connector/host": {"memory", "numa", "shared_memory"},
}
"""Of the connector's folders, the modules that are ours alone: they are tested without vLLM."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imported(name: str, path: Path, source: str, known: Iterable[str]) -> Iterator[str]:
    """Names of the modules that a module imports: ours as modules, others as they are written."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base


def graph() -> dict[str, set[str]]:
    """Module of ours -> modules it imports."""
    return {name: set(imported(name, path, path.read_text(), SOURCES)) for name, path in SOURCES.items()}


def ours(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    return {name: {to for to in found if to in edges and to != name} for name, found in edges.items()}


def room(module: str) -> str | None:
    """The first folder or module below the package; None for the package itself."""
    return (module.split(".")[1:] or [None])[0]


def connector_room(module: str) -> str | None:
    """The folder below connector, "." for its own modules; None for all else."""
    parts = module.split(".")
    if parts[1:2] != ["connector"] or len(parts) == 2:
        return None
    folders = {part for layer in CONNECTOR_LAYERS for part in layer}
    return parts[2] if parts[2] in folders else "."


def upward(edges: dict[str, set[str]], layers, room_of) -> list[str]:
    """Imports that do not go to the own room or to a lower layer."""
    level = {name: i for i, layer in enumerate(layers) for name in layer}
    wrong = []
    for module, found in ours(edges).items():
        for to in found:
            here, there = room_of(module), room_of(to)
            if here is None or there is None or here == there:
                continue
            if level[here] >= level[there]:
                wrong.append(f"{module} imports {to}")
    return sorted(wrong)


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other round in a circle, or nothing."""
    edges, done = ours(edges), set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for to in sorted(edges[module]):
            if found := visit(to, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in edges if (found := visit(module, []))), [])


def speaks_vllm(found: set[str]) -> bool:
    return any(name.split(".")[0] == "vllm" for name in found)


@pytest.fixture(scope="module")
def edges():
    return graph()


def test_every_room_has_its_layer(edges):
    rooms = {room(module) for module in edges} - {None}
    assert rooms <= {name for layer in LAYERS for name in layer}


def test_no_import_goes_upward(edges):
    assert upward(edges, LAYERS, room) == []


def test_no_import_in_the_connector_goes_upward(edges):
    assert upward(edges, CONNECTOR_LAYERS, connector_room) == []


def test_no_imports_go_round(edges):
    assert circle(edges) == []


def test_the_package_imports_nothing_of_the_repository(edges):
    found = {(module, to) for module in edges for to in edges[module]}
    assert [pair for pair in found if pair[1].split(".")[0] in ("benchmarks", "tests", "setup")] == []


def test_vllm_is_spoken_in_its_rooms_only(edges):
    assert {room(module) for module in edges if speaks_vllm(edges[module])} <= SPEAK_VLLM
    for folder, names in SPEAK_NO_VLLM.items():
        prefix = f"{PACKAGE}.{folder.replace('/', '.')}."
        assert [name for name in sorted(names) if speaks_vllm(edges[prefix + name])] == []


@pytest.mark.parametrize(
    ("module", "line", "says"),
    [
        ("nvfp4", "import vllm_xlayer.ops", "vllm_xlayer.nvfp4 imports vllm_xlayer.ops"),
        ("compat.rows", "from ..attention import cpu",
         "vllm_xlayer.compat.rows imports vllm_xlayer.attention.cpu"),
        ("ops.cache", "def f():\n    from ..layout import Layout\n    from ..plugin import register",
         "vllm_xlayer.ops.cache imports vllm_xlayer.plugin"),
        ("layout.spec", "if TYPE_CHECKING:\n    from vllm_xlayer.connector.spec import RowOffloadingSpec",
         "vllm_xlayer.layout.spec imports vllm_xlayer.connector.spec"),
    ],
)  # fmt: skip
def test_an_upward_import_is_found(edges, module, line, says):
    name = f"{PACKAGE}.{module}"
    added = set(imported(name, SOURCES[name], line, SOURCES))
    assert upward(edges | {name: edges[name] | added}, LAYERS, room) == [says]


def test_an_upward_import_in_the_connector_is_found(edges):
    name = f"{PACKAGE}.connector.copy.pacing"
    added = set(imported(name, SOURCES[name], "from ..host import memory", SOURCES))
    found = upward(edges | {name: added}, CONNECTOR_LAYERS, connector_room)
    assert found == [f"{name} imports {PACKAGE}.connector.host.memory"]


def test_a_circle_is_found(edges):
    lower, upper = f"{PACKAGE}.layout.spec", f"{PACKAGE}.layout.descriptor"
    assert lower in edges[upper]
    found = circle(edges | {lower: edges[lower] | {upper}})
    assert found[0] == found[-1] and {lower, upper} <= set(found)

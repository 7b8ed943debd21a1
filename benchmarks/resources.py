"""``python -m benchmarks.resources [--write]``: registers, spills and occupancy of all kernels.

Needs an extension with CUDA code, and no GPU. ``cuobjdump`` says a thread's registers and spills, the
extension a block's dynamic shared memory. How many an SM then holds follows from its limits, as in the table
"Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide.
"""

import argparse
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_xlayer import ops
from vllm_xlayer.provenance import provenance

from . import RESULTS

FILE = RESULTS / "resources.json"
WARP, REGISTERS = 32, 65536
REGISTER_UNIT = 256  # a warp's registers are given out in these
SHARED_UNIT = 128
RESERVED = 1024  # bytes of shared memory that every block has beside its own

SM = {
    "80": (64, 32, 164),
    "86": (48, 16, 100),
    "89": (48, 24, 100),
    "90": (64, 32, 228),
    "100": (64, 32, 228),
    "120": (48, 24, 100),
}
"""Architecture -> warps, thread blocks and KiB of shared memory an SM has."""

NAME = re.compile(r"decode_kernelINS0_6ConfigILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)EEELb([01])E")
"""In a mangled name: head size, query rows / 8, warps, teams, whether there may be newest tokens."""
OTHER = re.compile(r"_ZN6xlayer(?:9attention|6prefix)?\d+(\w+?_kernel)(?=[IE])")
"""The name itself, of the other kernels."""


@dataclass(frozen=True)
class Kernel:
    """One instantiation of the decode kernel, for one architecture.

    Attributes:
        arch: as nvcc names it, "90a" for instance.
        rows: query rows of a head tile.
        warps: of a team.
        teams: of a thread block.
        newest: with tiles of newest tokens.
        registers: of a thread.
        spilled: bytes of stack a thread.
        shared_bytes: of a thread block, static and dynamic.
        blocks: that an SM holds; 0 if it has not enough shared memory for one.
    """

    arch: str
    head_size: int
    rows: int
    warps: int
    teams: int
    newest: bool
    registers: int
    spilled: int
    shared_bytes: int
    blocks: int


@dataclass(frozen=True)
class OtherKernel:
    """All instantiations of another kernel, for one architecture.

    Attributes:
        registers: of a thread, the most of any.
        spilled: bytes of stack a thread, the most of any.
        warps: that an SM has registers for, of the one with the most.
    """

    arch: str
    name: str
    registers: int
    spilled: int
    warps: int


def find_cuobjdump() -> str:
    """vLLM's Triton brings one, if no CUDA toolkit does.

    Raises:
        FileNotFoundError: nothing does.
    """
    import triton

    for place in ("cuobjdump", f"{Path(triton.__file__).parent}/backends/nvidia/bin/cuobjdump"):
        if found := shutil.which(place):
            return found
    raise FileNotFoundError("cuobjdump: expected it in PATH or in the package triton, found none")


def blocks_of(arch: str, warps: int, registers: int, shared_bytes: int) -> int:
    """Thread blocks that an SM holds."""
    _, most_blocks, kib = SM[_number(arch)]
    shared = -(-(shared_bytes + RESERVED) // SHARED_UNIT) * SHARED_UNIT
    return min(most_blocks, warps_of(arch, registers) // warps, kib * 1024 // shared)


def warps_of(arch: str, registers: int) -> int:
    """Warps that an SM has registers for; each of its four schedulers gives them out."""
    warp_registers = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    return min(SM[_number(arch)][0], 4 * (REGISTERS // 4 // warp_registers))


def _number(arch: str) -> str:
    return re.sub(r"\D", "", arch)


def said_of(text: str) -> Iterator[tuple[str, str, int, int, int]]:
    """Architecture, mangled name, registers, stack and static shared memory, of what cuobjdump says."""
    arch = name = ""
    for line in text.splitlines():
        if found := re.match(r"arch = sm_(\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function (\w+)", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, spilled, static = map(int, found.groups())
            yield arch, name, registers, spilled, static


def parsed(text: str, shared: dict[tuple[int, int, int, int], int]) -> Iterator[Kernel]:
    """The decode kernels of what cuobjdump says.

    Args:
        shared: (head size, rows, warps, teams) -> bytes of dynamic shared memory.
    """
    for arch, mangled, registers, spilled, static in said_of(text):
        if name := NAME.search(mangled):
            head_size, tiles, warps, teams, newest = map(int, name.groups())
            # What nvcc counts as static on sm_90 and newer is what is reserved, by every block.
            static = max(0, static - RESERVED)
            shape = head_size, 8 * tiles, warps, teams
            total = static + shared[shape]
            blocks = blocks_of(arch, warps * teams, registers, total)
            yield Kernel(arch, *shape, bool(newest), registers, spilled, total, blocks)


def others(text: str) -> list[OtherKernel]:
    """All but the decode kernels of what cuobjdump says.

    Raises:
        ValueError: a kernel's name is not understood.
    """
    most: dict[tuple[str, str], tuple[int, int]] = {}
    for arch, mangled, registers, spilled, _ in said_of(text):
        if NAME.search(mangled):
            continue
        if not (name := OTHER.match(mangled)):
            raise ValueError(f"expected a kernel of xlayer, got {mangled}")
        key = name[1].removesuffix("_kernel"), arch
        before = most.get(key, (0, 0))
        most[key] = max(registers, before[0]), max(spilled, before[1])
    return [OtherKernel(arch, name, *of, warps_of(arch, of[0])) for (name, arch), of in sorted(most.items())]


def kernels() -> tuple[list[Kernel], list[OtherKernel]]:
    """The decode kernels of the installed extension, and the others.

    Raises:
        RuntimeError: it was built without CUDA.
    """
    info = ops.build_info()
    if not info["cuda"]:
        raise RuntimeError("expected an extension with CUDA code, got one without (VLLM_XLAYER_CUDA=1)")
    extension = importlib.import_module("vllm_xlayer._C").__file__
    shapes = info["decode"]["shapes"]
    shared = {(s["head_size"], s["rows"], s["warps"], s["teams"]): s["shared_bytes"] for s in shapes}
    command = [find_cuobjdump(), "--dump-resource-usage", str(extension)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = sorted(
        parsed(said.stdout, shared), key=lambda k: (k.head_size, k.rows, k.warps, k.teams, k.newest, k.arch)
    )
    if not found:
        raise RuntimeError(f"expected decode kernels in {extension}, cuobjdump named none")
    return found, others(said.stdout)


def others_table(found: list[dict[str, Any]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Head and lines: a line a kernel; a column an architecture: registers, spills, warps an SM."""
    return _by_arch("kernel", ((k["name"], k["arch"], _cell(k, "warps")) for k in found))


def table(found: list[dict[str, Any]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Head and lines: a line an instantiation; a column an architecture: registers, spills, blocks an SM."""
    cells = []
    for k in found:
        title = f"{k['head_size']}, {k['rows']} rows"
        title += f", {k['warps']} warps" if k["warps"] != 4 else ""
        title += f", {k['teams']} teams" if k["teams"] != 1 else ""
        title += ", newest" if k["newest"] else ""
        cells.append((title, k["arch"], _cell(k, "blocks")))
    return _by_arch("head size", cells)


def _cell(k: dict[str, Any], fits: str) -> str:
    spilled = f" + {k['spilled']} B" if k["spilled"] else ""
    return f"{k['registers']}{spilled}: {k[fits]}"


def _by_arch(
    first: str, cells: Iterable[tuple[str, str, str]]
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Head and lines of (line, architecture, cell)."""
    lines: dict[str, dict[str, str]] = {}
    for title, arch, cell in cells:
        lines.setdefault(title, {})[arch] = cell
    archs = sorted({arch for line in lines.values() for arch in line}, key=lambda arch: int(_number(arch)))
    head = [first, *(f"sm_{arch}" for arch in archs)]
    return head, [(title, [line.get(arch, "-") for arch in archs]) for title, line in lines.items()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into results/{FILE.name}")
    args = parser.parse_args()
    decode, rest = ([asdict(kernel) for kernel in some] for some in kernels())
    for (head, lines), what in ((table(decode), "thread blocks"), (others_table(rest), "warps")):
        shown = Table(*head, title=f"registers (+ spills): {what} an SM")
        for title, cells in lines:
            shown.add_row(title, *cells)
        Console().print(shown)
    if args.write:
        result = provenance() | {"nvcc": ops.build_info()["nvcc"], "kernels": decode, "others": rest}
        FILE.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

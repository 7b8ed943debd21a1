"""``python -m benchmarks.resources [--write]``: registers, spills and occupancy of the decode kernel.

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
from collections.abc import Iterator
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

NAME = re.compile(r"decode_kernelINS0_6ConfigILi(\d+)ELi(\d+)ELi(\d+)EEELb([01])E")
"""In a mangled name: head size, query rows / 8, warps, whether there may be newest tokens."""
PAGES = re.compile(r"decode_pages_kernelINS0_10PageConfigILi(\d+)EEELb([01])E")
"""KV heads, each with a warp, beside one that loads pages; newest tokens. For sm_90, empty elsewhere."""


@dataclass(frozen=True)
class Kernel:
    """One instantiation of the decode kernel, for one architecture.

    Attributes:
        arch: as nvcc names it, "90a" for instance.
        rows: query rows of a head tile.
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
    newest: bool
    registers: int
    spilled: int
    shared_bytes: int
    blocks: int


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
    most_warps, most_blocks, kib = SM[re.sub(r"\D", "", arch)]
    warp_registers = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    shared = -(-(shared_bytes + RESERVED) // SHARED_UNIT) * SHARED_UNIT
    # Registers are given out by each of the SM's four schedulers.
    by_registers = 4 * (REGISTERS // 4 // warp_registers) // warps
    return min(most_blocks, most_warps // warps, by_registers, kib * 1024 // shared)


def shape_of(line: str, arch: str) -> tuple[int, ...] | None:
    """(head size, query rows / 8, warps, newest) of a line with a function's name, None for other kernels."""
    if found := NAME.search(line):
        return tuple(map(int, found.groups()))
    if arch.startswith("90") and (found := PAGES.search(line)):
        return 128, 1, int(found[1]) + 1, int(found[2])
    return None


def parsed(text: str, shared: dict[tuple[int, int, int], int]) -> Iterator[Kernel]:
    """What cuobjdump says.

    Args:
        shared: (head size, rows, warps) -> bytes of dynamic shared memory.
    """
    arch = ""
    name: tuple[int, ...] | None = None
    for line in text.splitlines():
        if found := re.match(r"arch = sm_(\w+)", line):
            arch = found[1]
        elif "Function" in line:
            name = shape_of(line, arch)
        elif name and (found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line)):
            head_size, tiles, warps, newest = name
            registers, spilled, static = map(int, found.groups())
            # What nvcc counts as static on sm_90 and newer is what is reserved, by every block.
            static = max(0, static - RESERVED)
            total = static + shared[head_size, 8 * tiles, warps]
            blocks = blocks_of(arch, warps, registers, total)
            yield Kernel(arch, head_size, 8 * tiles, warps, bool(newest), registers, spilled, total, blocks)


def kernels() -> list[Kernel]:
    """Those of the installed extension.

    Raises:
        RuntimeError: it was built without CUDA.
    """
    info = ops.build_info()
    if not info["cuda"]:
        raise RuntimeError("expected an extension with CUDA code, got one without (VLLM_XLAYER_CUDA=1)")
    extension = importlib.import_module("vllm_xlayer._C").__file__
    shared = {(s["head_size"], s["rows"], s["warps"]): s["shared_bytes"] for s in info["decode"]["shapes"]}
    command = [find_cuobjdump(), "--dump-resource-usage", str(extension)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = sorted(
        parsed(said.stdout, shared), key=lambda k: (k.head_size, k.rows, k.warps, k.newest, k.arch)
    )
    if not found:
        raise RuntimeError(f"expected decode kernels in {extension}, cuobjdump named none")
    return found


def table(found: list[dict[str, Any]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Head and lines: a line an instantiation; a column an architecture: registers, spills, blocks an SM."""
    archs = sorted({k["arch"] for k in found}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    lines: dict[str, dict[str, str]] = {}
    for k in found:
        title = f"{k['head_size']}, {k['rows']} rows"
        title += f", {k['warps']} warps" if k["warps"] != 4 else ""
        title += ", newest" if k["newest"] else ""
        spilled = f" + {k['spilled']} B" if k["spilled"] else ""
        lines.setdefault(title, {})[k["arch"]] = f"{k['registers']}{spilled}: {k['blocks']}"
    head = ["head size", *(f"sm_{arch}" for arch in archs)]
    return head, [(title, [cells.get(arch, "-") for arch in archs]) for title, cells in lines.items()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into results/{FILE.name}")
    args = parser.parse_args()
    found = [asdict(kernel) for kernel in kernels()]
    head, lines = table(found)
    shown = Table(*head, title="registers (+ spills): thread blocks an SM")
    for title, cells in lines:
        shown.add_row(title, *cells)
    Console().print(shown)
    if args.write:
        result = provenance() | {"nvcc": ops.build_info()["nvcc"], "kernels": found}
        FILE.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

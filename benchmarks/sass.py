"""``python -m benchmarks.sass FILE [NAME ...]``: instructions in the page loops of decode kernel and gather.

FILE: an extension or a cubin. NAME: what the (mangled) names of the kernels to look at contain, all of them.
A page loop of the decode kernel multiplies (HMMA) and copies (LDGSTS), one of the gather loads (LDG), rotates
(SHFL) and stores (STG). Counted is the way through it that does all of that, with the fewest instructions: of
a tile that is copied and multiplied, nothing masked, no maximum lagging; of a token in a page. Needs
cuobjdump, and no GPU.
"""

import argparse
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from .resources import find_cuobjdump

PIPES = {
    "logic": "PRMT LOP3 PLOP3 SHF ISETP FSETP FMNMX IMNMX VIMNMX IADD3 VIADD LEA SEL FSEL SGXT MOV R2P VOTE",
    "F2FP": "F2FP",
    "half": "HMUL2 HFMA2 HADD2",
    "fma": "IMAD FFMA FMUL FADD",
    "HMMA": "HMMA",
    "shared": "LDS STS LDSM MOVM SHFL LDGSTS",
    "local": "LDL STL",
    "MUFU": "MUFU",
}  # fmt: skip
"""Of sm_90: pipe (or what else is counted) -> operations. What is not here is "other"."""
PAGE_LOOPS = {
    "decode_kernel": frozenset({"HMMA", "LDGSTS"}),
    "nvfp4_gather_kernel": frozenset({"LDG", "SHFL", "STG"}),
}
"""Part of a kernel's name -> what its page loops do."""
PIPE_OF = {op: pipe for pipe, ops in PIPES.items() for op in ops.split()}
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicated: bool
    op: str
    target: int | None
    """Where a branch goes to."""


@dataclass(frozen=True)
class Loop:
    """A page loop. ``counts``: by pipe, of one tile's way through it."""

    kernel: str
    head: int
    counts: Counter[str]


def instructions(sass: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Each kernel's name and code, of what ``cuobjdump -sass`` prints."""
    for section in re.split(r"Function : ", sass)[1:]:
        code = []
        for address, predicate, op, rest in LINE.findall(section):
            target = re.search(r"0x([0-9a-f]+)\s*$", rest.strip()) if op == "BRA" else None
            code.append(
                # BRA.DIV branches only where the warp's lanes have parted.
                Instruction(
                    int(address, 16),
                    bool(predicate) or rest.startswith(".DIV"),
                    op,
                    int(target[1], 16) if target else None,
                )
            )
        yield section.split(maxsplit=1)[0], code


def loops(kernel: str, code: list[Instruction], wanted: frozenset[str]) -> Iterator[Loop]:
    """The innermost loops that have all of ``wanted``."""
    at = {x.address: i for i, x in enumerate(code)}
    after: list[list[int]] = []  # of each instruction, those that may come next
    before: dict[int, list[int]] = defaultdict(list)
    for i, x in enumerate(code):
        ends = not x.predicated and x.op in ("BRA", "EXIT", "RET")
        after.append([] if ends or i + 1 == len(code) else [i + 1])
        if x.target in at:
            after[i].append(at[x.target])
        for j in after[i]:
            before[j].append(i)
    found = []
    for end, x in enumerate(code):
        if x.target not in at or at[x.target] > end:
            continue
        head, body = at[x.target], {at[x.target]}
        todo = [end]
        while todo:  # what reaches the end without the head
            if (i := todo.pop()) not in body:
                body.add(i)
                todo += before[i]
        ops = {code[i].op for i in body}
        if min(body) == head and wanted <= ops:
            found.append((head, end, body))
    for head, end, body in found:
        if not any(other < body for *_, other in found):
            yield Loop(kernel, code[head].address, counted(code, after, head, end, body, wanted))


def counted(
    code: list[Instruction],
    after: list[list[int]],
    head: int,
    end: int,
    body: set[int],
    wanted: frozenset[str],
) -> Counter[str]:
    """Of the way from head to end with the most of ``wanted``, and then the fewest instructions."""
    best: dict[int, tuple[tuple[int, int], int]] = {}  # (what it has to the end, what comes next)
    opened: set[int] = set()
    todo = [head]
    while todo:  # depth first; what leads back to what is open is another loop's, or this one's, end
        i = todo[-1]
        if i in best:
            todo.pop()
            continue
        following = [] if i == end else [j for j in after[i] if j in body and j not in opened | {i}]
        if missing := [j for j in following if j not in best]:
            opened.add(i)
            todo += missing
            continue
        opened.discard(i)
        todo.pop()
        most, count = max((best[j][0] for j in following), default=(0, 0) if i == end else (-(10**6), 0))
        here = int(code[i].op in wanted)
        step = max(following, key=lambda j: best[j][0], default=i)
        best[i] = ((most + here, count - 1), step)
    counts: Counter[str] = Counter()
    i = head
    while True:
        counts[PIPE_OF.get(code[i].op, "other")] += 1
        if i == end:
            return counts
        i = best[i][1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sass", description=__doc__)
    parser.add_argument("file")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    said = subprocess.run([find_cuobjdump(), "-sass", args.file], capture_output=True, text=True, check=True)
    grid = Table()
    for column in ("kernel", "loop at", "all", *PIPES, "other"):
        grid.add_column(column, justify="left" if column == "kernel" else "right")
    for kernel, code in instructions(said.stdout):
        part = next((part for part in PAGE_LOOPS if part in kernel), None)
        if part is not None and all(name in kernel for name in args.names):
            for loop in loops(kernel, code, PAGE_LOOPS[part]):
                shown = [loop.counts.total(), *(loop.counts[pipe] for pipe in (*PIPES, "other"))]
                grid.add_row(re.sub(rf".*{part}", "", kernel), hex(loop.head), *map(str, shown))
    Console(width=200).print(grid)
    return 0


if __name__ == "__main__":
    sys.exit(main())

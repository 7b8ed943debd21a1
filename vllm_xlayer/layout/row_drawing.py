"""A row for people: which part of it is which layer's, of every KV cache group."""

from vllm_xlayer.layout.drawing import CELLS, WIDTH, Span, bar, count
from vllm_xlayer.layout.rows import RowDescriptor, RowGroup


def draw_row(row: RowDescriptor) -> str:
    """Every group's pages and the unused end of the row: plain text, at most 100 columns."""
    lines = [
        f"one row, {row.row_bytes:,} bytes, belongs to one group at a time:",
        "each group's pages, = and - in turn, and what it leaves unused (.)",
    ]
    for i, group in enumerate(row.groups):
        used = row.used_bytes(i)
        pages = count(len(group.pages), "page")
        lines += [
            "",
            f"group {i}: {pages} of {_kinds(group)}, {group.block_size} tokens a block; {used:,} bytes used, "
            f"{row.row_bytes - used:,} unused",
            _bar(row, group),
            *_pages(group),
        ]
    return "\n".join(line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in lines)


def _kinds(group: RowGroup) -> str:
    return " and ".join(group.kinds)


def _bar(row: RowDescriptor, group: RowGroup) -> str:
    whole: Span = (0, row.row_bytes)
    if len(group.pages) > CELLS // 2:  # they would hide each other
        return bar(whole, [((page.offset, page.end), "=") for page in group.pages])
    return bar(whole, [((page.offset, page.end), "=-"[i % 2]) for i, page in enumerate(group.pages)])


def _pages(group: RowGroup) -> list[str]:
    """The first page and the last: those between are in the same order."""
    ends = group.pages if len(group.pages) < 3 else (group.pages[0], group.pages[-1])
    return [f"  bytes {page.offset:>13,} .. {page.end - 1:>13,}  {page.layer}" for page in ends]

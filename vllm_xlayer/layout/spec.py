"""The axes of a KV cache, and what one KV cache group of a model asks for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllm_xlayer.nvfp4 import GROUP, ScaleOrder

ITEM_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
    "nvfp4": 1,
}
"""Bytes of one item of the cache's view. NVFP4 and fp8 caches are seen as bytes (torch.uint8)."""


class Layout(StrEnum):
    """A physical order of the axes, slowest first.

    L layer (slot), B block, H KV head of the rank, N token in the block, C content: K then V of one
    head and token. C is innermost in all of them.
    """

    LBHNC = "LBHNC"
    BLHNC = "BLHNC"
    BHLNC = "BHLNC"
    BLNHC = "BLNHC"
    LBNHC = "LBNHC"

    @property
    def block_outer(self) -> bool:
        """Whether a block is one contiguous row; else it is one piece a layer, in separate regions."""
        return self.value[0] == "B"

    @property
    def page_is_dense(self) -> bool:
        """Whether a layer's part of a block is contiguous: no L among or inside H and N."""
        return "L" in self.value[:2]

    @property
    def head_major(self) -> bool:
        """Whether heads are outside tokens (vLLM's HND)."""
        return self.value.index("H") < self.value.index("N")


@dataclass(frozen=True)
class CacheSpec:
    """What the model says of one KV cache group: layers that share a block table and a geometry.

    Args:
        layers: names of the group's layers, in the engine's order. The i-th takes page slot i.
        num_kv_heads: H, KV heads of this rank.
        head_size_k, head_size_v: elements of one K and one V vector.
        block_size: N, tokens in a block.
        dtype: a key of ITEM_BYTES.
        page_bytes: bytes of one layer's page as the engine counts them, without padding. Stated, not
            derived, so that a cache format this package does not know is noticed.
        page_bytes_padded: distance between the starts of two pages where the engine pads them.

    Raises:
        ValueError: a field has the wrong type or is not positive. What is well-formed but cannot be
            laid out is not an error here: the negotiation refuses it, with the reason.
    """

    layers: tuple[str, ...]
    num_kv_heads: int
    head_size_k: int
    head_size_v: int
    block_size: int
    dtype: str
    page_bytes: int
    page_bytes_padded: int | None = None

    def __post_init__(self) -> None:
        layers = self.layers
        if isinstance(layers, str) or not layers or not all(isinstance(name, str) for name in layers):
            raise ValueError(f"layers: expected one or more layer names, got {layers!r}")
        object.__setattr__(self, "layers", tuple(layers))
        for name in ("num_kv_heads", "head_size_k", "head_size_v", "block_size", "page_bytes"):
            _check_positive(name, getattr(self, name))
        if self.page_bytes_padded is not None:
            _check_positive("page_bytes_padded", self.page_bytes_padded)

    @property
    def label(self) -> str:
        """A short name for messages."""
        first, count = self.layers[0], len(self.layers)
        return first if count == 1 else f"{first} .. {self.layers[-1]} ({count} layers)"

    @property
    def dense_page(self) -> bool:
        """Whether kernels address the page as a whole, so that it must be contiguous and head-major."""
        return self.dtype == "nvfp4"

    @property
    def item_bytes(self) -> int:
        """Bytes of one item of the cache's view."""
        return ITEM_BYTES[self.dtype]

    @property
    def content(self) -> int:
        """C, items of one head and token, K and V together."""
        if self.dtype == "nvfp4":
            return sum(size // 2 + size // GROUP for size in (self.head_size_k, self.head_size_v))
        return self.head_size_k + self.head_size_v

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, N, C) of one page."""
        return (self.num_kv_heads, self.block_size, self.content)

    @property
    def page_step(self) -> int:
        """Bytes from one page to the next, padding included."""
        return self.page_bytes if self.page_bytes_padded is None else self.page_bytes_padded

    def problems(self) -> Iterator[str]:
        """What makes this spec impossible to lay out in any order."""
        if self.dtype not in ITEM_BYTES:
            yield f"dtype: expected one of {', '.join(ITEM_BYTES)}, got {self.dtype}"
            return
        if self.dtype == "nvfp4":
            yield from self._nvfp4_problems()
        heads, tokens, content = self.shape
        expected = heads * tokens * content * self.item_bytes
        if self.page_bytes != expected:
            yield (
                f"page_bytes: expected {expected} ({heads} heads x {tokens} tokens x {content} x "
                f"{self.item_bytes} bytes), got {self.page_bytes}"
            )
        if self.page_step < self.page_bytes:
            yield f"page_bytes_padded: expected at least {self.page_bytes}, got {self.page_step}"
        # Kernels read NVFP4 pages 16 bytes at a time; other dtypes only need whole items.
        align = 16 if self.dense_page else self.item_bytes
        if self.page_step % align:
            yield f"page_bytes_padded: expected a multiple of {align}, got {self.page_step}"

    def _nvfp4_problems(self) -> Iterator[str]:
        if self.head_size_k != self.head_size_v:
            yield (
                "nvfp4 needs K and V heads of one size, "
                f"got head_size_k {self.head_size_k} and head_size_v {self.head_size_v}"
            )
        for name in ("head_size_k", "head_size_v", "block_size"):
            if getattr(self, name) % GROUP:
                yield f"{name}: expected a multiple of {GROUP} with nvfp4, got {getattr(self, name)}"

    def scale_order_problem(self, order: ScaleOrder) -> str | None:
        """Why the block scales cannot be stored in ``order``, or None."""
        scales = self.head_size_v // GROUP
        if self.dtype == "nvfp4" and order is ScaleOrder.SWIZZLED and scales % 4:
            return (
                "swizzled scales need a head size that is a multiple of 64, "
                f"got {self.head_size_v} ({scales} scales a token)"
            )
        return None


def model_problems(layout: Layout, specs: Sequence[CacheSpec]) -> Iterator[str]:
    """Why groups of a model cannot be laid out in ``layout``: nothing if they can."""
    names = [name for spec in specs for name in spec.layers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield f"layer names: expected each once, got {', '.join(twice)} more than once"
    for spec in specs:
        for problem in spec.problems():
            yield f"{spec.label}: {problem}"
    if len({spec.page_step for spec in specs}) > 1:
        sizes = ", ".join(f"{spec.page_step} bytes for {spec.label}" for spec in specs)
        yield f"page size: expected one for all groups, since they share page slots, got {sizes}"
    for spec in specs:
        yield from (f"{spec.label}: {problem}" for problem in _order_problems(layout, spec))
    if not layout.page_is_dense and len({(*spec.shape, spec.dtype) for spec in specs}) > 1:
        yield (
            f"shape and dtype: expected one for all groups, as {layout.value} interleaves layers, got several"
        )


def _order_problems(layout: Layout, spec: CacheSpec) -> Iterator[str]:
    if spec.dense_page and not layout.page_is_dense:
        yield (
            f"{spec.dtype} kernels write a layer's page as one dense piece; {layout.value} puts other "
            "layers between its heads, so layers would overwrite each other"
        )
    if spec.dense_page and not layout.head_major:
        yield (
            f"{spec.dtype} pages hold [K data | K scale | V data | V scale], each head by head; in "
            f"{layout.value} tokens are outside heads, so K and V of a head are not contiguous halves"
        )
    if not layout.page_is_dense and spec.page_step != spec.page_bytes:
        yield (
            f"the page is padded from {spec.page_bytes} to {spec.page_step} bytes, and {layout.value} "
            "has no page end where the padding could go"
        )


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")

"""What a batch for nvfp4_paged_attention is like: lengths, heads, and what real models' caches look like."""

from dataclasses import dataclass, fields

import torch

from vllm_xlayer.nvfp4 import ScaleOrder

HEAD_SIZES = [64, 80, 96, 112, 128, 192, 256]  # with a decode kernel (tests/ops/test_published_limits.py)
TILE = 16  # tokens that come from one place


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    """Tokens of each request, its q_len new ones included."""
    q_len: int = 1
    """Query tokens of each request; with q_lens the most."""
    q_lens: tuple[int, ...] = ()
    """Query tokens of each request, if they are not as many."""
    kernel_q_len: int = 1
    """With q_lens, what the kernel is chosen for."""
    kv_heads: int = 2
    group: int = 4
    head_size: int = 128
    block_size: int = 16
    window: int = 0
    soft_cap: float = 0.0
    sinks: bool = False
    order: ScaleOrder = ScaleOrder.LINEAR
    dtype: torch.dtype = torch.bfloat16
    k_scale: float = 1.0
    v_scale: float = 1.0
    q_size: float = 1.0
    """Standard deviation of the queries; the softmax scale is divided by it, so scores stay about 1."""
    all_scales: bool = False
    """Block scales of K and V over e4m3's whole range, instead of those of Gaussian K and V."""
    first_logit: float = 0.0
    """If not 0, about what every query's logit of its request's first token is, whose V is 0. Models attend
    to that token where they have nothing to look for; what they see then is in the others' tiny weights."""
    outliers: bool = False
    """Sixteen channels of K are sixteen times as large as the others, so logits are about 6."""
    small_v: bool = False
    """V of about 0.005: its block scales are subnormal numbers."""
    newest: int = 0
    """Places of a row of unquantised newest tokens; 0: there is no such memory. Which of a request's tokens
    are read from there is drawn; their pages are poisoned, and so is every place that no token is read from.
    """
    rotated_keys: bool = False
    """What is in pages and among the newest is rotated K."""
    split_units: int = 0
    sees_all: bool = False
    """Queries come after all of the tokens, of which a request may have none (nvfp4_prefix_attention)."""
    seed: int = 0

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self)[1:]]
        changed = [f"{name}={value}" for name, value in changed if value != getattr(Case, name)]
        return ",".join(["+".join(map(str, self.lengths)), *changed]).replace("torch.", "")

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def softmax_scale(self) -> float:
        k_size = self.k_scale * (400.0 if self.all_scales else 1.0)
        return self.head_size**-0.5 / (self.q_size * k_size)

    @property
    def queries(self) -> tuple[int, ...]:
        """Query tokens of each request."""
        return self.q_lens or (self.q_len,) * len(self.lengths)

    def first_seen(self, r: int) -> int:
        """The first token that a query of request r sees."""
        return max(0, self.lengths[r] - self.queries[r] - self.window + 1) if self.window else 0

    def rows(self, r: int) -> slice:
        """Request r's in q."""
        return slice(sum(self.queries[:r]), sum(self.queries[: r + 1]))


SHARP = tuple(
    Case((2048, 100, 1, 33), head_size=head_size, dtype=dtype, **how)
    for head_size, dtype in ((128, torch.bfloat16), (64, torch.bfloat16), (256, torch.float16))
    for how in (
        {"first_logit": 20.0},
        {"first_logit": 14.0, "q_len": 4, "window": 700, "sinks": True},
        {"outliers": True, "q_len": 2},
        {"outliers": True, "first_logit": 25.0, "small_v": True, "soft_cap": 50.0},
        {"small_v": True, "v_scale": 0.01},
    )
)
"""What real models' caches look like, and random ones never do."""

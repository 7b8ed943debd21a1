"""The ops that vLLM's CPU code asks for and its CUDA wheel lacks, as torch library fragments."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from . import convolution, delta_net, mamba2, packed, speculation

PAD_SLOT = -1

Function = Callable[[torch.Tensor], torch.Tensor]

_LIBRARIES: list[torch.library.Library] = []
"""torch removes an op when the Library that defined it is collected: keep them."""


def init_cpu_memory_env(node_ids: list[int]) -> None:
    """vLLM binds memory to NUMA nodes here; the reference platform leaves that to the system."""


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


_gelu_tanh = partial(functional.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Function] = {
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_quick": _quick_gelu,
}
"""Op names of activations: out [..., d] = f(x [..., d])."""

GATED_ACTIVATIONS: dict[str, Function] = {
    "silu_and_mul": functional.silu,
    "gelu_and_mul": functional.gelu,
    "gelu_tanh_and_mul": _gelu_tanh,
}
"""Op names of gated activations: out [..., d] = f(x[..., :d]) * x[..., d:], x [..., 2d]."""


def _activation(function: Function) -> Callable[..., None]:
    def op(out: torch.Tensor, x: torch.Tensor) -> None:
        out.copy_(function(x))

    return op


def _gated_activation(function: Function) -> Callable[..., None]:
    def op(out: torch.Tensor, x: torch.Tensor) -> None:
        gate, up = x.chunk(2, dim=-1)
        torch.mul(function(gate), up, out=out)

    return op


def compute_slot_mapping(
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_size: int,
) -> None:
    """Write the cache slot of every scheduled token: block * block_size + offset in block.

    Args:
        query_start_loc: int32 [num_reqs + 1], where each request's tokens start in the batch.
        positions: int64 [num_tokens], each token's position in its request.
        block_table: int32 [max_num_reqs, max_blocks], each request's blocks in order.
        slot_mapping: int64 [max_num_tokens], written; entries past num_tokens become -1.
        block_size: tokens a block of ``block_table`` holds.
    """
    num_tokens, num_reqs = positions.shape[0], query_start_loc.shape[0] - 1
    requests = torch.repeat_interleave(torch.arange(num_reqs), query_start_loc.diff(), output_size=num_tokens)
    blocks = block_table[requests, positions // block_size].to(torch.int64)
    slot_mapping[:num_tokens] = blocks * block_size + positions % block_size
    slot_mapping[num_tokens:] = PAD_SLOT


def greedy_argmax(logits: torch.Tensor) -> torch.Tensor:
    """int64 [n]: the column of the first largest logit of each row of logits [n, vocabulary]."""
    return logits.argmax(dim=-1)


def fused_gumbel_argmax(logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """A sample of softmax(logits) a row, int64 [n]; a row's seed alone decides it.

    Gumbel's trick: with g drawn as -log(Exp(1)), argmax(logits + g) is distributed as the softmax.

    Args:
        logits: float32 [n, vocabulary]; -inf is never drawn.
        seeds: int64 [n].
    """
    noise = torch.empty_like(logits)
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        row.exponential_(generator=torch.Generator().manual_seed(seed))
    return (logits - noise.log()).argmax(dim=-1)


_OPS: dict[str, Callable[..., Any]] = {
    "fused_gumbel_argmax(Tensor logits, Tensor seeds) -> Tensor": fused_gumbel_argmax,
    "greedy_argmax(Tensor logits) -> Tensor": greedy_argmax,
    "init_cpu_memory_env(SymInt[] node_ids) -> ()": init_cpu_memory_env,
    "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, Tensor block_table, "
    "Tensor(a!) slot_mapping, SymInt block_size) -> ()": compute_slot_mapping,
    **convolution.OPS,
    **delta_net.OPS,
    **mamba2.OPS,
    **packed.OPS,
    **speculation.OPS,
}
_OPS |= {f"{name}(Tensor(a!) out, Tensor x) -> ()": _activation(f) for name, f in ACTIVATIONS.items()}
_OPS |= {
    f"{name}(Tensor(a!) out, Tensor x) -> ()": _gated_activation(f) for name, f in GATED_ACTIVATIONS.items()
}


def define_missing_ops() -> list[str]:
    """Define those ops of ``torch.ops._C`` that nobody has defined yet; return their names.

    vLLM's layers take the ops as attributes while they are built, also where they then run
    their native forward. Safe to call again, and beside a library that defines some of them.
    """
    defined = []
    for schema, function in _OPS.items():
        name = schema.partition("(")[0]
        if hasattr(torch.ops._C, name):
            continue
        library = torch.library.Library("_C", "FRAGMENT")
        library.define(schema)
        library.impl(name, function, "CompositeExplicitAutograd")
        _LIBRARIES.append(library)
        defined.append(name)
    return defined

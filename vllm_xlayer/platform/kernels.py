"""The ops that vLLM's CPU code asks for and its CUDA wheel lacks, as torch library fragments."""

import torch

PAD_SLOT = -1

_LIBRARIES: list[torch.library.Library] = []
"""torch removes an op when the Library that defined it is collected: keep them."""


def init_cpu_memory_env(node_ids: list[int]) -> None:
    """vLLM binds memory to NUMA nodes here; the reference platform leaves that to the system."""


def silu_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    """out [..., d] = silu(x[..., :d]) * x[..., d:] for x [..., 2d]."""
    gate, up = x.chunk(2, dim=-1)
    torch.mul(torch.nn.functional.silu(gate), up, out=out)


def gelu_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    """out [..., d] = gelu(x[..., :d]) * x[..., d:] for x [..., 2d]."""
    gate, up = x.chunk(2, dim=-1)
    torch.mul(torch.nn.functional.gelu(gate), up, out=out)


def gelu_tanh_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    """out [..., d] = gelu_tanh(x[..., :d]) * x[..., d:] for x [..., 2d]."""
    gate, up = x.chunk(2, dim=-1)
    torch.mul(torch.nn.functional.gelu(gate, approximate="tanh"), up, out=out)


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


_OPS = {
    "init_cpu_memory_env(SymInt[] node_ids) -> ()": init_cpu_memory_env,
    "silu_and_mul(Tensor(a!) out, Tensor x) -> ()": silu_and_mul,
    "gelu_and_mul(Tensor(a!) out, Tensor x) -> ()": gelu_and_mul,
    "gelu_tanh_and_mul(Tensor(a!) out, Tensor x) -> ()": gelu_tanh_and_mul,
    "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, Tensor block_table, "
    "Tensor(a!) slot_mapping, SymInt block_size) -> ()": compute_slot_mapping,
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

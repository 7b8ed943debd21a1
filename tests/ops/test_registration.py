"""The ops as torch sees them: schemas, fake versions, and an extension that is missing."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from reference import prefix_cases
from reference.attention_batches import make_batch
from reference.attention_cases import Case
from reference.pools import make_pool, scalar

from vllm_xlayer import ops
from vllm_xlayer.ops import extension


def arguments_of(name: str, device: torch.device) -> tuple:
    pool = make_pool(device, blocks=3, head_size=64)
    one = scalar(1.0, device)
    key = torch.randn(5, 2, 64, dtype=torch.bfloat16, device=device)
    if name == "reshape_and_cache_nvfp4":
        return key, key.clone(), pool.cache, torch.arange(5, device=device), one, one, 0, 2
    if name == "gather_nvfp4":
        table = torch.tensor([[2, 0]], dtype=torch.int32, device=device)
        starts = torch.tensor([14], dtype=torch.int32, device=device)
        cumulative = torch.tensor([0, 5], dtype=torch.int32, device=device)
        pool.raw.fill_(0x38)  # finite, so that results can be compared
        return pool.cache, table, starts, cumulative, one, one, key, key.clone(), 0
    if name == "newest_step":
        starts, lens, rows = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 5], [20], [1]))
        state = torch.full((2, 2), -1, dtype=torch.int32, device=device)
        slots = torch.arange(5, device=device)
        return starts, lens, rows, slots, state, slots.clone(), lens.clone(), 16
    if name == "nvfp4_prefix_attention":
        if not ops.nvfp4_prefix_rows(key, 128):
            pytest.skip(f"no kernel for this GPU: {torch.cuda.get_device_capability()}, expected (9, 0)")
        prompts = prefix_cases.make(prefix_cases.case((20, 40), (2, 3)), device)
        out, lse = torch.zeros_like(prompts.q), torch.zeros(prompts.q.shape[1::-1], device=device)
        inputs = prompts.q, prompts.pool.cache, prompts.block_table, prompts.seq_lens, prompts.query_starts
        return *inputs, one, one, out, lse, 0.1, 3, False
    if name.startswith("nvfp4"):
        batch = make_batch(Case((20, 40), 2, head_size=64, sinks=True), device)
        workspace, one = batch.workspace(), scalar(1.0, device)
        shape = (8, 2, 64)
        if name == "nvfp4_attention_schedule":
            return batch.seq_lens, workspace.schedule, 2, *shape, 0, workspace.parts_for(2), 0
        if name == "nvfp4_attention_parts":
            return workspace.partial, 64, 8
        if name == "nvfp4_attention_workspace_size":
            return workspace.partial, 2, 1024, 2, *shape, 16, 0
        ops.nvfp4_attention_schedule(batch.seq_lens, workspace, 2)
        inputs = (batch.q, batch.pool.cache, batch.block_table, batch.seq_lens, workspace.schedule, one, one)
        out, lse = torch.zeros_like(batch.q), torch.zeros(8, 4, device=device)
        # Finite, so that what a call leaves there can be compared.
        partial = torch.zeros_like(workspace.partial)
        return *inputs, out, lse, batch.sinks, partial, 0.125, 2, 0, 0.0, 0, workspace.parts_for(2), 0
    if name == "land_rows":
        rows, blocks = pool.raw[:2].clone(), torch.tensor([2, 0], device=device)
        return rows, pool.raw, blocks, torch.arange(rows.shape[1] // 8, device=device), blocks.clone()
    ids = torch.tensor([0, 2])
    return pool.raw, pool.raw.clone(), ids, ids.flip(0), 1


@pytest.mark.parametrize("name", ops.extension.OPS)
def test_opcheck(device, name):
    ops.load()
    torch.library.opcheck(getattr(torch.ops.vllm_xlayer, name).default, arguments_of(name, device))


@pytest.mark.parametrize("name", ["nvfp4_attention_parts", "nvfp4_attention_workspace_size"])
def test_opcheck_of_ops_without_a_fake_version(device, name):
    """Sizes asked for before anything is traced."""
    ops.load()
    op = getattr(torch.ops.vllm_xlayer, name).default
    torch.library.opcheck(op, arguments_of(name, device), test_utils="test_schema")


def test_build_info():
    info = ops.build_info()
    assert set(info) == {"cuda", "nvcc", "archs", "force_sm80", "kernels", "cxx", "decode"}
    assert info["cuda"] is bool(info["archs"]) is bool(info["nvcc"])
    attention = {"nvfp4_write", "nvfp4_gather", "nvfp4_attention"}
    assert set(info["kernels"]) == {*attention, "block_copy", "land_rows"}


def test_a_missing_extension_is_reported_at_first_use():
    """Importing works; the first op says what to do."""
    code = (
        "import sys; sys.modules['vllm_xlayer._C'] = None\n"
        "import torch\n"
        "from vllm_xlayer import ops\n"
        "rows = torch.zeros(1, 16, dtype=torch.uint8); ids = torch.tensor([0])\n"
        "try:\n"
        "    ops.copy_blocks(rows, rows, ids, ids)\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True
    )
    assert result.stdout.startswith(
        "ExtensionMissingError vllm_xlayer/_C.abi3.so: expected the compiled extension"
    )
    assert "pip install ." in result.stdout


def test_a_cpu_only_build_refuses_cuda_tensors(monkeypatch):
    """The wrapper names the cause, where the dispatcher would only name a missing backend."""
    monkeypatch.setattr(ops.extension, "load", lambda: {"cuda": False})

    class OnCuda:
        is_cuda, device = True, torch.device("cuda", 0)

    with pytest.raises(
        RuntimeError, match="got a tensor on cuda:0, but this build of vllm_xlayer has CPU ops only"
    ):
        ops.copy_blocks(OnCuda(), OnCuda(), None, None)


@pytest.mark.parametrize(
    ("debug", "on_gpu", "capturing", "expected"),
    [
        ("1", True, False, True),
        ("1", True, True, False),
        ("0", True, False, False),
        ("1", False, False, False),
    ],
)
def test_debug_mode_reads_no_values_while_a_graph_is_captured(
    monkeypatch, debug, on_gpu, capturing, expected
):
    monkeypatch.setenv(ops.DEBUG_ENV, debug)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert extension.checks_values(SimpleNamespace(is_cuda=on_gpu)) is expected

"""The NVFP4 backend with its real kernels on a GPU: same cases as tests/ops/test_nvfp4_backend.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from backend_cases import CASES, check_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, monkeypatch):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.worker import workspace

    from vllm_xlayer.attention.impl import NVFP4Impl

    device = torch.device("cuda", 0)
    monkeypatch.setattr(workspace, "_manager", workspace.WorkspaceManager(device, 1))
    with set_current_vllm_config(VllmConfig()):
        impl = NVFP4Impl(
            case.num_heads, case.head_size, case.head_size**-0.5, case.num_kv_heads,
            sliding_window=case.window, logits_soft_cap=case.soft_cap,
        )  # fmt: skip
    impl.capacity = case.capacity
    check_case(case, impl, device, exact_softmax=False)

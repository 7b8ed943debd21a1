"""The NVFP4 backend with its real kernels on a GPU: same cases as tests/ops/test_nvfp4_backend.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from backend_cases import CASES, check_case, make_impl

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("pages_alone")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, monkeypatch):
    from vllm.v1.worker import workspace

    from vllm_xlayer.attention.impl import NVFP4Impl

    device = torch.device("cuda", 0)
    monkeypatch.setattr(workspace, "_manager", workspace.WorkspaceManager(device, 1))
    impl = make_impl(NVFP4Impl, case, device)
    impl.capacity = case.capacity
    check_case(case, impl, device, exact_softmax=False)

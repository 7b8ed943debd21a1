"""Two engines that have only TCP between them are told so, with what to do."""

import pytest

from vllm_xlayer.connector.nixl import link
from vllm_xlayer.connector.nixl.link import Link, why_tcp

OURS = Link("host a", "", rdma=True)
BESIDE, FAR = OURS, Link("host b", "", rdma=True)


@pytest.mark.parametrize("theirs", [BESIDE, FAR])
@pytest.mark.parametrize("ucx_tls", ["", "all", "rc,cuda_copy,tcp", "tcp,sm", "^tcp"])
def test_there_may_be_better(theirs, ucx_tls):
    assert why_tcp(Link("host a", ucx_tls, rdma=True), theirs) is None


@pytest.mark.parametrize("ucx_tls", ["tcp", "tcp,self", "tcp,cuda_copy"])
def test_a_setting_that_allows_nothing_else(ucx_tls):
    said = why_tcp(OURS, Link("host a", ucx_tls, rdma=True))
    assert said == f"UCX_TLS={ucx_tls} there allows nothing else: unset it"


def test_hosts_without_rdma():
    bare = Link("host b", "", rdma=False)
    assert "no RDMA device is visible there" in why_tcp(OURS, bare)
    assert "no RDMA device is visible here" in why_tcp(bare, OURS)
    assert why_tcp(bare, bare) is None, "shared memory, or NVLink"


def test_a_host_that_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "BOOT_ID", tmp_path / "nothing")
    assert Link.here({}) == Link("", "", rdma=True)
    assert why_tcp(Link.here({}), FAR) is None


def test_reads_over_cuda_ipc_are_the_users_to_refuse():
    environment = {}
    link.allow_cuda_ipc_reads(environment)
    assert environment == {"UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "y"}
    environment = {"UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "n"}
    link.allow_cuda_ipc_reads(environment)
    assert environment == {"UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "n"}


def test_this_host(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "RDMA_DEVICES", tmp_path / "infiniband")
    assert not Link.here({}).rdma
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    here = Link.here({"UCX_TLS": "rc"})
    assert here.rdma and here.ucx_tls == "rc"
    assert here.host == Link.here({}).host and Link(**here.to_dict()) == here

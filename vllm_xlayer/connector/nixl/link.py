"""Whether rows between two engines can go over nothing better than TCP, which only their time would show."""

import os
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""The same in all containers of a host."""
RDMA_DEVICES = Path("/sys/class/infiniband")
NO_LINKS = {"tcp", "self", "cuda_copy", "gdr_copy"}
"""UCX's transports that are no link between two processes, and TCP."""

CUDA_IPC_READS = "UCX_CUDA_IPC_ENABLE_GET_ZCOPY"


def allow_cuda_ipc_reads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets UCX read another process's GPU memory directly, unless the user has set what it does.

    By itself UCX does so only where it sees NVLink, since writing is faster than reading over some PCIe
    bridges. But a hand-over only reads, and what UCX takes instead goes through host memory and TCP: 0.5 GB/s
    in place of 56 between two processes on one H200. For agents that are made afterwards.
    """
    environment.setdefault(CUDA_IPC_READS, "y")


@dataclass(frozen=True)
class Link:
    """What one engine has to reach others.

    Args:
        host: equal for engines of one host; empty where the host does not say.
        ucx_tls: UCX_TLS in its environment, empty where that is not set.
        rdma: whether it sees an RDMA device.
    """

    host: str
    ucx_tls: str
    rdma: bool

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> "Link":
        try:
            host = BOOT_ID.read_text().strip()
            rdma = RDMA_DEVICES.is_dir() and any(RDMA_DEVICES.iterdir())
        except OSError:  # a sandbox hides them: then nothing is known, and nothing is said
            host, rdma = "", True
        return cls(host, environment.get("UCX_TLS", ""), rdma)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def why_tcp(ours: Link, theirs: Link) -> str | None:
    """Why UCX has only TCP between two engines, and what to do about it; None where it may have better."""
    return "; ".join(_reasons(ours, theirs)) or None


def _reasons(ours: Link, theirs: Link) -> Iterator[str]:
    for where, link in (("here", ours), ("there", theirs)):
        if link.ucx_tls and set(link.ucx_tls.split(",")) <= NO_LINKS:
            yield f"UCX_TLS={link.ucx_tls} {where} allows nothing else: unset it"
        if ours.host != theirs.host and not link.rdma:
            yield (
                f"no RDMA device is visible {where} ({RDMA_DEVICES} is empty): give the container "
                "/dev/infiniband, or the host such a card"
            )

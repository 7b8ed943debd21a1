"""Which NUMA node a GPU hangs on, and keeping a thread there.

Linux takes a page of memory from the node whose CPU touches it first, so a thread that stays on a node's CPUs
makes memory of that node, as long as it has some.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

SYSTEM = Path("/sys")


def stay_near(device: torch.device) -> int | None:
    """Keeps the calling thread on the CPUs of a GPU's node, from now on.

    Returns:
        The node. None if nothing was done: there is only one, it is unknown, or none of its CPUs is ours.
    """
    node = node_of(_pci_address(device))
    if node is None:
        return None
    cpus = node_cpus(node) & os.sched_getaffinity(0)
    if not cpus:
        logger.info("XLayerConnector: this process may not run on NUMA node %d, where %s is", node, device)
        return None
    os.sched_setaffinity(0, cpus)  # 0: this thread
    return node


def node_of(pci_address: str) -> int | None:
    """The node of a PCI device, where the machine has several and says which."""
    try:
        if len(_ids((SYSTEM / "devices/system/node/online").read_text())) < 2:
            return None
        node = int((SYSTEM / "bus/pci/devices" / pci_address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def node_cpus(node: int) -> set[int]:
    """Empty if the machine does not say."""
    try:
        return _ids((SYSTEM / f"devices/system/node/node{node}/cpulist").read_text())
    except (OSError, ValueError):
        return set()


def _ids(text: str) -> set[int]:
    """Of Linux's "0-3,8"."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _pci_address(device: torch.device) -> str:
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack these
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"

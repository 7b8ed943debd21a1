"""Pinning piece by piece, with CUDA's part replaced: what is cut where, and what is left when it ends."""

import mmap
import threading

import pytest
import torch

pytest.importorskip("vllm")

from vllm_xlayer.connector.host import numa, pinning
from vllm_xlayer.connector.host.memory import HostShape, scheduler_memory, worker_memory
from vllm_xlayer.connector.host.pinning import Pinning, piece_bytes

PAGE = mmap.PAGESIZE
GPU = torch.device("cuda", 0)


class Cuda:
    """Registrations of host memory, as the driver keeps them; refuses as it does."""

    def __init__(self, monkeypatch):
        self.pinned: dict[int, int] = {}
        self.pieces: list[tuple[int, int]] = []
        self.refuse_after = None
        self.gate = threading.Event()
        self.gate.set()
        for name in ("enter", "pin", "unpin"):
            monkeypatch.setattr(pinning, name, getattr(self, name))

    def enter(self, device):
        assert device == GPU
        return None

    def pin(self, address, size):
        assert self.gate.wait(10)
        if self.refuse_after == len(self.pieces):
            raise RuntimeError("cudaHostRegister: cudaErrorMemoryAllocation")
        assert address % PAGE == 0 and not any(
            address < begin + n and begin < address + size for begin, n in self.pinned.items()
        )
        self.pinned[address] = size
        self.pieces.append((address, size))

    def unpin(self, address):
        del self.pinned[address]


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def wait(pins):
    pins._thread.join(10)
    assert not pins._thread.is_alive()


@pytest.mark.parametrize("unit", [48, 4096, 589_824, 3 * 73_728 + 16, 300 << 20])
def test_pieces_are_whole_chunks_and_whole_pages(unit):
    piece = piece_bytes(unit)
    assert piece % unit == 0 and piece % PAGE == 0
    assert piece <= pinning.PIECE_BYTES or piece - PAGE * unit <= 0


@pytest.mark.parametrize("rows_per_chunk", [1, 3])
def test_every_row_lies_in_one_piece(cuda, monkeypatch, rows_per_chunk):
    monkeypatch.setattr(pinning, "PIECE_BYTES", 10 * PAGE)
    shape = HostShape(
        chunks=701, rows_per_chunk=rows_per_chunk, row_bytes=1008, ranks=1, shared_as=None, in_process=True
    )
    host, pins = worker_memory(shape, 0, GPU)
    pins.start()
    wait(pins)
    assert pins.ready and not pins.problem and len(cuda.pieces) > 2
    assert torch.count_nonzero(host) == 0
    for row in host.view(shape.chunks * rows_per_chunk, -1):
        begin, end = row.data_ptr(), row.data_ptr() + row.nbytes
        assert sum(a <= begin and end <= a + n for a, n in cuda.pieces) == 1
    pins.close()
    assert not pins.ready and not cuda.pinned


def test_pages_are_there_before_they_are_pinned(cuda, monkeypatch):
    monkeypatch.setattr(pinning, "PIECE_BYTES", PAGE)
    memory, order = torch.frombuffer(mmap.mmap(-1, 3 * PAGE), dtype=torch.uint8), []
    real = cuda.pin
    monkeypatch.setattr(
        pinning, "pin", lambda a, n: (order.append(("pin", a - memory.data_ptr())), real(a, n))
    )
    pins = Pinning(memory, PAGE, GPU, lambda begin, count: order.append(("populate", begin)))
    pins.start()
    wait(pins)
    assert order == [(what, i * PAGE) for i in range(3) for what in ("populate", "pin")]
    pins.close()


def test_a_refusal_leaves_nothing_pinned_and_says_what_to_do(cuda, monkeypatch):
    monkeypatch.setattr(pinning, "PIECE_BYTES", PAGE)
    cuda.refuse_after = 2
    pins = Pinning(torch.frombuffer(mmap.mmap(-1, 5 * PAGE), dtype=torch.uint8), PAGE, GPU, lambda *_: None)
    pins.start()
    wait(pins)
    assert not pins.ready and len(cuda.pieces) == 2 and not cuda.pinned
    for text in ("cudaErrorMemoryAllocation", "cpu_bytes_to_use", "ulimit -l"):
        assert text in pins.problem
    pins.close()


def test_closed_in_the_middle(cuda, monkeypatch):
    monkeypatch.setattr(pinning, "PIECE_BYTES", PAGE)
    cuda.gate.clear()
    pins = Pinning(torch.frombuffer(mmap.mmap(-1, 50 * PAGE), dtype=torch.uint8), PAGE, GPU, lambda *_: None)
    pins.start()
    threading.Timer(0.1, cuda.gate.set).start()
    pins.close()
    assert not pins._thread.is_alive() and not pins.ready and not pins.problem
    assert not cuda.pinned and len(cuda.pieces) < 50


def test_memory_that_is_not_there_is_refused_at_once(cuda):
    shape = HostShape(
        chunks=1 << 40, rows_per_chunk=1, row_bytes=4096, ranks=1, shared_as=None, in_process=True
    )
    with pytest.raises(MemoryError, match="cpu_bytes_to_use"):
        worker_memory(shape, 0, GPU)


def test_shared_memory_gets_its_pages_while_it_is_pinned(cuda, tmp_path):
    name = str(tmp_path)
    shape = HostShape(chunks=5, rows_per_chunk=2, row_bytes=4096, ranks=2, shared_as=name, in_process=False)
    cuda.gate.clear()
    ranks = [worker_memory(shape, rank, GPU) for rank in range(2)]
    whole = scheduler_memory(shape)
    for _, pins in ranks:
        pins.start()
    assert not any(pins.ready for _, pins in ranks)
    cuda.gate.set()
    for rank, (host, pins) in enumerate(ranks):
        wait(pins)
        assert pins.ready
        host.fill_(rank + 1)
    assert whole.view(10, 2, 4096)[:, :, 7].tolist() == [[1, 2]] * 10
    for _, pins in ranks:
        pins.close()
    assert not cuda.pinned


def test_shared_memory_that_is_not_there_is_refused_at_once(cuda, tmp_path):
    name = str(tmp_path)
    shape = HostShape(
        chunks=1 << 40, rows_per_chunk=1, row_bytes=4096, ranks=2, shared_as=name, in_process=False
    )
    with pytest.raises(MemoryError, match="GiB that are available"):
        worker_memory(shape, 0, GPU)


@pytest.fixture
def two_nodes(tmp_path, monkeypatch):
    monkeypatch.setattr(numa, "SYSTEM", tmp_path)
    for path, text in {
        "devices/system/node/online": "0-1\n",
        "devices/system/node/node1/cpulist": "0,8-10\n",
        "bus/pci/devices/0000:1a:00.0/numa_node": "1\n",
        "bus/pci/devices/0000:1b:00.0/numa_node": "-1\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_numa_node_of_a_gpu(two_nodes):
    assert numa.node_of("0000:1a:00.0") == 1 and numa.node_cpus(1) == {0, 8, 9, 10}
    assert numa.node_of("0000:1b:00.0") is None and numa.node_of("0000:1c:00.0") is None
    assert numa.node_cpus(0) == set()
    (two_nodes / "devices/system/node/online").write_text("0\n")
    assert numa.node_of("0000:1a:00.0") is None


def test_only_the_calling_thread_stays_on_the_node(two_nodes, monkeypatch):
    import os

    monkeypatch.setattr(numa, "_pci_address", lambda device: "0000:1a:00.0")
    before, found = os.sched_getaffinity(0), []
    thread = threading.Thread(target=lambda: found.extend([numa.stay_near(GPU), os.sched_getaffinity(0)]))
    thread.start()
    thread.join()
    assert found == [1, {0}] and os.sched_getaffinity(0) == before
    (two_nodes / "devices/system/node/node1/cpulist").write_text("900-901")
    assert numa.stay_near(GPU) is None and os.sched_getaffinity(0) == before

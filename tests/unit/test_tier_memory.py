"""Host memory that scheduler and workers share: each rank its rows, who has it is known, nothing is left."""

import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

pytest.importorskip("vllm")

from vllm_xlayer.connector.connector import off_one_host
from vllm_xlayer.connector.host import shared_memory
from vllm_xlayer.connector.host.memory import HostShape, scheduler_memory, worker_memory

SHAPE = HostShape(chunks=3, rows_per_chunk=2, row_bytes=48, ranks=2, shared_as="", in_process=False)


@pytest.fixture
def shape(request):
    """With a name that only this test has."""
    return replace(SHAPE, shared_as=f"{request.node.nodeid} {os.getpid()}")


def workers(shape, ranks=(0, 1)):
    """The memory of these ranks, which come at the same time, or what each raised."""
    found = {}

    def work(rank):
        try:
            found[rank] = worker_memory(shape, rank)[0]
        except MemoryError as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in ranks]


def test_ranks_lie_side_by_side(shape):
    ranks = workers(shape)
    whole = scheduler_memory(shape)
    assert not named_files()
    for rank, host in enumerate(ranks):
        assert host.shape == (6, 48) and host.stride() == (96, 1)
        for row in range(6):
            host[row] = 10 * row + rank
    expected = [[10 * row + rank for row in (2 * c, 2 * c + 1) for rank in (0, 1)] for c in range(3)]
    assert whole.view(3, 4, 48)[:, :, 5].tolist() == expected
    whole.fill_(7)
    assert all(torch.all(host == 7) for host in ranks)


def test_in_one_process_it_is_the_same_tensor(shape):
    shape = replace(shape, ranks=1, in_process=True)
    host, _ = worker_memory(shape, 0)
    whole = scheduler_memory(shape)
    assert whole.data_ptr() == host.data_ptr() and whole.shape == (3, 96)


def test_a_rank_that_does_not_share_it(shape):
    """As one on another host: it makes memory for itself, and the scheduler is not given half of it."""
    here, there = (
        worker_memory(shape, 0),
        worker_memory(replace(shape, shared_as=shape.shared_as + " elsewhere"), 1),
    )
    with pytest.raises(MemoryError, match="does not share memory with rank 1, on another host"):
        scheduler_memory(shape)
    assert here[0].shape == there[0].shape


def test_the_scheduler_on_another_host(shape):
    ranks = workers(shape)
    with pytest.raises(MemoryError, match="no worker on the scheduler's host shares"):
        scheduler_memory(replace(shape, shared_as=shape.shared_as + " elsewhere"))
    assert len(ranks) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(), ""),
        (dict(nnodes_within_dp=2), "expected one node, got 2"),
        (dict(distributed_executor_backend="external_launcher"), "scheduler of its own"),
    ],
)
def test_what_the_configuration_says(changes, reason):
    parallel = dict(nnodes_within_dp=1, distributed_executor_backend="mp") | changes
    found = off_one_host(SimpleNamespace(**parallel))
    assert reason in found and bool(found) == bool(reason)


def test_two_engines_of_one_name(shape):
    """Whoever comes second is refused while the first starts, and has memory of its own after that."""
    first = workers(shape)
    with pytest.raises(MemoryError, match="another engine starts with this engine_id"):
        worker_memory(shape, 0)
    whole = scheduler_memory(shape)
    second = workers(shape)
    other = scheduler_memory(shape)
    whole.fill_(1)
    other.fill_(2)
    assert all(torch.all(host == 1) for host in first) and all(torch.all(host == 2) for host in second)


def test_no_memory(shape, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(MemoryError, match="worker has no host memory"):
        scheduler_memory(replace(shape, in_process=True))
    with pytest.raises(MemoryError, match="cpu_bytes_to_use"):
        worker_memory(replace(shape, chunks=1 << 50, in_process=True), 0)
    with pytest.raises(MemoryError, match="GiB that are available"):
        worker_memory(replace(shape, chunks=1 << 40), 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    for error in workers(shape):  # the one that made it, and the one that waited for it
        assert isinstance(error, MemoryError)
        assert "No space left" in str(error) or "the worker that makes it ended" in str(error)
    with pytest.raises(MemoryError, match="no worker on the scheduler's host"):
        scheduler_memory(shape)


WORKER = """
import sys, time
from dataclasses import replace
from vllm_xlayer.connector.host.memory import worker_memory
from test_tier_memory import SHAPE
host, _ = worker_memory(replace(SHAPE, shared_as=sys.argv[1]), 0)
host.fill_(1)
print("ready", flush=True)
time.sleep(60)
"""


def test_killed_while_it_starts(shape):
    """Nothing is left of what a worker had when it was killed: neither memory, nor the name."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    command = [sys.executable, "-c", WORKER, shape.shared_as]
    for _ in range(2):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as worker:
            assert any(line == "ready\n" for line in worker.stdout)
            with pytest.raises(MemoryError, match="another engine starts"):
                worker_memory(shape, 0)
            # Its only names end with the process: /proc/PID/fd and the socket.
            maps = psutil.Process(worker.pid).memory_maps()
            (file,) = (m for m in maps if "vllm-xlayer" in os.path.basename(m.path))
            assert file.path.startswith("/memfd:") and not named_files()
            worker.send_signal(signal.SIGKILL)
        assert not named_files()
    with pytest.raises(MemoryError, match="no worker on the scheduler's host"):
        scheduler_memory(shape)


def named_files():
    return [name for name in os.listdir("/dev/shm") if "xlayer" in name]


def test_another_user_gets_nothing(shape, monkeypatch):
    """Neither memory from us, nor us as users of theirs."""
    ranks = workers(shape, [0])
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(MemoryError, match="another user's"):
        worker_memory(shape, 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.settimeout(10)
        stranger.connect(shared_memory._address(shape.shared_as))
        answer, descriptors, _, _ = socket.recv_fds(stranger, 100, 1)
        assert answer == b"" and not descriptors
    monkeypatch.undo()
    assert shared_memory.take(shape.shared_as)[1] == {0} and len(ranks) == 1

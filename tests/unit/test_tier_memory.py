"""Host memory that scheduler and workers share: one file, each rank its rows, nothing left behind."""

import os
import threading
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

from vllm_xlayer.connector import host_memory
from vllm_xlayer.connector.host_memory import HostShape, scheduler_memory, worker_memory

SHAPE = HostShape(chunks=3, rows_per_chunk=2, row_bytes=48, ranks=2, shared_as="test", in_process=False)


@pytest.fixture
def shape(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "SHARED_FOLDER", str(tmp_path))
    return SHAPE


def test_ranks_lie_side_by_side(shape, tmp_path):
    ranks = [None, None]

    def work(rank):
        ranks[rank], _ = worker_memory(shape, rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = scheduler_memory(shape)
    assert not os.listdir(tmp_path)
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


def test_no_memory(shape, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(MemoryError, match="worker has no host memory"):
        scheduler_memory(replace(shape, in_process=True, shared_as="never made"))
    with pytest.raises(MemoryError, match="cpu_bytes_to_use"):
        worker_memory(replace(shape, chunks=1 << 50, in_process=True), 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MemoryError, match="No space left"):
        worker_memory(shape, 0)
    assert not os.listdir(tmp_path)
    with pytest.raises(MemoryError, match="No such file"):
        scheduler_memory(shape)

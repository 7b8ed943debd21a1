"""Imported by a worker process: its host memory is that of a host of its own, unless it is rank 0."""

from vllm_xlayer.connector.host import shared_memory

_join = shared_memory.join


def _join_on_own_host(engine, rank, make):
    return _join(f"{engine} on host {rank}" if rank else engine, rank, make)


shared_memory.join = _join_on_own_host


class Worker:
    """For vLLM's worker_extension_cls, which imports this module."""

"""NIXL's agent as vLLM makes it, but for the thread that moves bytes over UCX.

By itself NIXL gives transfers of 1,024 descriptors and more to threads that post them and ask for their end.
A smaller one is posted by the caller to a worker of UCX that a sleeping thread looks after. Over CUDA IPC
that one is woken by a function of the host that UCX puts between the copies, and the copies behind it wait
until it has been called. A chunk of rows has fewer descriptors, so here the first way is taken for all.

One thread: of a chunk that several have posted, one's error is final while the others' bytes still arrive.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

ONE_THREAD = {"num_threads": "1", "split_batch_size": "1"}
"""Parameters of NIXL's backend UCX: threads, and the fewest descriptors that are theirs."""


def with_thread(agent: type) -> type:
    """A class of agents like ``agent``, nixl_agent or the like, whose UCX has one thread for all transfers;
    none where it would have none (`num_threads` is 0, or not given)."""

    class RowAgent(agent):  # type: ignore[misc]
        def create_backend(self, backend: str, params: dict[str, str] | None = None) -> Any:
            params = params or {}
            if backend == "UCX" and "num_threads" in params:
                params = params | ONE_THREAD
            return super().create_backend(backend, params)

    return RowAgent


@contextlib.contextmanager
def vllm_makes_such() -> Iterator[None]:
    """A worker of vLLM's NIXL connector that is made meanwhile has an agent of such a class."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker

    vllms = base_worker.NixlWrapper
    base_worker.NixlWrapper = with_thread(vllms)
    try:
        yield
    finally:
        base_worker.NixlWrapper = vllms

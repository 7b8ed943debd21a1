"""The floor of a hand-over: what NIXL alone reads in one piece, from the memory of another process."""

import contextlib
import multiprocessing
import time
import uuid
from multiprocessing.connection import Connection
from typing import Any

READS = 5
SECONDS = 60.0
"""For a read, before it counts as hung."""
START_SECONDS = 300.0
"""For the other process to import torch and NIXL."""


def read_rate(piece: int) -> float:
    """Bytes a second: the best of READS of a piece of so many bytes, on the GPU where there is one.

    Raises:
        RuntimeError: a read failed or did not end; says what NIXL said.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    context = multiprocessing.get_context("spawn")
    pipe, there = context.Pipe()
    process = context.Process(target=_offer, args=(there, piece, device), daemon=True)
    process.start()
    there.close()
    try:
        if not pipe.poll(START_SECONDS):
            raise RuntimeError(f"expected the other process to offer memory in {START_SECONDS:g} s")
        metadata, address = pipe.recv()
        target = torch.zeros(piece, dtype=torch.uint8, device=device)
        agent = _agent(target)
        name = agent.add_remote_agent(metadata)
        kind = "VRAM" if device == "cuda" else "DRAM"
        here = agent.get_xfer_descs([(target.data_ptr(), piece, 0)], kind)
        theirs = agent.get_xfer_descs([(address, piece, 0)], kind)
        best = min(_read(agent, here, theirs, name) for _ in range(READS))
        if not bool((target == 1).all()):
            raise RuntimeError("expected the other process's bytes, got others")
        return piece / best
    except EOFError as error:
        raise RuntimeError("the other process ended, see above") from error
    finally:
        pipe.close()  # it ends then
        process.join(10)
        process.kill()


def _agent(memory: Any) -> Any:
    """NIXL's agent, with this memory registered."""
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(str(uuid.uuid4()), nixl_agent_config(backends=["UCX"]))
    agent.register_memory(memory)
    return agent


def _offer(pipe: Connection, piece: int, device: str) -> None:
    """The other process: offers ones until the pipe is closed."""
    import torch

    memory = torch.ones(piece, dtype=torch.uint8, device=device)
    agent = _agent(memory)
    pipe.send((agent.get_agent_metadata(), memory.data_ptr()))
    with contextlib.suppress(EOFError):
        pipe.recv()


def _read(agent: Any, here: Any, theirs: Any, name: str) -> float:
    """Seconds."""
    handle = agent.initialize_xfer("READ", here, theirs, name)
    begin = time.perf_counter()
    state = agent.transfer(handle)
    while state == "PROC" and time.perf_counter() - begin < SECONDS:
        state = agent.check_xfer_state(handle)
    seconds = time.perf_counter() - begin
    if state != "DONE":
        raise RuntimeError(f"expected a read to be DONE within {SECONDS:g} s, got {state}")
    agent.release_xfer_handle(handle)
    return seconds

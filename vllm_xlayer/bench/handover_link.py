"""The floor of a hand-over: what NIXL alone reads from another process, in one piece or more."""

import contextlib
import multiprocessing
import os
import random
import time
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

READS = 5
SECONDS = 60.0
"""For a read, before it counts as hung."""
START_SECONDS = 120.0
"""For a process to import torch and NIXL, and to offer memory or to read it."""


def read_rates(nbytes: int, pieces: list[int], devices: list[str] | None = None) -> list[float]:
    """Bytes a second, the best of READS, for each number of equal pieces that they are read in.

    Args:
        devices: of the process that is read from and of the one that reads, as CUDA_VISIBLE_DEVICES; None
            for whatever is visible. Where there is no GPU the memory is the host's.

    Raises:
        RuntimeError: a read failed or did not end; says what NIXL said.
    """
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in "12"]
    first = [device.split(",")[0] for device in devices] if devices else [None, None]
    works: list[tuple[Callable[..., None], tuple[list[int], ...]]] = [(_offer, ()), (_fetch, (pieces,))]
    processes = [
        context.Process(target=work, args=(ends[i][1], nbytes, first[i], *more), daemon=True)
        for i, (work, more) in enumerate(works)
    ]
    (offers, _), (fetches, _) = ends
    try:
        for process, (_, theirs) in zip(processes, ends, strict=True):
            process.start()
            theirs.close()
        fetches.send(_answer(offers, START_SECONDS, "offer memory"))
        rates: list[float] = _answer(fetches, START_SECONDS + len(pieces) * READS * SECONDS, "read it")
        return rates
    finally:
        for end, _ in ends:
            end.close()  # they end then
        for process in processes:
            process.join(10)
            process.kill()


def _answer(pipe: Connection, seconds: float, what: str) -> Any:
    try:
        if not pipe.poll(seconds):
            raise RuntimeError(f"expected a process to {what} in {seconds:g} s")
        said = pipe.recv()
    except EOFError as error:
        raise RuntimeError("a process ended, see above") from error
    if isinstance(said, Exception):
        raise said
    return said


def _memory(nbytes: int, value: int, device: str | None) -> tuple[Any, Any, str]:
    """This process's memory, full of a value, the agent that has it registered, NIXL's name of its kind."""
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    import torch
    from nixl._api import nixl_agent, nixl_agent_config

    on_gpu = torch.cuda.is_available()
    memory = torch.full((nbytes,), value, dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
    agent = nixl_agent(str(uuid.uuid4()), nixl_agent_config(backends=["UCX"]))
    agent.register_memory(memory)
    return memory, agent, "VRAM" if on_gpu else "DRAM"


@contextlib.contextmanager
def _tells(pipe: Connection) -> Any:
    """Lets the other process raise what is raised here; ends quietly once it has closed the pipe."""
    try:
        yield
    except (EOFError, BrokenPipeError):
        pass
    except ImportError as error:
        pipe.send(ImportError(str(error)))
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))


def _offer(pipe: Connection, nbytes: int, device: str | None) -> None:
    """The process that is read from: offers ones until the pipe is closed."""
    with _tells(pipe):
        memory, agent, _ = _memory(nbytes, 1, device)
        pipe.send((agent.get_agent_metadata(), memory.data_ptr()))
        pipe.recv()


def _fetch(pipe: Connection, nbytes: int, device: str | None, pieces: list[int]) -> None:
    """The process that reads."""
    with _tells(pipe):
        target, agent, kind = _memory(nbytes, 0, device)
        metadata, address = pipe.recv()
        name = agent.add_remote_agent(metadata)
        rates = []
        for count in pieces:
            size = nbytes // count
            # In any order: side by side NIXL would make one descriptor of many.
            starts = random.Random(count).sample(range(0, size * count, size), count)
            here = agent.get_xfer_descs([(target.data_ptr() + at, size, 0) for at in starts], kind)
            theirs = agent.get_xfer_descs([(address + at, size, 0) for at in starts], kind)
            target.zero_()
            best = min(_read(agent, here, theirs, name) for _ in range(READS))
            if not bool((target[: size * count] == 1).all()):
                raise RuntimeError("expected the other process's bytes, got others")
            rates.append(size * count / best)
        pipe.send(rates)


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

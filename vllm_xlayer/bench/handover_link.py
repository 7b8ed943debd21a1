"""The floor of a hand-over: what NIXL alone reads from another process, in one piece or more."""

import contextlib
import multiprocessing
import os
import time
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self

from ..connector.nixl.link import allow_cuda_ipc_reads

READS = 5
ENOUGH_SECONDS = 2.0
"""After so long no further read is begun: over a slow link one says enough."""
READ_SECONDS = 20.0
"""For a read, before it counts as hung."""
VLLM_THREADS = 4
"""Of UCX, as vLLM's connector has it by default."""
START_SECONDS = 60.0
"""For a process to import torch and NIXL, and to offer memory or to be ready to read it."""


class Link:
    """Two processes with registered memory: one offers, the other reads. They end with the `with` block.

    Attributes:
        works: what the two do.

    Raises:
        ImportError: from `wait`; NIXL is missing.
        RuntimeError: from `wait` and `rate`; a process or a read failed or did not end; says what NIXL said.
    """

    works: tuple[Callable[..., None], Callable[..., None]]

    def __init__(self, nbytes: Any, devices: list[str] | None = None) -> None:
        """Starts them, without waiting.

        nbytes: the most that is to be read.
        devices: of the process that is read from and of the one that reads, as CUDA_VISIBLE_DEVICES; None
            for whatever is visible. Where there is no GPU the memory is the host's.
        """
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in "12"]
        first = [device.split(",")[0] for device in devices] if devices else [None, None]
        self._processes = [
            context.Process(target=work, args=(theirs, nbytes, device), daemon=True)
            for work, (_, theirs), device in zip(self.works, ends, first, strict=True)
        ]
        self._offers, self._fetches = (ours for ours, _ in ends)
        for process, (_, theirs) in zip(self._processes, ends, strict=True):
            process.start()
            theirs.close()

    def wait(self) -> None:
        """Until the one can read from the other."""
        self._fetches.send(_answer(self._offers, START_SECONDS, "offer memory"))
        _answer(self._fetches, START_SECONDS, "be ready to read it")

    def rate(self, nbytes: int, pieces: int) -> float:
        """Bytes a second, the best of READS, read in so many equal pieces."""
        return self.asked((nbytes, pieces), f"read {nbytes} bytes in {pieces} pieces")

    def asked(self, what: Any, said: str) -> float:
        """What the one that reads answers to something, bytes a second; said: what that is, in words."""
        self._fetches.send(what)
        seconds = ENOUGH_SECONDS + 2 * READ_SECONDS  # preparing the pieces takes its time, too
        rate: float = _answer(self._fetches, seconds, said)
        return rate

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self._offers, self._fetches):
            end.close()  # they end then
        for process in self._processes:
            process.join(5)
            process.kill()


def _answer(pipe: Connection, seconds: float, what: str) -> Any:
    try:
        if not pipe.poll(seconds):
            raise RuntimeError(f"expected a process to {what} in {seconds:g} s")
        said = pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        raise RuntimeError("a process ended, see above") from error
    if isinstance(said, Exception):
        raise said
    return said


def registered(nbytes: int, value: int, device: str | None, ours: bool = False) -> tuple[Any, Any, str]:
    """This process's memory, full of a value, the agent that has it registered, NIXL's name of its kind.

    Before torch is imported: the process sees no other GPU than ``device`` from then on.

    ours: whether the agent is as our connector has it, not as vLLM's.
    """
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    import torch
    from nixl._api import nixl_agent, nixl_agent_config

    on_gpu = torch.cuda.is_available()
    memory = torch.full((nbytes,), value, dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.synchronize()  # NIXL reads past torch's streams
        allow_cuda_ipc_reads()
    if ours:
        from ..connector.nixl.agent import with_thread

        nixl_agent = with_thread(nixl_agent)
    agent = nixl_agent(str(uuid.uuid4()), nixl_agent_config(num_threads=VLLM_THREADS))
    agent.register_memory(memory)
    return memory, agent, "VRAM" if on_gpu else "DRAM"


@contextlib.contextmanager
def tells(pipe: Connection) -> Any:
    """Lets the other process raise what is raised here; ends quietly once it has closed the pipe."""
    try:
        yield
    except (EOFError, ConnectionResetError, BrokenPipeError):
        pass
    except ImportError as error:
        pipe.send(ImportError(str(error)))
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))


def _offer(pipe: Connection, nbytes: int, device: str | None) -> None:
    """The process that is read from: offers ones until the pipe is closed."""
    with tells(pipe):
        memory, agent, _ = registered(nbytes, 1, device)
        pipe.send((agent.get_agent_metadata(), memory.data_ptr()))
        pipe.recv()


def _fetch(pipe: Connection, nbytes: int, device: str | None) -> None:
    """The process that reads, whatever it is told to until the pipe is closed."""
    with tells(pipe):
        target, agent, kind = registered(nbytes, 0, device)
        metadata, address = pipe.recv()
        name = agent.add_remote_agent(metadata)
        pipe.send("ready")
        while True:
            asked, count = pipe.recv()
            pipe.send(_rate(agent, name, kind, target[:asked], address, count))


def _rate(agent: Any, name: str, kind: str, target: Any, address: int, count: int) -> float:
    """Bytes a second of a read into a tensor, in so many pieces."""
    import numpy as np

    size = target.numel() // count
    # In any order: side by side NIXL would make one descriptor of many.
    starts = np.random.default_rng(count).permutation(count).astype(np.uint64) * np.uint64(size)
    descriptors = np.zeros((count, 3), np.uint64)  # the last column is the device's number
    descriptors[:, 1] = size
    descriptors[:, 0] = starts + np.uint64(target.data_ptr())
    here = agent.get_xfer_descs(descriptors, kind)
    descriptors[:, 0] = starts + np.uint64(address)
    theirs = agent.get_xfer_descs(descriptors, kind)
    target.zero_()
    target[:1].item()  # on a GPU, waits for it
    best, end = float("inf"), time.perf_counter() + ENOUGH_SECONDS
    for _ in range(READS):
        best = min(best, _read(agent, here, theirs, name))
        if time.perf_counter() > end:
            break
    if not bool((target[: size * count] == 1).all()):
        raise RuntimeError("expected the other process's bytes, got others")
    return size * count / best


def _read(agent: Any, here: Any, theirs: Any, name: str) -> float:
    """Seconds."""
    handle = agent.initialize_xfer("READ", here, theirs, name)
    begin = time.perf_counter()
    state = agent.transfer(handle)
    while state == "PROC" and time.perf_counter() - begin < READ_SECONDS:
        state = agent.check_xfer_state(handle)
    seconds = time.perf_counter() - begin
    if state != "DONE":
        raise RuntimeError(f"expected a read to be DONE within {READ_SECONDS:g} s, got {state}")
    agent.release_xfer_handle(handle)
    return seconds


Link.works = (_offer, _fetch)

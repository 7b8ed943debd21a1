"""Memory that the processes of one engine on one host share, and proof of who does.

The first worker that comes makes it, without a name in any file system (memfd), and hands its descriptor to
the others and to the scheduler, over a socket in Linux's abstract name space. Whoever holds the descriptor
has the very same pages, so nobody has to assume what is shared: a rank on another host, or in a container
with a network of its own, does not reach the socket, makes memory for itself, and is not among the ranks
that the scheduler is told. Socket and memory end with the processes that have them open, however they end.
"""

import errno
import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable

WAIT_SECONDS = 60.0
"""For the worker that makes the memory, by the others."""
_SCHEDULER = -1
_MAX_RANKS = 4096
_ANSWER_SECONDS = 5.0


def join(engine: str, rank: int, make: Callable[[], int]) -> int:
    """A worker's descriptor of its engine's memory on this host.

    Args:
        engine: a name that no other engine has.
        make: makes the memory and returns its descriptor; called in the worker that comes first only.

    Raises:
        OSError: what ``make`` raised here, or the worker that came first has no memory or does not answer; or
            this rank has its memory already, so that two engines have one name.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            server.bind(_address(engine))
            server.listen(_MAX_RANKS)
        except OSError as error:
            server.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return _offer(server, rank, make)
        try:
            descriptor, _ = _ask(engine, rank)
            return descriptor
        except ConnectionError:  # it does not listen yet, or has just gone: then this worker may come first
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def take(engine: str) -> tuple[int, frozenset[int]]:
    """The scheduler's descriptor, and the ranks that have this memory; nobody can join any more.

    Raises:
        OSError: no worker on this host has any.
    """
    return _ask(engine, _SCHEDULER)


def _address(engine: str) -> bytes:
    return b"\0vllm-xlayer-" + hashlib.sha256(engine.encode()).hexdigest().encode()


def _offer(server: socket.socket, rank: int, make: Callable[[], int]) -> int:
    try:
        descriptor = make()
    except BaseException:
        server.close()  # those who wait see it end
        raise
    given = os.dup(descriptor)
    threading.Thread(
        target=_serve, args=(server, given, {rank}), name="xlayer-share-memory", daemon=True
    ).start()
    return descriptor


def _serve(server: socket.socket, descriptor: int, ranks: set[int]) -> None:
    """Hands the descriptor out until the scheduler has come, which comes last."""
    try:
        with server:
            while _answer(server, descriptor, ranks) != _SCHEDULER:
                pass
    finally:
        os.close(descriptor)


def _answer(server: socket.socket, descriptor: int, ranks: set[int]) -> int | None:
    """Who asked, and got the descriptor; None if nobody got it."""
    peer, _ = server.accept()
    with peer:
        if not _is_ours(peer):
            return None
        peer.settimeout(_ANSWER_SECONDS)
        try:
            asker = struct.unpack("i", peer.recv(4))[0]
            if asker in ranks:
                peer.send(b"taken")
                return None
            socket.send_fds(peer, [struct.pack(f"{len(ranks)}i", *ranks)], [descriptor])
        except (OSError, struct.error):
            return None
    if asker != _SCHEDULER:
        ranks.add(asker)
    return asker


def _ask(engine: str, asker: int) -> tuple[int, frozenset[int]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(WAIT_SECONDS)
        peer.connect(_address(engine))
        if not _is_ours(peer):
            raise PermissionError("expected shared memory of this user's, got another user's")
        peer.send(struct.pack("i", asker))
        answer, descriptors, _, _ = socket.recv_fds(peer, 4 * _MAX_RANKS, 1)
    if not descriptors:
        if answer == b"taken":
            raise OSError(f"rank {asker} has its memory already: another engine starts with this engine_id")
        raise ConnectionResetError("the worker that makes it ended")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0], frozenset(struct.unpack(f"{len(answer) // 4}i", answer))


def _is_ours(peer: socket.socket) -> bool:
    """Whether the process at the other end is of this process's user."""
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return user == os.geteuid()

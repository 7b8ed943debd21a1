"""Handshakes are answered after messages that nobody understands, and on a port that was taken."""

import contextlib
import logging
import socket
import threading

import msgspec
import pytest
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG

from vllm_xlayer.connector.nixl.listener import keep_listening
from vllm_xlayer.connector.nixl.scheduler import RowNixlScheduler

HOST = "127.0.0.1"
PAYLOAD = b"this engine's memory"
SECONDS = 30


def free_port():
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def listening(port):
    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(
        target=RowNixlScheduler._nixl_handshake_listener, args=({(0, 0): PAYLOAD}, ready, stop, HOST, port)
    )
    thread.start()
    try:
        yield ready
    finally:
        stop.set()
        thread.join(SECONDS)
        assert not thread.is_alive()


def say(port, message, seconds=SECONDS):
    """The first part of the answer, None if none comes."""
    with zmq.Context() as context, context.socket(zmq.REQ) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVTIMEO, int(1000 * seconds))
        sock.connect(f"tcp://{HOST}:{port}")
        sock.send(message)
        try:
            return sock.recv_multipart()[0]
        except zmq.Again:
            return None


def handshake(rank):
    return msgspec.msgpack.encode((GET_META_MSG, 0, rank))


@pytest.mark.parametrize(
    "odd",
    [b"", b"\xc1 no msgpack", handshake(7)],
    ids=["empty", "another protocol", "a rank that is not there"],
)
def test_others_are_answered_after_it(odd, caplog):
    port = free_port()
    with listening(port) as ready:
        assert ready.wait(SECONDS)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert say(port, odd, 0.5) is None
        assert say(port, handshake(0)) == PAYLOAD
    (said,) = (record.message for record in caplog.records if "handshake" in record.message)
    assert f"{HOST}:{port}" in said and "said once" in said


def test_a_port_that_was_taken(caplog):
    """vLLM's start waits for the event that it listens."""
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with listening(port) as ready:
            with caplog.at_level(logging.WARNING):
                assert not ready.wait(1)
            other.close()
            assert ready.wait(SECONDS) and say(port, handshake(0)) == PAYLOAD
    assert "VLLM_NIXL_SIDE_CHANNEL_PORT" in caplog.text and "Address already in use" in caplog.text


def test_it_ends_with_the_engine():
    """Also where it can never listen."""
    stop, tries = threading.Event(), []

    def listen():
        tries.append(None)
        if len(tries) == 3:
            stop.set()
        raise OSError

    keep_listening(listen, stop, "here")
    assert len(tries) == 3

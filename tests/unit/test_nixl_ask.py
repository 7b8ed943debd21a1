"""Two running engines are asked what they are, as they ask each other."""

import threading
from dataclasses import replace

import msgspec
import pytest
import zmq
from test_nixl_record import OURS

ask = pytest.importorskip("vllm_xlayer.connector.nixl.ask", reason="needs vLLM with its NIXL connector")
LAYOUT = {"row_bytes": 4608, "layout": "BLHNC"}


@pytest.fixture
def answering():
    """answering(text) -> address of an engine whose record that is."""
    context, stop, threads = zmq.Context(), threading.Event(), []

    def start(members):
        socket = context.socket(zmq.REP)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        socket.setsockopt(zmq.RCVTIMEO, 50)
        meta = ask.NixlAgentMetadata(
            "id", b"", [0], 0, 1, [4608], [4608], "BLHNC", 16, (0, 0), "CPU", 1, region_members=members
        )
        payload = ask.NixlHandshakePayload("hash", msgspec.msgpack.encode(meta))

        def serve():
            with socket:
                while not stop.is_set():
                    try:
                        asked = msgspec.msgpack.decode(socket.recv())
                    except zmq.Again:
                        continue
                    assert asked == [ask.GET_META_MSG, 0, 0]
                    socket.send_multipart([msgspec.msgpack.encode(payload), b""])

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"127.0.0.1:{port}"

    yield start
    stop.set()
    for thread in threads:
        thread.join()
    context.term()


def record(**changes):
    return [[ask.PROTOCOL, replace(OURS, layout=LAYOUT, **changes).encode()]]


def test_two_engines_that_agree(answering):
    found = ask.compare(answering(record()), answering(record(tp_size=2)))
    assert found["differ"] == []
    assert "tensor_parallel_size 1, rows of 4,608 bytes (BLHNC), 100 of them" in found["engines"][0]
    assert "tensor_parallel_size 2" in found["engines"][1]


def test_what_differs_is_named_with_both_values(answering):
    other = record(must_equal={**OURS.must_equal, "weights": "b" * 32})
    (said,) = ask.compare(answering(record()), answering(other))["differ"]
    assert said == f"weights: here {'a' * 32}, there {'b' * 32}"


def test_an_engine_without_our_connector(answering):
    with pytest.raises(ask.NoAnswer, match="expected a record of xlayer-rows-2, got"):
        ask.record_at(answering([]))


def test_nobody_is_there(monkeypatch):
    monkeypatch.setattr(ask, "SECONDS", 0.05)
    with pytest.raises(ask.NoAnswer, match=r"within 0\.05 s, got nothing"):
        ask.record_at("127.0.0.1:9")

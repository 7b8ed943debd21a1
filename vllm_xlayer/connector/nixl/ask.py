"""What two running engines would agree on: asks each for its record, as they ask each other."""

import msgspec
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
    GET_META_MSG,
    NixlAgentMetadata,
    NixlHandshakePayload,
)

from .record import PROTOCOL, Record, RecordsDiffer, differences

SECONDS = 5.0
"""For an answer; vLLM's engines give each other as long."""


class NoAnswer(RuntimeError):
    """Nothing at an address says what it is; says what was expected there."""


def record_at(address: str) -> Record:
    """The record of rank 0 of an engine, at host:port of its side channel (VLLM_NIXL_SIDE_CHANNEL_...).

    Raises:
        NoAnswer: nobody, or an engine with another connector, is there.
    """
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, int(SECONDS * 1000))
        try:
            socket.connect(f"tcp://{address}")
            socket.send(msgspec.msgpack.encode((GET_META_MSG, 0, 0)))
            answer = socket.recv_multipart()[0]
        except zmq.ZMQError as error:
            # Again, which is what a timeout is, calls itself "Resource temporarily unavailable".
            got = "nothing" if isinstance(error, zmq.Again) else error
            raise NoAnswer(
                f"{address}: expected the side channel of an engine with XLayerNixlConnector (HOST:PORT) to "
                f"answer within {SECONDS:g} s, got {got}"
            ) from error
    try:
        payload = msgspec.msgpack.decode(answer, type=NixlHandshakePayload)
        meta = msgspec.msgpack.decode(payload.agent_metadata_bytes, type=NixlAgentMetadata)
        ((protocol, text),) = meta.region_members
        if protocol != PROTOCOL:
            raise ValueError(f"a record of {protocol}")
        return Record.decode(text)
    except (msgspec.MsgspecError, ValueError, RecordsDiffer) as error:
        raise NoAnswer(f"{address}: expected a record of {PROTOCOL}, got {error}") from error


def compare(first: str, second: str) -> dict[str, list[str]]:
    """{"engines": what each is, "differ": what keeps them from exchanging rows} of two addresses.

    Raises:
        NoAnswer: as `record_at`.
    """
    ours, theirs = record_at(first), record_at(second)
    return {
        "engines": [
            f"{address}: tensor_parallel_size {record.tp_size}, rows of {record.layout['row_bytes']:,} bytes "
            f"({record.layout['layout']}), {record.blocks:,} of them"
            for address, record in ((first, ours), (second, theirs))
        ],
        "differ": list(differences(ours, theirs)),
    }

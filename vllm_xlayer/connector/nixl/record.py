"""What an engine says of its rows before another one may read them, and whether two engines agree.

vLLM's compatibility hash knows names and shapes. It does not know weights, global scales, the order of block
scales or of layers: two engines that differ in those would exchange bytes that mean different things.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

PROTOCOL = "xlayer-rows-2"
"""Raise it when the meaning of a record, of a seal or of a message changes."""
SHOWN = 4
"""Differences that are spelt out in one message."""


class RecordsDiffer(RuntimeError):
    """Two engines must not exchange rows; says what differs, with both values."""


@dataclass(frozen=True)
class Record:
    """One rank of one engine.

    Args:
        must_equal: plain data that shapes the KV of a token, nested by name.
        layout: `LayoutDescriptor.to_dict` of this rank's rows.
        tp_size: ranks of tensor parallelism.
        tp_rank: this one.
        blocks: rows of the pool.
        seals: address of the table of seals (seals.py) in this rank's memory; 0 where seals are off.
        link: `Link.to_dict` of this engine.
    """

    must_equal: Mapping[str, Any]
    layout: Mapping[str, Any]
    tp_size: int
    tp_rank: int
    blocks: int
    seals: int
    link: Mapping[str, Any]

    def encode(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, default=str)

    @classmethod
    def decode(cls, text: str) -> "Record":
        """Reads what `encode` wrote.

        Raises:
            RecordsDiffer: it is no record of this protocol.
        """
        try:
            data = json.loads(text)
            return cls(**{field.name: data[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise RecordsDiffer(f"expected a record of {PROTOCOL}, got one with {error!r}") from error


def check_records(ours: Record, theirs: Record) -> None:
    """Returns if rows of one engine may be used by the other.

    Raises:
        RecordsDiffer: with the first differences, and how many there are.
    """
    wrong = list(differences(ours, theirs))
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise RecordsDiffer(
            "these engines must not exchange rows; start both with the same of: "
            + "; ".join(wrong[:SHOWN] + more)
        )


def differences(ours: Record, theirs: Record) -> Iterator[str]:
    """What must be equal and is not: 'name: here x, there y'."""
    # Through JSON, as theirs came: tuples are lists there, and keys text.
    here = dict(_leaves("", json.loads(ours.encode())["must_equal"]))
    there = dict(_leaves("", json.loads(theirs.encode())["must_equal"]))
    for name in sorted(here.keys() | there.keys()):
        a, b = here.get(name, _MISSING), there.get(name, _MISSING)
        if json.dumps(a) != json.dumps(b):  # as text, since True == 1 == 1.0 otherwise
            yield f"{name}: here {_say(a)}, there {_say(b)}"
    if (ours.seals == 0) != (theirs.seals == 0):
        yield f"row_seals: here {ours.seals != 0}, there {theirs.seals != 0}"


_MISSING = "not given"


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), inner)
    else:
        yield name, value


def _say(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."

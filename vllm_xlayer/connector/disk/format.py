"""One entry of the disk tier: a header that says what the bytes are, and the bytes of one chunk.

    offset 0        8 bytes   magic "XLAYROW" and the format version
           8        4 bytes   length of the JSON text, little-endian
          12                  JSON: identity, key, payload_bytes, payload_xxh3_128; then zeros
        4080       16 bytes   xxh3-128 of the 4080 bytes before
        4096                  the chunk: its blocks in order, of each block the rows of all TP ranks in order

Every byte of the file is covered by a checksum or must be what is expected, and the file must end where the
header says. So what `check_header` and `check_payload` let pass is what was written, for this very engine.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import xxhash

FORMAT_VERSION = 2
"""Goes up when entries written before must not be used any more.

The version is not in the names of folders and files: an entry of an older format is met where a new one would
be, counts against the bound like any other, and goes first, as nobody uses it.
"""
MAGIC = b"XLAYROW" + bytes([FORMAT_VERSION])
OLD_FORMAT = "old format"
HEADER_BYTES = 4096
_TEXT_AT, _SUM_AT = 12, HEADER_BYTES - 16
_MAX_TEXT = _SUM_AT - _TEXT_AT


class EntryError(Exception):
    """An entry cannot be used. ``reason`` is one of a few words, for counting."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class TierIdentity:
    """Whose KV it is. Chunks of engines that differ in any of this are never exchanged."""

    layout: str
    """RowDescriptor.fingerprint: axis order, strides, heads, head sizes, scale order; and whether ranks with
    equal rows have one for all of them."""
    kv_dtype: str
    model: str
    """Name or folder."""
    settings: str
    """Digest of what shapes the values: the model's configuration, dtype, quantization."""
    weights: str
    """weight_files.loaded_weights."""
    tp_size: int
    """The rows of ranks 0 to tp_size-1 lie side by side in an entry, of equal ones the first."""
    block_size: int
    """Tokens."""
    blocks_per_chunk: int
    epoch: str = ""
    """Empty for what may be used after a restart; else private to one engine (see DiskTier.forget)."""

    @cached_property
    def digest(self) -> str:
        """32 hex digits: the folder of this identity's entries. Kept, as every path of an entry begins so."""
        return xxhash.xxh3_128_hexdigest(json.dumps(asdict(self), sort_keys=True).encode())


def encode_header(identity: TierIdentity, key: bytes, payload: memoryview) -> bytes:
    """HEADER_BYTES bytes. ValueError if the identity's texts are too long for it."""
    values = asdict(identity) | {
        "key": key.hex(),
        "payload_bytes": payload.nbytes,
        "payload_xxh3_128": xxhash.xxh3_128_hexdigest(payload),
    }
    text = json.dumps(values, sort_keys=True).encode()
    if len(text) > _MAX_TEXT:
        raise ValueError(f"header: expected at most {_MAX_TEXT} bytes of JSON, got {len(text)}")
    body = (MAGIC + len(text).to_bytes(4, "little") + text).ljust(_SUM_AT, b"\0")
    return body + xxhash.xxh3_128_digest(body)


def decode_header(header: bytes) -> dict[str, Any]:
    """The JSON of a header that is whole.

    Raises:
        EntryError: it is short, damaged or of another format.
    """
    if len(header) != HEADER_BYTES:
        raise EntryError("short", f"expected a header of {HEADER_BYTES} bytes, got {len(header)}")
    if header[:7] == MAGIC[:7] and 0 < header[7] < FORMAT_VERSION:
        raise EntryError(OLD_FORMAT, f"expected version {FORMAT_VERSION}, got {header[7]}")
    if header[: len(MAGIC)] != MAGIC:
        raise EntryError("format", f"expected {MAGIC!r}, got {header[: len(MAGIC)]!r}")
    if xxhash.xxh3_128_digest(header[:_SUM_AT]) != header[_SUM_AT:]:
        raise EntryError("damaged header", "its checksum differs")
    length = int.from_bytes(header[8:_TEXT_AT], "little")
    try:
        values = json.loads(header[_TEXT_AT : _TEXT_AT + length])
    except ValueError as error:
        raise EntryError("damaged header", str(error)) from error
    if not isinstance(values, dict):
        raise EntryError("damaged header", f"expected an object, got {type(values).__name__}")
    return values


def check_header(values: Mapping[str, Any], identity: TierIdentity, key: bytes, payload_bytes: int) -> str:
    """The checksum that the payload must have.

    Args:
        values: what `decode_header` returned.
        payload_bytes: of a chunk of this engine.

    Raises:
        EntryError: it is another engine's, or another key's.
    """
    for field in fields(identity):
        expected, got = getattr(identity, field.name), values.get(field.name)
        if expected != got or type(expected) is not type(got):
            raise EntryError(f"other {field.name}", f"expected {expected!r}, got {got!r}")
    if values.get("key") != key.hex():
        raise EntryError("other key", f"expected {key.hex()}, got {values.get('key')!r}")
    if values.get("payload_bytes") != payload_bytes:
        raise EntryError("other size", f"expected {payload_bytes}, got {values.get('payload_bytes')!r}")
    return str(values.get("payload_xxh3_128"))


def check_payload(payload: Iterable[memoryview | bytes], expected: str) -> None:
    """EntryError if the checksum of the payload, which may come in pieces, is not the header's."""
    digest = xxhash.xxh3_128()
    for piece in payload:
        digest.update(piece)
    if digest.hexdigest() != expected:
        raise EntryError("damaged payload", f"expected xxh3-128 {expected}, got {digest.hexdigest()}")

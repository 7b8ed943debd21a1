"""Entries of the disk tier: every field counts, and sizes are exact."""

import json
from dataclasses import asdict, fields, replace

import pytest
import xxhash

from vllm_xlayer.connector.disk.format import (
    FORMAT_VERSION,
    HEADER_BYTES,
    MAGIC,
    EntryError,
    TierIdentity,
    check_header,
    check_payload,
    decode_header,
    encode_header,
)

IDENTITY = TierIdentity(
    layout="a" * 32, kv_dtype="nvfp4", model="a/model", settings="b" * 32, weights="c" * 32, tp_size=2,
    block_size=16, blocks_per_chunk=4,
)  # fmt: skip
KEY = bytes(range(36))
PAYLOAD = bytes(i % 251 for i in range(1000))


def entry(identity=IDENTITY, key=KEY, payload=PAYLOAD):
    return encode_header(identity, key, memoryview(payload))


def check(header, identity=IDENTITY, key=KEY, payload=PAYLOAD):
    check_payload(
        [payload[:7], payload[7:]], check_header(decode_header(header), identity, key, len(payload))
    )


def test_what_was_written_passes():
    header = entry()
    assert len(header) == HEADER_BYTES
    check(header)


@pytest.mark.parametrize("name", [field.name for field in fields(TierIdentity)])
def test_every_field_of_the_identity_counts(name):
    value = getattr(IDENTITY, name)
    other = replace(IDENTITY, **{name: value + 1 if isinstance(value, int) else value + "x"})
    assert other.digest != IDENTITY.digest
    with pytest.raises(EntryError, match=f"other {name}: expected") as caught:
        check(entry(other))
    assert caught.value.reason == f"other {name}"


def test_the_digest_is_made_once():
    """Every path of an entry begins with it, and a prompt has thousands."""
    assert IDENTITY.digest is IDENTITY.digest
    assert replace(IDENTITY, epoch="other").digest != IDENTITY.digest


def test_key_size_and_payload_count():
    with pytest.raises(EntryError, match="other key"):
        check(entry(), key=KEY[:-1] + b"\0")
    with pytest.raises(EntryError, match="other size"):
        check(entry(), payload=PAYLOAD + b"\0")
    with pytest.raises(EntryError, match="damaged payload"):
        check(entry(), payload=PAYLOAD[:-1] + b"\0")


def test_equal_values_of_another_type_are_not_equal():
    values = decode_header(entry()) | {"tp_size": 2.0}
    with pytest.raises(EntryError, match="other tp_size"):
        check_header(values, IDENTITY, KEY, len(PAYLOAD))


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1, HEADER_BYTES + 1])
def test_a_header_of_another_length(length):
    with pytest.raises(EntryError, match="short"):
        decode_header((entry() + b"\0")[:length])


def entry_of_version(version, identity=IDENTITY, key=KEY, payload=PAYLOAD):
    """A whole entry, built from the definition of version 1, whose header is otherwise that of today."""
    values = asdict(identity) | {
        "key": key.hex(),
        "payload_bytes": len(payload),
        "payload_xxh3_128": xxhash.xxh3_128_hexdigest(payload),
    }
    text = json.dumps(values, sort_keys=True).encode()
    body = (b"XLAYROW" + bytes([version]) + len(text).to_bytes(4, "little") + text).ljust(4080, b"\0")
    return body + xxhash.xxh3_128_digest(body) + payload


def test_an_older_format_is_named():
    """Entries that were written before the identity covered what it covers now."""
    assert FORMAT_VERSION == 2
    old = entry_of_version(1)
    with pytest.raises(EntryError, match="expected version 2, got 1") as caught:
        decode_header(old[:HEADER_BYTES])
    assert caught.value.reason == "old format"
    check(entry_of_version(2)[:HEADER_BYTES])  # nothing but the version was in the way


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, 255])
def test_a_format_that_does_not_exist(version):
    with pytest.raises(EntryError) as caught:
        decode_header(entry_of_version(version)[:HEADER_BYTES])
    assert caught.value.reason == "format"


def test_the_magic_ends_with_the_version():
    assert entry()[:8] == MAGIC == b"XLAYROW\x02"


def test_too_long_names_are_refused():
    with pytest.raises(ValueError, match="expected at most"):
        entry(replace(IDENTITY, model="m" * HEADER_BYTES))


def test_the_identity_is_readable_from_the_header():
    values = decode_header(entry())
    assert {name: values[name] for name in asdict(IDENTITY)} == asdict(IDENTITY)

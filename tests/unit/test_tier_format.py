"""Entries of the disk tier: every field counts, and sizes are exact."""

from dataclasses import asdict, fields, replace

import pytest

from vllm_xlayer.connector.disk_format import (
    HEADER_BYTES,
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
    check_payload(payload, check_header(decode_header(header), identity, key, len(payload)))


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


def test_another_format_version():
    header = bytearray(entry())
    header[7] += 1
    with pytest.raises(EntryError, match="format"):
        decode_header(bytes(header))


def test_too_long_names_are_refused():
    with pytest.raises(ValueError, match="expected at most"):
        entry(replace(IDENTITY, model="m" * HEADER_BYTES))


def test_the_identity_is_readable_from_the_header():
    values = decode_header(entry())
    assert {name: values[name] for name in asdict(IDENTITY)} == asdict(IDENTITY)

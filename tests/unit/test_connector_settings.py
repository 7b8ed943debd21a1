"""kv_connector_extra_config: ours, vLLM's, and what is neither."""

import pytest

from vllm_xlayer.config import VLLMS_SETTINGS, ConfigError, ConnectorSettings
from vllm_xlayer.connector.nixl.settings import VLLMS, NixlSettings, settings_of_both


def test_nothing_is_needed():
    settings = ConnectorSettings.read({})
    assert settings.cpu_bytes_to_use is settings.disk_path is settings.disk_bytes_to_use is None


def test_ours_beside_vllms():
    extra = {"cpu_bytes_to_use": 4e9, "disk_path": "/tier", "disk_bytes_to_use": 8, "blocks_per_chunk": 3}
    settings = ConnectorSettings.read(extra)
    assert settings.model_dump() == {
        "cpu_bytes_to_use": 4_000_000_000,
        "disk_path": "/tier",
        "disk_bytes_to_use": 8,
    }


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"cpu_byte_to_use": 1}, "expected cpu_bytes_to_use, got unknown key 'cpu_byte_to_use'"),
        ({"block_per_chunk": 1}, "expected blocks_per_chunk, got unknown key 'block_per_chunk'"),
        ({"xyz": 1}, "expected one of cpu_bytes_to_use, .*, got unknown key 'xyz'"),
        ({"cpu_bytes_to_use": 0}, "cpu_bytes_to_use: expected bytes .*, got 0"),
        ({"cpu_bytes_to_use": 1.5}, "cpu_bytes_to_use: expected bytes .*, got 1.5"),
        ({"cpu_bytes_to_use": True}, "cpu_bytes_to_use: expected bytes .*, got True"),
        ({"disk_path": 3, "disk_bytes_to_use": 1}, "disk_path: expected the folder .*, got 3"),
        ({"disk_path": "", "disk_bytes_to_use": 1}, "disk_path: expected the folder .*, got ''"),
        ({"disk_path": "/a", "disk_bytes_to_use": "1"}, "disk_bytes_to_use: expected bytes .*, got '1'"),
        ({"disk_path": "/a"}, "disk_bytes_to_use: expected bytes .*, got none"),
        ({"disk_bytes_to_use": 1}, "disk_path: expected the folder .*, got none"),
        ({"sync_load_budget_bytes": 5}, "sync_load_budget_bytes: expected nothing: .*, got 5"),
        ({"canonical_layout": True}, "canonical_layout: expected nothing: .*, got True"),
    ],
)
def test_what_is_refused(extra, message):
    with pytest.raises(ConfigError, match=f"^kv_connector_extra_config: {message}$"):
        ConnectorSettings.read(extra)


@pytest.mark.parametrize("name", VLLMS_SETTINGS)
def test_vllms_keys_are_taken_and_those_that_do_nothing_said(name, caplog):
    ConnectorSettings.read({name: 0})
    silent = bool(VLLMS_SETTINGS[name]) or name in ("canonical_layout", "sync_load_budget_bytes")
    assert (f"{name} does nothing here" in caplog.text) != silent


def test_of_the_hand_over():
    extra = {"row_seals": False, "staging_bytes": 1e6, "read_timeout_seconds": 5}
    assert NixlSettings.read(extra | dict.fromkeys(VLLMS, 1)).model_dump() == extra
    given = NixlSettings.read({"bidirectional_kv_xfer": False})
    assert (given.row_seals, given.staging_bytes, given.read_timeout_seconds) == (True, 256 << 20, 30.0)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"row_seal": True}, "expected row_seals, got unknown key 'row_seal'"),
        ({"num_thread": 1}, "expected num_threads, got unknown key 'num_thread'"),
        ({"xyz": 1}, "expected one of row_seals, .*, got unknown key 'xyz'"),
        ({"row_seals": 1}, "row_seals: expected true or false, .*, got 1"),
        ({"staging_bytes": 0}, "staging_bytes: expected bytes .*, got 0"),
        ({"read_timeout_seconds": 0}, "read_timeout_seconds: expected seconds .*, got 0"),
        ({"decoder_kv_blocks_ttl": 3}, "decoder_kv_blocks_ttl: expected nothing, got 3: rows go .* only"),
    ],
)
def test_what_the_hand_over_refuses(extra, message):
    with pytest.raises(ConfigError, match=f"^XLayerNixlConnector: kv_connector_extra_config: {message}$"):
        NixlSettings.read(extra)


def test_of_hand_over_and_tiers():
    link = {"row_seals": True, "kv_lease_duration": 9, "bidirectional_kv_xfer": False}
    tiers = {"cpu_bytes_to_use": 4e9, "block_size": 48, "canonical_layout": False}
    assert settings_of_both(tiers | link) == (link, tiers)
    assert settings_of_both({}) == ({}, {})
    for key, meant in (("row_seal", "row_seals"), ("cpu_byte_to_use", "cpu_bytes_to_use")):
        with pytest.raises(
            ConfigError, match=f"^XLayerTieredNixl.*: expected {meant}, got unknown .*'{key}'$"
        ):
            settings_of_both(link | {key: 1} | tiers)


def test_no_key_is_of_both():
    link = {*NixlSettings.model_fields, *VLLMS}
    assert not link & {*ConnectorSettings.model_fields, *VLLMS_SETTINGS}


def test_vllms_keys_are_those_that_it_reads():
    """Of every key that vLLM's source asks for, in what OffloadingConnector uses here."""
    import inspect
    import re

    pytest.importorskip("vllm")
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading import config, scheduler
    from vllm.v1.kv_offload import base, factory
    from vllm.v1.kv_offload.cpu import spec
    from vllm.v1.kv_offload.tiering import spec as tiering

    source = "".join(map(inspect.getsource, (config, scheduler, base, factory, spec, tiering)))
    read = set(re.findall(r'extra_config\.get\(\s*"(\w+)"', source))
    assert len(read) > 8 and read - {"cpu_bytes_to_use"} <= set(VLLMS_SETTINGS)

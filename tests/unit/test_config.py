"""Settings: where they come from, and what is refused."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from vllm_xlayer.config import VARIABLES, Config, ConfigError
from vllm_xlayer.nvfp4 import ScaleChoice


def test_defaults():
    config = Config.load(env={})
    assert (config.debug, config.gather_workspace_bytes) == (False, 256 << 20)
    assert config.scale_choice is ScaleChoice.BEST_OF_9


def test_all_settings_from_the_environment():
    env = {
        "VLLM_XLAYER_DEBUG": "1",
        "VLLM_XLAYER_GATHER_WORKSPACE_BYTES": "200",
        "VLLM_XLAYER_SCALE_CHOICE": "amax_6",
        "VLLM_XLAYER_KV_SCALES": __file__,
        "VLLM_XLAYER_NEWEST_TOKENS": "64",
        "VLLM_XLAYER_CUDA": "0",
        "VLLM_XLAYER_ARCHS": "90",
        "VLLM_XLAYER_COMMIT": "0123abc",
        "VLLM_PLUGINS": "other",
    }
    assert Config.load(env=env) == Config(True, 200, ScaleChoice.AMAX_6, Path(__file__), 64)


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("VLLM_XLAYER_GATHER_WORKSPACE_BYTES", "321")
    assert Config.load().gather_workspace_bytes == 321


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"VLLM_XLAYER_DEBUGG": "1"}, "environment: expected one of VLLM_XLAYER_DEBUG,"),
        (
            {"VLLM_XLAYER_NEWEST_TOKENS": "24"},
            "VLLM_XLAYER_NEWEST_TOKENS: expected 0, 16, 32, 64 or 128, got '24'",
        ),
        ({"VLLM_XLAYER_DEBUG": "true"}, "VLLM_XLAYER_DEBUG: expected 0 or 1, got 'true'"),
        ({"VLLM_XLAYER_DEBUG": ""}, "VLLM_XLAYER_DEBUG: expected 0 or 1, got ''"),
        (
            {"VLLM_XLAYER_GATHER_WORKSPACE_BYTES": "4GiB"},
            "VLLM_XLAYER_GATHER_WORKSPACE_BYTES: expected a positive number of bytes, got '4GiB'",
        ),
        ({"VLLM_XLAYER_GATHER_WORKSPACE_BYTES": " 5 "}, "got ' 5 '"),
        ({"VLLM_XLAYER_GATHER_WORKSPACE_BYTES": "٣"}, "got '٣'"),
        ({"VLLM_XLAYER_GATHER_WORKSPACE_BYTES": "0"}, "got '0'"),
        (
            {"VLLM_XLAYER_SCALE_CHOICE": "best"},
            "VLLM_XLAYER_SCALE_CHOICE: expected one of amax_6, four_over_six, best_of_9, got 'best'",
        ),
        (
            {"VLLM_XLAYER_KV_SCALES": "no/such.json"},
            "VLLM_XLAYER_KV_SCALES: expected a file, found none: 'no/such.json'",
        ),
    ],
)
def test_refused(env, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config.load(env=env)


def test_every_variable_is_described():
    """docs/configuration.md is made from these."""
    assert list(VARIABLES) == [field.name for field in fields(Config)]
    defaults = {
        "debug": "0",
        "gather_workspace_bytes": "256 MiB",
        "scale_choice": "best_of_9",
        "kv_scales": "none",
        "newest_tokens": "64 where they can be",
    }
    assert {name: default for name, (default, _) in VARIABLES.items()} == defaults
    assert Config() == Config.load({})

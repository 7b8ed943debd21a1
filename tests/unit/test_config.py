"""Settings: where they come from, and what is refused."""

import re

import pytest

from vllm_xlayer.config import Config, ConfigError
from vllm_xlayer.nvfp4 import ScaleChoice


def test_defaults():
    config = Config.load(env={})
    assert config == Config()
    assert (config.debug, config.host_bytes, config.gather_workspace_bytes) == (False, 4 << 30, 256 << 20)
    assert config.scale_choice is ScaleChoice.BEST_OF_9
    assert Config.load(env={}, default_host_bytes=5).host_bytes == 5


def test_all_settings_from_the_environment():
    env = {
        "VLLM_XLAYER_DEBUG": "1",
        "VLLM_XLAYER_HOST_BYTES": "100",
        "VLLM_XLAYER_GATHER_WORKSPACE_BYTES": "200",
        "VLLM_XLAYER_SCALE_CHOICE": "amax_6",
        "VLLM_XLAYER_CUDA": "0",
        "VLLM_PLUGINS": "other",
    }
    assert Config.load(env=env, default_host_bytes=5) == Config(True, 100, 200, ScaleChoice.AMAX_6)


def test_the_extra_config_wins_and_leaves_others_keys_alone():
    env = {"VLLM_XLAYER_HOST_BYTES": "100", "VLLM_XLAYER_SCALE_CHOICE": "amax_6"}
    extra = {"host_bytes": 7, "scale_choice": "four_over_six", "eviction_policy": "arc"}
    config = Config.load(extra, env, other_keys={"eviction_policy"})
    assert (config.host_bytes, config.scale_choice) == (7, ScaleChoice.FOUR_OVER_SIX)
    assert Config.load({"gather_workspace_bytes": "12"}, env).gather_workspace_bytes == 12
    assert Config.load({}, env).host_bytes == 100


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("VLLM_XLAYER_HOST_BYTES", "321")
    assert Config.load().host_bytes == 321


@pytest.mark.parametrize(
    ("env", "extra", "message"),
    [
        ({"VLLM_XLAYER_DEBUGG": "1"}, {}, "environment: expected one of VLLM_XLAYER_DEBUG,"),
        ({"VLLM_XLAYER_DEBUG": "true"}, {}, "VLLM_XLAYER_DEBUG: expected 0 or 1, got 'true'"),
        ({"VLLM_XLAYER_DEBUG": ""}, {}, "VLLM_XLAYER_DEBUG: expected 0 or 1, got ''"),
        (
            {"VLLM_XLAYER_HOST_BYTES": "4GiB"},
            {},
            "VLLM_XLAYER_HOST_BYTES: expected a positive number of bytes, got '4GiB'",
        ),
        ({"VLLM_XLAYER_HOST_BYTES": " 5 "}, {}, "got ' 5 '"),
        ({"VLLM_XLAYER_HOST_BYTES": "٣"}, {}, "got '٣'"),
        ({"VLLM_XLAYER_HOST_BYTES": "0"}, {}, "got 0"),
        ({"VLLM_XLAYER_HOST_BYTES": "bad"}, {"host_bytes": 7}, "got 'bad'"),
        (
            {},
            {"host_byte": 1},
            "expected one of host_bytes, gather_workspace_bytes, scale_choice, got host_byte",
        ),
        ({}, {"debug": True}, "got debug"),
        (
            {},
            {"host_bytes": True},
            "kv_connector_extra_config.host_bytes: expected a positive number of bytes, got True",
        ),
        ({}, {"host_bytes": 1.5}, "got 1.5"),
        ({}, {"gather_workspace_bytes": -1}, "got -1"),
        ({}, {"gather_workspace_bytes": None}, "got None"),
        ({}, {"scale_choice": "best"}, "expected one of amax_6, four_over_six, best_of_9, got 'best'"),
        ({}, {"scale_choice": 2}, "got 2"),
        ({}, {"scale_choice": ["amax_6"]}, "got ['amax_6']"),
    ],
)
def test_what_is_wrong_is_said(env, extra, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config.load(extra, env)

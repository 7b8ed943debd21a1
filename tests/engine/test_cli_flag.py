"""--kv-connector in vLLM's own parser, and what happens to users who ask for nothing."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def parse(reference_platform, tmp_path_factory):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    model = str(tmp_path_factory.mktemp("model"))  # a name would be looked for, where vLLM may not go online

    def parsed(*arguments: str):
        return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", model, *arguments]))

    return parsed


def test_the_short_form_is_the_long_one(parse):
    short = parse("--kv-connector", "XLayerConnector").kv_transfer_config
    assert (short.kv_connector, short.kv_role) == ("XLayerConnector", "kv_both")
    long = '{"kv_connector": "XLayerConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"a": 1}}'
    both = parse("--kv-connector", "XLayerConnector", "--kv-transfer-config", long).kv_transfer_config
    assert (both.kv_connector, both.kv_role) == ("XLayerConnector", "kv_both")
    assert both.kv_connector_extra_config == {"a": 1}


def test_it_fills_in_a_config_without_a_name(parse):
    config = parse(
        "--kv-connector", "XLayerConnector", "--kv-transfer-config", '{"kv_connector_extra_config": {"a": 1}}'
    ).kv_transfer_config
    assert (config.kv_connector, config.kv_role) == ("XLayerConnector", "kv_both")
    assert config.kv_connector_extra_config == {"a": 1}


def test_without_it_nothing_is_configured(parse):
    assert parse().kv_transfer_config is None


def test_they_must_agree(parse):
    other = '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}'
    with pytest.raises(ValueError, match="got XLayerConnector and OffloadingConnector"):
        parse("--kv-connector", "XLayerConnector", "--kv-transfer-config", other)


def test_an_unknown_name_is_refused_with_the_known_ones(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--kv-connector", "NoSuchConnector")
    said = capsys.readouterr().err
    assert "XLayerConnector" in said and "got 'NoSuchConnector'" in said


LOOK = """
import json, sys
sys.path.insert(0, sys.argv[1])
from model_fixture import random_prompts, vllm_greedy
from vllm import LLM

llm = LLM(sys.argv[2], skip_tokenizer_init=True, dtype="float32", max_model_len=256,
          kv_cache_memory_bytes=4 << 20)
context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
caches = [layer.kv_cache for layer in context.values()]
print("REPORT" + json.dumps({
    "shapes": [list(c.shape) for c in caches],
    "strides": [list(c.stride()) for c in caches],
    "contiguous": [c.is_contiguous() for c in caches],
    "backends": [type(layer.impl).__name__ for layer in context.values()],
    "tokens": vllm_greedy(llm, random_prompts([5, 100, 33]), 8),
}))
"""


def test_nothing_changes_for_those_who_do_not_ask(reference_platform, tiny_llama, tmp_path):
    """The same engine with the general plugin (patches, connector) and without it."""

    def look(plugins: str) -> dict:
        environment = os.environ | {"VLLM_PLUGINS": plugins, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", LOOK, os.path.dirname(__file__), str(tiny_llama)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.partition("REPORT")[2])

    without = look("vllm_xlayer_cpu")
    assert look("vllm_xlayer_cpu,vllm_xlayer") == without
    assert without["contiguous"] == [True, True]  # not in rows

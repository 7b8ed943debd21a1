"""A config file made for vLLM's OffloadingConnector serves with XLayerConnector when its name is changed."""

import re
from pathlib import Path

import pytest
import vllm
import vllm.v1.kv_offload.cpu.spec
import yaml
from faults import check, forget_device_cache, live_connector, settle, without_connector
from model_fixture import ON_GPU, random_prompts
from vllm.v1.kv_offload.cpu.policies.lru import LRUCachePolicy

from vllm_xlayer.config import VLLMS_SETTINGS

NUM_TOKENS = 8
PROMPTS = random_prompts([5, 100, 16, 33, 200, 1])
THEIRS, OURS = "OffloadingConnector", "XLayerConnector"
BASE = {"cpu_bytes_to_use": 16 << 20}
pytestmark = pytest.mark.anywhere

ACCEPTED = [
    {},
    {"cpu_bytes_to_use": 1.6e7},
    {"block_size": 32},
    {"blocks_per_chunk": 3},
    {"eviction_policy": "arc"},
    {"eviction_policy": "RecencyBesideThis", "cache_policy_module_path": "test_config_file"},
    {"offload_prompt_only": False},
    {"store_threshold": 2, "max_tracker_size": 1000},
    {"self_describing_kv_events": True},
    {"spec_name": "CPUOffloadingSpec"},
    {"spec_name": "RowsBesideThis", "spec_module_path": "test_config_file"},
    {"spec_name": "TieringOffloadingSpec", "secondary_tiers": []},
]
REFUSED = [
    ({"cpu_bytes_to_use": 0}, "cpu_bytes_to_use"),
    ({"block_size": 24}, r"block_size'?=24 .*must be a multiple of .* \(16 tokens\)"),
    ({"block_size": 32, "blocks_per_chunk": 2}, "only one of"),
    ({"blocks_per_chunk": 0}, "blocks_per_chunk"),
    ({"eviction_policy": "random"}, "random"),
    ({"spec_name": "NoSuchSpec"}, "NoSuchSpec"),
]
KEYS = {key for extra in ACCEPTED for key in extra}
SINCE_0_33 = {"sync_load_budget_bytes", "tier_poll_interval_s"}
OF_TIERS = {"enable_telemetry"}
"""What tiers of vLLM's own read, from settings that TieringOffloadingSpec gives them."""


class RowsBesideThis(vllm.v1.kv_offload.cpu.spec.CPUOffloadingSpec):
    """A user's own spec."""


class RecencyBesideThis(LRUCachePolicy):
    """A user's own policy."""


@pytest.fixture(scope="module")
def answers(make_llm, tiny_llama):
    return without_connector(make_llm, tiny_llama, PROMPTS, NUM_TOKENS)


def config_file(folder, extra):
    transfer = {"kv_connector": THEIRS, "kv_role": "kv_both", "kv_connector_extra_config": BASE | extra}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"kv-transfer-config": transfer, "kv-cache-dtype": "auto"}))
    return path


def settings_of(path, model):
    """What `vllm serve --config` makes of it. (Without a model vLLM looks for its default one.)"""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("--config")
    given = parser.parse_args(["--config", str(path), "--model", str(model)])
    arguments = AsyncEngineArgs.from_cli_args(given)
    return dict(kv_transfer_config=arguments.kv_transfer_config, kv_cache_dtype=arguments.kv_cache_dtype)


def swap(path):
    text = path.read_text()
    assert text.count(THEIRS) == 1
    path.write_text(text.replace(THEIRS, OURS))


def needs_gpu(extra):
    return extra.get("spec_name", "CPUOffloadingSpec") != "CPUOffloadingSpec"


@pytest.mark.parametrize("extra", ACCEPTED, ids=lambda extra: ", ".join(extra) or "as it is")
def test_only_the_name_is_changed(make_llm, tiny_llama, answers, tmp_path, extra):
    path = config_file(tmp_path, extra)
    if ON_GPU:
        check(make_llm(tiny_llama, **settings_of(path, tiny_llama)), PROMPTS, answers)
    swap(path)
    if not ON_GPU and needs_gpu(extra):
        # vLLM's own workers, which ours leaves to do what the user asked for.
        with pytest.raises(Exception, match="only supported on CUDA-alike"):
            make_llm(tiny_llama, **settings_of(path, tiny_llama))
        return
    llm = make_llm(tiny_llama, **settings_of(path, tiny_llama))
    assert type(live_connector()).__name__ == OURS
    for _ in range(2):
        check(llm, PROMPTS, answers)
        if needs_gpu(extra):
            return  # not our tier's accounts
        forget_device_cache(llm)
    if "store_threshold" in extra:  # vLLM counts lookups, which end at the first block that is missing
        assert sum(check(llm, PROMPTS, answers)) > 0
        return
    span = 16 * live_connector().connector_worker.worker.blocks_per_chunk
    assert check(llm, PROMPTS, answers) == [(len(p) - 1) // span * span for p in PROMPTS]
    settle(llm)


@pytest.mark.parametrize(
    ("extra", "sentence"), REFUSED, ids=lambda v: ", ".join(v) if type(v) is dict else ""
)
def test_what_is_refused_is_said(make_llm, tiny_llama, tmp_path, extra, sentence):
    path = config_file(tmp_path, extra)
    swap(path)
    with pytest.raises(Exception, match=sentence):
        make_llm(tiny_llama, **settings_of(path, tiny_llama))


def test_every_key_of_vllms_is_tried():
    """As its sources name them."""
    root = Path(vllm.__file__).parent
    sources = [
        *(root / "v1/kv_offload").rglob("*.py"),
        *(root / "distributed/kv_transfer/kv_connector/v1/offloading").rglob("*.py"),
    ]
    found = set()
    for source in sources:
        found.update(re.findall(r'extra_config\s*\.get\(\s*"(\w+)"', source.read_text()))
    tried = KEYS | {"cpu_bytes_to_use", *(name for name, text in VLLMS_SETTINGS.items() if not text)}
    found -= OF_TIERS
    assert found | SINCE_0_33 == tried and found & SINCE_0_33 in (set(), SINCE_0_33)

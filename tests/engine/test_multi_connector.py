"""XLayerConnector as one of several, in vLLM's MultiConnector."""

import pytest
from disk_fixture import ROW, WHOLE_BLOCKS
from faults import check, core_of, live_connector, without_connector
from model_fixture import random_prompts
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from vllm_xlayer.compat.engine import come_to_rest, empty_device_cache
from vllm_xlayer.connector.connector import XLayerConnector
from vllm_xlayer.connector.copy import directions, transfers
from vllm_xlayer.connector.host.accounts import check_accounts

NUM_TOKENS = 8
PROMPTS = random_prompts([5, 100, 16, 33, 200, 1])


class Silent(KVConnectorBase_V1, SupportsHMA):
    """Has nothing and stores nothing; wishes for the layout that its settings name."""

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config):
        return vllm_config.kv_transfer_config.kv_connector_extra_config.get("layout")

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        return 0, False

    def build_connector_meta(self, scheduler_output):
        return KVConnectorMetadata()

    def request_finished_all_groups(self, request, block_ids):
        return False, None

    def nothing(self, *args, **kwargs):
        pass

    start_load_kv = wait_for_layer_load = save_kv_layer = wait_for_save = update_state_after_alloc = nothing


def both(layout=None, **policy):
    silent = dict(
        kv_connector="Silent", kv_connector_module_path=__name__, kv_role="kv_both",
        kv_connector_extra_config={"layout": layout},
    )  # fmt: skip
    ours = dict(
        kv_connector="XLayerConnector", kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": 256 * ROW},
    )  # fmt: skip
    return dict(
        kv_connector="MultiConnector", kv_role="kv_both",
        kv_connector_extra_config={"connectors": [silent, ours]}, **policy,
    )  # fmt: skip


def forget(llm):
    """So that what is not restored shows."""
    empty_device_cache(llm)
    for connector in live_connector().sub_connectors:
        if isinstance(connector, XLayerConnector):
            connector.pool.fill_(0xFF)


def refuse(*_):
    raise RuntimeError("injected copy error")


def test_prompts_are_restored_and_failed_loads_computed(make_llm, tiny_llama, monkeypatch):
    answers = without_connector(make_llm, tiny_llama, PROMPTS, NUM_TOKENS)
    llm = make_llm(tiny_llama, kv_transfer_config=both(kv_load_failure_policy="recompute"))
    check(llm, PROMPTS, answers)
    forget(llm)
    assert check(llm, PROMPTS, answers) == WHOLE_BLOCKS
    forget(llm)
    monkeypatch.setattr(transfers.ops, "copy_blocks", refuse)
    check(llm, PROMPTS, answers)
    (ours,) = core_of(llm).scheduler.connector.sub_connectors[1:]
    assert ours.connector_scheduler.manager.loads_failed > 0
    come_to_rest(llm)
    check_accounts(ours.connector_scheduler, idle=True)


def test_the_policy_for_failed_loads_is_said(caplog_vllm):
    """It is MultiConnector's, and one of its connectors cannot change it."""
    KVConnectorFactory.get_connector_class(KVTransferConfig(**both()))
    (said,) = [record for record in caplog_vllm.records if "kv_load_failure_policy" in record.getMessage()]
    assert "recompute" in said.getMessage()


def test_another_layout_is_refused_with_both_names(make_llm, tiny_llama):
    with pytest.raises(ValueError, match="Silent asks for LBHNC, XLayerConnector asks for BLHNC"):
        make_llm(tiny_llama, kv_transfer_config=both("LBHNC"))


@pytest.mark.parametrize("follows", [False, True])
def test_loads_are_early_beside_connectors_that_follow_the_stream(make_llm, tiny_llama, monkeypatch, follows):
    """Of others nobody knows when they write to blocks that are given to them."""
    made = []
    real = directions.make_direction

    def make_direction(src, dst, device, early=False):
        made.append(early)
        return real(src, dst, device, early)

    monkeypatch.setattr(directions, "make_direction", make_direction)
    monkeypatch.setattr(Silent, "loads_follow_streams", follows, raising=False)
    make_llm(tiny_llama, kv_transfer_config=both())
    assert made == [False, follows]  # stores, loads

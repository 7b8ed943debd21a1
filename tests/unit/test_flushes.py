"""What a step's stores copy from is copied before model runner V2 zeroes or overwrites it."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from vllm_xlayer.compat.private_connector import RUNNER_V2
from vllm_xlayer.connector import flushes
from vllm_xlayer.patches import flushes as patch

MODULE, _, NAME = RUNNER_V2.owner.partition(":")


def make(connector="XLayerConnector"):
    """A connector is made, as vLLM does; returns what vLLM's factory was told."""
    transfer = SimpleNamespace(has_connector=lambda name: name == connector)
    config = SimpleNamespace(kv_transfer_config=transfer)

    def original(cls, config, role):
        return config.kv_transfer_config, role

    return patch.see_to_the_runner(original, None, config=config, role="role") == (transfer, "role")


class Connector:
    def __init__(self, events):
        self.events = events

    def before_blocks_change(self, metadata):
        self.events.append(("flushed", metadata))


@pytest.fixture
def events(monkeypatch):
    """What happens, in order; with a runner V2 in this process, and a connector of ours."""
    events = []

    class Runner:
        def update_requests(self, scheduler_output):
            events.append(("zeroed", scheduler_output.new_block_ids_to_zero))
            return "result"

    module = ModuleType(MODULE)
    setattr(module, NAME, Runner)
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr(flushes, "_first", False)
    _serve(monkeypatch, Connector(events))
    return events


def _serve(monkeypatch, connector):
    import vllm.distributed.kv_transfer as transfer

    monkeypatch.setattr(transfer, "get_kv_transfer_group", lambda: connector)
    monkeypatch.setattr(transfer, "has_kv_transfer_group", lambda: connector is not None)


def _step(metadata):
    runner = getattr(sys.modules[MODULE], NAME)()
    return runner.update_requests(SimpleNamespace(kv_connector_metadata=metadata, new_block_ids_to_zero=[7]))


def test_stores_are_waited_for_before_blocks_are_zeroed(events):
    assert make() and flushes.flushed_first()
    assert make()  # once more: nothing changes
    assert _step("metadata") == "result"
    assert events == [("flushed", "metadata"), ("zeroed", [7])]


@pytest.mark.parametrize("name", ["XLayerConnector", "XLayerTieredNixlConnector"])
def test_below_multi_connector_ours_gets_its_own(events, monkeypatch, name):
    others = SimpleNamespace()
    _serve(monkeypatch, SimpleNamespace(_connectors=[others, Connector(events)]))
    make(name)
    _step(SimpleNamespace(metadata=["theirs", "ours"]))
    assert events == [("flushed", "ours"), ("zeroed", [7])]


def test_without_a_connector_or_metadata_the_runner_does_what_it_did(events, monkeypatch):
    make()
    _step(None)
    _serve(monkeypatch, None)
    _step("metadata")
    assert events == [("zeroed", [7])] * 2


def test_another_runner_is_left_alone_and_not_counted_on(events, monkeypatch):
    class Other:
        def update_requests(self, something_else):
            events.append("original")

    monkeypatch.setattr(sys.modules[MODULE], NAME, Other)
    original = Other.update_requests
    make()
    assert Other.update_requests is original and not flushes.flushed_first()


def test_nothing_changes_for_other_connectors(events):
    original = getattr(sys.modules[MODULE], NAME).update_requests
    assert make("OffloadingConnector")
    assert getattr(sys.modules[MODULE], NAME).update_requests is original and not flushes.flushed_first()


def test_models_whose_blocks_are_zeroed_are_refused_where_nobody_calls_in_time(monkeypatch):
    from vllm_xlayer.connector.connector import XLayerConnector
    from vllm_xlayer.connector.limits import NotServedError

    monkeypatch.setattr(flushes, "_first", False)
    connector = XLayerConnector.__new__(XLayerConnector)
    connector.connector_worker, connector.zeroed_early = object(), True
    with pytest.raises(NotServedError, match=r"model runner V2: .* set VLLM_USE_V2_MODEL_RUNNER=0"):
        connector.register_kv_caches({})
    flushes.expect_flushes_first()
    connector.layout = SimpleNamespace(groups=[], row_bytes=1)
    with pytest.raises(IndexError):  # it goes on, to caches that are not there
        connector.register_kv_caches({})

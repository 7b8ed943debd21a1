"""What the two connectors in XLayerTieredNixlConnector are told, without an engine."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorTransferResults,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks

from vllm_xlayer.connector.connector import XLayerConnector
from vllm_xlayer.connector.nixl.connector import XLayerNixlConnector
from vllm_xlayer.connector.nixl.parts import Joining, Parts
from vllm_xlayer.connector.nixl.tiered import TieredNixlMetadata, XLayerTieredNixlConnector

REQUEST = SimpleNamespace(request_id="r")


class One:
    """Stands in for one of the two."""

    def __init__(self, tokens=0, is_async=True, groups=(0,)):
        self.answer, self.groups, self.told = (tokens, is_async and bool(tokens)), groups, []
        self.results = KVConnectorTransferResults()

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        return self.answer

    def get_loaded_kv_cache_group_ids(self, request):
        return self.groups

    def get_external_cache_hit_sources(self, request, num_external_tokens):
        return {id(self): num_external_tokens} if num_external_tokens else {}

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        self.told.append(([list(group) for group in blocks.blocks], num_external_tokens))

    def request_finished_all_groups(self, request, block_ids):
        return False, None

    def build_connector_meta(self, scheduler_output):
        return KVConnectorMetadata()

    def bind_connector_metadata(self, connector_metadata):
        pass

    def get_transfer_results(self, finished_req_ids):
        results, self.results = self.results, KVConnectorTransferResults()
        return results

    def get_block_ids_with_load_errors(self):
        return {1, 2}


def make(link, tiers, block_sizes=(16,)):
    connector = object.__new__(XLayerTieredNixlConnector)
    connector.link, connector.tiers, connector._connectors = link, tiers, [link, tiers]
    connector.block_sizes, connector.parts, connector.begun = list(block_sizes), {}, set()
    connector.joining, connector._extra_async_saves = Joining(), {}
    connector._all_support_hma, connector._requests_to_connector = True, {}
    connector._connector_metadata = None
    return connector


def allocated(*counts):
    """Blocks of each group, by number."""
    return KVCacheBlocks(tuple([f"{group}.{i}" for i in range(n)] for group, n in enumerate(counts)))


def blocks(group, first, last):
    return [f"{group}.{i}" for i in range(first, last)]


def begun(connector):
    return connector.build_connector_meta(None).both


def test_each_is_told_of_its_part():
    link, tiers = One(81), One(48)
    connector = make(link, tiers)
    assert connector.get_num_new_matched_tokens(REQUEST, 16) == (81, True)
    assert connector.parts == {"r": Parts(16, 48, 33)}
    connector.update_state_after_alloc(REQUEST, allocated(7), 81)
    assert tiers.told == [([blocks(0, 0, 7)], 48)], "it counts blocks from the prompt's begin"
    assert link.told == [([blocks(0, 4, 7)], 33)], "it reads all that it is shown"
    assert begun(connector) == {"r"} and begun(connector) == frozenset()
    assert connector.get_external_cache_hit_sources(REQUEST, 81) == {id(tiers): 48, id(link): 33}
    connector.update_state_after_alloc(REQUEST, allocated(8), 0)  # it goes on
    assert tiers.told[1][1] == link.told[1][1] == 0 and begun(connector) == frozenset()
    connector.request_finished_all_groups(REQUEST, ([],))
    assert not connector.parts


def test_groups_of_other_block_sizes_are_cut_at_the_same_token():
    link, tiers = One(97), One(64)
    connector = make(link, tiers, (16, 32))
    connector.get_num_new_matched_tokens(REQUEST, 0)
    connector.update_state_after_alloc(REQUEST, allocated(7, 4), 97)
    assert link.told == [([blocks(0, 4, 7), blocks(1, 2, 4)], 33)] and tiers.told[0][1] == 64


@pytest.mark.parametrize(
    ("link", "tiers", "loaded", "told"),
    [
        (One(97), One(0), (97, True), (97, 0)),
        (One(0), One(48), (48, True), (0, 48)),
        (One(0), One(48, is_async=False), (48, False), (0, 48)),
        (One(97), One(48, is_async=False), (97, True), (97, 0)),
        (One(96), One(96), (96, True), (0, 96)),  # the link tells the other engine that nothing is read
        (One(97), One(40), (97, True), (97, 0)),  # within a block
        (One(0), One(0), (0, False), (0, 0)),
    ],
)
def test_one_of_them_has_it_alone(link, tiers, loaded, told):
    connector = make(link, tiers)
    assert connector.get_num_new_matched_tokens(REQUEST, 0) == loaded
    connector.update_state_after_alloc(REQUEST, allocated(7), loaded[0])
    assert (link.told, tiers.told) == tuple([([blocks(0, 0, 7)], tokens)] for tokens in told)
    assert begun(connector) == frozenset()


@pytest.mark.parametrize(("wanted", "told"), [(0, (0, 0)), (80, (80, 0))])
def test_vllm_wants_less_than_was_offered(wanted, told):
    link, tiers = One(97), One(48)
    connector = make(link, tiers)
    connector.get_num_new_matched_tokens(REQUEST, 0)
    connector.update_state_after_alloc(REQUEST, allocated(7), wanted)
    assert (link.told, tiers.told) == tuple([([blocks(0, 0, 7)], tokens)] for tokens in told)
    assert begun(connector) == frozenset()
    assert sum(connector.get_external_cache_hit_sources(REQUEST, wanted).values()) == wanted


def test_who_does_not_know_yet_is_waited_for():
    link, tiers = One(97), One(48)
    connector = make(link, tiers)
    connector.get_num_new_matched_tokens(REQUEST, 0)
    tiers.answer = (None, False)
    assert connector.get_num_new_matched_tokens(REQUEST, 0) == (None, False)
    assert not connector.parts, "what was cut before does not hold any more"


def test_blocks_that_one_of_two_leaves_are_zeroed():
    connector = make(One(97, groups=(0, 1, 3)), One(48, groups=(0, 1, 2)))
    connector.get_num_new_matched_tokens(REQUEST, 0)
    assert connector.get_loaded_kv_cache_group_ids(REQUEST) == (0, 1)
    connector.tiers.answer = (0, False)
    connector.get_num_new_matched_tokens(REQUEST, 0)
    assert connector.get_loaded_kv_cache_group_ids(REQUEST) == (0, 1, 3)


def test_workers_report_whole_requests():
    link, tiers = One(), One()
    connector = make(link, tiers)
    meta = TieredNixlMetadata((KVConnectorMetadata(), KVConnectorMetadata()), None, frozenset({"a", "b"}))
    connector.bind_connector_metadata(meta)
    link.results = KVConnectorTransferResults({"sent"}, {"a", "b", "c"}, {"b"})
    results = connector.get_transfer_results(set())
    assert (results.finished_sending, results.finished_recving) == ({"sent"}, {"c"})
    assert not results.failed_recving, "its blocks may still be written to"
    tiers.results = KVConnectorTransferResults(set(), {"a", "b"}, set())
    results = connector.get_transfer_results(set())
    assert (results.finished_recving, results.failed_recving) == ({"a", "b"}, {"b"})
    assert connector.get_block_ids_with_load_errors() == set()


def test_both_follow_the_models_stream():
    """So that loads of the tiers may be early beside the link's."""
    assert XLayerNixlConnector.loads_follow_streams and XLayerConnector.loads_follow_streams

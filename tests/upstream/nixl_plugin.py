"""A plugin of pytest: vLLM's own unit tests of its NIXL connector, with XLayerNixlConnector in its place.

benchmarks/upstream_nixl.py runs them. These tests make half of a worker by hand, as vLLM's own is made: its
descriptors, and a peer's metadata. `Worker` makes by hand what ours has beside that; what the tests are about
(requests, leases, failures, reports, notifications) is all ours and vLLM's.
"""

import os
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch

OURS = "UPSTREAM_NIXL_OURS"
"""Set in the environment where our classes take the place of vLLM's."""
NIXL = "vllm.distributed.kv_transfer.kv_connector.v1.nixl"
MODULES = ("", ".connector", ".scheduler", ".worker", ".pull_scheduler", ".pull_worker")


def pytest_configure(config):
    for mark in ("skip_global_cleanup", "cpu_test"):
        config.addinivalue_line("markers", f"{mark}: vLLM's")
    # Imported by a file whose other tests do not need it.
    sys.modules.setdefault("ray", ModuleType("ray"))
    if os.environ.get(OURS):
        _substitute()


@pytest.fixture
def dist_init():
    """One rank of a group of one."""
    from vllm.config import VllmConfig, get_current_vllm_config_or_none, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    current = get_current_vllm_config_or_none() or VllmConfig()
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(current):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        cleanup_dist_env_and_memory()


@pytest.fixture
def default_vllm_config():
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


def _substitute():
    """Before the tests are imported, so that each name they import is ours."""
    from vllm_xlayer.connector.nixl import connector as ours

    scheduler, worker = _scheduler(), _worker()
    # Plans of these tests have no tensors, from which the place of a page is known.
    ours.negotiate_rows = lambda _, plan: SimpleNamespace(descriptor=SimpleNamespace(uniform=_rows(plan)))
    ours.RowNixlScheduler = scheduler
    ours.RowNixlWorker = lambda config, engine, plan, layout, settings: worker(config, engine, plan)
    # Their checkpoint is a configuration without weights.
    import_module("vllm_xlayer.connector.nixl.engine").weights_digest = lambda *_, **__: "none"
    in_place_of = {
        "NixlConnector": ours.XLayerNixlConnector,
        "NixlPullConnector": ours.XLayerNixlConnector,
        "NixlConnectorScheduler": scheduler,
        "NixlPullConnectorScheduler": scheduler,
        "NixlConnectorWorker": worker,
        "NixlPullConnectorWorker": worker,
    }
    for module in (import_module(NIXL + name) for name in MODULES):
        for name in in_place_of.keys() & vars(module).keys():
            setattr(module, name, in_place_of[name])


def _rows(plan):
    """Rows of a plan's groups."""
    from vllm_xlayer.compat.plan import cache_spec
    from vllm_xlayer.layout import Layout, LayoutDescriptor

    groups = [cache_spec(group.layer_names, group.kv_cache_spec) for group in plan.kv_cache_groups]
    return LayoutDescriptor(Layout.BLHNC, tuple(groups))


def _scheduler():
    from vllm_xlayer.connector.nixl.scheduler import RowNixlScheduler
    from vllm_xlayer.connector.nixl.stats import RowNixlStats

    class Scheduler(RowNixlScheduler):
        """Some tests make one without its constructor."""

        to_seal = cached_property(lambda self: {})
        stats = cached_property(lambda self: RowNixlStats())
        warned = cached_property(lambda self: set())
        blocks_per_sw = cached_property(lambda self: [0] * len(self.kv_cache_config.kv_cache_groups))
        _ssm_spec_blocks = cached_property(lambda self: [None] * len(self.kv_cache_config.kv_cache_groups))

        def on_new_request(self, request):
            """Their requests name three blocks, in no group, whatever the prompt is. Ours asks for what a
            prefill engine says: a list for each group, of the prompt's blocks."""
            params = request.kv_transfer_params
            if params and params.get("remote_block_ids"):
                params["remote_block_ids"] = [[*range(n)] for n in self._blocks(request.num_prompt_tokens)]
            super().on_new_request(request)

    return Scheduler


class Agent:
    """A worker's NIXL agent, which tests replace after it is made."""

    def __init__(self, worker):
        self.worker = worker

    def __getattr__(self, name):
        return getattr(self.worker.nixl_wrapper, name)


def _worker():
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

    from vllm_xlayer.connector.nixl.record import Record
    from vllm_xlayer.connector.nixl.scheduler import RowNixlMetadata
    from vllm_xlayer.connector.nixl.settings import NixlSettings
    from vllm_xlayer.connector.nixl.staging import StagedReads
    from vllm_xlayer.connector.nixl.wire import BUFFERS, NixlWire
    from vllm_xlayer.connector.nixl.worker import RowNixlWorker

    class Worker(RowNixlWorker):
        """Made as vLLM's is; takes metadata that has no record for that of a peer that agrees."""

        def __init__(self, vllm_config, engine_id, kv_cache_config):
            extra = vllm_config.kv_transfer_config.kv_connector_extra_config
            settings = NixlSettings.read({**extra, "row_seals": False})
            super().__init__(vllm_config, engine_id, kv_cache_config, _rows(kv_cache_config), settings)
            link = {"host": "", "ucx_tls": "", "rdma": True}
            size, blocks = vllm_config.parallel_config.tensor_parallel_size, kv_cache_config.num_blocks
            self.record = Record({}, self.layout.to_dict(), size, self.tp_rank, blocks, 0, link)

        # Some tests make one without its constructor.
        tags = cached_property(lambda self: {})
        failures = cached_property(lambda self: Counter())
        reads = cached_property(lambda self: StagedReads(self.wire, BUFFERS, 30.0))

        @cached_property
        def wire(self):
            return self._wire(1, 16)

        def _wire(self, blocks, row):
            self.pool = torch.zeros(blocks, row, dtype=torch.uint8)
            ring = torch.zeros(BUFFERS, 8 * row, dtype=torch.uint8)
            return NixlWire(Agent(self), "DRAM", self.pool, ring, self._record_transfer)

        def add_remote_agent(self, nixl_agent_meta, remote_tp_rank=0, remote_tp_size=1, remote_dcp_size=1):
            self.theirs = replace(self.record, tp_size=remote_tp_size, tp_rank=remote_tp_rank)
            if not nixl_agent_meta.region_members:
                # They do not register a cache, and make up the size of a block.
                wire = self._wire(nixl_agent_meta.num_blocks, nixl_agent_meta.block_lens[0])
                wire.peers, wire.retired = self.wire.peers, self.wire.retired
                self.wire = self.reads.wire = wire
            return super().add_remote_agent(nixl_agent_meta, remote_tp_rank, remote_tp_size, remote_dcp_size)

        def _agree(self, meta):
            return super()._agree(meta) if meta.region_members else self.theirs

        def _validate_remote_agent_handshake(self, nixl_agent_meta, remote_tp_size, remote_dcp_size=1):
            ours = RowNixlWorker if nixl_agent_meta.region_members else NixlPullConnectorWorker
            ours._validate_remote_agent_handshake(self, nixl_agent_meta, remote_tp_size, remote_dcp_size)

        def start_load_kv(self, metadata):
            rows = RowNixlMetadata()
            vars(rows).update(vars(metadata))
            rows.tags = {
                name: [[0] * len(ids) for ids in request.local_block_ids]
                for name, request in metadata.reqs_to_recv.items()
            }
            super().start_load_kv(rows)

    return Worker

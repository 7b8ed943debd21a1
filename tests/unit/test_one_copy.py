"""Ranks with equal rows (latents) have one copy of each in host memory, which the first rank writes."""

import os

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)

from vllm_xlayer.connector.host.memory import worker_memory
from vllm_xlayer.connector.spec import RowOffloadingSpec

ROW, ROWS = 4096, 6
KEY = make_offload_key(b"a", 0)


def offloading_config(rank=0, ranks=2, **changes):
    parallel = OffloadingParallelConfig(
        rank=rank, world_size=ranks, tp_size=ranks, pp_size=1, pcp_size=1, dcp_size=1, data_parallel_index=0,
        data_parallel_size=1, data_parallel_rank_local=None, is_parallelism_agnostic=False,
    )  # fmt: skip
    settings = dict(
        groups=(), worker_kv_bytes_per_block=ROW, enable_kv_cache_events=False,
        extra_config={"cpu_bytes_to_use": ROWS * ROW}, engine_id="a",
        model=OffloadingModelConfig("model", "bfloat16"), cache=OffloadingCacheConfig(16, 1),
        parallel=parallel, replicated_layout=True,
    )  # fmt: skip
    return OffloadingConfig(**settings | changes)


@pytest.fixture
def specs(request):
    """The scheduler's, and those of two workers."""
    name = f"{request.node.nodeid} {os.getpid()}"
    configs = (offloading_config(), offloading_config(), offloading_config(rank=1))
    return [RowOffloadingSpec(config, engine=name, takes_failures=True) for config in configs]


def test_the_same_bytes_hold_twice_the_rows(specs):
    two_copies = RowOffloadingSpec(offloading_config(replicated_layout=False), takes_failures=True)
    assert (two_copies.num_chunks, specs[0].num_chunks) == (ROWS // 2, ROWS)
    assert [spec._shape.chunks * spec._shape.chunk_bytes for spec in (two_copies, specs[0])] == [
        ROWS * ROW
    ] * 2


def test_every_rank_sees_what_one_writes(specs):
    scheduler, first, second = specs
    here, there = worker_memory(first._shape, 0)[0], worker_memory(second._shape, 1)[0]
    assert scheduler.get_manager().serves
    assert here.shape == there.shape == (ROWS, ROW)
    here[:] = torch.arange(ROWS, dtype=torch.uint8)[:, None]
    assert torch.equal(here, there)


def test_a_rank_that_does_not_share_it_turns_the_tier_off(specs, caplog):
    """It would read what nobody wrote."""
    scheduler, first, _ = specs
    alone = RowOffloadingSpec(offloading_config(rank=1), engine="another host", takes_failures=True)
    kept = [worker_memory(first._shape, 0), worker_memory(alone._shape, 1)]
    manager = scheduler.get_manager()
    assert not manager.serves and "does not share memory with rank 1" in manager.problem
    assert manager.lookup(KEY, ReqContext(req_id="a")) is LookupResult.MISS
    assert len(kept) == 2


def test_ranks_with_rows_of_their_own_share_nothing():
    config = offloading_config(replicated_layout=False)
    shape = RowOffloadingSpec(config, engine="a", takes_failures=True)._shape
    assert shape.shared_as is None and not shape.one_copy and shape.chunk_bytes == 2 * ROW
    assert RowOffloadingSpec(config, engine="a", takes_failures=True).get_manager().serves

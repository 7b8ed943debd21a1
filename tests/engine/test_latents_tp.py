"""Two ranks with equal latents: host memory has a row once, which the first rank writes and both read."""

import pytest
import torch
from faults import live_connector, manager_of, settle, slow_direction, under_way
from hybrid_fixture import answers_and_hits, save_hybrid
from model_fixture import ON_GPU
from test_latents import BLOCK, HITS, LENGTHS, NUM_TOKENS, PROMPTS, UNWRITTEN, one_by_one, start
from test_tensor_parallel import TALLY, counts

HOST_BYTES, WHOLE = 16 << 20, sum(length // BLOCK for length in LENGTHS)
USABLE = sum(HITS) // BLOCK
pytestmark = [
    pytest.mark.anywhere,
    pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


# These run in the workers.


def seen(_):
    """(rows of the tier, bytes of one, sum of the host memory's bytes, of the pool's) of this worker."""
    connector = live_connector()
    host = connector.connector_worker.worker.host
    return *host.shape, host.long().sum().item(), connector.pool.long().sum().item()


def spoil(_, tier=True):
    live_connector().pool.fill_(UNWRITTEN)
    if tier:
        live_connector().connector_worker.worker.host.fill_(UNWRITTEN)


def slow_stores(_, delay):
    worker, pool = live_connector().connector_worker.worker, live_connector().pool
    worker._store = slow_direction(delay)(pool, worker.host, pool.device)


# These here.


def forget(llm):
    settle(llm)
    assert llm.reset_prefix_cache()
    llm.collective_rpc(spoil, args=(False,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hybrid("deepseek_v2", tmp_path_factory.mktemp("deepseek"))


@pytest.fixture(scope="module")
def make(make_llm, folder):
    """Starts two ranks, whose memory is UNWRITTEN, with the connector."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_XLAYER_DEBUG", "OMP_NUM_THREADS"):
            patch.setenv(name, "1")
        patch.delenv("PYTHONHASHSEED", raising=False)

        def make(**extra):
            llm = start(make_llm, folder, {"cpu_bytes_to_use": HOST_BYTES} | extra, tensor_parallel_size=2)
            llm.collective_rpc(spoil, args=(False,))
            return llm

        yield make


@pytest.fixture(scope="module")
def engine(make):
    return make()


@pytest.fixture(scope="module")
def computed(engine):
    return [answer[:2] for answer in one_by_one(engine)]


@pytest.fixture(scope="module")
def cached(engine, computed):
    """Answers of the device's cache."""
    answers = one_by_one(engine)
    assert [hit for *_, hit in answers] == HITS
    return answers


@pytest.fixture
def llm(engine, cached):
    """With nothing in the tier, nor on the device."""
    counts(engine)
    settle(engine)
    assert engine.reset_prefix_cache(reset_connector=True)
    engine.collective_rpc(spoil)
    return engine


def since(before, llm, rank=None):
    return [tuple(map(int.__sub__, now, then)) for now, then in zip(counts(llm), before, strict=True)]


def test_each_row_is_kept_once_and_restored_on_both(llm, computed, cached):
    before = counts(llm)
    assert [answer[:2] for answer in one_by_one(llm)] == computed
    settle(llm)
    (rows, row_bytes, *sums), other = llm.collective_rpc(seen)
    assert rows == HOST_BYTES // row_bytes, "not twice as many as two copies would leave room for"
    assert other == (rows, row_bytes, *sums), "the ranks' latents differ, or their host memory does"
    assert len(manager_of(llm).host.chunks()) == WHOLE
    forget(llm)
    assert one_by_one(llm) == cached
    assert since(before, llm) == [(0, WHOLE, USABLE), (0, 0, USABLE)]


@pytest.mark.fault("copy error on one rank")
def test_a_store_that_fails_on_the_rank_that_stores(llm, computed):
    """No rank may load what the first one did not write, though the others had nothing to do."""
    before = counts(llm, 0, stores=True)
    assert [answer[:2] for answer in one_by_one(llm)] == computed
    settle(llm)
    (failed, *_), others = since(before, llm)
    TALLY["tries"] += failed
    assert failed > 0 and others == (0, 0, 0) and not manager_of(llm).host.chunks()
    forget(llm)
    assert one_by_one(llm) == [(*answer, 0) for answer in computed]


@pytest.mark.fault("copy error on one rank")
def test_a_load_that_fails_on_the_rank_that_does_not_store(llm, computed, cached):
    assert one_by_one(llm, 1)
    forget(llm)
    before = counts(llm, 1, loads=True)
    assert [answer[:2] for answer in one_by_one(llm)] == computed
    settle(llm)
    failed = since(before, llm)
    TALLY["tries"] += failed[1][0]
    assert failed[1][0] > 0 and failed[0][0] == 0
    forget(llm)
    assert one_by_one(llm) == cached


def test_nobody_reads_a_row_before_it_is_stored(llm, cached):
    """A prompt is asked for again while the first rank's copies have not begun."""
    llm.collective_rpc(slow_stores, args=(40,))
    try:
        answers_and_hits(llm, PROMPTS[-1:], 1)
        assert llm.reset_prefix_cache() and under_way(llm, "store")
        assert answers_and_hits(llm, PROMPTS[-1:], NUM_TOKENS) == cached[-1:]
    finally:
        llm.collective_rpc(slow_stores, args=(0,))


def test_the_disk_has_each_row_once(make, engine, cached, tmp_path):
    row_bytes = engine.collective_rpc(seen)[0][1]
    llm = make(disk_path=str(tmp_path / "tier"), disk_bytes_to_use=64 << 20)
    assert one_by_one(llm, 1)
    settle(llm)
    tier = manager_of(llm).disk
    assert tier.chunk_bytes == row_bytes and tier.counts["stored"] == WHOLE
    assert llm.reset_prefix_cache()
    manager_of(llm).host.reset_cache()
    llm.collective_rpc(spoil)
    before = counts(llm)
    assert one_by_one(llm) == cached and tier.counts["hit"] == USABLE
    # The last block of two prompts is computed, and so stored again.
    assert since(before, llm) == [(0, WHOLE - USABLE, USABLE), (0, 0, USABLE)]

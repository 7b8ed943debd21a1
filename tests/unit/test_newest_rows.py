"""Rows of running requests: nobody shares one, and every start is counted in its own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm_xlayer.attention import newest, newest_rows
from vllm_xlayer.attention.newest_rows import NO_ROW, NamedRows, RunnerRows

PLACES = 12


class OnV2:
    """Requests in the places of a runner's table; it does not say when one ends."""

    def __init__(self, rows):
        self.rows, self.running = RunnerRows(object(), PLACES, rows), {}

    def start(self, name, rng):
        free = [place for place in range(PLACES) if place not in self.running.values()]
        self.running[name] = int(rng.choice(free))
        self.rows.start(self.running[name], self.running.values())

    def end(self, name):
        del self.running[name]

    def row_of(self, name):
        step = SimpleNamespace(num_reqs=2, req_idx=np.array([self.running[name]]))
        row, padding = self.rows.rows_of(step).tolist()
        assert padding == NO_ROW
        return row


class OnV1:
    """Requests by name."""

    def __init__(self, rows):
        self.rows, self.running = NamedRows(rows, lambda: [self.asked]), {}

    def start(self, name, rng):
        self.running[name] = None
        self.rows.start([name])

    def end(self, name):
        del self.running[name]
        self.rows.end([name])

    def row_of(self, name):
        self.asked = name
        return self.rows.rows_of(SimpleNamespace(num_reqs=1)).tolist()[0]


@pytest.mark.parametrize("runner", [OnV1, OnV2])
def test_requests_beyond_the_rows_are_said(runner, monkeypatch):
    """The first and the tenth, not each; and none as long as there are rows."""
    said = []
    monkeypatch.setattr(newest_rows, "_starts_without_row", 0)
    monkeypatch.setattr(newest_rows.logger, "warning", lambda line, *args: said.append(line % args))
    rng, requests, lines = np.random.default_rng(0), runner(2), []
    for name in range(PLACES + 1):
        if name == PLACES:
            requests.end(PLACES - 1)  # it had no row: nor has the one that comes for it
        requests.start(name, rng)
        lines.append(len(said))
    assert lines == [0, 0, *[1] * 9, 2, 2]
    assert "of 2 running requests, and more run: 1 request so far" in said[0] and "10 requests" in said[1]
    assert "--max-num-seqs 2 lets them wait" in said[0]


def test_vllms_warm_up_is_no_word_to_the_user(monkeypatch):
    """It has more requests than rows, at every start; it counts starts as all do."""
    from vllm_xlayer.patches.newest import tell_start

    said = []
    monkeypatch.setattr(newest_rows, "_starts_without_row", 0)
    monkeypatch.setattr(newest_rows, "_num_rows", 2)
    monkeypatch.setattr(newest_rows, "_rows", None)
    monkeypatch.setattr(newest_rows.logger, "warning", lambda line, *args: said.append(line % args))
    table = SimpleNamespace(max_num_reqs=PLACES, req_id_to_index={})

    def start(name):
        tell_start(lambda states, req_id: states.req_id_to_index.update({req_id: len(places)}), table, name)

    places = table.req_id_to_index
    for i in range(5):
        start(f"_warmup_{i}_")
    assert not said and newest_rows.rows_in_use().starts.tolist() == [1, 1]
    start("somebody's")
    assert len(said) == 1 and "more run: 1 request so far" in said[0]


@pytest.mark.parametrize("runner", [OnV1, OnV2])
@pytest.mark.parametrize("count", [1, 5, PLACES])
def test_rows_are_nobody_elses(runner, count):
    rng, requests = np.random.default_rng(count), runner(count)
    without = 0
    for number in range(2000):
        full = len(requests.running) == PLACES
        if full or (requests.running and rng.random() < 0.48):
            requests.end(str(rng.choice(list(requests.running))))
            continue
        before, others = requests.rows.starts.copy(), {n: requests.row_of(n) for n in requests.running}
        requests.start(str(number), rng)
        row = requests.row_of(str(number))
        # Those that run keep theirs, and nobody's but the new one's is counted.
        assert others == {n: requests.row_of(n) for n in others}
        assert row not in set(others.values()) - {NO_ROW}
        counted = np.flatnonzero(requests.rows.starts != before).tolist()
        assert counted == ([] if row == NO_ROW else [row])
        # Who has none came when all rows were in use.
        assert (row == NO_ROW) == (sum(r != NO_ROW for r in others.values()) == count)
        without += row == NO_ROW
    assert (without > 0) == (count < PLACES)


def test_a_resumed_request_starts_again():
    rows = RunnerRows(object(), PLACES, 2)
    for starts in (1, 2):
        rows.start(3, [3])
        assert sorted(rows.starts.tolist()) == [0, starts]


def test_another_table_has_rows_of_its_own(monkeypatch):
    monkeypatch.setattr(newest_rows, "_rows", None)
    newest_rows.have_rows(4)
    found = []
    for table in ("one", "one", "another"):
        newest_rows.start_on_v2(table, PLACES, 0, [0])
        found.append(newest_rows.rows_in_use())
    assert found[0] is found[1] is not found[2] and len(found[2].starts) == 4


@pytest.mark.parametrize(("gigabytes", "rows"), [(150, 447), (0.0001, 1), (1000, 1024)])
def test_rows_take_a_share_of_the_memory(monkeypatch, gigabytes, rows):
    """Of a model with 8 heads of 128 in 32 layers: 64 tokens take 8.4 MB."""

    monkeypatch.setenv("VLLM_XLAYER_NEWEST_TOKENS", "64")
    memory = SimpleNamespace(get_device_total_memory=lambda: gigabytes * 1e9)
    monkeypatch.setattr(newest, "current_platform", memory)
    model = SimpleNamespace(
        get_num_layers=lambda _: 32, get_num_kv_heads=lambda _: 8, get_head_size=lambda: 128,
        dtype=torch.bfloat16,
    )  # fmt: skip
    config = SimpleNamespace(
        model_config=model, parallel_config=None, scheduler_config=SimpleNamespace(max_num_seqs=1024)
    )
    assert newest.num_rows(config) == rows


def test_a_hybrids_batch_is_whose_metadata_is_being_built():
    """vLLM says the places of a batch's requests to nobody; a wrapper around what builds it does."""
    from vllm_xlayer.patches.newest import tell_batch

    rows = RunnerRows(object(), PLACES, 4)
    for place in (7, 2):
        rows.start(place, [7, 2])
    step = SimpleNamespace(num_reqs=3, req_idx=None)
    built = []

    def build(states, batch, fails):
        built.append(rows.rows_of(step).tolist())
        if fails:
            raise RuntimeError("no metadata")

    told = SimpleNamespace(idx_mapping_np=np.array([2, 7]))
    tell_batch(build, None, told, False)
    with pytest.raises(RuntimeError, match="no metadata"):
        tell_batch(build, None, told, True)
    two, seven = (
        rows.rows_of(SimpleNamespace(num_reqs=1, req_idx=np.array([p]))).tolist()[0] for p in (2, 7)
    )
    assert built == [[two, seven, NO_ROW]] * 2 and two != seven
    assert rows.rows_of(step).tolist() == [NO_ROW] * 3, "what was said is of that batch only"


ON_GPU = SimpleNamespace(
    device_config=SimpleNamespace(device_type="cuda"), use_v2_model_runner=True,
    model_config=SimpleNamespace(is_hybrid=False), speculative_config=None,
    parallel_config=SimpleNamespace(use_ubatching=False, prefill_context_parallel_size=1),
    cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "tokens", "reason"),
    [
        ({}, 64, ""),
        ({"use_v2_model_runner": False}, 0, "got V1"),
        ({"model_config": SimpleNamespace(is_hybrid=True)}, 0, "got a hybrid"),  # whose batches nobody tells
        ({"speculative_config": SimpleNamespace(method="ngram_gpu")}, 64, ""),
        ({"speculative_config": SimpleNamespace(method="eagle")}, 64, ""),
        ({"speculative_config": SimpleNamespace(method="dflash")}, 0, "got dflash"),
        ({"use_v2_model_runner": False, "device_config": SimpleNamespace(device_type="cpu")}, 64, ""),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else None,
)
def test_how_many_are_kept_where_nobody_says(monkeypatch, changes, tokens, reason):
    """What the user asks for is never less quietly: it is refused with the reason."""
    config = SimpleNamespace(**(vars(ON_GPU) | changes))
    monkeypatch.setattr(newest_rows, "_v2_starts_are_told", True)
    monkeypatch.setattr(newest_rows, "_batches_of_hybrids_are_told", False)
    monkeypatch.delenv("VLLM_XLAYER_NEWEST_TOKENS", raising=False)
    assert newest.newest_tokens_of(config) == tokens
    assert reason in (newest.explain_refusal(config) or "")
    said = []
    monkeypatch.setattr(newest.logger, "info_once", lambda text, *args: said.append(text % args))
    if not tokens:
        assert newest.make_planner(config, [], None) is None and reason in said[0]
        monkeypatch.setenv("VLLM_XLAYER_NEWEST_TOKENS", "16")
        with pytest.raises(ValueError, match=f"NEWEST_TOKENS=16: .*{reason}"):
            newest.make_planner(config, [], None)
    for asked in (16, 0):
        monkeypatch.setenv("VLLM_XLAYER_NEWEST_TOKENS", str(asked))
        assert newest.newest_tokens_of(config) == asked


def test_hybrids_keep_them_where_their_batches_are_told(monkeypatch):
    config = SimpleNamespace(**(vars(ON_GPU) | {"model_config": SimpleNamespace(is_hybrid=True)}))
    for told in ("_v2_starts_are_told", "_batches_of_hybrids_are_told"):
        monkeypatch.setattr(newest_rows, told, True)
    monkeypatch.delenv("VLLM_XLAYER_NEWEST_TOKENS", raising=False)
    assert newest.newest_tokens_of(config) == 64


def test_they_are_not_kept_where_starts_are_not_told(monkeypatch):
    monkeypatch.setattr(newest_rows, "_v2_starts_are_told", False)
    monkeypatch.delenv("VLLM_XLAYER_NEWEST_TOKENS", raising=False)
    assert newest.newest_tokens_of(ON_GPU) == 0
    assert "told when a request starts" in str(newest.explain_refusal(ON_GPU))


@pytest.mark.parametrize(
    "memory",
    [None, torch.empty(2, 2, 1, 64, 16), torch.empty(3, 2, 1, 32, 16)],
    ids=["none", "rows", "places"],
)
def test_a_group_with_a_layer_that_has_no_memory_reads_its_pages(monkeypatch, memory):
    """Its schedule would count on what one of its layers does not read."""
    monkeypatch.setattr(newest_rows, "_v2_starts_are_told", True)
    monkeypatch.setattr(newest, "num_rows", lambda config: 3)
    monkeypatch.delenv("VLLM_XLAYER_NEWEST_TOKENS", raising=False)
    whole = torch.empty(3, 2, 1, 64, 16)
    layers = {
        name: SimpleNamespace(impl=SimpleNamespace(newest=its)) for name, its in (("a", whole), ("b", memory))
    }
    compilation = SimpleNamespace(static_forward_context=layers, max_cudagraph_capture_size=0)
    config = SimpleNamespace(
        **vars(ON_GPU), compilation_config=compilation,
        scheduler_config=SimpleNamespace(max_num_seqs=3, max_num_batched_tokens=64),
    )  # fmt: skip
    said = []
    monkeypatch.setattr(newest.logger, "warning", lambda text, *args: said.append(text % args))
    assert newest.make_planner(config, ["a"], torch.device("cpu")) is not None and not said
    assert newest.make_planner(config, ["a", "b"], torch.device("cpu")) is None and "in b:" in said[0]


def test_layers_that_attend_in_chunks_read_their_pages(monkeypatch):
    """Whose a chunk is nobody says, and a request has several of them in a step: more than there are rows."""
    monkeypatch.setattr(newest_rows, "_v2_starts_are_told", True)
    monkeypatch.setattr(newest, "num_rows", lambda config: 3)
    monkeypatch.delenv("VLLM_XLAYER_NEWEST_TOKENS", raising=False)
    impl = SimpleNamespace(newest=torch.empty(3, 2, 1, 64, 16))
    layers = {
        "whole": SimpleNamespace(impl=impl),
        "chunk": SimpleNamespace(impl=impl, attention_chunk_size=64),
    }
    compilation = SimpleNamespace(static_forward_context=layers, max_cudagraph_capture_size=0)
    config = SimpleNamespace(
        **vars(ON_GPU), compilation_config=compilation,
        scheduler_config=SimpleNamespace(max_num_seqs=3, max_num_batched_tokens=64),
    )  # fmt: skip
    said = []
    monkeypatch.setattr(newest.logger, "warning", lambda text, *args: said.append(text % args))
    assert newest.make_planner(config, ["whole"], torch.device("cpu")) is not None and not said
    assert newest.make_planner(config, ["chunk"], torch.device("cpu")) is None
    assert "chunks of 64 tokens in chunk: 1 layers" in said[0]


def test_an_engine_steps_with_its_own_rows(monkeypatch):
    """Two engines in one process on model runner V1: the second one's rows are of other requests."""
    from vllm_xlayer.platform import worker

    monkeypatch.setattr(worker.CPUModelRunner, "_update_states", lambda *_: None)
    monkeypatch.setattr(newest_rows, "_rows", None)
    engines = [worker.CpuReferenceRunner.__new__(worker.CpuReferenceRunner) for _ in range(2)]
    for i, engine in enumerate(engines):
        engine.request_rows = NamedRows(4, lambda i=i: [f"{i}-request"])
    nothing = SimpleNamespace(
        finished_req_ids=(), preempted_req_ids=None, scheduled_new_reqs=(),
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=()),
    )  # fmt: skip
    for engine in (*engines, engines[0]):
        engine._update_states(nothing)
        assert newest_rows.rows_in_use() is engine.request_rows


def test_rows_of_an_engine_with_more_requests_are_nobodys(monkeypatch):
    """Two engines in one process on model runner V2: what started last may have the longer table, and more
    rows, than the engine whose step it is."""
    large = RunnerRows("large", PLACES, PLACES)
    for place in range(PLACES):
        large.start(place, range(PLACES))
    monkeypatch.setattr(newest_rows, "_rows", large)
    planner = newest.NewestPlanner(2, 4, 4, 16, torch.device("cpu"))
    ints = [torch.tensor(x, dtype=torch.int32) for x in (range(5), [1] * 4)]
    step = SimpleNamespace(
        num_reqs=4,
        req_idx=np.arange(4),
        query_start_loc=ints[0],
        seq_lens=ints[1],
        slot_mapping=torch.arange(4),
    )
    own = large._row_of[:4].copy()
    assert own.max() >= 2
    for _ in range(2):  # the second time what started meanwhile is looked at
        assert planner.plan(step).rows.tolist() == [row if row < 2 else NO_ROW for row in own]
        large.start(PLACES - 1, range(PLACES))
    small = RunnerRows("small", 2, 2)
    small.start(1, [1])
    assert small.rows_of(step).tolist() == [NO_ROW, 1, NO_ROW, NO_ROW]

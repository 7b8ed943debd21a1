"""Newest tokens in the CUDA backend's builder and layer, on CPU tensors: which tokens are read as they were.

Requests live in the rows of a table, as on model runner V2. The expected result is float64 attention to each
token's exact or dequantised value, according to a model of what each place of a row holds. FlashAttention is
replaced by torch attention, as in test_nvfp4_backend.
"""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from backend_cases import Case, exact
from test_nvfp4_backend import cpu_impl
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_xlayer import nvfp4, ops
from vllm_xlayer.attention import newest, newest_rows
from vllm_xlayer.attention.decode import limits
from vllm_xlayer.attention.metadata import NVFP4MetadataBuilder

ROWS, BLOCK, MOST = 4, 16, 192
"""Rows of the table; tokens of a block; tokens that a request may have."""
PLACES = 32


class Machine:
    """A table's requests, a layer, and what each place of each row holds."""

    def __init__(self, monkeypatch, case: Case, seed: int) -> None:
        monkeypatch.setenv("VLLM_XLAYER_NEWEST_TOKENS", str(PLACES))
        monkeypatch.setattr(newest, "explain_refusal", lambda config: None)
        monkeypatch.setattr(newest, "num_rows", lambda config: ROWS)
        self.case, self.rng = case, np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.impl = cpu_impl(case)
        self.builder = NVFP4MetadataBuilder(
            FullAttentionSpec(
                block_size=BLOCK, num_kv_heads=case.num_kv_heads, head_size=case.head_size, dtype=torch.uint8
            ),
            ["layer"], self._config(), torch.device("cpu"),
        )  # fmt: skip
        self.layer = SimpleNamespace(
            layer_name="layer", _k_scale=torch.tensor(0.5), _v_scale=torch.tensor(2.0)
        )
        self.step_metadata = None
        context = SimpleNamespace(attn_metadata={})
        monkeypatch.setattr(newest, "get_forward_context", lambda: context)
        self.context = context
        shape = (ROWS * MOST // BLOCK, 2, case.num_kv_heads, BLOCK, nvfp4.content_bytes(case.head_size))
        self.cache = torch.full(shape, 0xFF, dtype=torch.uint8)[:, 1]
        self.table = torch.arange(shape[0], dtype=torch.int32).view(ROWS, -1)
        self.own_table = object()
        self.content = torch.zeros(ROWS, MOST, 2, case.num_kv_heads, case.head_size, dtype=case.dtype)
        self.length = [0] * ROWS
        self.held: list[dict[int, int]] = [{} for _ in range(ROWS)]  # place -> position
        self.exact_reads = 0

    def _config(self):
        layers = {"layer": SimpleNamespace(impl=self.impl)}
        return SimpleNamespace(
            speculative_config=None,
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            scheduler_config=SimpleNamespace(max_num_seqs=ROWS, max_num_batched_tokens=1024),
            cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
            compilation_config=SimpleNamespace(max_cudagraph_capture_size=8, static_forward_context=layers),
        )

    def start(self, row: int, found: int) -> None:
        """A request is put into a row; its first tokens are in the cache, written by another."""
        newest_rows.start_on_v2(self.own_table, ROWS, row, range(ROWS))
        self.held[row], self.length[row] = {}, 0
        self.context.attn_metadata = None
        self._write([(row, 0, found)])
        self.length[row] = found

    def _write(self, batch) -> torch.Tensor:
        """New content for (row, first, tokens); into pages, and into rows where the metadata says so."""
        slots = []
        for row, first, tokens in batch:
            new = torch.randn(tokens, *self.content.shape[2:], generator=self.generator)
            self.content[row, first : first + tokens] = new.to(self.case.dtype)
            slots.append(self._slots(row, first, tokens))
        kv = self._of(batch)
        self.impl.do_kv_cache_update(self.layer, kv[:, 0], kv[:, 1], self.cache, torch.cat(slots))
        return kv

    def _of(self, batch) -> torch.Tensor:
        return torch.cat([self.content[row, first : first + tokens] for row, first, tokens in batch])

    def _slots(self, row: int, first: int, tokens: int) -> torch.Tensor:
        positions = torch.arange(first, first + tokens)
        return self.table[row].long()[positions // BLOCK] * BLOCK + positions % BLOCK

    def step(self, batch, padding: int = 0) -> None:
        """batch: (row, first position, tokens); single tokens first, as vLLM orders them."""
        rows = [row for row, _, _ in batch]
        lens = torch.tensor([first + n for _, first, n in batch] + [0] * padding, dtype=torch.int32)
        starts = torch.tensor([0] + [n for _, _, n in batch] + [0] * padding).cumsum(0).to(torch.int32)
        tokens = int(starts[-1])
        metadata = self.builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lens,
                seq_lens_cpu_upper_bound=lens, num_reqs=len(lens), num_actual_tokens=tokens,
                max_query_len=max(n for _, _, n in batch), max_seq_len=int(lens.max()),
                block_table_tensor=torch.cat([self.table[rows], self.table[:1].expand(padding, -1)]),
                slot_mapping=torch.cat([self._slots(*one) for one in batch]), req_idx=np.array(rows),
            ),
        )  # fmt: skip
        self.context.attn_metadata = {"layer": metadata}
        kv = self._write(batch)
        for row, first, n in batch:
            self.length[row] = first + n
            self.held[row] |= {p % PLACES: p for p in range(first, first + n)}
        shape = (tokens + padding, self.case.num_heads, self.case.head_size)  # as buffers are padded
        query = torch.randn(shape, generator=self.generator)
        query = query.to(self.case.dtype)
        output = torch.full_like(query, torch.nan)
        self.impl.forward(self.layer, query, kv[:, 0], kv[:, 1], self.cache, metadata, output)
        for i, (row, first, n) in enumerate(batch):
            q = slice(int(starts[i]), int(starts[i + 1]))
            self._check(row, first, n, query[q].double(), output[q].double())

    def _check(self, row: int, first: int, n: int, query, got) -> None:
        """Every tile that the row has whole is read as it was; and in a chunk, the chunk."""
        end, held = first + n, self.held[row]
        is_chunk = n > 1 or self.case.head_size not in limits().head_sizes
        k, v = self.content[row, :end].double().unbind(1)
        dense = [torch.empty(end, *k.shape[1:]) for _ in range(2)]
        ops.gather_nvfp4(
            self.cache, self.table[row : row + 1], torch.zeros(1, dtype=torch.int32),
            torch.tensor([0, end], dtype=torch.int32), self.layer._k_scale, self.layer._v_scale, *dense,
            rotated_keys=nvfp4.ROTATED_KEYS,
        )  # fmt: skip
        for tile in range(0, end, 16):
            positions = range(tile, min(tile + 16, end))
            whole = all(held.get(p % PLACES) == p for p in positions)
            self.exact_reads += whole and tile < first
            for p in positions:
                if not whole and not (is_chunk and p >= first):
                    k[p], v[p] = (d[p].to(self.case.dtype).double() for d in dense)
        expected = exact(self.case, query, k, v, first)
        bound = 4 * torch.finfo(self.case.dtype).eps * expected.abs().amax((0, 2))
        error = (got - expected).abs().amax((0, 2))
        assert (error <= bound).all(), (row, first, n, error.tolist(), bound.tolist())


CASES = [
    Case((), dtype=torch.bfloat16),
    Case((), dtype=torch.float16, window=24, sinks=True),
    Case((), capacity=64, num_heads=8, num_kv_heads=2),  # requests longer than the workspace
    Case((), head_size=48),  # no decode kernel: single tokens are dequantised, too
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_read_as_it_was(monkeypatch, case, seed):
    """Rows reused, tokens found in the cache, chunks, rejected drafts, mixed batches, padding."""
    machine = Machine(monkeypatch, case, seed)
    rng = machine.rng
    for _ in range(40):
        batch = []
        for row in rng.permutation(ROWS).tolist():
            if machine.length[row] == 0 or machine.length[row] > MOST - 50 or rng.random() < 0.05:
                machine.start(row, int(rng.choice([0, 16, 48])))
            if rng.random() < 0.2:
                continue
            position = machine.length[row]
            if rng.random() < 0.3:  # so many drafts were rejected
                position = max(0, position - int(rng.integers(0, 7)))
            batch.append((row, position, int(rng.choice([1, 1, 1, 4, 40]))))
        if batch:
            machine.step(sorted(batch, key=lambda one: one[2] > 1), padding=int(rng.integers(0, 3)))
    assert machine.exact_reads > 40


def test_schedule_and_attention_have_the_same_newest_tokens(monkeypatch):
    told = {"nvfp4_attention_schedule": [], "nvfp4_paged_attention": []}

    def listen(name: str) -> None:
        op = getattr(ops, name)

        def called(*args, **kwargs):
            first = inspect.signature(op).bind(*args, **kwargs).arguments["newest_from"]
            told[name].append((first.data_ptr(), len(first)))
            op(*args, **kwargs)

        monkeypatch.setattr(ops, name, called)

    for name in told:
        listen(name)
    machine = Machine(monkeypatch, CASES[0], 0)
    for row in range(3):
        machine.start(row, 0)
    machine.step([(row, 0, 40) for row in range(3)])
    machine.step([(0, 40, 1), (2, 40, 1), (1, 40, 20)], padding=1)
    machine.step([(row, machine.length[row], 1) for row in range(3)])
    scheduled, attended = told.values()
    assert scheduled == attended and [count for _, count in attended] == [2, 3]


def test_a_start_that_is_not_told_is_seen(monkeypatch):
    """The test above fails without what it tests: a row's request is another one, and nobody says so."""
    machine = Machine(monkeypatch, CASES[0], 0)
    machine.start(0, 0)
    machine.step([(0, 0, 60)])
    monkeypatch.setattr(newest_rows, "start_on_v2", lambda *_: None)
    machine.start(0, 48)
    with pytest.raises(AssertionError):
        for position in range(48, 52):
            machine.step([(0, position, 1)])


def test_a_layer_that_hears_late_whose_kv_it_reads(monkeypatch):
    """A drafter's layers (Gemma 4): queries alone, to another layer's pages and newest tokens."""
    machine = Machine(monkeypatch, CASES[0], 0)
    config, drafter = machine._config(), SimpleNamespace(impl=cpu_impl(CASES[0]))
    assert drafter.impl.newest is not machine.impl.newest and drafter.impl.newest.isnan().all()
    drafter.kv_sharing_target_layer_name = "layer"
    config.compilation_config.static_forward_context["drafter"] = drafter
    machine.builder = NVFP4MetadataBuilder(
        machine.builder.kv_cache_spec, ["layer", "drafter"], config, torch.device("cpu")
    )
    assert drafter.impl.newest is machine.impl.newest
    forward, compared = machine.impl.forward, []

    def both(layer, query, key, value, cache, metadata, output):
        forward(layer, query, key, value, cache, metadata, output)
        drafts = torch.full_like(output, torch.nan)
        drafter.impl.forward(layer, query, None, None, cache, metadata, drafts)
        decodes = 0 if metadata.decode is None else metadata.decode.num_tokens
        assert torch.equal(drafts[:decodes], output[:decodes])
        assert not drafts[: metadata.num_actual_tokens].isnan().any()
        compared.append(decodes)

    monkeypatch.setattr(machine.impl, "forward", both)
    for row in range(2):
        machine.start(row, 0)
    machine.step([(row, 0, 40) for row in range(2)])
    machine.step([(0, 40, 1), (1, 40, 20)])
    machine.step([(0, 41, 1), (1, 60, 1)])
    assert compared == [0, 1, 2]

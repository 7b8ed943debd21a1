"""States of speculating models on the CPU platform: after any number of accepted drafts, as if none had been.

Caches are views of rows, and what no request owns is NaN before and after.
"""

import pytest
import torch
from test_platform_states import USED, check_unowned, pool, whole_convolution
from torch.nn import functional

from vllm_xlayer.platform.kernels import define_missing_ops
from vllm_xlayer.platform.state_copies import after_a_step, before_a_step

DRAFTS, ACCEPTED = 2, ([1, 3, 2], [3, 1, 1], [2, 2, 3], [1, 1, 1])
"""Of each step and request: tokens of the step that turn out right, the first always."""


@pytest.fixture(scope="module")
def ops():
    define_missing_ops()
    return torch.ops._C


def steps(sequences):
    """Of each step and request: the place of its first token, tokens, and how many of them are right."""
    begin = [len(s) for s in sequences]
    for right in ACCEPTED:
        yield [(at, 1 + DRAFTS, count) for at, count in zip(begin, right, strict=True)]
        begin = [at + count for at, count in zip(begin, right, strict=True)]


def tokens_of(sequence, at, count, right):
    """[count, ...]: as many as are right, and then wrong ones."""
    given = sequence[at : at + count].clone()
    given[right:] = 100 + torch.rand_like(given[right:])
    return given


@pytest.mark.parametrize("width", [3, 4])
def test_convolution(ops, width):
    weight, bias = torch.randn(6, width), torch.linspace(-1, 1, 6)
    packed = ops.causal_conv1d_weight_pack(weight)
    total = 4 + sum(map(max, ACCEPTED)) + DRAFTS
    sequences = [torch.randn(total, 6) for _ in USED]
    expected = [functional.silu(whole_convolution(s.T, weight, bias)).T for s in sequences]
    cache = pool((6, width - 1 + DRAFTS), USED)
    batch, slots = torch.cat([s[:4] for s in sequences]).T, torch.tensor(USED)
    ops.causal_conv1d_fwd_cpu(
        batch, packed, bias, cache, torch.arange(4) * 4, slots, torch.full((3,), False), True, -1, True
    )
    accepted = torch.ones(3, dtype=torch.int32)
    for step in steps([s[:4] for s in sequences]):
        x = torch.stack([tokens_of(s, *where) for s, where in zip(sequences, step, strict=True)])
        padded = torch.cat((x, torch.full((1, *x.shape[1:]), torch.nan)))
        y = ops.causal_conv1d_update_cpu(
            padded, cache, packed, bias, True, torch.cat((accepted, torch.ones(1, dtype=torch.int32))),
            torch.tensor([*USED, -1]), -1, True,
        )  # fmt: skip
        for i, (at, _, right) in enumerate(step):
            torch.testing.assert_close(
                y[i, :right].double(), expected[i][at : at + right], rtol=1e-5, atol=1e-5
            )
        assert not y[3].any()
        accepted = torch.tensor([right for *_, right in step], dtype=torch.int32)
    check_unowned(cache, USED)


def test_gated_delta_rule(ops):
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    heads, key_heads, size = 4, 2, 8
    total = sum(map(max, ACCEPTED)) + DRAFTS
    torch.manual_seed(0)
    parts = [key_heads * size, key_heads * size, heads * size, heads, heads]
    sequences = [torch.randn(total, sum(parts)) for _ in USED]
    A_log, dt_bias = torch.randn(heads), torch.randn(heads)
    owned = [[5, 1, 4], [2, 0, 6], [3, 7, 8]]

    def split(tokens):
        q, k, v, a, b = tokens.split(parts, dim=-1)
        return q.view(-1, key_heads, size), k.view(-1, key_heads, size), v.view(-1, heads, size), a, b

    cache = torch.full((10, heads, 2 * size, size), torch.nan)[:, :, :size]
    for slots in owned:
        cache[slots[0]] = torch.randn(heads, size, size)
    first = [cache[slots[0]].clone() for slots in owned]
    found, accepted = [[] for _ in USED], torch.ones(3, dtype=torch.int32)
    for step in steps([s[:0] for s in sequences]):
        x = torch.cat([tokens_of(s, *where) for s, where in zip(sequences, step, strict=True)])
        y = ops.fused_sigmoid_gating_delta_rule_update_spec_cpu(
            A_log, dt_bias, *split(x), cache, torch.tensor(owned), accepted, torch.arange(4) * (1 + DRAFTS),
            True, 1.0, 20.0,
        )  # fmt: skip
        for i, (_, count, right) in enumerate(step):
            found[i].append(y[i * count : i * count + right])
        accepted = torch.tensor([right for *_, right in step], dtype=torch.int32)
    assert cache[9].isnan().all()
    for i, sequence in enumerate(sequences):
        out = torch.cat(found[i])
        q, k, v, a, b = split(sequence[: len(out)])
        expected, state = torch_recurrent_gated_delta_rule(
            q.repeat_interleave(2, dim=1)[None], k.repeat_interleave(2, dim=1)[None], v[None],
            g=(-A_log.exp() * functional.softplus(a + dt_bias))[None], beta=b.sigmoid()[None],
            initial_state=first[i][None], output_final_state=True, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cache[owned[i][accepted[i] - 1]], state[0], rtol=1e-4, atol=1e-4)


BLOCKS, BLOCK, WIDTH, CHANNELS, STATE = 12, 8, 5, 3, 7


class Memory:
    """States of two groups, in rows: of convolutions [blocks, WIDTH, CHANNELS] and others [blocks, STATE]."""

    def __init__(self, in_rows):
        self.in_rows = in_rows
        row = torch.randn(BLOCKS, 64)
        shape, strides = ((CHANNELS, WIDTH), (WIDTH, 1)) if in_rows else ((WIDTH, CHANNELS), (CHANNELS, 1))
        self.states = []  # of a layer of each group
        for group in range(2):
            begin = 30 * group
            self.states.append(row.as_strided((BLOCKS, *shape), (64, *strides), begin))
            self.states.append(row.as_strided((BLOCKS, STATE), (64, 1), begin + 18))
        tables = [[1, 2, 3, 4, 0], [5, 6, 7, 8, 0]], [[9, 10, 11, 3, 0], [4, 2, 6, 7, 0]]
        self.tables = [torch.tensor(table, dtype=torch.int32) for table in tables]
        self.row = row

    def arguments(self):
        sizes = [s.element_size() for s in self.states]
        return (
            torch.tensor([t.data_ptr() for t in self.tables]), self.tables[0].stride(0),
            torch.tensor([s.data_ptr() for s in self.states]),
            torch.tensor([64 * size for size in sizes]), torch.tensor(sizes, dtype=torch.int32),
            torch.tensor([1 if self.in_rows else CHANNELS, STATE] * 2),
            torch.tensor([WIDTH, 0] * 2, dtype=torch.int32), torch.tensor([0, 0, 1, 1], dtype=torch.int32),
            torch.tensor([CHANNELS if self.in_rows else 0, 0] * 2, dtype=torch.int32),
            torch.tensor([WIDTH * 4 if self.in_rows else 0, 0] * 2),
        )  # fmt: skip

    def expect(self, before, request, source, target, tokens):
        """What the copy is to make of `before`, which is changed."""
        for group, table in enumerate(self.tables):
            conv, other = before[2 * group : 2 * group + 2]
            to, of = int(table[request, target]), int(table[request, source])
            if self.in_rows:
                conv[to, :, : WIDTH - tokens] = conv[of, :, tokens:].clone()
            else:
                conv[to, : WIDTH - tokens] = conv[of, tokens:].clone()
            other[to] = other[int(table[request, source + tokens])]

    def check(self, act, *copies):
        expected = Memory(self.in_rows)
        expected.row.copy_(self.row)
        for copy in copies:
            expected.expect(expected.states, *copy)
        act()
        assert torch.equal(self.row, expected.row)


@pytest.mark.parametrize("in_rows", [False, True], ids=["tokens of channels", "channels of tokens"])
class TestCopies:
    @pytest.mark.parametrize(
        ("sources", "targets", "tokens", "copies"),
        [
            ([0, -1], [1, 0], [0, 0], [(0, 0, 1, 0)]),
            ([0, 1], [2, 1], [1, 2], [(0, 0, 2, 1)]),
            ([1, 0], [0, 1], [2, 1], [(0, 1, 0, 2), (1, 0, 1, 1)]),
        ],
        ids=["a new request has none", "in the same block they stay", "after drafts"],
    )
    def test_before_a_step(self, in_rows, sources, targets, tokens, copies):
        memory = Memory(in_rows)

        def act():
            before_a_step(
                *map(torch.tensor, (targets, sources, tokens)), *memory.arguments(), None, 2,
                CONV_STATE_DIM_FIRST=in_rows, HAS_IDX_MAPPING=False, COPY_BLOCK_SIZE=1024,
            )  # fmt: skip

        memory.check(act, *copies)

    @pytest.mark.parametrize(
        ("computed", "scheduled", "drafts", "accepted", "column", "copies", "now"),
        [
            (4, 3, 2, 2, 0, [], 2),  # no block is full
            (6, 3, 2, 2, 0, [(0, 0, 0, 1)], 1),  # full after its second token, which was accepted
            (6, 3, 2, 1, 0, [], 1),  # that token was not
            (7, 3, 2, 1, 0, [], 1),  # full after its first token: what is there is right
            (7, 3, 2, 3, 1, [(0, 1, 0, 0)], 3),  # the same, and the step's states are in the next block
            (14, 3, 2, 3, 2, [(0, 2, 1, 1)], 3),
        ],
    )
    def test_after_a_step(self, in_rows, computed, scheduled, drafts, accepted, column, copies, now):
        memory, out = Memory(in_rows), torch.tensor([accepted, 1])

        def act():
            after_a_step(
                *(torch.tensor([x, y]) for x, y in (
                    (accepted, 1), (column, 0), (scheduled, 3), (computed, 1), (drafts, 2)
                )),
                *memory.arguments(), out, None, 2, block_size=BLOCK, CONV_STATE_DIM_FIRST=in_rows,
            )  # fmt: skip

        memory.check(act, *copies)
        assert out.tolist() == [now, 1]

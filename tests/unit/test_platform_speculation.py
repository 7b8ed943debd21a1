"""What the CPU platform keeps of drafts, against answers made by hand and the distribution that is wanted."""

import pytest
import torch

from vllm_xlayer.platform import speculation

LEFT = -7
"""What must not be written."""


def ints(*values):
    return torch.tensor(values, dtype=torch.int64)


CUMULATED = ints(2, 2, 5)
"""Of three requests with 2, 0 and 3 drafts."""


def test_greedy_drafts_are_kept_up_to_the_first_wrong_one():
    output = torch.full((3, 4), LEFT)
    drafts, best = ints(4, 5, 6, 7, 8), ints(4, 5, 6, 1, 8)
    speculation.keep_greedy(output, CUMULATED, drafts, best, ints(11, 12, 13)[:, None], None, 3)
    assert output.tolist() == [[4, 5, 11, LEFT], [12, LEFT, LEFT, LEFT], [6, 1, LEFT, LEFT]]


def test_each_kind_of_request_is_left_to_its_own_function():
    greedy, random = torch.full((3, 4), LEFT), torch.full((3, 4), LEFT)
    drafts, is_greedy = ints(4, 5, 6, -1, 8), torch.tensor([True, False, False])
    bonus, recovered, probs = ints(11, 12, 13)[:, None], ints(0, 1, 2, 3, 4), torch.full((5, 9), 0.5)
    speculation.keep_greedy(greedy, CUMULATED, drafts, drafts, bonus, is_greedy, 3)
    speculation.keep_random(
        random, CUMULATED, drafts, None, probs, bonus, recovered, torch.zeros(5), is_greedy, 3, 9, True
    )
    assert greedy.tolist() == [[4, 5, 11, LEFT], [LEFT] * 4, [LEFT] * 4]
    assert random.tolist() == [[LEFT] * 4, [12, LEFT, LEFT, LEFT], [6, 3, LEFT, LEFT]]


def test_sampled_tokens_have_the_targets_distribution():
    """With drafts of any distribution, or certain ones, one draft or its replacement is a sample."""
    generator = torch.Generator().manual_seed(0)
    count, vocabulary = 20_000, 5
    target = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]).repeat(count, 1)
    drafted = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.5]).repeat(count, 1)
    cumulated, none = torch.arange(1, count + 1), torch.zeros(count, dtype=torch.bool)
    for probs in (drafted, None):
        drafts = torch.multinomial(drafted, 1, generator=generator)[:, 0]
        noise = torch.empty(count, vocabulary).exponential_(generator=generator).reciprocal()
        uniform = torch.rand(count, generator=generator)
        recovered, output = torch.empty(count, dtype=torch.int64), torch.full((count, 2), LEFT)
        speculation.recover(recovered, cumulated, drafts, probs, target, noise, vocabulary, probs is None)
        bonus = torch.zeros(count, 1, dtype=torch.int64)
        speculation.keep_random(
            output, cumulated, drafts, probs, target, bonus, recovered, uniform, none, 1, vocabulary,
            probs is None,
        )  # fmt: skip
        found = torch.bincount(output[:, 0], minlength=vocabulary) / count
        torch.testing.assert_close(found, target[0], rtol=0, atol=0.02)


def test_values_are_given_to_every_draft():
    output = torch.full((5,), float(LEFT))
    speculation.expand(output, torch.tensor([0.0, 0.5, 0.7]), CUMULATED.int(), 0, 1)
    torch.testing.assert_close(output, torch.tensor([1.0, 1.0, 0.7, 0.7, 0.7]))


def test_next_tokens_of_a_drafter():
    sampled = ints(3, 4, -1, 5, -1, -1, 6, 7, 99, -1, -1, -1).view(4, 3)
    output, counts = torch.full((4,), LEFT), torch.full((4,), LEFT)
    discarded = torch.tensor([False, True, False, False])
    speculation.next_tokens(sampled, discarded, ints(20, 21, 22, 23), output, counts, 50, 3, 4)
    assert output.tolist() == [4, 21, 7, 23] and counts.tolist() == [2, 0, 2, 0]


def test_places_of_the_last_tokens_that_were_kept():
    starts, output, lost = torch.tensor([0, 3, 10, 14], dtype=torch.int32), ints(0, 0, 0), ints(0, 0, 0)
    speculation.places_to_sample(CUMULATED, ints(1, 1, 4), starts, output, lost, 3)
    assert lost.tolist() == [2, 0, 0] and output.tolist() == [0, 9, 13]


def test_a_step_of_a_drafter():
    table = torch.tensor([[5, 6], [7, 8], [9, 3]], dtype=torch.int32)
    lengths = torch.tensor([4, 1, 8], dtype=torch.int32)
    positions, slots = torch.full((3,), LEFT), torch.full((4,), LEFT)
    speculation.advance(ints(3, 0, 7), table, lengths, positions, slots, 4, 8, -1)
    assert positions.tolist() == [4, 1, 0]
    assert slots.tolist() == [24, 29, -1, -1]
    assert lengths.tolist() == [5, 2, 1]


def test_what_stands_in_for_vllms_can_be_looked_at_again(monkeypatch):
    """An engine may start in a process where another one was configured."""
    utils = pytest.importorskip("vllm.utils.cpu_triton_utils")
    from vllm_xlayer.compat.private import table

    (record,) = (record for record in table() if record.owner == "vllm.utils.cpu_triton_utils")
    monkeypatch.setattr(utils, "_expand_kernel_impl", speculation.expand)
    assert record.problem() is None
    monkeypatch.setattr(utils, "_expand_kernel_impl", lambda output, values: None)
    assert "_expand_kernel_impl: expected parameters output" in str(record.problem())

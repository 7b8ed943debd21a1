"""Speculative decoding: what is kept of a step's drafts, and what its drafter is given, in plain torch.

Drafts of all requests lie one after another: [T], of which request r has those from cumulated[r - 1] up to
cumulated[r]. A draft of -1 fills up and is never kept.
"""

from collections.abc import Callable, Iterator

import torch

NONE = -1


def _drafts(cumulated: torch.Tensor) -> Iterator[range]:
    """For each request the places of its drafts."""
    first = 0
    for end in cumulated.tolist():
        yield range(first, end)
        first = end


def expand(
    output: torch.Tensor,
    input_val: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Write to output [T] the value [R] of each draft's request, replace_to where that is replace_from.

    It stands in for vLLM's ``_expand_kernel_impl``, whose parameters it has: they are looked at again when an
    engine starts in a process where it does already.
    """
    values = torch.where(input_val == replace_from, replace_to, input_val)
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    output.copy_(values.repeat_interleave(counts))


def keep_greedy(
    output: torch.Tensor,
    cumulated: torch.Tensor,
    drafts: torch.Tensor,
    best: torch.Tensor,
    bonus: torch.Tensor,
    is_greedy: torch.Tensor | None,
    max_drafts: int,
) -> None:
    """Write each greedy request's tokens: its drafts up to the first wrong one, and the best there.

    Args:
        output: int64 [R, max_drafts + 1]; other requests' rows and what follows the tokens are left alone.
        drafts, best: int64 [T], what was drafted and the target's first choice in its place.
        bonus: int64 [R, 1], the target's choice after all drafts.
        is_greedy: bool [R]; None if all are.
    """
    for request, places in enumerate(_drafts(cumulated)):
        if is_greedy is None or is_greedy[request]:
            accepted = [int(drafts[i]) == int(best[i]) for i in places]
            _write(output[request], best[places.start : places.stop], accepted, best, places, bonus[request])


def keep_random(
    output: torch.Tensor,
    cumulated: torch.Tensor,
    drafts: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    bonus: torch.Tensor,
    recovered: torch.Tensor,
    uniform: torch.Tensor,
    is_greedy: torch.Tensor,
    max_drafts: int,
    vocabulary: int,
    no_draft_probs: bool,
) -> None:
    """As `keep_greedy`, of the other requests: a draft is kept with probability target / draft.

    Args:
        draft_probs, target_probs: float32 [T, vocabulary]; without the former a draft was certain.
        recovered: int64 [T], what to take in place of the first draft that is not kept.
        uniform: float32 [T], in [0, 1).
    """
    for request, places in enumerate(_drafts(cumulated)):
        if is_greedy[request]:
            continue
        accepted = []
        for i in places:
            token = int(drafts[i])
            drafted = 1.0 if draft_probs is None or no_draft_probs else float(draft_probs[i, token])
            kept = token != NONE and drafted > 0
            accepted.append(kept and float(target_probs[i, token]) / drafted >= float(uniform[i]))
        own = drafts[places.start : places.stop]
        _write(output[request], own, accepted, recovered, places, bonus[request])


def _write(
    row: torch.Tensor,
    tokens: torch.Tensor,
    accepted: list[bool],
    instead: torch.Tensor,
    places: range,
    bonus: torch.Tensor,
) -> None:
    """Write the accepted tokens and one more: the bonus if that is all, else what is taken instead."""
    count = accepted.index(False) if False in accepted else len(accepted)
    row[:count] = tokens[:count]
    row[count] = instead[places[count]] if count < len(accepted) else bonus


def recover(
    output: torch.Tensor,
    cumulated: torch.Tensor,
    drafts: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    inverse_noise: torch.Tensor,
    vocabulary: int,
    no_draft_probs: bool,
) -> None:
    """Write to output int64 [T] a sample in place of each draft, of what the target has above the draft.

    inverse_noise: float32 [R, vocabulary], 1 / Exp(1): the largest probability times that is a sample.
    """
    for request, places in enumerate(_drafts(cumulated)):
        for i in places:
            if draft_probs is None or no_draft_probs:
                left = target_probs[i].clone()
                left[drafts[i]] = 0
            else:
                left = (target_probs[i] - draft_probs[i]).clamp(min=0)
            output[i] = (left * inverse_noise[request]).argmax()


def next_tokens(
    sampled: torch.Tensor,
    is_discarded: torch.Tensor,
    backup: torch.Tensor,
    output: torch.Tensor,
    counts: torch.Tensor,
    vocabulary: int,
    width: int,
    num_requests: int,
) -> None:
    """Write each request's last sampled token (output [R]), or its backup [R], and how many it has (counts).

    sampled: int64 [R, width]; -1 and what is no token do not count. Discarded requests have none.
    """
    sampled = sampled[:num_requests]
    valid = (sampled != NONE) & (sampled < vocabulary) & ~is_discarded[:num_requests, None]
    places = torch.arange(sampled.shape[1]).where(valid, NONE).amax(1)
    last = sampled.gather(1, places.clamp(min=0)[:, None])[:, 0]
    output[:num_requests] = torch.where(places >= 0, last, backup[:num_requests])
    counts[:num_requests] = valid.sum(1)


def places_to_sample(
    cumulated: torch.Tensor,
    counts: torch.Tensor,
    query_starts: torch.Tensor,
    output: torch.Tensor,
    rejected: torch.Tensor,
    num_requests: int,
) -> None:
    """Write how many drafts of each request were not kept, and where in the batch its last kept token is.

    Args:
        counts: int64 [R], tokens sampled: one more than the drafts that were kept.
        query_starts: int32 [R + 1], the first token of each request in the batch.
        output, rejected: int32 and int64 [R].
    """
    drafted = cumulated.diff(prepend=cumulated.new_zeros(1))[:num_requests]
    lost = torch.where(drafted > 0, drafted + 1 - counts[:num_requests], 0)
    rejected[:num_requests] = lost
    output[:num_requests] = query_starts[1 : num_requests + 1] - 1 - lost


def advance(
    positions: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out_positions: torch.Tensor,
    out_slots: torch.Tensor,
    block_size: int,
    max_model_len: int,
    pad_slot: int,
) -> None:
    """Write position, slot and length of each request's next draft; beyond the end those of nothing.

    Args:
        positions: int64 [R], of the tokens before.
        block_table: int32 [R, blocks].
        seq_lens: int32 [R], overwritten.
        out_positions, out_slots: int64 [R] and [>= R].
    """
    count = positions.shape[0]
    after = positions + 1
    ends = after >= max_model_len
    after = after.where(~ends, 0)
    blocks = (after // block_size).clamp(max=block_table.shape[1] - 1)
    slots = block_table[:count].gather(1, blocks[:, None])[:, 0] * block_size + after % block_size
    out_positions[:count] = after
    out_slots[:count] = slots.where(~ends, pad_slot)
    out_slots[count:] = pad_slot
    seq_lens[:count] = (seq_lens[:count] + 1).where(~ends, 1).clamp(max=max_model_len)


OPS: dict[str, Callable[..., None]] = {
    "rejection_greedy_sample_kernel_impl(Tensor(a!) output, Tensor cumulated, Tensor drafts, Tensor best, "
    "Tensor bonus, Tensor? is_greedy, SymInt max_drafts) -> ()": keep_greedy,
    "rejection_random_sample_kernel_impl(Tensor(a!) output, Tensor cumulated, Tensor drafts, "
    "Tensor? draft_probs, Tensor target_probs, Tensor bonus, Tensor recovered, Tensor uniform, "
    "Tensor is_greedy, SymInt max_drafts, SymInt vocabulary, bool no_draft_probs) -> ()": keep_random,
    "sample_recovered_tokens_kernel_impl(Tensor(a!) output, Tensor cumulated, Tensor drafts, "
    "Tensor? draft_probs, Tensor target_probs, Tensor inverse_noise, SymInt vocabulary, "
    "bool no_draft_probs) -> ()": recover,
    "eagle_prepare_next_token_padded_kernel_impl(Tensor sampled, Tensor is_discarded, Tensor backup, "
    "Tensor(a!) output, Tensor(b!) counts, SymInt vocabulary, SymInt width, SymInt num_requests) -> ()": (
        next_tokens
    ),
    "eagle_prepare_inputs_padded_kernel_impl(Tensor cumulated, Tensor counts, Tensor query_starts, "
    "Tensor(a!) output, Tensor(b!) rejected, SymInt num_requests) -> ()": places_to_sample,
    "eagle_step_slot_mapping_metadata_kernel_impl(Tensor positions, Tensor block_table, Tensor(a!) seq_lens, "
    "Tensor(b!) out_positions, Tensor(c!) out_slots, SymInt block_size, SymInt max_model_len, "
    "SymInt pad_slot) -> ()": advance,
}
"""Schemas, with the arguments in vLLM's order."""

"""Seals: equal exactly where tokens and bytes are."""

import numpy as np
import pytest
import torch

from vllm_xlayer.connector.nixl.seals import RowDigest, SealTable, prompt_tags

TOKENS = list(range(40))
CPU = torch.device("cpu")


def test_a_tag_covers_all_tokens_up_to_its_block_and_nothing_after():
    tags = prompt_tags(TOKENS, 16, 0, "")
    assert len(tags) == len(set(tags.tolist())) == 3 and tags.dtype == np.int64
    for changed in range(40):
        other = [*TOKENS[:changed], 77, *TOKENS[changed + 1 :]]
        same = [a == b for a, b in zip(tags, prompt_tags(other, 16, 0, ""), strict=True)]
        assert same == [changed >= 16, changed >= 32, False]
    assert prompt_tags(TOKENS[:32], 16, 0, "").tolist() == tags[:2].tolist()
    assert prompt_tags(TOKENS[:33], 16, 0, "")[2] != tags[2]


def test_the_order_of_tokens_shows():
    """Within a block, and between blocks of the same tokens."""
    tags = prompt_tags(TOKENS, 16, 0, "").tolist()
    swapped = [TOKENS[1], TOKENS[0], *TOKENS[2:]]
    moved = [*TOKENS[16:32], *TOKENS[:16], *TOKENS[32:]]
    for other in (swapped, moved, TOKENS[::-1]):
        assert not set(tags) & set(prompt_tags(other, 16, 0, "").tolist())
    assert len(set(prompt_tags([5] * 400, 16, 0, "").tolist())) == 25, "the same tokens in every block"


def test_tags_of_many_prompts_are_all_different():
    """Of prompts that differ in one token, or are a token longer: no two blocks of other tokens are alike."""
    draw, seen = np.random.default_rng(0), {}
    base = draw.integers(0, 200_000, 64).tolist()
    for _ in range(2000):
        tokens = base[: draw.integers(1, 65)]
        tokens[draw.integers(len(tokens))] = int(draw.integers(0, 200_000))
        for n, tag in enumerate(prompt_tags(tokens, 16, 0, "").tolist()):
            assert seen.setdefault(tag, tokens[: 16 * n + 16]) == tokens[: 16 * n + 16]
    assert len(seen) > 2000


@pytest.mark.parametrize("other", [dict(group=1), dict(salt="x"), dict(block_size=8), dict(items=[(0, "a")])])
def test_whatever_else_shapes_a_block_changes_its_tag(other):
    settings = dict(block_size=16, group=0, salt="", items=[])
    assert prompt_tags(TOKENS, **settings)[0] != prompt_tags(TOKENS, **(settings | other))[0]


def test_an_image_changes_the_tags_from_its_block_on():
    first, second = (prompt_tags(TOKENS, 16, 0, "", [(20, name)]) for name in "ab")
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, False]


def oracle(row: bytes, factors) -> int:
    words = np.frombuffer(row, "<i8")
    total = sum(int(w) * int(f) for w, f in zip(words, factors, strict=True)) % 2**64
    return total - 2**64 if total >= 2**63 else total


def test_the_digest_is_the_sum_it_claims_to_be_and_sees_every_bit():
    digest = RowDigest(64, CPU)
    rows = torch.randint(256, (5, 64), dtype=torch.uint8)
    want = [oracle(bytes(row.tolist()), digest.factors.tolist()) for row in rows]
    assert digest(rows).tolist() == want
    for bit in range(512):
        changed = rows[:1].clone()
        changed[0, bit // 8] ^= 1 << bit % 8
        assert digest(changed).item() != want[0]
    assert all(factor % 2 for factor in digest.factors.tolist())


def test_swapped_words_and_rows_of_other_sizes():
    digest = RowDigest(64, CPU)
    row = torch.arange(64, dtype=torch.uint8)[None]
    assert digest(row).item() != digest(row.view(8, 8).flip(0).reshape(1, 64)).item()
    with pytest.raises(ValueError, match="multiple of 8, got 60"):
        RowDigest(60, CPU)


def test_only_the_rows_named_are_sealed():
    pool = torch.randint(256, (100, 64), dtype=torch.uint8)
    seals = SealTable(pool)
    blocks = list(range(2, 80, 2))  # more than are digested at once
    seals.seal(blocks, [1000 + b for b in blocks])
    digests = RowDigest(64, CPU)(pool)
    for block, (tag, digest) in enumerate(seals.table.tolist()):
        assert (tag, digest) == ((1000 + block, digests[block].item()) if block in blocks else (0, 0))

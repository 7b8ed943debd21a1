"""Of a model with full attention and sliding windows the tiers load what they have, the link the rest."""

import pytest

pytest.importorskip("nixl", reason="needs nixl: pip install vllm-xlayer[nixl]")

from hybrid_fixture import CONFIGS, groups, save_hybrid
from model_fixture import random_prompts
from nixl_tiers_fixture import Pair, tiered_connector
from vllm.v1.kv_cache_interface import SlidingWindowSpec

NAME = "cohere2"
PROMPTS = random_prompts([161, 97, 33])
HEADS = [80, 80, 16]


@pytest.fixture(scope="module")
def pair(make_llm, tmp_path_factory):
    folder = save_hybrid(NAME, tmp_path_factory.mktemp(NAME))
    with Pair(make_llm, folder, PROMPTS, tiered_connector(16 << 20), dtype=CONFIGS[NAME]["dtype"]) as pair:
        assert pair.cached == pair.computed
        yield pair


def test_it_has_several_groups_with_and_without_a_window(pair):
    specs = [group.kv_cache_spec for group in pair.scheduler.kv_cache_config.kv_cache_groups]
    windows = [isinstance(spec, SlidingWindowSpec) for spec in specs]
    assert len(groups(pair.decode)) > 1 and any(windows) and not all(windows)


def test_both_load_their_part_of_every_group(pair):
    """Of 80 tokens the tiers find 64, of 16 none. There are 4 groups, and 3 of them need the last 64 tokens
    of a prompt only: 11 + 3 x 5, 7 + 3 x 5 and 4 x 3 rows. The tiers have 4, 4 + 3 x 2 and none of them."""
    pair.hold(HEADS)
    assert pair.ask(pair.hand_over()) == (60 - 14, 14)
    assert not pair.reads.failures

"""Who waits for the next step: requests that go on inside a block which got its hash in this one.

What it protects is in tests/engine/test_partial_hit_answers.py.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, UniformTypeKVCacheSpecs

from vllm_xlayer.patches import partial_hits, registry

BLOCK, BLOCKS, NEEDED = 64, 100, 3


class Manager:
    """An attention group's, as far as is looked at; `cache` gives its one request's second block a hash."""

    def __init__(self, spec):
        self.block_size, self.kv_cache_spec = BLOCK, spec
        self.block_pool = SimpleNamespace(num_gpu_blocks=BLOCKS)
        self.blocks = [SimpleNamespace(block_id=i, block_hash_num_tokens=None) for i in (7, 8, 9)]
        self.blocks[0].block_hash_num_tokens = BLOCK
        self.num_cached_block, self.req_to_blocks = {"a": 1}, {"a": self.blocks}

    def cache(self):
        def cache_blocks(manager, request):
            self.blocks[1].block_hash_num_tokens = BLOCK + 16

        partial_hits.note_hashed(cache_blocks, self, SimpleNamespace(request_id="a"))

    def needed(self, num_blocks, num_tokens):
        return partial_hits.wait_for_next_step(
            lambda *_: NEEDED, self, "b", 200, self.blocks[:num_blocks], num_tokens, num_tokens, 200
        )


def spec(mode=KVQuantMode.NONE):
    return FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, kv_quant_mode=mode
    )


def several(*specs):
    return UniformTypeKVCacheSpecs(block_size=BLOCK, kv_cache_specs=dict(enumerate(specs)))


@pytest.fixture
def on_a_gpu(monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setitem(sys.modules, partial_hits.OUR_CONNECTOR, sys)  # it is there again after the test
    monkeypatch.delitem(sys.modules, partial_hits.OUR_CONNECTOR)


def test_a_part_of_a_block_of_this_step_waits():
    manager = Manager(spec())
    assert manager.needed(2, BLOCK + 16) == NEEDED  # nothing got a hash yet
    manager.cache()
    assert manager.needed(2, BLOCK + 16) == BLOCKS + 1
    assert manager.needed(1, BLOCK) == manager.needed(0, 0) == NEEDED  # whole blocks are read, not copied
    assert manager.needed(1, 16) == NEEDED  # of an earlier step
    partial_hits.forget_hashed(lambda manager: None, manager)
    assert manager.needed(2, BLOCK + 16) == NEEDED
    manager.cache()  # has it already
    assert manager.needed(2, BLOCK + 16) == NEEDED


@pytest.mark.parametrize(
    "of, waits",
    [
        (spec(), False),
        (spec(KVQuantMode.NVFP4), True),
        (several(spec(), spec()), False),
        (several(spec(), spec(KVQuantMode.NVFP4)), True),
    ],
    ids=["bf16", "nvfp4", "several", "several, one nvfp4"],
)
def test_only_where_the_cache_is_ours(on_a_gpu, monkeypatch, of, waits):
    manager = Manager(of)
    manager.cache()
    assert manager.needed(2, BLOCK + 16) == (BLOCKS + 1 if waits else NEEDED)
    monkeypatch.setitem(sys.modules, partial_hits.OUR_CONNECTOR, sys)
    assert manager.needed(2, BLOCK + 16) == BLOCKS + 1


def test_off_where_blocks_do_not_say_how_much_of_them_is_hashed(monkeypatch):
    """And nothing is changed, as it would end the engine."""

    class Block:
        block_id: int

    monkeypatch.setattr("vllm.v1.core.kv_cache_utils.KVCacheBlock", Block)
    monkeypatch.setattr(partial_hits, "wrap", lambda *_: pytest.fail("vLLM was changed"))
    patches = registry.Registry()
    patches.apply([partial_hits.PATCH])
    (record,) = patches.report()
    assert record.state is registry.State.OFF and "no attribute block_hash_num_tokens" in record.reason

"""Prompts of embeddings, and of tokens with embeddings between them: no tag of tokens tells two of them
apart, so their rows are neither sealed nor read."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import Request

from vllm_xlayer.connector.nixl.scheduler import RowNixlScheduler

TOKENS = [7] * 40
EMBEDDINGS = torch.randn(len(TOKENS), 8)
BETWEEN = [i < 16 for i in range(len(TOKENS))]
"""Positions that are tokens. The others have a placeholder in TOKENS, the same one in all prompts."""
PROMPTS = {
    "tokens": dict(prompt_token_ids=TOKENS),
    "embeddings": dict(prompt_token_ids=None, prompt_embeds=EMBEDDINGS),
    "both": dict(prompt_token_ids=TOKENS, prompt_embeds=EMBEDDINGS, prompt_is_token_ids=BETWEEN),
}
READ = dict(
    do_remote_prefill=True, remote_engine_id="p", remote_request_id="r", remote_host="localhost",
    remote_port=1, remote_block_ids=[[1, 2, 3]], tp_size=1,
)  # fmt: skip


@pytest.fixture
def scheduler():
    """As much of one as is asked before a step."""
    made = object.__new__(RowNixlScheduler)
    vars(made).update(
        to_seal={}, use_host_buffer=False, is_bidirectional_kv_xfer_enabled=False, _reqs_in_batch=set(),
        _reqs_need_recv={}, _has_mamba=False, _is_hma_required=False,
        _prefill_backoff=lambda: 0,
        kv_cache_config=SimpleNamespace(select_transfer_block_ids=lambda ids: ids),
    )  # fmt: skip
    return made


def request(kind, params):
    return Request(
        "r", sampling_params=SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": dict(params)}),
        pooling_params=None, **PROMPTS[kind],
    )  # fmt: skip


@pytest.mark.parametrize("kind", PROMPTS)
def test_only_prompts_of_tokens_are_read(scheduler, kind):
    asked = request(kind, READ)
    found, later = scheduler.get_num_new_matched_tokens(asked, 0)
    assert (found, later) == ((len(TOKENS), True) if kind == "tokens" else (0, False))
    blocks = [SimpleNamespace(block_id=i, block_hash=None, is_null=False) for i in (1, 2, 3)]
    scheduler.update_state_after_alloc(asked, KVCacheBlocks((blocks,)), found)
    # The other engine is told in either case, and need not keep the rows.
    _, to_read, _, waits = scheduler._reqs_need_recv["r"]
    assert ([*map(list, to_read)], waits) == (([[1, 2, 3]], True) if kind == "tokens" else ([], False))


@pytest.mark.parametrize("kind", PROMPTS)
def test_only_prompts_of_tokens_are_sealed(scheduler, kind):
    scheduler.update_state_after_alloc(request(kind, dict(do_remote_decode=True)), KVCacheBlocks(((),)), 0)
    assert [*scheduler.to_seal] == (["r"] if kind == "tokens" else [])

"""Blocks that another connector loads into: stores that still read them are waited for, in every vLLM."""

from types import SimpleNamespace

from vllm_xlayer.connector.scheduler import RowConnectorScheduler


class Scheduler(RowConnectorScheduler):
    """Of a connector that has nothing to load."""

    def __init__(self):
        self._current_batch_allocated_block_ids = {3}
        self.activity = SimpleNamespace(lookups=SimpleNamespace(admitted=lambda name: None))


def test_they_are_noted_without_a_token_to_load():
    groups = tuple(tuple(SimpleNamespace(block_id=i) for i in ids) for ids in ([0, 7], [8, 0]))
    scheduler = Scheduler()
    scheduler.update_state_after_alloc(
        SimpleNamespace(request_id="b"), SimpleNamespace(blocks=groups), num_external_tokens=0
    )
    assert scheduler._current_batch_allocated_block_ids == {3, 7, 8}

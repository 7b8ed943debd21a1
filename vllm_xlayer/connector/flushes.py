"""Whether stores are waited for before vLLM writes to the blocks that they copy from.

vLLM calls ``handle_preemptions`` for that. Model runner V1 does so first of all in a step, V2 (0.31 to 0.33)
only before the launch: where new blocks are zeroed, or copied into (models with states, caches of several
precisions), a store that is not through by then would keep zeros under a key that says otherwise.
"""

_first = False


def expect_flushes_first() -> None:
    """From now on model runner V2 of this process calls ``before_blocks_change`` in time."""
    global _first
    _first = True


def flushed_first() -> bool:
    """Whether it does."""
    return _first

"""Engines of one test that start and run at the same time: most of what each takes is its start."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def side_by_side(*engines: Callable[[], Any]) -> list[Any]:
    """What each returned, in their order. An engine is a call that runs it in a process of its own."""
    with ThreadPoolExecutor(len(engines)) as pool:
        return [future.result() for future in [pool.submit(engine) for engine in engines]]

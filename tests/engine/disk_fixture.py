"""Engines with a disk tier, for the tests of it."""

import os
import threading
import time
from pathlib import Path

from faults import TALLY, check, core_of, live_connector, settle
from model_fixture import random_prompts, vllm_greedy, vllm_outputs

from vllm_xlayer.connector.disk import tier as disk_tier

NUM_TOKENS = 8
PROMPTS = random_prompts([5, 100, 16, 33, 200, 1])
BLOCKS = sum(len(p) // 16 for p in PROMPTS)
ROW = 2 * 2 * 2 * 16 * 32 * 4


def connector(folder, **extra):
    extra = {
        "cpu_bytes_to_use": 256 * ROW, "disk_path": str(folder), "disk_bytes_to_use": 1 << 30,
    } | extra  # fmt: skip
    return dict(kv_connector="XLayerConnector", kv_role="kv_both", kv_connector_extra_config=extra)


def entries(folder):
    return sorted(Path(folder).rglob("*.row"))


def start(make_llm, model, folder, **extra):
    llm = make_llm(model, kv_transfer_config=connector(folder, **extra))
    live_connector().pool.fill_(0xFF)
    return llm


def fill(make_llm, model, folder, **extra):
    """A folder with all blocks of PROMPTS, left by an engine that was stopped."""
    llm = start(make_llm, model, folder, **extra)
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    settle(llm)
    core_of(llm).shutdown()
    assert len(entries(folder)) == BLOCKS
    return llm


def cached(llm):
    """(tokens, tokens found in a tier) of each of PROMPTS."""
    outputs = vllm_outputs(llm, PROMPTS, NUM_TOKENS)
    settle(llm)
    return [list(o.outputs[0].token_ids) for o in outputs], [o.num_cached_tokens for o in outputs]


def cached_right(llm, answers):
    """Tokens found in a tier, of each of PROMPTS, whose answers are counted and compared."""
    found = check(llm, PROMPTS, answers)
    settle(llm)
    return found


WHOLE_BLOCKS = [(len(p) - 1) // 16 * 16 for p in PROMPTS]
"""Tokens of each prompt that a cache can hold for it: its last token is always computed."""

GIVE_UP = 60
"""Seconds after which what a test waits for is taken to fail."""


def until(condition):
    give_up = time.monotonic() + GIVE_UP
    while not condition():
        assert time.monotonic() < give_up, "what was waited for did not happen"
        time.sleep(0.001)


class Hang:
    """A function of ``os`` that does not return on the disk's threads, until `release`.

    Only in between a call counts soon as one that hangs: on a busy machine any call may take long.
    """

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch
        self._go_on = threading.Event()
        self.began = threading.Event()

    def at(self, name, seconds=0.2):
        real = getattr(os, name)
        self._monkeypatch.setattr(disk_tier, "HUNG_SECONDS", seconds)

        def hanging(*args, **more):
            if threading.current_thread().name.startswith("xlayer-disk"):
                self.began.set()
                TALLY["tries"] += not self._go_on.is_set()
                assert self._go_on.wait(10 * GIVE_UP)
            return real(*args, **more)

        self._monkeypatch.setattr(os, name, hanging)

    def release(self):
        self._monkeypatch.setattr(disk_tier, "HUNG_SECONDS", 10 * GIVE_UP)
        self._go_on.set()

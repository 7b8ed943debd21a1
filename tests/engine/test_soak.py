"""Random arrivals, aborts, resets, copy errors and damaged files, with caches too small for anything.

SOAK_SECONDS says how long (8 each; `benchmarks.faults` sets it), SOAK_SEED from where. Every answer not
aborted is compared, and the accounts are checked after every step.
"""

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from disk_fixture import GIVE_UP, ROW, connector
from faults import (
    TALLY,
    Copies,
    compare,
    finish,
    greedy,
    live_connector,
    manager_of,
    settle,
    slow_down,
    without_connector,
)
from model_fixture import SHAPE, random_prompts, save_random_model
from transformers import Gemma2Config

from vllm_xlayer.connector.disk.format import HEADER_BYTES

NUM_TOKENS = 8
SAMPLING = greedy(NUM_TOKENS)
SECONDS = float(os.environ.get("SOAK_SECONDS", 8))


def prompts_with_shared_prefixes():
    prefixes = random_prompts([32, 64, 80], seed=3)
    tails = random_prompts([1, 7, 15, 16, 17, 40], seed=4)
    return [*tails, *(prefix + tail for prefix in prefixes for tail in tails)]


class Soak:
    def __init__(self, llm, copies, folder, prompts, answers, rng):
        self.llm, self.copies, self.folder = llm, copies, folder
        self.prompts, self.answers, self.rng = prompts, answers, rng
        self.running: dict[str, int] = {}
        self.did = Counter()

    def add(self):
        for _ in range(self.rng.randint(1, 6)):
            name, which = f"r{self.did['requests']}", self.rng.randrange(len(self.prompts))
            self.did["requests"] += 1
            self.running[name] = which
            self.llm.llm_engine.add_request(name, {"prompt_token_ids": self.prompts[which]}, SAMPLING)

    def step(self):
        for _ in range(self.rng.randint(1, 12)):
            self.answered({o.request_id: o for o in self.llm.llm_engine.step() if o.finished})

    def answered(self, outputs):
        compare(outputs, {name: self.answers[self.running.pop(name)] for name in outputs})
        self.did["answers"] += len(outputs)

    def abort(self):
        names = self.rng.sample(sorted(self.running), min(len(self.running), self.rng.randint(1, 4)))
        for name in names:
            del self.running[name]
        self.llm.llm_engine.abort_request(names)
        self.did["aborted"] += len(names)

    def reset(self):
        self.llm.reset_prefix_cache()
        self.did["resets"] += 1

    def reset_tiers(self):
        self.llm.reset_prefix_cache(reset_connector=True)
        self.did["resets of tiers"] += 1

    def copy_errors(self):
        rate = self.rng.choice([0, 0, 2, 5])
        self.copies.fail_loads = lambda n: rate and n % rate == 0
        self.copies.fail_stores = lambda n: rate and n % rate == 1

    def damage(self):
        files = sorted(Path(self.folder).rglob("*.row"))
        for path in self.rng.sample(files, min(len(files), 5)):
            try:
                data = bytearray(path.read_bytes())
                data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
                replacement = path.with_suffix(".damaged")  # as a bad disk would: not while it is being read
                replacement.write_bytes(data[: self.rng.choice([len(data), len(data), 100])])
                replacement.rename(path)
            except FileNotFoundError:  # evicted meanwhile
                continue
            self.did["damaged"] += 1

    def act(self, seconds, enough=lambda: True):
        """Does things at random for so long, and on until there were enough of them."""
        actions = [(self.add, 6), (self.step, 12), (self.abort, 2), (self.reset, 1), (self.copy_errors, 1)]
        actions += [(self.damage, 1), (self.reset_tiers, 0.1)]
        choices, weights = zip(*actions, strict=True)
        end = time.monotonic() + seconds
        # On a slow machine little has happened by then.
        while time.monotonic() < end or (not enough() and time.monotonic() < end + GIVE_UP):
            if len(self.running) > 20:
                self.step()
            else:
                self.rng.choices(choices, weights)[0]()

    def run(self, seconds, enough):
        self.act(seconds, enough)
        self.answered(finish(self.llm))
        compare({}, {name: self.answers[which] for name, which in self.running.items()})  # lost


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """Folder of a Gemma 2 with layers of sliding-window and of full attention."""
    config = Gemma2Config(
        **(SHAPE | dict(tie_word_embeddings=True, num_hidden_layers=4)),
        sliding_window=48,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return save_random_model(config, tmp_path_factory.mktemp("hybrid"))


@pytest.mark.fault("soak")
@pytest.mark.timeout(SECONDS + 400)
@pytest.mark.parametrize(("model", "blocks_per_chunk"), [("tiny_llama", 1), ("tiny_llama", 2), ("hybrid", 1)])
def test_soak(make_llm, request, tmp_path, monkeypatch, model, blocks_per_chunk):
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    seed = int(os.environ.get("SOAK_SEED", 0))
    folder = request.getfixturevalue(model)
    prompts = prompts_with_shared_prefixes()
    answers = without_connector(make_llm, folder, prompts, NUM_TOKENS)
    slow_down(monkeypatch, 2)
    copies = Copies(monkeypatch, lambda: live_connector().pool)
    bound = 24 * (blocks_per_chunk * ROW + HEADER_BYTES)
    extra = dict(cpu_bytes_to_use=14 * blocks_per_chunk * ROW, disk_bytes_to_use=bound)
    llm = make_llm(
        folder,
        num_gpu_blocks_override=30 if model == "tiny_llama" else 60,
        max_model_len=160,
        max_num_batched_tokens=96,
        kv_transfer_config=connector(tmp_path, blocks_per_chunk=blocks_per_chunk, **extra),
    )
    soak = Soak(llm, copies, tmp_path, prompts, answers, random.Random(seed))
    disk = manager_of(llm).disk
    soak.run(SECONDS, lambda: copies.loads and copies.failed and (disk.counts["hit"] or blocks_per_chunk > 1))
    settle(llm)
    for what in ("aborted", "resets", "resets of tiers", "damaged"):
        TALLY["tries"] += soak.did[what]  # and failed copies are in it
    print(f"soak: {dict(soak.did)}, copies failed {copies.failed} of {copies.loads + copies.stores}")
    print(f"soak: {dict(disk.counts)}")
    assert not disk.problem
    assert soak.did["answers"] == soak.did["requests"] - soak.did["aborted"] > 0
    assert copies.loads and copies.failed
    assert disk.counts["hit"] or blocks_per_chunk > 1  # few prompts are longer than a chunk
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.row")) <= bound

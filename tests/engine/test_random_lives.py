"""Engines with settings from a die, and requests that live as a die says: aborts, resets, preemption, copies
that are slow or fail, salts, limits of what is stored and loaded, prompts' logprobs.

Two things are compared: each answer with that of an engine that caches nothing, and each row that comes to
the host with what came under the same key before. So what is stored as another's is found where nobody reads
it, too. LIVES says which seeds: "0:2" are 0 and 1.
"""

import os
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from faults import Copies, compare, finish, greedy, live_connector, settle, slow_down
from hybrid_fixture import fill_memory, save_hybrid
from model_fixture import SHAPE, random_prompts, save_random_model
from transformers import Gemma2Config
from vllm import SamplingParams

from vllm_xlayer.connector.host.manager import HostTierManager

SEEDS = range(*map(int, os.environ.get("LIVES", "0:2").split(":")))
STEPS, MOST_AT_ONCE = 400, 8
NUM_TOKENS = 18
NEAR = 1e-3
"""Of elements that were computed with others in the batch; another block's differ by more than 0.1."""


def prompts_with_shared_prefixes() -> list[list[int]]:
    dice, prefixes, prompts = random.Random(5), random_prompts([200, 200], seed=9), []
    for i in range(24):
        (tail,) = random_prompts([dice.choice([1, 5, 16, 17, 32, 40])], seed=100 + i)
        prompts.append(prefixes[i % 2][: dice.choice([0, 16, 31, 48, 64, 80, 100, 160])] + tail)
    return prompts


PROMPTS = prompts_with_shared_prefixes()


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_llama):
    windows = dict(num_hidden_layers=4, head_dim=32, sliding_window=37, query_pre_attn_scalar=32)
    kinds = dict(tie_word_embeddings=True, layer_types=["sliding_attention", "full_attention"] * 2)
    gemma = tmp_path_factory.mktemp("gemma")
    save_random_model(Gemma2Config(**(SHAPE | windows | kinds)), gemma)
    return {"llama": tiny_llama, "gemma": gemma, "lfm2": save_hybrid("lfm2", tmp_path_factory.mktemp("lfm2"))}


@pytest.fixture(scope="module")
def answers(make_llm, models):
    known: dict[str, list[list[int]]] = {}

    def of(name: str) -> list[list[int]]:
        if name not in known:
            llm = make_llm(models[name], enable_prefix_caching=False)
            prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
            outputs = [llm.generate([prompt], greedy(NUM_TOKENS), use_tqdm=False)[0] for prompt in prompts]
            known[name] = [list(output.outputs[0].token_ids) for output in outputs]
        return known[name]

    return of


def settings_of(dice: random.Random, name: str, folder: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the engine, and of the connector. No cache has room for all."""
    extra: dict[str, Any] = {"offload_prompt_only": dice.random() < 0.3}
    extra["cpu_bytes_to_use"] = dice.choice([1 << 20, 4 << 20, 32 << 20])
    if dice.random() < 0.5:
        extra |= dict(disk_path=str(folder), disk_bytes_to_use=dice.choice([2 << 20, 64 << 20]))
    settings = dict(
        max_num_batched_tokens=dice.choice([64, 256]), max_model_len=320, max_num_seqs=dice.choice([4, 16]),
        num_gpu_blocks_override=dice.choice([40, 70, 120] if name == "llama" else [70, 120, 200]),
        async_scheduling=dice.random() < 0.6, scheduling_policy=dice.choice(["fcfs", "priority"]),
    )  # fmt: skip
    if name == "lfm2":
        if dice.random() < 0.5:
            parts = dict(block_size=64, prefix_match_unit=16, num_gpu_blocks_override=30)
            settings |= parts | dict(max_num_batched_tokens=512)
        return settings, extra
    if dice.random() < 0.4:
        extra["blocks_per_chunk"] = dice.choice([2, 3])
    if dice.random() < 0.3:
        settings["enable_prefix_caching"] = False
    if dice.random() < 0.4:
        drafts = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=2, prompt_lookup_min=1)
        settings |= dict(speculative_config=drafts, async_scheduling=False)
    return settings, extra


@dataclass
class Stored:
    """Looks at all that has come to the host.

    Attributes:
        blocks: rows of a key.
        first: key -> the rows that came first.
        others: keys under which another came later.
    """

    blocks: int
    first: dict[bytes, torch.Tensor] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = HostTierManager.complete_store

        def complete_store(manager, keys, context, success=True):
            keys = list(keys)
            real(manager, keys, context, success)
            for key in keys:
                chunk = manager._policy.get(key)
                if chunk is not None and chunk.is_ready and key not in manager._failed:
                    self._look(key, chunk.chunk_id)

        monkeypatch.setattr(HostTierManager, "complete_store", complete_store)

    def _look(self, key: bytes, chunk: int) -> None:
        worker = live_connector().connector_worker.worker
        group = int.from_bytes(key[-4:], "big")
        used, begin = worker.used_bytes[group], chunk * self.blocks
        rows = worker.host[begin : begin + self.blocks, :used].contiguous().clone().view(torch.float32)
        if not torch.allclose(self.first.setdefault(key, rows), rows, atol=NEAR):
            self.others.append(key.hex())


class Lives:
    def __init__(self, llm, answers, dice):
        self.llm, self.answers, self.dice = llm, answers, dice
        self.expected: dict[str, list[int]] = {}
        self.began = self.answered = 0

    def run(self) -> None:
        for _ in range(STEPS):
            while len(self.expected) < MOST_AT_ONCE and self.dice.random() < 0.5:
                self.begin()
            self.check(self.llm.llm_engine.step())
            if self.expected and self.dice.random() < 0.04:
                self.abort(self.dice.choice(list(self.expected)))
            if self.dice.random() < 0.02:
                self.reset()
        self.check(finish(self.llm).values())
        assert not self.expected

    def begin(self) -> None:
        dice, which, name = self.dice, self.dice.randrange(len(PROMPTS)), f"r{self.began}"
        self.began += 1
        sampling = SamplingParams(
            temperature=0, max_tokens=dice.choice([1, 2, 5, NUM_TOKENS]), ignore_eos=True, detokenize=False,
            prompt_logprobs=1 if dice.random() < 0.1 else None,
        )  # fmt: skip
        if dice.random() < 0.2:
            key, values = dice.choice(LIMITS)
            sampling.extra_args = {"kv_transfer_params": {key: dice.choice(values)}}
        prompt: dict[str, Any] = {"prompt_token_ids": list(PROMPTS[which])}
        if dice.random() < 0.2:
            prompt["cache_salt"] = dice.choice("ab")
        self.llm.llm_engine.add_request(name, prompt, sampling, priority=dice.randrange(3))
        self.expected[name] = self.answers[which][: sampling.max_tokens]

    def check(self, outputs) -> None:
        ended = {o.request_id: o for o in outputs if o.finished and o.request_id in self.expected}
        self.answered += len(ended)
        compare(ended, {name: self.expected.pop(name) for name in ended})

    def abort(self, name: str) -> None:
        self.llm.llm_engine.abort_request([name])
        del self.expected[name]

    def reset(self) -> None:
        try:
            self.llm.reset_prefix_cache(
                reset_running_requests=self.dice.random() < 0.7, reset_connector=self.dice.random() < 0.25
            )
        except RuntimeError as error:  # vLLM refuses while a request waits for a load
            assert "remote KV" in str(error)


LIMITS = (
    ("max_load_tokens", [0, 1, 16, 40]),
    ("max_offload_tokens", [0, 1, 16, 40, 64]),
    ("kv_load_tiers", [[], [{"medium": "storage"}]]),
)
"""What a request may say of its own KV."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["llama", "gemma", "lfm2"])
def test_all_answers_are_right(make_llm, models, answers, monkeypatch, tmp_path, seed, name):
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    dice, expected = random.Random(7 * seed + 1), answers(name)
    slow_down(monkeypatch, dice.choice([1, 2, 4, 9]))
    copies, rate = Copies(monkeypatch, lambda: live_connector().pool), dice.choice([0, 0, 0.1])
    copies.fail_loads = copies.fail_stores = lambda n: dice.random() < rate
    settings, extra = settings_of(dice, name, tmp_path / "tier")
    connector = dict(kv_connector="XLayerConnector", kv_role="kv_both", kv_connector_extra_config=extra)
    llm = make_llm(models[name], kv_transfer_config=connector, **settings)
    if "speculative_config" not in settings:  # its warm-up reads what nobody wrote
        fill_memory(llm, 0xFF)
    stored = Stored(extra.get("blocks_per_chunk", 1))
    if name != "lfm2":  # a state's row, and that of a part of a block, is longer than what is in it
        stored.watch(monkeypatch)
    lives = Lives(llm, expected, dice)
    lives.run()
    settle(llm)
    assert not stored.others, f"of {len(stored.first)} keys, others came under {stored.others}"
    assert lives.answered and (stored.first or name == "lfm2")

"""The soak of models with states beside attention: LFM2's short convolutions, Qwen3-Next's gated delta net,
and that with drafts of its own (MTP).

Tokens and their logprobs are compared with those of an engine without connector, whose device cache holds
all, which answers every prompt alone. A prompt has one right answer where its cache is in 16 or 32 bits:
states are of float32 or as their inputs are, so that they are the same wherever a step ends. With NVFP4 a
step's own tokens are exact to each other, and what it finds in a cache is quantised; so an answer is taken
for each number of tokens that a cache can hold. For this the only layer of attention is the last: what is in
a cache then depends on no such number, and no step cuts a prompt but at the end of a block, as vLLM does
where a state is to be kept. What a preempted request answers with NVFP4 after it went on is not compared.

Batches round otherwise than prompts alone, a few requests otherwise than many, and what a preempted request
had decoded is computed again by other kernels than before. How far that moves a logprob is measured on an
engine without connector, with as small a cache and for as long as the soak, since the largest of many counts.
Twice of it is allowed (TOLERANCE at least), of preempted requests for those alone. What the zero of wrong
answers is worth is measured, too: of each KV cache group a block of a cached prompt is given another prompt's
bytes.
"""

import itertools
import mmap
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_xlayer.provenance import rows_of, stamped, write

from . import serving
from .right_answers import NUM_TOKENS, Answers, ask, right_answers, sampling
from .soaking import ZEROS, note_preempted, soak, with_host_tier

MTP = dict(method="mtp", num_speculative_tokens=2)
MODELS: dict[str, dict[str, Any]] = {"lfm2": {}, "qwen3_next": {}, "qwen3_next_mtp": MTP}
"""Of models.json, and how they speculate: what vLLM is told."""
CACHES = ("auto", "nvfp4")
SEQUENCES = 8
BLOCKS, ROWS = 14, 16
"""Of the device's cache, and of the host tier, a KV cache group: about four requests fill the first."""
TOLERANCE = 1e-4
"""Of a logprob, in nats."""
EMPTIED = 5
"""Of so many batches, without the connector, one finds nothing in the device's cache."""


def config_of(model: str, cache: str) -> dict[str, Any]:
    """A model of models.json whose states do not hang on where steps end; with NVFP4 attention comes last."""
    from hybrid_fixture import CONFIGS

    config = dict(CONFIGS[model.removesuffix("_mtp")])
    if model == "lfm2" and cache == "nvfp4":
        layers = sorted(config["layer_types"])  # "conv" before "full_attention"
        layers.remove("full_attention")
        config |= {"layer_types": layers, "num_hidden_layers": len(layers)}
    return config


def prompts_of(block: int, drafts: bool) -> list[list[int]]:
    """Shorter than a block, whole blocks, one token less and more; they part at and within blocks.

    With drafts none has one token only: vLLM (0.31 to 0.33, model runner V1) takes it for a token with drafts
    whose states are in its block already, and answers from what is there.
    """
    from model_fixture import random_prompts

    prefixes = random_prompts([block, 2 * block, 3 * block - 5], seed=3)
    tails = random_prompts([2 if drafts else 1, 7, block - 1, block, block + 1, 2 * block + 8], seed=4)
    return [*tails, *(prefix + tail for prefix in prefixes for tail in tails)]


@dataclass
class Moved:
    """How far answers without a connector are from right ones, in nats, at most.

    Attributes:
        answers, preempted: of requests, and of those that were preempted.
        by_batches, by_preemption: of requests that never were, and of those. The former also by the number
            of tokens that a cache has of a prompt.
    """

    answers: int = 0
    preempted: int = 0
    by_batches: float = 0.0
    by_preemption: float = 0.0


def rounding(
    llm: Any, prompts: list[list[int]], seconds: float, distance: Callable[[int, Any, int | None], float]
) -> Moved:
    """Asks for batches of prompts for so long; `distance` is told what the soak's judge is."""
    from vllm_xlayer.compat.engine import empty_device_cache

    rng, moved, end = random.Random(0), Moved(), time.monotonic() + seconds
    for round_ in itertools.count():
        if time.monotonic() > end:
            break
        if round_ % EMPTIED == 0:
            empty_device_cache(llm)
        # A few requests round otherwise than many.
        asked = {f"{round_}.{i}": rng.randrange(len(prompts)) for i in range(rng.randint(1, 2 * SEQUENCES))}
        for name, which in asked.items():
            llm.llm_engine.add_request(name, {"prompt_token_ids": prompts[which]}, sampling())
        preempted: dict[str, int] = {}
        while llm.llm_engine.has_unfinished_requests():
            outputs = [output for output in llm.llm_engine.step() if output.finished]
            note_preempted(llm, preempted)
            for output in outputs:
                before = preempted.get(output.request_id)
                found = distance(asked[output.request_id], output, before)
                moved.answers += 1
                if before is None:
                    moved.by_batches = max(moved.by_batches, found)
                else:
                    moved.preempted += 1
                    moved.by_preemption = max(moved.by_preemption, found)
    return moved


def planted(llm: Any, prompts: list[list[int]], answers: list[Answers]) -> list[dict[str, Any]]:
    """Of each KV cache group, how far answers from wrong blocks are from right ones."""
    from hybrid_fixture import groups

    specs = [g.kv_cache_spec for g in _core(llm).scheduler.kv_cache_config.kv_cache_groups]
    found = []
    for group, spec in enumerate(specs):
        distances = [
            answers[which].distance(output)
            for which, prompt in enumerate(prompts)
            if (output := _answer_from_wrong_block(llm, prompt, group, which)) is not None
        ]
        kind = type(spec).__name__.removesuffix("Spec")
        found.append({"group": kind, "layers": len(groups(llm)[group]), "distances": distances})
    return found


def noticed(planted: list[dict[str, Any]], tolerance: float) -> list[dict[str, Any]]:
    """How many wrong blocks the soak notices, of so many that were planted."""
    found = []
    for group in planted:
        distances = group["distances"]
        seen = sum(distance > tolerance for distance in distances)
        found.append({k: group[k] for k in ("group", "layers")} | {"noticed": seen, "of": len(distances)})
    return found


def _answer_from_wrong_block(llm: Any, prompt: list[int], group: int, seed: int) -> Any:
    """A cached prompt's answer, where one of its blocks in a group has the bytes of another prompt's.

    None if nothing of it is found in the cache.
    """
    from hybrid_fixture import cached_blocks, groups, layer_tensors, wait_for_device
    from model_fixture import random_prompts

    from vllm_xlayer.compat.engine import come_to_rest, empty_device_cache

    rng = random.Random(seed)
    empty_device_cache(llm)
    (other,) = random_prompts([len(prompt)], seed=1000 + seed)
    serving.answer_to(llm, other, 1)
    theirs = sorted(cached_blocks(llm, group))
    serving.answer_to(llm, prompt, 1)
    come_to_rest(llm)
    ours = sorted(set(cached_blocks(llm, group)) - set(theirs))
    if not ours:
        return None
    source, target = rng.choice(theirs), rng.choice(ours)
    wait_for_device()
    for layer in groups(llm)[group]:
        for tensor in layer_tensors(llm, layer):
            tensor[target] = tensor[source].clone()
    wait_for_device()
    (output,) = ask(llm, [prompt])
    return output if output.num_cached_tokens else None


def _core(llm: Any) -> Any:
    from vllm_xlayer.compat.engine import core_of

    return core_of(llm)


def soak_one(folder: Path, model: str, cache: str, seconds: float, seed: int, keep: Any) -> dict[str, Any]:
    """Soaks a model with a cache, after as long without connector; `keep` gets what was counted so far."""
    from hybrid_fixture import save_hybrid_config, save_qwen3_next_with_mtp

    config, speculation = config_of(model, cache), MODELS[model]
    save = save_qwen3_next_with_mtp if speculation else save_hybrid_config
    settings = dict(
        model=str(folder), dtype=config["dtype"], kv_cache_dtype=cache, max_num_seqs=SEQUENCES,
        max_num_batched_tokens=4096, mamba_ssm_cache_dtype="float32", **save(config, folder),
        **({"speculative_config": dict(speculation)} if speculation else {}),
    )  # fmt: skip
    # Blocks of up to 240 tokens, on a GPU, and prompts of six of them.
    large = settings | dict(kv_cache_memory_bytes=64 << 20, max_model_len=settings["max_num_batched_tokens"])
    with serving.started(large) as llm:
        block = serving.block_of(llm)
        prompts = prompts_of(block, drafts=bool(speculation))
        right = right_answers(llm, prompts, drafts=bool(speculation))
        exactly = [Answers(one) for one in right]
        wrong_blocks = planted(llm, prompts, exactly)
        kv_cache = _core(llm).scheduler.kv_cache_config
        row = kv_cache.kv_cache_tensors[0].size // kv_cache.num_blocks
        row = -(-row // mmap.PAGESIZE) * mmap.PAGESIZE  # as vLLM counts it in host memory that ranks share
        groups = len(kv_cache.kv_cache_groups)
    longest = -(-(max(map(len, prompts)) + NUM_TOKENS) // block) * block
    small = settings | dict(
        num_gpu_blocks_override=BLOCKS * groups,
        max_model_len=longest,
        # vLLM's first step, without requests, has so many tokens in max_num_seqs requests, which must not be
        # longer than a request may be: kernels of states would read past the block table.
        max_num_batched_tokens=min(settings["max_num_batched_tokens"], SEQUENCES * longest),
    )

    def distance(which: int, output: Any, before: int | None) -> float:
        compared = NUM_TOKENS if before is None or cache == "auto" else before
        return exactly[which].distance(output, compared)

    with serving.started(small) as llm:
        moved = rounding(llm, prompts, seconds, distance)
    if cache == "auto":  # with NVFP4 a prompt's answers differ by what is quantised
        moved.by_batches = max(moved.by_batches, *(answers.spread() for answers in exactly))
    tolerance = max(TOLERANCE, 2 * moved.by_batches)
    of_preempted = max(tolerance, 2 * moved.by_preemption)
    about = dict(
        model=model, cache=cache, block_size=block, rounding=asdict(moved), tolerance=tolerance,
        tolerance_preempted=of_preempted, power=noticed(wrong_blocks, of_preempted),
    )  # fmt: skip
    print(about, flush=True)

    def is_right(which: int, output: Any, before: int | None) -> bool:
        if len(output.outputs[0].token_ids) != NUM_TOKENS:
            return False
        found = distance(which, output, before)
        is_near = found <= (tolerance if before is None else of_preempted)
        if not is_near:
            print(f"{found:g} nats from the nearest right answer", flush=True)
        return is_near

    def note(_: Any, counted: dict[str, Any]) -> None:
        keep(about | counted)
        print(counted, flush=True)

    small |= with_host_tier(ROWS * groups * row)
    counts = ("requests", "answers", "restored", "preempted", "wrong")
    return about | soak(small, prompts, sampling(), is_right, seconds, seed, counts, note)


def run(folder: Path, model: str, caches: Sequence[str], seconds: float, seed: int, result: Path) -> int:
    """Soaks a model with each of the caches for so long; returns 1 if an answer was wrong or lost, accounts
    did not balance, or no wrong block of some group would have been noticed."""
    rows: dict[str, Any] = rows_of(result, "soaks")

    def keep(found: dict[str, Any]) -> None:
        rows[f"{found['model']} {found['cache']}"] = stamped(found)
        write(result, {"soaks": {name: rows[name] for name in sorted(rows)}})

    failed = [is_bad(soak_one(folder / cache, model, cache, seconds, seed, keep)) for cache in caches]
    return int(any(failed))


def is_bad(found: dict[str, Any]) -> bool:
    blind: Iterable[bool] = (not group["noticed"] for group in found["power"])
    return any(found[name] for name in ZEROS) or any(blind)

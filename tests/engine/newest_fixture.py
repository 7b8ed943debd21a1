"""What tests of unquantised newest tokens share: a random life of requests, and what may go wrong."""

import random
import time
from collections import Counter
from contextlib import nullcontext
from unittest.mock import patch

import newest_drafts
from model_fixture import random_prompts


class Life:
    """Requests that come, share prefixes, are aborted, preempted and resumed, on a cache too small for them.

    Prompts begin with one of few stems, cut where others' prompts end, so that a prompt is often found in the
    cache up to a place where another request's row ends.
    """

    def __init__(self, llm, seed: int, temperature: float = 0.0) -> None:
        from vllm_xlayer.compat.engine import core_of

        self.engine = llm.llm_engine
        self.scheduler = core_of(llm).scheduler
        self.preempted: set[tuple[str, int]] = set()
        self.rng = random.Random(seed)
        self.seed, self.temperature = seed, temperature
        self.names = 0
        self.running: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.stems = random_prompts([96] * 3, seed=seed)
        newest_drafts.RANDOM.seed(seed)  # so that a life with this seed can be lived again
        self.engine.reset_prefix_cache()

    def begin(self) -> None:
        """What is known to be dangerous, before what is drawn at random."""
        for tokens in (
            20,
            36,
        ):  # 16 are found: of 20, or of 36 where vLLM (0.31) finds a block less for drafters
            self._resume_in_anothers_row(tokens)
            self._start_in_anothers_row(tokens)
        self._reject_drafts()
        stem, other, *pairs = random_prompts([97] + [100] * 9, seed=self.seed + 1)
        for prompt in (stem, other, stem):  # the third is found, and its row was the second's
            self._run([prompt], 2)
        # Rows are given back in any order: often, each gets the other's. With drafts few tokens may be all.
        for i, tokens in ((0, 6), (2, 6), (4, 6), (6, 24)):
            self._run(pairs[i : i + 2], tokens, preempt_after=5)
        self.stems[0] = stem[:96]

    # What another request left in a row is read where a request begins at c if the other one wrote the block
    # before c, and c, but nothing over that block; and if the step ends before it would be written over, too.
    # Here c is 16, and a row has places for 32 tokens: all three rows are left by requests that wrote tokens
    # 0 to between 16 and 32, and the step ends before 32, as another request takes most of its 64 tokens.

    def _resume_in_anothers_row(self, tokens: int) -> None:
        """A request with a prompt of so many tokens runs without a row, is preempted, and gets one."""
        prompt, long, *others = random_prompts([tokens, 116] + [17] * 3, seed=self.seed + tokens)
        names = [self._add(other, 40) for other in others]
        name = self._add(prompt, 40)
        while self._request(name).num_computed_tokens < tokens:
            self._step_engine()
        self._abort(names)
        self._add(long, 1)
        self._step_engine()
        self._preempt(keep=True, name=name)
        self._step_engine()
        self._abort(sorted(self.running))

    def _start_in_anothers_row(self, tokens: int) -> None:
        """A prompt of so many tokens comes again.

        Those who leave the rows were preempted, too, before there was a block to find. So their rows hold
        nothing older, whether starts of new requests are counted or only of resumed ones.
        """
        prompt, long, *others = random_prompts([tokens, 116] + [14] * 3, seed=self.seed + tokens + 1)
        self._run([prompt], 2)
        self._run(others, 6, preempt_after=1)
        self._run([long, prompt], 2)

    def _reject_drafts(self) -> None:
        """With places for 32 tokens, drafts at 32 and beyond are written over the first ones. The next step
        has none, ends before 32, and reads those."""
        with newest_drafts.all_wrong_every_other_step():
            self._run(random_prompts([24], seed=self.seed + 2), 12)

    def _run(self, prompts, tokens: int, preempt_after: int | None = None) -> None:
        for prompt in prompts:
            self._add(prompt, tokens)
        steps = 0
        while self.running:
            if steps == preempt_after:
                self._preempt(keep=True)
            self._step_engine()
            steps += 1

    def step(self) -> None:
        """One step of the engine, and what happens before it."""
        while len(self.running) < 5 and self.rng.random() < 0.4:
            self._add(*self._draw())
        if self.running and self.rng.random() < 0.02:
            self._abort([self.rng.choice(sorted(self.running))])
            self.counts["aborted"] += 1
        if self.rng.random() < 0.02:
            self._preempt(keep=self.rng.random() < 0.8)
        self._step_engine()

    def _step_engine(self) -> None:
        requests = self.scheduler.requests.items()
        self.preempted |= {(name, n) for name, r in requests if (n := r.num_preemptions)}
        for output in self.engine.step():
            self.counts["cached"] += bool(output.num_cached_tokens) and output.finished
            self.counts["finished"] += output.finished
            if output.finished:
                self.running.discard(output.request_id)

    def end(self) -> None:
        self.counts["preempted"] = len(self.preempted)
        self.engine.abort_request(sorted(self.running))
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def _preempt(self, keep: bool, name: str | None = None) -> None:
        """As for new weights, all or one; with keep, what they have computed is found again."""
        running = self.scheduler.running
        others = [] if name is None else [r for r in running if r is not self._request(name)]
        running[:] = [r for r in running if r not in others]
        manager = self.scheduler.kv_cache_manager
        kept = patch.object(manager, "reset_prefix_cache", return_value=True) if keep else nullcontext()
        with kept:
            self.engine.reset_prefix_cache(reset_running_requests=True)
        running += others
        self.counts["kept" if keep else "reset"] += 1

    def _abort(self, names: list[str]) -> None:
        self.engine.abort_request(names)
        self.running.difference_update(names)

    def _request(self, name: str):
        """The scheduler's, which calls it name-something."""
        return next(r for its, r in self.scheduler.requests.items() if its.startswith(f"{name}-"))

    def _draw(self) -> tuple[list[int], int]:
        rng = self.rng
        fresh, tail = random_prompts([96, rng.choice([1, 1, 5, 16, 17, 40])], seed=rng.randrange(1 << 30))
        if rng.random() < 0.3:  # whose request writes all of it itself
            self.stems[rng.randrange(len(self.stems))] = fresh
        stem = rng.choice(self.stems)
        return stem[: rng.choice([16, 48, 96, 96])] + tail, rng.choice([2] * 5 + [17, 60])

    def _add(self, prompt: list[int], tokens: int) -> str:
        from vllm import SamplingParams

        self.names += 1
        name = f"{self.seed}-{self.names}"
        params = SamplingParams(
            temperature=self.temperature, seed=self.seed, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        self.running.add(name)
        return name


HAPPENS = ("aborted", "preempted", "reset", "cached", "finished")
"""What must have happened in a search."""
LEAST_LIVES, MOST_LIVES = 3, 60


def live(llm, oracle, seconds: float, seed: int = 0, temperature: float = 0.0):
    """Lives one after the other until something is wrong, or the time is over and all has happened.

    Returns the last one's seed, and what all of them counted.
    """
    counts, end = None, time.monotonic() + seconds
    while not oracle.wrong and (
        time.monotonic() < end
        or seed < LEAST_LIVES
        or (seed < MOST_LIVES and min(counts[what] for what in HAPPENS) == 0)
    ):
        life = Life(llm, seed, temperature)
        life.begin()
        for _ in range(150):
            life.step()
            if oracle.wrong:
                break
        life.end()
        counts, seed = life.counts if counts is None else counts + life.counts, seed + 1
    return seed - 1, counts


def no_reset_on_reuse(monkeypatch):
    _count_only(monkeypatch, lambda name, seen: name in seen)


def no_reset_on_resumption(monkeypatch):
    _count_only(monkeypatch, lambda name, seen: name not in seen)


def _count_only(monkeypatch, counts):
    """Starts are counted only of requests for which counts(name, names seen before) is true."""
    from vllm_xlayer.attention import newest_rows

    start, start_on_v2, seen = newest_rows.NamedRows.start, newest_rows.start_on_v2, set()

    def mutated(rows, names):
        for name in list(names):
            before = rows.starts.copy()
            start(rows, [name])
            if not counts(name, seen):
                rows.starts[:] = before
            seen.add(name)

    def mutated_on_v2(table, places, place, running, *more):
        before = newest_rows.rows_in_use()
        starts = None if before is None else before.starts.copy()
        start_on_v2(table, places, place, running, *more)
        name = next(name for name, its in table.req_id_to_index.items() if its == place)
        if before is newest_rows.rows_in_use() and not counts(name, seen):
            before.starts[:] = starts
        seen.add(name)

    monkeypatch.setattr(newest_rows.NamedRows, "start", mutated)
    monkeypatch.setattr(newest_rows, "start_on_v2", mutated_on_v2)


def no_reset_after_a_prefix_hit(monkeypatch):
    """As if a request had itself written what was found in the cache."""

    def before(state, row, first):
        if state[row, 0] < 0:
            state[row, 0], state[row, 1] = 0, first

    _before_each_step(monkeypatch, before)


def no_reset_after_a_rejected_draft(monkeypatch):
    """As if rejected drafts had not been written over older tokens."""

    def before(state, row, first):
        state[row, 1] = min(int(state[row, 1]), first)

    _before_each_step(monkeypatch, before)


def _before_each_step(monkeypatch, change):
    """change(state, row, the request's first token of the step) for each request, before it is planned."""
    from vllm_xlayer.attention.newest import ops

    step = ops.newest_step

    def mutated(starts, lens, rows, slot_mapping, state, *others):
        for first, row in zip((lens - starts.diff()).tolist(), rows.tolist(), strict=True):
            if row >= 0:
                change(state, row, first)
        return step(starts, lens, rows, slot_mapping, state, *others)

    monkeypatch.setattr(ops, "newest_step", mutated)


MUTATIONS = (
    no_reset_on_reuse,
    no_reset_on_resumption,
    no_reset_after_a_prefix_hit,
    no_reset_after_a_rejected_draft,
)
"""Each leaves out one thing that keeps rows right; they take a monkeypatch."""

"""What goes first out of a full host tier is what goes first under vLLM's "lru", whoever uses what."""

import random

import pytest
from vllm.v1.kv_offload.base import ReqContext, make_offload_key

from vllm_xlayer.connector.host.manager import HostTierManager
from vllm_xlayer.connector.host.recency import POLICY

CHUNKS, BLOCK = 24, 16


class Tiers:
    """Two tiers that are asked the same, vLLM's policy in the first; what they answer must be equal."""

    def __init__(self):
        self.managers = [HostTierManager(CHUNKS, cache_policy=name) for name in ("lru", POLICY)]
        self.ours = self.managers[1]
        self.evicted = self.refused = 0

    def request(self, name, keys):
        contexts = [ReqContext(name) for _ in self.managers]
        for manager, context in zip(self.managers, contexts, strict=True):
            manager.on_new_request(context)
            for i, key in enumerate(keys):
                context.set_offload_key_position(key, (i + 1) * BLOCK)
        return keys, contexts

    def each(self, call, contexts, *arguments):
        """The answer of both managers to a call."""
        answers = [
            getattr(manager, call)(*arguments, context)
            for manager, context in zip(self.managers, contexts, strict=True)
        ]
        theirs, ours = map(plain, answers)
        assert ours == theirs, call
        chunks = [
            {key: (block.chunk_id, block.ref_cnt) for key, block in manager.chunks().items()}
            for manager in self.managers
        ]
        assert chunks[0] == chunks[1]
        return answers[1]

    def store(self, request, first, last):
        keys, contexts = request
        taken = self.each("prepare_store", contexts, keys[first:last])
        self.refused += taken is None
        self.evicted += 0 if taken is None else len(taken.evicted_keys)
        return taken


def plain(answer):
    """What can be compared of it."""
    if hasattr(answer, "store_spec"):
        return answer.keys_to_store, answer.store_spec.block_ids.tolist(), answer.evicted_keys
    return answer.block_ids.tolist() if hasattr(answer, "block_ids") else answer


def hashes(draw, prompts):
    """A prompt's keys: the beginning of another one's, and its own."""
    shared = draw.choice(prompts)[: draw.randrange(9)] if prompts else []
    own = [make_offload_key(draw.randbytes(8), 0) for _ in range(draw.randrange(1, 9))]
    prompts.append([*shared, *own])
    return prompts[-1]


@pytest.mark.parametrize("seed", range(25))
def test_the_same_goes_as_under_vllms_policy(seed):
    draw, tiers, prompts, running, jobs = random.Random(seed), Tiers(), [], {}, []

    def end(job, good):
        jobs.remove(job)
        keys, (_, contexts), load = job
        if not good:
            for manager in tiers.managers:
                manager.fail(keys)
        tiers.each("complete_load" if load else "complete_store", contexts, keys)

    for step in range(600):
        kind = draw.choice(["begin", "store", "store", "load", "end", "end", "end", "finish"])
        name = draw.choice(list(running)) if running else None
        if kind == "begin" and len(running) < 5:
            running[f"{seed}-{step}"] = [tiers.request(str(step), hashes(draw, prompts)), 0]
        elif kind == "store" and name:
            request, first = running[name]
            last = min(len(request[0]), first + draw.randrange(1, 6))
            taken = tiers.store(request, first, last) if last > first else None
            if taken is not None:
                running[name][1] = last
                if taken.keys_to_store:
                    jobs.append((taken.keys_to_store, request, False))
        elif kind == "load" and name and (hits := tiers.ours.count_hits(running[name][0][0])):
            request, _ = running[name]
            tiers.each("prepare_load", request[1], request[0][:hits])
            jobs.append((request[0][:hits], request, True))
        elif kind == "end" and jobs:
            end(draw.choice(jobs), good=draw.random() > 0.1)
        elif kind == "finish" and name and not any(job[1] is running[name][0] for job in jobs):
            tiers.each("on_request_finished", running.pop(name)[0][1])
        elif draw.random() < 0.01:
            for manager in tiers.managers:
                manager.reset_cache()
            running = {name: [request, 0] for name, (request, _) in running.items()}
            jobs.clear()
    assert tiers.evicted > 20 and tiers.refused < tiers.evicted


def stored(tiers, name, keys):
    """A request of which all is stored."""
    request = tiers.request(name, keys)
    tiers.each("complete_store", request[1], tiers.store(request, 0, len(keys)).keys_to_store)
    return request


def test_what_a_request_uses_that_another_one_used_later_stays_where_it_is():
    """The other one began first, and has finished since."""
    tiers, keys = Tiers(), [make_offload_key(bytes([i]), 0) for i in range(CHUNKS + 4)]
    first = stored(tiers, "first", keys[:4])
    second = tiers.request("second", [keys[4], *keys[:4]])
    tiers.each("complete_store", second[1], tiers.store(second, 0, 1).keys_to_store)
    third = stored(tiers, "third", keys[5:CHUNKS])
    tiers.each("on_request_finished", third[1])
    tiers.each("on_request_finished", first[1])
    tiers.store(second, 1, 5)
    new = tiers.request("new", keys[CHUNKS:])
    assert tiers.store(new, 0, 4).evicted_keys == [keys[4], *keys[CHUNKS - 3 : CHUNKS][::-1]]


def test_nothing_goes_that_was_offered_itself():
    tiers, keys = Tiers(), [make_offload_key(bytes([i]), 0) for i in range(CHUNKS + 1)]
    first = stored(tiers, "first", keys[:CHUNKS])
    tiers.each("prepare_load", first[1], keys[2:CHUNKS])
    assert tiers.store(tiers.request("second", [*keys[:2], keys[-1]]), 0, 3) is None


def test_what_nobody_uses_any_more_leaves_nothing_behind():
    tiers = Tiers()
    keys = hashes(random.Random(0), [])
    for n in range(20):
        tiers.each("on_request_finished", stored(tiers, str(n), keys)[1])
    assert len(tiers.ours._policy._uses) == 1


@pytest.mark.parametrize("n", [1, CHUNKS])
def test_touched_chunks_go_last_the_first_of_them_last_of_all(n):
    tiers = Tiers()
    keys = [make_offload_key(bytes([i]), 0) for i in range(CHUNKS)]
    request = stored(tiers, "all", keys)
    tiers.each("on_request_finished", request[1])
    tiers.each("touch", request[1], keys[-2:])
    other = tiers.request("other", [make_offload_key(bytes([100 + i]), 0) for i in range(n)])
    assert tiers.store(other, 0, n).evicted_keys == [*keys[:-2][::-1], keys[-1], keys[-2]][:n]

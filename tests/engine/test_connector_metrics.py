"""What Prometheus is told: exactly what happened."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from disk_fixture import (
    BLOCKS,
    NUM_TOKENS,
    PROMPTS,
    ROW,
    WHOLE_BLOCKS,
    cached,
    connector,
    entries,
    fill,
)
from faults import Copies, core_of, forget_device_cache, live_connector, settle, slow_down
from metrics_fixture import record_every_step, scrape
from model_fixture import vllm_greedy

from vllm_xlayer.connector.disk import manager as tiering
from vllm_xlayer.connector.disk.format import HEADER_BYTES
from vllm_xlayer.connector.disk.store import DiskStore
from vllm_xlayer.connector.stats import activity

ENTRY = ROW + HEADER_BYTES
USABLE = sum(WHOLE_BLOCKS) // 16
"""Blocks that are looked up: of those stored not the one that ends with the last token of a prompt."""
IDLE = {
    f"xlayer_queue_depth{{direction={d},tier={t}}}": 0 for d in ("store", "load") for t in ("host", "disk")
}


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    monkeypatch.setattr(tiering, "DEADLINE_SECONDS", 60)  # these tests wait for a slow disk


def start(make_llm, model, transfer):
    llm = make_llm(model, kv_transfer_config=transfer, disable_log_stats=False)
    record_every_step(llm)
    live_connector().pool.fill_(0xFF)
    return llm


def host_only(**extra):
    extra = {"cpu_bytes_to_use": 256 * ROW} | extra
    return dict(kv_connector="XLayerConnector", kv_role="kv_both", kv_connector_extra_config=extra)


def nonzero():
    """Ours that count, but for seconds, which are tested to be there where bytes are."""
    found = scrape("xlayer_")
    for name, value in found.items():
        if name.startswith("xlayer_transfer_bytes_total"):
            assert (value > 0) == (found[name.replace("bytes", "seconds")] > 0)
            assert value == found[name.replace("bytes", "rows")] * ROW
    return {n: v for n, v in found.items() if v and "seconds" not in n and "bytes_total" not in n}


def rows(way, tier, number):
    return {f"xlayer_transfer_rows_total{{direction={way},tier={tier}}}": number}


def misses(tier, reason, number):
    return {f"xlayer_misses_total{{reason={reason},tier={tier}}}": number}


def missed(reason, tokens):
    return {f"xlayer_miss_tokens_total{{reason={reason}}}": tokens}


def hit(tokens):
    return {"xlayer_hit_tokens_total": tokens}


def failures(way, tier, reason, number):
    return {f"xlayer_failures_total{{direction={way},reason={reason},tier={tier}}}": number}


def hits(tier, number):
    return {f"xlayer_hits_total{{tier={tier}}}": number}


def test_stores_and_loads(make_llm, tiny_llama):
    llm = start(make_llm, tiny_llama, host_only())
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    settle(llm)
    stored = rows("store", "host", BLOCKS) | missed("absent", 16 * USABLE)
    assert nonzero() == stored
    assert scrape("xlayer_hit_tokens")["xlayer_hit_tokens_total"] == 0  # there, although nothing happened
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)  # all in the device's cache
    settle(llm)
    assert nonzero() == stored
    forget_device_cache(llm)
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    settle(llm)
    assert nonzero() == stored | rows("load", "host", USABLE) | hit(16 * USABLE)
    found = scrape("kv_offload")  # vLLM's own, of the same transfers
    assert found["kv_offload_store_bytes_total"] == BLOCKS * ROW
    assert found["kv_offload_load_bytes_total"] == USABLE * ROW


def test_chunks_of_several_blocks(make_llm, tiny_llama):
    llm = start(make_llm, tiny_llama, host_only(blocks_per_chunk=2))
    chunks = sum(len(p) // 32 for p in PROMPTS)
    for _ in range(2):
        vllm_greedy(llm, PROMPTS, NUM_TOKENS)
        forget_device_cache(llm)
    assert nonzero() == (
        rows("store", "host", 2 * chunks) | rows("load", "host", 2 * chunks)
        | missed("absent", 32 * chunks) | hit(32 * chunks)
    )  # fmt: skip


@pytest.mark.parametrize("delay", [0, 3], ids=["at once", "late"])
def test_failed_copies(make_llm, tiny_llama, monkeypatch, delay):
    if delay:
        slow_down(monkeypatch, delay)
    copies = Copies(monkeypatch, lambda: live_connector().pool)
    llm = start(make_llm, tiny_llama, host_only())
    copies.fail_stores = lambda n: n == 0
    vllm_greedy(llm, PROMPTS[1::2][:2], NUM_TOKENS)  # the first's 6 blocks are lost, the second's 2 are not
    forget_device_cache(llm)
    lost = rows("store", "host", 2) | missed("absent", 16 * 8) | failures("store", "host", "copy", 6)
    assert nonzero() == lost
    copies.fail_loads = lambda n: True
    vllm_greedy(llm, PROMPTS[3:4], NUM_TOKENS)  # found, not loaded, computed, stored again
    settle(llm)
    assert nonzero() == lost | rows("store", "host", 4) | hit(16 * 2) | failures("load", "host", "copy", 2)


def test_a_disk_that_is_filled_and_read(make_llm, tiny_llama, tmp_path):
    """vLLM's own metrics of a second tier, too, which its front end dies of where it does not know them."""
    llm = start(make_llm, tiny_llama, connector(tmp_path))
    cached(llm)
    disk = {"xlayer_disk_used_bytes": BLOCKS * ENTRY, "xlayer_disk_limit_bytes": 1 << 30}
    stored = rows("store", "host", BLOCKS) | rows("store", "disk", BLOCKS) | missed("absent", 16 * USABLE)
    assert nonzero() == stored | disk
    assert scrape("xlayer_queue") == IDLE
    core_of(llm).shutdown()
    llm = start(make_llm, tiny_llama, connector(tmp_path))
    assert cached(llm)[1] == WHOLE_BLOCKS
    loaded = rows("load", "disk", USABLE) | rows("load", "host", USABLE) | hit(16 * USABLE)
    again = rows("store", "host", BLOCKS - USABLE)  # the computed ones; the disk has them
    assert nonzero() == loaded | hits("disk", USABLE) | again | disk
    found = scrape("kv_offload")
    assert found["kv_offload_load_bytes_total"] == USABLE * ROW
    assert found["kv_offload_load_size_count"] == sum(n > 0 for n in WHOLE_BLOCKS)
    assert found["kv_offload_total_bytes_total{transfer_type=CPU_to_GPU}"] == USABLE * ROW
    assert found["kv_offload_tiering_lookup_sync_delay_seconds_count{tier=1:xlayer-disk}"] > 0


def test_a_damaged_entry(make_llm, tiny_llama, tmp_path):
    fill(make_llm, tiny_llama, tmp_path)
    for path in entries(tmp_path):
        data = bytearray(path.read_bytes())
        data[HEADER_BYTES + 7] ^= 1
        path.write_bytes(data)
    llm = start(make_llm, tiny_llama, connector(tmp_path))
    vllm_greedy(llm, [PROMPTS[2] + [7]], NUM_TOKENS)  # one block
    settle(llm)
    assert nonzero() == (
        misses("disk", "damaged payload", 1) | missed("absent", 16 * 1)
        | rows("store", "host", 1) | rows("store", "disk", 1)
        | {"xlayer_disk_used_bytes": BLOCKS * ENTRY, "xlayer_disk_limit_bytes": 1 << 30}
    )  # fmt: skip


@pytest.mark.parametrize("way", ["store", "load"])
def test_a_disk_that_fails(make_llm, tiny_llama, tmp_path, monkeypatch, way):
    def broken(self, key, payload):
        raise OSError("injected")

    if way == "load":
        fill(make_llm, tiny_llama, tmp_path)
    monkeypatch.setattr(DiskStore, "write" if way == "store" else "read", broken)
    llm = start(make_llm, tiny_llama, connector(tmp_path))
    vllm_greedy(llm, PROMPTS[4:5], NUM_TOKENS)  # 12 blocks in one transfer
    settle(llm)
    found = nonzero()
    assert failures(way, "disk", "disk error", 1).items() <= found.items()
    assert failures(way, "disk", "off", 11).items() <= found.items()
    assert found["xlayer_miss_tokens_total{reason=absent}"] == 16 * 12


def test_late_and_off(make_llm, tiny_llama, tmp_path, monkeypatch):
    fill(make_llm, tiny_llama, tmp_path)
    monkeypatch.setattr(tiering, "DEADLINE_SECONDS", -1)
    read, answered = DiskStore.read, threading.Event()

    def reads(*args):  # not before the next step, however long that takes
        assert answered.wait(60)
        return read(*args)

    monkeypatch.setattr(DiskStore, "read", reads)
    llm = start(make_llm, tiny_llama, connector(tmp_path))
    vllm_greedy(llm, PROMPTS[1:2], NUM_TOKENS)
    answered.set()
    settle(llm)
    assert missed("late", 16 * 6).items() <= nonzero().items()
    llm = start(make_llm, tiny_llama, host_only(cpu_bytes_to_use=ROW - 1))
    vllm_greedy(llm, PROMPTS[1:2], NUM_TOKENS)
    assert nonzero() == missed("off", 16 * 6)


def test_what_waits_is_seen(make_llm, tiny_llama, monkeypatch):
    slow_down(monkeypatch, 50)
    llm = start(make_llm, tiny_llama, host_only())
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    waiting = "xlayer_queue_depth{direction=store,tier=host}"
    assert nonzero() == missed("absent", 16 * USABLE) | {waiting: BLOCKS}
    settle(llm)
    assert scrape("xlayer_queue") == IDLE


SCRIPT = """
import asyncio, sys, time
import conftest
from metrics_fixture import scrape
from model_fixture import random_prompts
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

async def main():
    extra = dict(cpu_bytes_to_use=1 << 24, disk_path=sys.argv[2], disk_bytes_to_use=1 << 30)
    transfer = dict(kv_connector="XLayerConnector", kv_role="kv_both", kv_connector_extra_config=extra)
    settings = conftest.ENGINE_DEFAULTS | dict(kv_transfer_config=transfer, disable_log_stats=False)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(sys.argv[1], **settings))
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    for name in "abc":
        prompt = {"prompt_token_ids": random_prompts([100])[0]}
        async for _ in engine.generate(prompt, sampling, name):
            pass
        give_up = time.monotonic() + 60
        while scrape("xlayer").get("xlayer_transfer_rows_total{direction=store,tier=disk}") != 6:
            assert time.monotonic() < give_up, scrape("xlayer")
            await asyncio.sleep(0.01)
        while not await engine.reset_prefix_cache():
            assert time.monotonic() < give_up
    print("SCRAPED", scrape("xlayer_"))
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_as_vllm_serve_does_it(reference_platform, tiny_llama, tmp_path):
    script, folder = tmp_path / "serve.py", tmp_path / "tier"
    script.write_text(SCRIPT)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(script), str(tiny_llama), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SCRAPED")]
    found = eval(line.removeprefix("SCRAPED"))
    assert found["xlayer_transfer_bytes_total{direction=store,tier=host}"] == 6 * ROW
    assert found["xlayer_transfer_rows_total{direction=load,tier=host}"] == 12
    assert found["xlayer_hit_tokens_total"] == 16 * 12
    assert found["xlayer_miss_tokens_total{reason=absent}"] == 16 * 6
    assert found["xlayer_disk_used_bytes"] == 6 * ENTRY


def test_a_line_a_minute(make_llm, tiny_llama, monkeypatch, caplog_vllm):
    caplog_vllm.set_level(logging.INFO, "vllm_xlayer")
    now = [1000.0]
    monkeypatch.setattr(activity, "time", SimpleNamespace(monotonic=lambda: now[0]))
    llm = make_llm(tiny_llama, kv_transfer_config=host_only())  # without statistics: the line comes anyway
    caplog_vllm.clear()  # of what the engine before this one said at its end

    def lines():
        found = [r.getMessage() for r in caplog_vllm.records if r.name.endswith("connector.stats.activity")]
        return [line.removeprefix("XLayerConnector: ") for line in found]

    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    settle(llm)
    now[0] += 59
    vllm_greedy(llm, PROMPTS[:1], NUM_TOKENS)  # less than a block: steps, and nothing for the tier
    assert not lines()
    now[0] += 1
    vllm_greedy(llm, PROMPTS[:1], NUM_TOKENS)
    assert len(lines()) == 1 and lines()[0].startswith(f"in 60 s stored {BLOCKS} rows, 0.00 GB at ")
    assert lines()[0].endswith(f"; hits 0 % of {16 * USABLE} tokens; tokens missed: (absent) {16 * USABLE}")
    now[0] += 600
    vllm_greedy(llm, PROMPTS[:1], NUM_TOKENS)
    now[0] += 600
    vllm_greedy(llm, PROMPTS[:1], NUM_TOKENS)
    assert len(lines()) == 1
    forget_device_cache(llm)
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    settle(llm)
    assert len(lines()) == 1
    now[0] += 7
    core_of(llm).shutdown()
    assert len(lines()) == 2 and lines()[1].startswith(f"in 7 s loaded {USABLE} rows")
    assert lines()[1].endswith(f"; hits 100 % of {16 * USABLE} tokens")

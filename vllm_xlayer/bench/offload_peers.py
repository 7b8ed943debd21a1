"""First tokens of restored prompts with vLLM's own OffloadingConnector, layer by layer and in rows.

It says nothing of its tier that could be waited for, so a pause does, and the tokens that a request found
cached say whether it was restored.
"""

import statistics
import time
from typing import Any

from rich.table import Table

from .first_token import TURNS, added, make_prompts

PEERS: dict[str, dict[str, str]] = {
    "stock": {},
    "stock-rows": {"VLLM_KV_CACHE_LAYOUT": "BLHNC"},
}
"""Name -> vLLM's environment. The connector asks for pages layer by layer; the variable beats that."""
TITLES = {
    "with": "XLayerConnector", "stock": "OffloadingConnector", "stock-rows": "OffloadingConnector, in rows",
}  # fmt: skip
PAUSE_SECONDS, PAUSES = 1.0, 3
"""After prompts were computed, each with a step after it, in which vLLM submits the last stores."""
RESET_SECONDS = 60.0


def restores(llm: Any, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds to the first token: prompts that are new, in the host tier only, and then on the device.

    Raises:
        RuntimeError: a prompt was not where it should have been.
    """
    from vllm import SamplingParams

    one = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    prompts = make_prompts(llm, repeats, tokens, seed=0)
    short = make_prompts(llm, 1, 3, seed=50)[0]
    block = llm.llm_engine.vllm_config.cache_config.block_size
    report: dict[str, list[float]] = {"cold": [], "restored": [], "cached": []}

    def first_token(prompt: list[int]) -> tuple[float, int]:
        begin = time.perf_counter()
        (output,) = llm.generate([{"prompt_token_ids": prompt}], one, use_tqdm=False)
        return time.perf_counter() - begin, output.num_cached_tokens or 0

    def first_tokens(kind: str, least: int, most: int) -> None:
        for prompt in prompts:
            seconds, cached = first_token(prompt)
            if not least <= cached <= most:
                raise RuntimeError(f"{kind}: expected {least} to {most} tokens to be there, got {cached}")
            report[kind].append(seconds)

    def empty_device_cache() -> None:
        deadline = time.monotonic() + RESET_SECONDS
        while not llm.reset_prefix_cache():
            if time.monotonic() > deadline:
                raise RuntimeError("the device's prefix cache could not be emptied")
            first_token(short)

    kept = tokens // block * block
    first_tokens("cold", 0, 0)
    for _ in range(PAUSES):
        first_token(short)
        time.sleep(PAUSE_SECONDS)
    for _ in range(TURNS):
        empty_device_cache()
        first_tokens("restored", kept, tokens)
        first_tokens("cached", kept, tokens)
    return report


def lines(engines: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Connector, and milliseconds of prompts that are computed, on the device, in the host tier, and what the
    latter take longer."""
    found = []
    for name, title in TITLES.items():
        if "restore" in engines.get(name, {}):
            restore = engines[name]["restore"]
            cells = [statistics.median(restore[kind]) for kind in ("cold", "cached", "restored")]
            found.append((title, [f"{seconds * 1e3:.1f}" for seconds in (*cells, added(restore))]))
    return found


HEAD = ("computed", "on the device", "in the host tier", "host tier - device")


def peer_table(engines: dict[str, Any]) -> Table:
    grid = Table(title="First token, ms, median, by connector")
    for title in ("", *HEAD):
        grid.add_column(title, justify="right" if title else "left")
    for title, cells in lines(engines):
        grid.add_row(title, *cells)
    return grid

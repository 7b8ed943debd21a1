"""What the demo, the benchmarks and the tests ask of a running engine whose core is in this process."""

import random
import time
from typing import Any, NamedTuple


class CacheGeometry(NamedTuple):
    """The KV cache of an engine whose KV cache groups have equal pages."""

    layers: int
    page_bytes: int
    in_rows: bool
    tokens: int
    """That the cache holds."""
    block_size: int


def core_of(llm: Any) -> Any:
    """The EngineCore of a vllm.LLM made with VLLM_ENABLE_V1_MULTIPROCESSING=0."""
    return llm.llm_engine.engine_core.engine_core


def cache_geometry(llm: Any) -> CacheGeometry:
    """How a running engine's KV cache lies in memory."""
    config = core_of(llm).scheduler.kv_cache_config
    spec, tensors = config.kv_cache_groups[0].kv_cache_spec, config.kv_cache_tensors
    return CacheGeometry(
        layers=sum(len(tensor.layers) for tensor in tensors),
        page_bytes=spec.page_size_bytes,
        in_rows=tensors[0].block_stride > tensors[0].layer_stride,
        tokens=config.num_blocks * spec.block_size,
        block_size=spec.block_size,
    )


def rows_loaded() -> int:
    """Rows that XLayerConnector has loaded from its host tier in this process."""
    return connector().connector_worker.worker.rows_loaded


def connector() -> Any:
    """The XLayerConnector of this process's worker."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def come_to_rest(llm: Any, seconds: float = 60.0) -> None:
    """Steps a running engine until nothing is under way.

    After the last answer a step may be that was scheduled ahead of it, and transfers; after the start, the
    pinning of the host tier. Only steps of the engine find out that it no longer is.

    Raises:
        TimeoutError: something still is after ``seconds``.
    """
    core = core_of(llm)
    deadline = time.monotonic() + seconds
    while core.scheduler.has_requests() or core.batch_queue:
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected all steps and transfers to end within {seconds} s; some have not")
        llm.llm_engine.step()
        time.sleep(0.001)


def shuffle_free_blocks(llm: Any, seed: int = 0) -> None:
    """Lets a running engine give out its free blocks in another order, as after hours of requests.

    Of a new engine a prompt's blocks lie side by side, which whoever moves them may make use of.
    """
    queue = core_of(llm).scheduler.kv_cache_manager.block_pool.free_block_queue
    blocks = queue.popleft_n(queue.num_free_blocks)
    random.Random(seed).shuffle(blocks)
    queue.append_n(blocks)


def histogram_sum(llm: Any, name: str) -> float:
    """The sum of one of vLLM's histograms; of an engine with ``disable_log_stats=False``."""
    return float(sum(metric.sum for metric in llm.get_metrics() if metric.name == name))


def empty_device_cache(llm: Any, seconds: float = 60.0) -> None:
    """Forgets what the device's prefix cache of a running engine holds.

    vLLM forgets no block that is in use, so the engine comes to rest first.

    Raises:
        TimeoutError: as come_to_rest.
        RuntimeError: vLLM refuses, though nothing is under way.
    """
    come_to_rest(llm, seconds)
    if not llm.reset_prefix_cache():
        raise RuntimeError("the device's prefix cache could not be emptied")

"""The host tier's memory."""

import time

import torch
from vllm.logger import init_logger

logger = init_logger(__name__)

GIB = 1 << 30


def allocate_host(rows: int, row_bytes: int, pinned: bool) -> torch.Tensor:
    """uint8 [rows, row_bytes]. MemoryError if that much cannot be had."""
    wanted = f"{rows * row_bytes / GIB:.2f} GiB of {'pinned ' if pinned else ''}host memory"
    advice = "Set cpu_bytes_to_use in kv_connector_extra_config to less."
    started = time.perf_counter()
    try:
        # Zeroed by the first touch of each page where it is not pinned: no start-up cost on the CPU platform.
        host = torch.empty((rows, row_bytes), dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MemoryError(f"expected {wanted}, got: {reason}. {advice}") from error
    seconds = time.perf_counter() - started
    logger.info(
        "XLayerConnector: host tier of %d rows x %d bytes: %s in %.1f s", rows, row_bytes, wanted, seconds
    )
    return host

"""What test_two_ranks_gpu.py asks of each rank's worker: functions of (worker, ...), called there."""

import time

import torch

counted = {"early": 0, "failed": 0}


def _rank():
    from vllm.distributed import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank()


def _connector():
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def spoil_pool(_):
    """Fills it with NaN, as bf16 and as an NVFP4 scale."""
    _connector().pool.fill_(0xFF)


def counts(_):
    """(loads reported early, copies failed, rows loaded) of this rank."""
    return counted["early"], counted["failed"], _connector().connector_worker.worker.rows_loaded


def slow_down(_, rank):
    """Two milliseconds for two rows on one rank; on both a load is reported once its first two have come."""
    from vllm_xlayer.connector.copy import early_loads, transfers
    from vllm_xlayer.connector.copy.choice import Way

    if _rank() == rank:
        copy_blocks = transfers.ops.copy_blocks

        def slow(*args):
            if torch.cuda.is_available():
                torch.cuda._sleep(4_000_000)
            else:
                time.sleep(0.002)
            copy_blocks(*args)

        transfers.ops.copy_blocks = slow
    about_to_end = early_loads.EarlyLoads._about_to_end

    def noted(self, seconds_left):
        results = about_to_end(self, seconds_left)
        counted["early"] += len(results)
        return results

    early_loads.EarlyLoads._about_to_end = noted
    transfers.BATCH_BYTES = dict.fromkeys(Way, 2 * _connector().layout.row_bytes)
    transfers.IDLE_BATCH_BYTES = 2 * _connector().layout.row_bytes
    early_loads.IDLE_SECONDS = early_loads.BUSY_SECONDS = 1e9


def fail_loads(_, rank):
    """From now on every load fails on one rank."""
    from vllm_xlayer.connector.copy import transfers

    copy_blocks, pool = transfers.ops.copy_blocks, _connector().pool.data_ptr()

    def fail(src, dst, *args):
        if dst.data_ptr() == pool and _rank() == rank:
            counted["failed"] += 1
            raise RuntimeError("injected copy error")
        copy_blocks(src, dst, *args)

    transfers.ops.copy_blocks = fail

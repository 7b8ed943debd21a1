"""Loads to the device that are reported shortly before they end.

What follows a load, the scheduler's accounts, the next step's schedule and its launch, takes the host as long
as several batches take the link. So a load whose rest the link will have copied in that time is reported
early, and the stream on which the model runs waits for its last batches.

Nothing uses its blocks before that. vLLM hears of the load when the wait is on that stream already, and what
it does to blocks is put there later: zeroing and copies of blocks, launches (in parts or as a graph, which
follow the stream that they are launched on), a draft model's; microbatches run on it. What runs elsewhere
follows it: copies to the host, and loads into the same blocks once they are someone else's. vLLM's streams
of their own (samples to the host, grammars, what ranks of a pipeline exchange) touch no blocks. Both runners
ask what has finished after the launch, on that stream; if ever one does not, loads are not reported early.
Of several ranks each has its own wait, and a load counts when all have reported it.

A request that is aborted between the report and the end gives its blocks away as early. So loads are early
only beside connectors whose own loads follow the stream, too: a read over a network does not.

Host memory is given away as early: only for tiers whose host memory nothing but such copies of this rank
writes, so not with a disk tier, whose threads do, nor where ranks share one copy of equal rows.
"""

from collections import Counter

from torch import cuda
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import TransferResult

from .transfers import Job, StreamDirection

logger = init_logger(__name__)

IDLE_SECONDS, BUSY_SECONDS = 16e-3, 2e-3
"""Of copying that may be left: after a step in which no model ran, and after one in which it did. After the
former vLLM's core runs another one without a model, sleeps for a millisecond twice, and launches the next,
which in all takes the host about as long; a request that comes meanwhile is late by what is left then.
Beside a model that runs anyway, what is left is copied while it does; a step that is shorter is late by that,
once a load."""


class EarlyLoads(StreamDirection):
    """Takes what StreamDirection takes; host to device."""

    _told: set[int]
    """Jobs that were reported and still run."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._told = set()
        self._model_stream: cuda.Stream | None = None

    def before_launch(self) -> None:
        self._model_stream = cuda.current_stream()
        super().before_launch()

    def advance(self, model_ran: bool = True) -> list[TransferResult]:
        """What finished since the last call, or is about to.

        Raises:
            RuntimeError: a load failed after it was reported. A step may have computed with what was not
                there; the device lost a copy that it had accepted and does nothing more after that.
        """
        results = []
        for result in super().advance(model_ran):
            if result.job_id not in self._told:
                results.append(result)
                continue
            self._told.remove(result.job_id)
            if not result.success:
                raise RuntimeError(
                    "XLayerConnector: a load that the device had accepted failed after it was reported; "
                    "the engine must stop, as an answer could be wrong"
                )
        return results + self._about_to_end(BUSY_SECONDS if model_ran else IDLE_SECONDS)

    def drain(self) -> None:
        super().drain()
        self._told.clear()

    def _about_to_end(self, seconds_left: float) -> list[TransferResult]:
        results: list[TransferResult] = []
        ahead = Counter[Job]()
        if not self._seconds_copying:  # nothing has been loaded yet: how long this takes is not known
            return results
        if cuda.current_stream() != self._model_stream:
            return results
        rate = self._bytes_copied / self._seconds_copying
        left = rate * seconds_left
        for batch in self._running:
            left -= batch.nbytes
            if left < 0:
                break
            for job, nbytes in batch.parts:
                ahead[job] += nbytes
                if job.done + ahead[job] < job.nbytes or job.job_id in self._told:
                    continue
                try:
                    batch.paced.let_current_stream_follow()
                except RuntimeError as error:  # it is reported when it ends, or has failed
                    logger.error("XLayerConnector: the device does not answer: %s", error)
                    return results
                self._told.add(job.job_id)
                seconds = job.seconds + (job.nbytes - job.done) / rate
                results.append(TransferResult(job.job_id, True, job.nbytes, seconds))
        return results

"""What the disk tier may go on with after a sleep: the entries of weights that are still the same.

Whoever trains puts an engine to sleep, wakes its memory for weights, writes other weights there, and wakes
the rest. Whoever shares a GPU puts it to sleep and wakes it as it was. vLLM's connector sees both as a reset.
Others send weights to an engine that does not sleep, of which a connector is told nothing. So the loaded
weights are summed up before the sleep or the call, and again when the first request asks after it.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger

from .format import TierIdentity

logger = init_logger(__name__)

PIECE_BYTES = 1 << 24
"""Summed at once; as much again is needed meanwhile."""
ROW = 4096
"""Words that become one sum."""


class AcrossSleep:
    """The identity of an engine that sleeps, for when it is seen to have the same weights."""

    def __init__(self) -> None:
        self._announced: tuple[Callable[[], Any], Any] | None = None
        self._kept: tuple[TierIdentity, Callable[[], Any], Any] | None = None

    def begins(self, weights: Callable[[], Any]) -> None:
        """The next reset is a sleep's. ``weights`` returns what all ranks' weights sum up to."""
        self._announced = None
        try:
            self._announced = (weights, weights())
        except Exception as error:  # the engine must sleep all the same
            logger.warning(
                "XLayerConnector: the disk tier begins anew after this sleep, or call that may change "
                "weights: they could not be summed up: %s: %s", type(error).__name__, error,
            )  # fmt: skip

    def reset(self, identity: TierIdentity) -> None:
        """What this identity names is forgotten: for good, unless a sleep was announced."""
        self._kept = (identity, *self._announced) if self._announced else None
        self._announced = None

    def ends(self) -> TierIdentity | None:
        """To be asked before anything is looked for or stored: the identity to take again. Looks at the
        weights once after a sleep, and costs nothing otherwise."""
        if self._kept is None:
            return None
        (identity, weights, before), self._kept = self._kept, None
        try:
            if weights() == before:
                return identity
            problem = "the weights are not those from before"
        except Exception as error:  # not known to be the same
            problem = f"{type(error).__name__}: {error}"
        logger.info("XLayerConnector: the disk tier begins anew: %s", problem)
        return None


def loaded_weights(worker: Any) -> str:
    """32 hex digits over every byte of the parameters and buffers that a worker's models have in memory.

    Run in the worker. Names, shapes and dtypes count, and a byte's place in its tensor. Every 4096 words of
    32 bits become a sum, weighted with odd numbers, modulo 2**32: no change of one word goes unseen, and one
    of many words does only if the sums of all their rows happen to be equal.
    """
    digest, seen = hashlib.sha256(), set()
    draft = getattr(worker, "get_draft_model", lambda: None)()
    for model in filter(None, (worker.get_model(), draft)):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            facts = [name, str(tensor.dtype), list(tensor.shape), list(tensor.stride())]
            digest.update(json.dumps(facts).encode())
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                for piece in whole.split(PIECE_BYTES):
                    digest.update(_sums(piece).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _sums(piece: torch.Tensor) -> torch.Tensor:
    """int64, one a row of 4096 words of ``piece`` (uint8 [n]); missing bytes count as 0."""
    words = torch.nn.functional.pad(piece, (0, -len(piece) % (4 * ROW))).view(torch.int32).view(-1, ROW)
    factors = torch.arange(ROW, device=piece.device) * 2_654_435_761 % (1 << 31) | 1
    return (words * factors.to(torch.int32)).sum(dim=1, dtype=torch.int64)

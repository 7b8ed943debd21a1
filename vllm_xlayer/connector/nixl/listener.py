"""A thread that answers other engines' handshakes, whatever they say.

vLLM's ends at the first message that it does not understand, or that asks for a rank that is not there: from
then on nobody could begin to read from this engine, and nothing would say so. Where its port is taken it ends
before it begins, and the start of the engine waits for it without a word.
"""

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 0.2
"""Before the next try: the port is free again by then, and the log of a port that stays taken is short."""


def keep_listening(listen: Callable[[], None], stop: threading.Event, address: str) -> None:
    """Calls ``listen`` until it returns, or ``stop`` is set; says once of each kind of error what was wrong.

    Args:
        listen: answers on ``address`` until ``stop`` is set, and closes its socket where it raises.
        stop: set when the engine ends.
        address: for the log: host and port.
    """
    said: set[str] = set()
    while not stop.is_set():
        try:
            return listen()
        except Exception as error:
            kind = type(error).__name__
            if kind not in said:
                said.add(kind)
                logger.warning(
                    "hand-over: on %s expected another engine's handshake, or the port to be free "
                    "(VLLM_NIXL_SIDE_CHANNEL_PORT), got %s: %s; other engines are answered on (said once)",
                    address, kind, error,
                )  # fmt: skip
            stop.wait(PAUSE_SECONDS)

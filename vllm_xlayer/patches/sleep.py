"""When weights may become others, told to the engine's connector: before a sleep, whose reset looks like that
of changed weights, and before a user runs something in the workers (a trainer's weight transfer, say)."""

from ..compat.dependence import Patch
from .wrapping import wrap


def announce_sleep(original, core, level: int = 1, *args, **kwargs):
    """Calls the original, after telling the engine's connectors how to see what its weights are."""
    if level >= 1:
        _tell(core, "before_sleep")
    return original(core, level, *args, **kwargs)


def doubt_weights(original, core, *args, **kwargs):
    """Calls the original, by which a user runs in the workers whatever they like, after the same."""
    _tell(core, "before_weights_may_change")
    return original(core, *args, **kwargs)


def _tell(core, what):
    # Weights that sleep cannot be looked at: to read memory that is not there would end the workers.
    if "weights" in getattr(core.model_executor, "sleeping_tags", ()):
        return
    connector = core.scheduler.get_kv_connector()
    for one in getattr(connector, "_connectors", [connector]):
        if hasattr(one, what):
            getattr(one, what)(core.model_executor.collective_rpc)


def _apply() -> None:
    from vllm.v1.engine.core import EngineCore

    wrap(EngineCore, "sleep", announce_sleep, "vllm")
    wrap(EngineCore, "collective_rpc", doubt_weights, "vllm")


PATCHES = (
    Patch(
        feature="disk tier across a sleep and changed weights",
        owner="vllm.v1.engine.core:EngineCore",
        why="after a sleep nothing is found in the disk tier that was written before it; and where weights "
        "are changed in place (collective_rpc, weight transfer), KV of the old ones is found: leave "
        "disk_path out there",
        how="tells XLayerConnector that the reset which follows is a sleep's, and that weights may change",
        remove_when="a connector is told why it is reset, and of changed weights",
        methods={"sleep": "self level", "collective_rpc": "self method"},
        attributes=("model_executor", "scheduler"),
        apply=_apply,
    ),
)

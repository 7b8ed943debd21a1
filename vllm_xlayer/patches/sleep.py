"""A sleep of the engine, told to its connector: it sees a reset, as if the weights had been changed."""

from ..compat.dependence import Patch
from .wrapping import wrap


def announce_sleep(original, core, level: int = 1, *args, **kwargs):
    """Calls the original, after telling the engine's connectors how to see what its weights are."""
    if level >= 1:
        connector = core.scheduler.get_kv_connector()
        for one in getattr(connector, "_connectors", [connector]):
            if hasattr(one, "before_sleep"):
                one.before_sleep(core.model_executor.collective_rpc)
    return original(core, level, *args, **kwargs)


def _apply() -> None:
    from vllm.v1.engine.core import EngineCore

    wrap(EngineCore, "sleep", announce_sleep, "vllm")


PATCHES = (
    Patch(
        feature="disk tier across a sleep",
        owner="vllm.v1.engine.core:EngineCore",
        why="after a sleep nothing is found in the disk tier that was written before it",
        how="tells XLayerConnector that the reset which follows is a sleep's",
        remove_when="a connector is told why it is reset",
        methods={"sleep": "self level"},
        attributes=("model_executor", "scheduler"),
        apply=_apply,
    ),
)

"""What this package needs of vLLM that is not public: declared, listed by `doctor`, and probed before use.

One record an owner (a class or a module): the methods that are wrapped, overridden or called, and the
attributes that are read or set. A feature whose records do not all fit the installed vLLM is off, and
whoever asks for it is told which name is missing. Patches (`patches`) are records that also change something.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

CONNECTOR_FEATURE = "XLayerConnector"
PLATFORM_FEATURE = "CPU reference platform"
ATTENTION_FEATURE = "NVFP4 attention"
TOOLS_FEATURE = "demo and benchmarks"


class FeatureUnavailable(RuntimeError):
    """A feature was asked for that does not fit the installed vLLM; says what is missing."""


@dataclass(frozen=True)
class Private:
    """One owner of private names.

    Args:
        feature: what is off where the record does not fit.
        owner: "module:Class", or "module".
        why: what goes wrong without it, one sentence.
        how: how it is used, one sentence.
        remove_when: how to see that it can go.
        upstream: the issue or pull request that would make it superfluous, or "none known".
        methods: name -> parameters that it must take, in this order (others may stand between them).
        attributes: names that the owner's source assigns or reads.
    """

    feature: str
    owner: str
    why: str
    how: str
    remove_when: str
    upstream: str = "none known"
    methods: Mapping[str, str] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.methods, *self.attributes)

    @property
    def target(self) -> str:
        """The owner and its names, for people."""
        return f"{self.owner.replace(':', '.')}: {', '.join(self.names)}"

    def resolve(self) -> Any:
        """The owner itself. Raises ImportError or AttributeError where it is gone."""
        module, _, name = self.owner.partition(":")
        found = importlib.import_module(module)
        return getattr(found, name) if name else found

    def problem(self) -> str | None:
        """What the installed vLLM lacks of this, or None."""
        try:
            return next(self._problems(self.resolve()), None)
        except Exception as error:  # a probe that trips over a changed vLLM has found that it changed
            return f"{self.owner}: {type(error).__name__}: {error}"

    def _problems(self, owner: Any) -> Iterator[str]:
        for name, expected in self.methods.items():
            function = getattr(owner, name, None)
            if function is None:
                yield f"{self.owner} has no {name}"
                continue
            wanted, found = expected.split(), list(inspect.signature(function).parameters)
            if [p for p in found if p in wanted] != wanted:
                yield f"{self.owner}.{name}: expected parameters {', '.join(wanted)}, got {', '.join(found)}"
        for name in self.attributes:
            if not hasattr(owner, name) and not re.search(rf"\.{name}\b", _source(owner)):
                yield f"{self.owner} has no attribute {name}"


def _source(owner: Any) -> str:
    """The source of a module, or of a class and the classes of vLLM that it inherits from."""
    if not isinstance(owner, type):
        return inspect.getsource(owner)
    return "\n".join(inspect.getsource(c) for c in owner.__mro__ if c.__module__.startswith("vllm."))


def table() -> tuple[Private, ...]:
    """Every record but those of the patches."""
    from . import private_connector, private_nixl

    return (*_OWN, *private_connector.DEPENDENCES, *private_nixl.DEPENDENCES)


@functools.cache
def _problems_of(feature: str) -> tuple[str, ...]:
    return tuple(p for record in table() if record.feature == feature and (p := record.problem()))


def require(feature: str) -> None:
    """Returns if everything private that a feature needs is there.

    Raises:
        FeatureUnavailable: with all that is missing.
    """
    if problems := _problems_of(feature):
        raise FeatureUnavailable(f"{feature} does not work with this vLLM: {'; '.join(problems)}")


_KV_SCALES = "vllm.model_executor.layers.attention.attention"
_OWN = (
    Private(
        ATTENTION_FEATURE,
        _KV_SCALES,
        why="the global scales of K and V would not be found",
        how="read from the layer when pages are written and read",
        remove_when="the layer's scales have public names",
        attributes=("_k_scale", "_v_scale"),
    ),
    Private(
        CONNECTOR_FEATURE,
        "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory",
        why="registering a connector twice is an error, and --kv-connector could not name the known ones",
        how="read: which connectors are registered",
        remove_when="the factory lists its connectors",
        attributes=("_registry",),
    ),
    Private(
        "MultiConnector's reasons",
        "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector:MultiConnector",
        why="nobody could say which of its connectors asks for which layout",
        how="called where they disagree; get_required_kvcache_layout is wrapped",
        remove_when="MultiConnector names the connectors that disagree",
        methods={
            "_get_connector_classes_and_configs": "vllm_config",
            "get_required_kvcache_layout": "vllm_config",
        },
    ),
    Private(
        TOOLS_FEATURE,
        "vllm.v1.engine.core:EngineCore",
        why="the demo could not wait for transfers, nor tell what the cache's memory looks like",
        how="read, where the core is in this process",
        remove_when="LLM tells whether transfers are under way",
        attributes=("scheduler", "batch_queue"),
    ),
    Private(
        PLATFORM_FEATURE,
        "vllm.platforms.cpu:CpuPlatform",
        why="vLLM's CUDA wheel has no CPU kernels, and no engine would start",
        how="inherited; these are overridden",
        remove_when="vLLM's CUDA wheel runs without a GPU",
        upstream="vllm-project/vllm#57684",
        methods={
            "import_kernels": "",
            "get_attn_backend_cls": "selected_backend attn_selector_config num_heads",
            "check_and_update_config": "vllm_config",
            "update_block_size_for_backend": "vllm_config",
            "discover_numa_topology": "",
        },
    ),
    Private(
        PLATFORM_FEATURE,
        "vllm.v1.worker.cpu_worker:CPUWorker",
        why="the worker would warm up compiled kernels that are not there",
        how="inherited; these are overridden",
        remove_when="vLLM's CUDA wheel runs without a GPU",
        upstream="vllm-project/vllm#57684",
        methods={
            "__init__": "vllm_config local_rank rank distributed_init_method is_driver_worker",
            "init_device": "self",
            "determine_available_memory": "self",
        },
    ),
    Private(
        PLATFORM_FEATURE,
        "vllm.v1.worker.gpu_worker",
        why="the worker could not set up its process groups",
        how="called as the CPU worker does",
        remove_when="vLLM's CUDA wheel runs without a GPU",
        upstream="vllm-project/vllm#57684",
        methods={
            "init_worker_distributed_environment": "vllm_config rank distributed_init_method local_rank"
        },
    ),
)


@dataclass(frozen=True)
class Patch(Private):
    """A record that also changes vLLM.

    Args:
        apply: makes the change; idempotent. What it does with ``wrap`` is undone if it raises.
        not_needed: why the change would do nothing here, or None; None where it always is needed.
    """

    apply: Callable[[], None] = lambda: None
    not_needed: Callable[[], str | None] = lambda: None

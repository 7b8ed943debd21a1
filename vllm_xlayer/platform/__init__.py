"""The CPU reference platform: vLLM's real engine on a machine without a GPU.

This module only answers the question whether that platform applies here. It is loaded by
vLLM through the entry point group ``vllm.platform_plugins`` in every vLLM process, also
where the answer is no, so it imports nothing at module level.
"""

PLATFORM_CLASS = "vllm_xlayer.platform.reference.CpuReferencePlatform"
ENTRY_POINT_GROUP = "vllm.platform_plugins"
NEEDED_MODULE = "vllm.v1.kv_cache_layout"
"""No vLLM that this platform could not run on at all has it."""


def cpu_reference_platform() -> str | None:
    """Return the platform's class path where nothing else can run vLLM, else None.

    None where vLLM's own platforms apply (a GPU is visible, vLLM was built for CPU, TPU,
    ...), where another platform plugin applies, where a GPU's device node exists but its
    driver does not answer (that machine's owner needs the driver's error, not a slow
    engine), and with a vLLM that is too old. Never raises: vLLM calls this on the way to every
    start, also for users who never asked for the platform.
    """
    try:
        if not _vllm_is_supported() or _gpu_device_nodes():
            return None
        if _builtin_platform_applies() or _other_plugin_applies():
            return None
    except Exception:
        import logging

        logging.getLogger(__name__).warning("CPU reference platform: detection failed", exc_info=True)
        return None
    return PLATFORM_CLASS


def _vllm_is_supported() -> bool:
    """Looks for a module without importing it; the platform itself looks at the rest when it is used."""
    from importlib.util import find_spec

    return find_spec(NEEDED_MODULE) is not None


def _gpu_device_nodes() -> list[str]:
    """Device nodes of NVIDIA and AMD GPUs: there even if the driver's library fails."""
    from glob import glob

    return glob("/dev/nvidia[0-9]*") + glob("/dev/kfd")


def _applies(detect) -> bool:
    """Whether a platform's detection function claims the machine; vLLM reads a raise as no."""
    try:
        return detect() is not None
    except Exception:
        return False


def _builtin_platform_applies() -> bool:
    from vllm.platforms import builtin_platform_plugins

    return any(_applies(detect) for detect in builtin_platform_plugins.values())


def _other_plugin_applies() -> bool:
    """Whether another installed plugin claims the machine: vLLM refuses to start with two."""
    from importlib.metadata import entry_points

    from vllm import envs

    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.value.startswith("vllm_xlayer.") or (
            envs.VLLM_PLUGINS is not None and entry.name not in envs.VLLM_PLUGINS
        ):
            continue
        if _applies(lambda entry=entry: entry.load()()):
            return True
    return False

"""Engines for the tests: real vLLM, in this process, on the CPU reference platform.

On a machine with a GPU only those tests run that are marked `anywhere` or `fault`, with engines on the GPU.
"""

import gc
import os

# Before vLLM is imported. In one process a test can look into the engine and start many cheaply.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from model_fixture import ON_GPU

if ON_GPU:
    # Tokens are compared exactly, of requests that were batched in other ways.
    os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    # Ranks of an engine in a process that has used a GPU already: forked ones cannot use any.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

import pytest
import torch
from faults import COUNTS, TALLY

ENGINE_DEFAULTS = dict(
    skip_tokenizer_init=True,
    dtype="float32",
    max_model_len=512,
    kv_cache_memory_bytes=32 << 20,
    seed=0,
)
if ON_GPU:
    ENGINE_DEFAULTS |= dict(dtype="bfloat16", gpu_memory_utilization=0.2, enforce_eager=True)


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    for item in items:
        anywhere = item.get_closest_marker("anywhere") or item.get_closest_marker("fault")
        if ON_GPU and not anywhere and str(item.path).startswith(here):
            item.add_marker(pytest.mark.skip(reason="needs a machine without GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    from vllm_xlayer.connector.host.accounts import AccountingError

    if call.excinfo is not None and isinstance(call.excinfo.value, AccountingError):
        TALLY["leaked"] += len(call.excinfo.value.problems)


@pytest.fixture(autouse=True)
def fault_tally(request, record_property):
    """What a test marked `fault` counted goes to the JUnit report, for `benchmarks.faults`."""
    TALLY.clear()
    yield
    mark = request.node.get_closest_marker("fault")
    if mark is not None:
        record_property("fault", mark.args[0])
        for name in COUNTS:
            record_property(name, TALLY[name])


@pytest.fixture(scope="session")
def reference_platform():
    """vLLM's current platform, which must be the CPU reference platform on a machine without GPU."""
    from vllm.platforms import current_platform

    from vllm_xlayer.platform import PLATFORM_CLASS

    if not current_platform.is_cpu():
        if current_platform.is_unspecified():
            pytest.fail("vLLM found no platform: install this package, so that its entry points are found")
        pytest.skip("needs a machine without GPU")
    found = f"{type(current_platform).__module__}.{type(current_platform).__qualname__}"
    assert found == PLATFORM_CLASS
    torch.set_num_threads(1)  # the models are too small to share among threads
    return current_platform


@pytest.fixture(scope="session")
def platform(request):
    """The GPU's, or the CPU reference platform."""
    if not ON_GPU:
        return request.getfixturevalue("reference_platform")
    from vllm.platforms import current_platform

    return current_platform


@pytest.fixture(scope="session")
def cheap_collections():
    """Leaves the first engine, and all that was imported for it, out of every later garbage collection.

    vLLM collects several times while an engine starts and stops, each time over a million objects of imported
    modules: that was 85 % of a start. Engines made later are collected as ever.
    """
    with pytest.MonkeyPatch.context() as patch:

        def freeze_once():
            real_freeze()
            patch.setattr(gc, "freeze", lambda: None)

        real_freeze = gc.freeze
        patch.setattr(gc, "freeze", freeze_once)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield
    gc.unfreeze()


class Engines:
    """engines(model_folder, **settings) -> vllm.LLM.

    The settings override ENGINE_DEFAULTS. One engine lives at a time: making the next shuts
    the last one down. Its host tier is pinned, unless wait_for_tier=False.
    """

    def __init__(self):
        from vllm import LLM

        self.live, self._make = [], LLM  # a test may put something else there

    def __call__(self, model, wait_for_tier=True, **settings):
        from vllm_xlayer.compat.engine import come_to_rest

        self.shut_down()
        self.live.append(self._make(str(model), **(ENGINE_DEFAULTS | settings)))
        if wait_for_tier:
            come_to_rest(self.live[-1])
        return self.live[-1]

    def shut_down(self):
        """Ends the live engine and what it leaves in the process, for the next one of whichever kind."""
        from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
        from vllm.distributed.parallel_state import destroy_model_parallel

        while self.live:
            self.live.pop().llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()  # an engine that failed to start leaves its connector behind
        destroy_model_parallel()  # groups of experts are made for the first model of a process only


@pytest.fixture(scope="session")
def make_llm(platform, cheap_collections):
    """The session's Engines."""
    engines = Engines()
    yield engines
    engines.shut_down()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Folder of a two-layer grouped-query Llama with random float32 weights."""
    from model_fixture import llama_config, save_random_model

    return save_random_model(llama_config(), tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture
def preempted(monkeypatch):
    """Names of the requests that are preempted from now on, in order."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    preempt = Scheduler._preempt_request

    def spy(self, request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", spy)
    return preempted


@pytest.fixture
def caplog_vllm(caplog, monkeypatch):
    """caplog that hears this package's logger, once: it hands its records to vLLM's handlers only, and some
    versions of pytest listen there and some do not."""
    import logging

    from vllm_xlayer import plugin

    plugin.register()  # gives our logger its handlers, unless it has some already
    ours = logging.getLogger("vllm_xlayer")
    monkeypatch.setattr(ours, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(ours, "propagate", True)
    return caplog

"""What the server imports from which prefill engines are forked."""

import gc
import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")

import vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector
import vllm.model_executor.models.llama
import vllm.v1.engine.core
import vllm.v1.engine.llm_engine
import vllm.v1.worker.cpu_model_runner  # noqa: F401
from vllm import LLM  # noqa: F401

gc.freeze()  # vLLM collects several times while an engine starts, else each time over all of this

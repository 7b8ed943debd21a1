"""Engines of a real model's shape with random weights, each in a process of its own.

The sizes and times of a KV cache do not depend on the weights.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", rms_norm_eps=1e-5, rope_theta=500000.0,
    hidden_act="silu", dtype="bfloat16",
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=131072,
    ),
    "tiny": dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, vocab_size=512, max_position_embeddings=32768,
    ),
}  # fmt: skip


def write_model(folder: Path, shape: str) -> Path:
    """A folder with the config of a shape; vLLM makes the weights (load_format="dummy")."""
    model = folder / shape
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA | SHAPES[shape]))
    return model


def run_engine(
    function: str, job: dict[str, Any], folder: Path, core_here: bool = False
) -> dict[str, Any] | None:
    """What ``module:function`` returns for the job, called in a new process; None if it failed.

    core_here: with vLLM's engine core in that process too, so that the function can look into it.
    """
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    module, name = function.split(":")
    env = {"VLLM_USE_FLASHINFER_SAMPLER": "0"} | os.environ
    if core_here:
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    code = (
        f"import json, pathlib; from {module} import {name} as f; "
        f"result = f(json.loads({json.dumps(json.dumps(job))})); "
        f"pathlib.Path({str(out)!r}).write_text(json.dumps(result))"
    )
    # Not in the current folder: a source tree there would be imported instead of the package.
    if subprocess.run([sys.executable, "-c", code], env=env, cwd=folder, check=False).returncode:
        return None
    result: dict[str, Any] = json.loads(out.read_text())
    return result

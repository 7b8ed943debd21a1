"""Importing the package needs neither vLLM nor a GPU, and touches neither."""

import subprocess
import sys

import pytest

MODULES = [
    "vllm_xlayer",
    "vllm_xlayer.layout",
    "vllm_xlayer.nvfp4",
    "vllm_xlayer.config",
    "vllm_xlayer.patches.registry",
]

CHECK = """
import sys
{hide}
import importlib
for name in {modules}:
    importlib.import_module(name)
found = [name for name in sys.modules if name.split(".")[0] == "vllm" and sys.modules[name] is not None]
assert not found, f"vLLM was imported: {{found[:3]}}"
extension = [name for name in sys.modules if name.startswith("vllm_xlayer") and name.endswith("_C")]
assert not extension, f"the extension was imported: {{extension}}"
assert "torch" not in sys.modules or not sys.modules["torch"].cuda.is_initialized(), "CUDA was initialised"
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("hide", ["", "sys.modules['vllm'] = None"], ids=["vllm as it is", "vllm hidden"])
def test_imports_are_light(hide):
    done = run(CHECK.format(hide=hide, modules=MODULES))
    assert done.returncode == 0, done.stderr


def test_the_check_sees_vllm():
    """The check above can fail: a module that imports vLLM is caught."""
    fake = "import types; sys.modules['vllm'] = types.ModuleType('vllm')"
    done = run(CHECK.format(hide=fake, modules=["vllm"]))
    assert done.returncode != 0 and "vLLM was imported" in done.stderr

"""A small trained model and lm_eval tasks whose answers are only in the KV cache.

``model_path()`` is a Hugging Face model folder, ``tasks_path()`` a folder for lm_eval's
``--include_path``, ``TASKS`` the tasks' names. Importing this needs neither torch nor lm_eval.
"""

from pathlib import Path

TASKS = ("xlayer_recall", "xlayer_copy", "xlayer_trace")
"""lm_eval task names; the group ``xlayer`` holds all of them."""


def model_path() -> Path:
    """Folder of the shipped model (config, bf16 safetensors, tokenizer)."""
    return Path(__file__).parent / "model"


def tasks_path() -> Path:
    """Folder of the task YAML files and their data."""
    return Path(__file__).parent / "tasks"

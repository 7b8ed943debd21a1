"""Tiny models of many families: models.json, and what a GPU's kernels need other than the CPU platform's."""

import json
from typing import Any

from . import ROOT

CONFIGS = ROOT / "benchmarks" / "models.json"


def configs(gpu: bool) -> dict[str, dict[str, Any]]:
    """Name -> a model's config.

    Args:
        gpu: with the sizes under "gpu", and in bfloat16. Real kernels take fewer head sizes, and attention's
            tokens are large beside a state there, so that blocks stay shorter than the prompts of tests.
    """
    found = json.loads(CONFIGS.read_text())
    for config in found.values():
        there = config.pop("gpu", {})
        if gpu:
            config |= there | {"dtype": "bfloat16"}
    return found

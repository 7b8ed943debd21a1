"""What needs the repository: committed results, the tables and pictures made of them, the runs of its tests.

``python -m benchmarks.MODULE`` from the repository's root. The questions that a user asks of a machine are
``vllm-xlayer bench``'s; nothing in ``vllm_xlayer`` imports this package, and no wheel contains it.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The repository."""
RESULTS = Path(__file__).parent / "results"
"""Committed results files."""

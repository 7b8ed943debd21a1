"""Prints the folder of the task files: ``lm_eval --include_path $(python -m vllm_xlayer.eval.tasks)``."""

from vllm_xlayer.eval import tasks_path

print(tasks_path())

"""Prints the folder of the task files: ``lm_eval --include_path $(python -m vllm_xlayer.demo.tasks)``."""

from vllm_xlayer.demo import tasks_path

print(tasks_path())

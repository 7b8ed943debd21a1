"""lm_eval task files. ``python -m vllm_xlayer.eval.tasks`` prints this folder, for --include_path."""

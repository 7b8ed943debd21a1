"""lm_eval task files. ``python -m vllm_xlayer.demo.tasks`` prints this folder, for --include_path."""

"""Benchmarks: one module a question. Each prints a table and writes a JSON file to ``results/``.

``vllm-xlayer bench QUESTION``; ``python -m vllm_xlayer.bench.readme`` puts the results into
the README.
"""

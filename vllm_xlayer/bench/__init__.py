"""Questions that a user asks of a machine: one module each, which prints a table and writes a JSON file.

``vllm-xlayer bench QUESTION``; the file goes to the current folder unless ``--json`` says otherwise.
"""

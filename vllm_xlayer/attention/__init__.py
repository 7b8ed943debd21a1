"""Attention backends for vLLM that read and write this package's KV caches."""

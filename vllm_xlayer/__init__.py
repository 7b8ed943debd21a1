"""NVFP4 KV cache, cross-layer KV blocks and a KV connector for vLLM.

Importing this package imports neither vLLM nor the compiled extension, so it
never fails because a GPU or vLLM is absent.
"""

__version__ = "0.2.0"

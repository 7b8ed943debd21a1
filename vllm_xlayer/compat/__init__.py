"""The seam to vLLM 0.31 to 0.33: everything private of vLLM's, and every difference between its versions.

probe             whether the installed vLLM has what this package is built on
private           the table of what this package needs of vLLM that is not public
rows              vLLM's cache specs, layouts and allocations in the terms of ``layout``
engine            what the demo, the benchmarks and the tests ask of a running engine
extension_points  what this package registers with vLLM
"""

from .probe import UnsupportedVllm, check_vllm

__all__ = ["UnsupportedVllm", "check_vllm"]

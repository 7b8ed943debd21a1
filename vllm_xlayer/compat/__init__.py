"""What differs between vLLM versions, behind one set of functions.

`current()` returns the module for the installed vLLM; the rest of the package does not know
which one it is. To support another version, write a module with the same functions and add
it to `probe.CANDIDATES`.
"""

from .probe import UnsupportedVllm, current

__all__ = ["UnsupportedVllm", "current"]

"""What one engine of the quality command is to do."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """All lengths are in tokens."""

    title: str
    model: str
    is_demo: bool
    kv_cache_dtype: str
    out: str
    """The file for what it finds."""
    windows_file: str
    """Where the windows are. Written by the engine that comes first, which has 16-bit KV."""
    windows: int
    length: int
    first: int
    """Position of the first token that counts."""
    answer: int
    """Of each greedy answer."""
    chunk: int
    batch: int
    """Windows that are read at once."""
    is_reference: bool = False
    """Also reads the text again in other batches, and looks at K and V."""
    text_files: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    """Of vLLM's engine."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Job":
        return cls(**json.loads(path.read_text()))

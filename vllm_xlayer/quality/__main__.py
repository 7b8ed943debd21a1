"""One engine of the quality command, in a process of its own: ``python -m vllm_xlayer.quality JOB.json``."""

import sys
from pathlib import Path

from .job import Job


def main() -> int:
    try:
        job = Job.read(Path(sys.argv[1]))
        # Imported here: vLLM takes its time, in which someone may press Ctrl-C.
        from .engine import run

        run(job)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``vllm-xlayer bench QUESTION``, or ``python -m vllm_xlayer.bench QUESTION``."""

import argparse
import sys

from . import (
    capacity,
    copy,
    decode,
    engine,
    every,
    faults,
    load,
    offload,
    pacing,
    prefill,
    suite,
    traffic,
    write,
)

QUESTIONS = {
    "all": every,
    "capacity": capacity,
    "copy": copy,
    "decode": decode,
    "engine": engine,
    "faults": faults,
    "load": load,
    "offload": offload,
    "pacing": pacing,
    "prefill": prefill,
    "suite": suite,
    "traffic": traffic,
    "write": write,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vllm-xlayer bench")
    commands = parser.add_subparsers(dest="question", required=True)
    for name, module in QUESTIONS.items():
        module.add_arguments(commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0]))
    args = parser.parse_args(argv)
    return QUESTIONS[args.question].run(args)


if __name__ == "__main__":
    sys.exit(main())

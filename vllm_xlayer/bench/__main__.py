"""``vllm-xlayer bench QUESTION``, or ``python -m vllm_xlayer.bench QUESTION``."""

import argparse
import sys

from . import (
    capacity,
    copy,
    decode,
    engine,
    gather,
    handover,
    load,
    offload,
    prefill,
    traffic,
    write,
)

QUESTIONS = {
    "capacity": capacity,
    "copy": copy,
    "decode": decode,
    "engine": engine,
    "gather": gather,
    "handover": handover,
    "load": load,
    "offload": offload,
    "prefill": prefill,
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

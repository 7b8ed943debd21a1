"""``python -m vllm_xlayer.bench QUESTION``."""

import argparse
import sys

from . import capacity, decode, engine, faults, suite, write

QUESTIONS = {
    "capacity": capacity,
    "decode": decode,
    "engine": engine,
    "faults": faults,
    "suite": suite,
    "write": write,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vllm_xlayer.bench")
    commands = parser.add_subparsers(dest="question", required=True)
    for name, module in QUESTIONS.items():
        module.add_arguments(commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0]))
    args = parser.parse_args()
    return QUESTIONS[args.question].run(args)


if __name__ == "__main__":
    sys.exit(main())

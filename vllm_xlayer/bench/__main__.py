"""``vllm-xlayer bench QUESTION``, or ``python -m vllm_xlayer.bench QUESTION``."""

import argparse
import sys

import torch

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
NEED_A_GPU = frozenset({"copy", "decode", "write"})
"""The others run on the CPU reference platform, too, to see that they work."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vllm-xlayer bench",
        description="Measures this machine, prints a table, and writes QUESTION.json to the current folder.",
    )
    commands = parser.add_subparsers(dest="question", required=True)
    for name, module in QUESTIONS.items():
        text = module.__doc__ or ""
        question = commands.add_parser(
            name, help=text.partition("\n")[0], description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(question)
    args = parser.parse_args(argv)
    if args.question in NEED_A_GPU and not torch.cuda.is_available():
        print(f"{args.question}: expected an NVIDIA GPU, got none", file=sys.stderr)
        return 1
    return QUESTIONS[args.question].run(args)


if __name__ == "__main__":
    sys.exit(main())

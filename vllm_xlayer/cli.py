"""``vllm-xlayer``: look at the installation, and see the package work."""

import argparse
import sys

from . import __version__


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vllm-xlayer", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser("doctor", help="versions, GPU, kernels, patches, and a model's KV layout")
    doctor.add_argument("--model", help="name or folder of a model: show its negotiated KV layout")
    doctor.add_argument("--kv-cache-dtype", default="auto", help="as for vllm serve (default: auto)")
    doctor.add_argument("--block-size", type=int, default=None, help="as for vllm serve")
    doctor.add_argument("--layer", type=int, default=0, help="layer of the drawing (default: 0)")
    doctor.add_argument("--head", type=int, default=0, help="KV head of the drawing (default: 0)")
    doctor.add_argument("--token", type=int, default=0, help="token in the block of the drawing (default: 0)")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")

    demo = commands.add_parser(
        "demo", help="answer lm_eval tasks with the stock KV cache, with rows, and with NVFP4 rows restored"
    )
    demo.add_argument("--limit", type=int, default=None, help="documents a task (default: as many as fit)")
    demo.add_argument("--json", metavar="FILE", help="also write the results there")

    args = parser.parse_args(argv)
    try:
        if args.command == "doctor":
            from .doctor import run
        else:
            from .eval.demo import run
        return run(args)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

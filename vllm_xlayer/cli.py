"""Looks at the installation, and shows the package at work."""

import argparse
import sys
from collections.abc import Callable

from . import __version__


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    """The function behind a command; imported only for it, since some take seconds to import."""
    if name == "doctor":
        from . import doctor

        return doctor.run
    if name == "demo":
        from .demo import command as demo

        return demo.run
    if name == "quality":
        from .quality import command as quality

        return quality.run
    from .connector.disk import commands as tier_cli

    return tier_cli.run


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
    doctor.add_argument(
        "--engines",
        nargs=2,
        metavar="HOST:PORT",
        help="side channels of two engines with XLayerNixlConnector: would they exchange rows",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")

    demo = commands.add_parser(
        "demo", help="answer lm_eval tasks with stock KV caches, with rows, and with NVFP4 rows restored"
    )
    demo.add_argument("--limit", type=int, default=None, help="documents a task (default: as many as fit)")
    demo.add_argument("--json", metavar="FILE", help="also write the results there")

    from .connector.disk import commands as tier_cli
    from .quality import command as quality

    quality.add_parser(commands)
    tier_cli.add_parsers(commands)
    commands.add_parser("bench", help="benchmarks; bench --help lists them", add_help=False)
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:  # has parsers of its own, which take seconds to import
        from .bench.__main__ import main as bench

        return bench(argv[1:])
    args = parser.parse_args(argv)
    try:
        return _command(args.command)(args)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

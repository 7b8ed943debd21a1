"""``--kv-connector NAME``: the short form of ``--kv-transfer-config`` in vLLM's command line."""

import argparse

from ..compat.dependence import Patch
from ..compat.extension_points import known_connectors
from .wrapping import wrap


def _not_needed() -> str | None:
    from vllm.engine.arg_utils import EngineArgs

    return "vLLM has the flag" if "kv_connector" in EngineArgs.__dataclass_fields__ else None


def _apply() -> None:
    from vllm.engine.arg_utils import EngineArgs

    wrap(EngineArgs, "add_cli_args", add_kv_connector_flag, "vllm")
    wrap(EngineArgs, "from_cli_args", read_kv_connector_flag, "vllm")


def connector_name(text: str) -> str:
    """argparse type: the name of a connector vLLM can create."""
    known = known_connectors()
    if text not in known:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, got {text!r}")
    return text


def add_kv_connector_flag(original, parser):
    parser = original(parser)
    if "--kv-connector" not in parser._option_string_actions:
        parser.add_argument_group("vllm-xlayer").add_argument(
            "--kv-connector",
            type=connector_name,
            default=None,
            metavar="NAME",
            help="KV connector for this engine, e.g. XLayerConnector. Short for "
            '--kv-transfer-config \'{"kv_connector": NAME, "kv_role": "kv_both"}\'; '
            "with both given, they must agree.",
        )
    return parser


def read_kv_connector_flag(original, cls, args):
    name = getattr(args, "kv_connector", None)
    if name is not None:
        args.kv_transfer_config = merged(name, getattr(args, "kv_transfer_config", None))
    return original(cls, args)


def merged(name: str, config):
    """The transfer config for a connector of this name.

    Raises:
        ValueError: ``config`` names another connector.
    """
    from vllm.config import KVTransferConfig

    if config is None:
        return KVTransferConfig(kv_connector=name, kv_role="kv_both")
    if config.kv_connector not in (None, name):
        raise ValueError(
            f"--kv-connector and --kv-transfer-config: expected the same connector, got {name} and "
            f"{config.kv_connector}; give one of the two"
        )
    config.kv_connector = name
    config.kv_role = config.kv_role or "kv_both"
    return config


PATCH = Patch(
    feature="--kv-connector",
    owner="vllm.engine.arg_utils:EngineArgs",
    why="a connector can only be named in a JSON argument",
    how="adds --kv-connector to the parser, and turns it into a kv_transfer_config",
    remove_when="EngineArgs has a field kv_connector",
    methods={"add_cli_args": "parser", "from_cli_args": "args"},
    attributes=("kv_transfer_config",),
    apply=_apply,
    not_needed=_not_needed,
)

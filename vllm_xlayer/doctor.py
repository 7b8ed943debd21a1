"""``vllm-xlayer doctor``: what is installed, what works, and how a model's KV cache would lie in memory."""

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("vllm-xlayer", "vllm", "torch", "flashinfer-python", "lm-eval", "nixl")


def run(args: argparse.Namespace) -> int:
    """Prints the report. Returns 0 if everything asked for works, else 1."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the report says what the log would
    gpus = _gpus()
    report: dict[str, Any] = {
        "versions": _versions(),
        "gpus": gpus,
        "extension": _extension(gpus),
        "environment": _environment(),
        "vllm": _vllm(),
        "copies": copies(),
    }
    if args.model:
        report["model"] = _model(args)
    if args.engines:
        report["hand-over"] = _hand_over(*args.engines)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    parts = ("extension", "environment", "vllm", "model", "hand-over")
    return 1 if any("error" in report.get(name, {}) for name in parts) else 0


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


NO_CUDA_OPS = (
    "expected CUDA ops, as there is a GPU, but this build has CPU ops only, and attention to an NVFP4 KV "
    "cache is left to vLLM: reinstall this package from a wheel, or from source with VLLM_XLAYER_CUDA=1 "
    "beside an installed vLLM, which brings nvcc along"
)


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    properties = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in properties]


def _extension(gpus: list[str]) -> dict[str, Any]:
    """What the extension was built for; an error where it has nothing for these GPUs."""
    from . import ops

    try:
        built = ops.build_info()
    except ops.ExtensionMissingError as error:
        return {"error": str(error)}
    return built | {"error": NO_CUDA_OPS} if gpus and not built["cuda"] else built


def _environment() -> dict[str, str]:
    """The package's variables that are set; an error where an engine would not start with them."""
    from .config import PREFIX, Config, ConfigError

    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIX)}
    try:
        Config.load()
    except ConfigError as error:
        found["error"] = str(error)
    return found


def copies() -> str:
    """What moves rows between device and host."""
    import torch

    from .connector.copy.choice import rule

    return rule() if torch.cuda.is_available() else "no GPU: nothing to choose"


def _vllm() -> dict[str, Any]:
    """State of the patches and extension points, as the plugin leaves them in a vLLM process."""
    from . import compat
    from .compat import extension_points, private
    from .patches.registry import REGISTRY
    from .plugin import register

    try:
        compat.check_vllm()
    except compat.UnsupportedVllm as error:
        return {"error": str(error)}
    register()
    patches = [_private(r.patch, r.state.value, r.reason) for r in REGISTRY.report()]
    others = []
    for record in private.table():
        problem = record.problem() or ""
        others.append(_private(record, "off" if problem else "fits", problem))
    return {**extension_points.report(), "private": [*patches, *others]}


def _private(record: Any, state: str, reason: str) -> dict[str, str]:
    """One record of `compat.private`, with what became of it."""
    names = ("feature", "target", "why", "how", "upstream", "remove_when")
    return {**{name: getattr(record, name) for name in names}, "state": state, "reason": reason}


def _model(args: argparse.Namespace) -> dict[str, Any]:
    from . import compat
    from .layout import NegotiationError, row_line

    if args.model.startswith(("/", ".", "~")) and not Path(args.model).expanduser().is_dir():
        # vLLM would take it for a name, and say that it is not one.
        return {"error": f"--model: expected a folder or a name, found no folder {args.model!r}"}
    try:
        compat.check_vllm()
        from .compat.model import rows_of_model
        from .connector.limits import check_served

        found = rows_of_model(args.model, args.kv_cache_dtype, args.block_size)
        check_served(found.config, found.plan, found.decision.descriptor, ours=True)
        drawing = _drawing(found, args)
    except (NegotiationError, ValueError, IndexError, OSError, compat.UnsupportedVllm) as error:
        return {"error": str(error)}
    row = found.decision.descriptor
    return {
        "decision": row_line(found.decision),
        "assumed": found.assumed,
        "accepted by": list(found.decision.accepted_by),
        "refused": [str(refusal) for refusal in found.decision.refusals],
        "row bytes": row.row_bytes,
        "descriptor": row.to_dict(),
        "drawing": drawing,
    }


def _drawing(found: Any, args: argparse.Namespace) -> str:
    """Where one token lies, if all groups have pages of one kind; else where the pages do."""
    from .layout import draw, draw_row

    if not 0 <= args.layer < len(found.layers):
        raise ValueError(f"--layer: expected 0 to {len(found.layers) - 1}, got {args.layer}")
    row = found.decision.descriptor
    if row.uniform is None:
        return draw_row(row)
    return draw(row.uniform, found.layers[args.layer], args.head, args.token)


def _hand_over(first: str, second: str) -> dict[str, Any]:
    """Whether two running engines would exchange rows."""
    from .connector.nixl.ask import NoAnswer, compare

    try:
        found: dict[str, Any] = dict(compare(first, second))
    except NoAnswer as error:
        return {"error": str(error)}
    if found["differ"]:
        found["error"] = f"these engines would not exchange rows: {'; '.join(found['differ'])}"
    return found


def _print(report: dict[str, Any]) -> None:
    console = Console(width=100, highlight=False)
    pairs = Table(show_header=False, box=None, pad_edge=False)
    for name, version in report["versions"].items():
        pairs.add_row(name, version)
    pairs.add_row("GPU", "\n".join(report["gpus"]) or "none visible: the CPU reference platform serves")
    for name, value in report["extension"].items():
        pairs.add_row(f"extension: {name}", ", ".join(value) if isinstance(value, list) else str(value))
    for name, value in report["environment"].items():
        pairs.add_row(f"environment: {name}", value)
    state = report["vllm"]
    for name, value in state.items():
        if name != "private":
            pairs.add_row(f"vLLM: {name}", str(value))
    pairs.add_row("copies", report["copies"])
    console.print(pairs)
    if records := state.get("private"):
        console.print("\nWhat this package needs of vLLM that is not public:")
    for record in records or ():
        reason = f" ({record['reason']})" if record["reason"] else ""
        console.print(f"\n{record['feature']}: {record['state']}{reason}", style="bold", markup=False)
        for line in (record["target"], record["how"], f"without it: {record['why']}"):
            console.print(f"  {line}", markup=False, soft_wrap=True)
    if hand_over := report.get("hand-over"):
        console.print()
        for line in hand_over.get("engines", ()):
            console.print(line, markup=False)
        verdict = hand_over.get("error", "these engines exchange rows")
        console.print(verdict, markup=False, style="red" if "error" in hand_over else None)
    model = report.get("model")
    if model is None:
        return
    console.print()
    if "error" in model:
        console.print(model["error"], markup=False, style="red")
        return
    console.print(
        f"row: {model['row bytes']:,} bytes; accepted by {', '.join(model['accepted by'])}", markup=False
    )
    for refusal in model["refused"]:
        console.print(f"  {refusal}", markup=False)
    if model["assumed"]:
        console.print(
            "its layers could not be built without weights, so all are taken for full attention of one kind: "
            f"the engine says at its start what they are ({model['assumed']})", markup=False,
        )  # fmt: skip
    console.print()
    console.print(model["drawing"], markup=False, soft_wrap=True)

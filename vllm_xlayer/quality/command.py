"""``vllm-xlayer quality MODEL``: what each KV cache costs a model, on its user's text.

Each cache is served by an engine in a process of its own, one after the other; Ctrl-C ends the one that runs.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHOICE = {"cuda": ("fp8", "nvfp4"), "cpu": ("nvfp4",)}
"""Caches where nobody says which. vLLM's fp8 has no CPU version here."""


@dataclass(frozen=True)
class Cache:
    """A KV cache to look at."""

    title: str
    kv_cache_dtype: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, spec: str) -> "Cache":
        """DTYPE[,NAME=VALUE...]: a name in capitals is a variable of the environment, any other an argument
        of vLLM's engine, whose value is JSON or a plain string.

        Raises:
            ValueError: a part that is neither.
        """
        dtype, *parts = spec.split(",")
        options: dict[str, Any] = {}
        environment: dict[str, str] = {}
        for part in parts:
            name, equals, value = part.partition("=")
            if not dtype or not equals or not name.isidentifier():
                raise ValueError(f"--cache: expected DTYPE[,NAME=VALUE...], got {spec!r}")
            if name.isupper():
                environment[name] = value
            else:
                options[name] = _json_or_text(value)
        return cls(spec, dtype, options, environment)


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def add_parser(commands: Any) -> None:
    quality = commands.add_parser(
        "quality",
        help="what KV caches cost a model: perplexity in decode, KL, greedy answers, K and V a layer",
    )
    quality.add_argument("model", help='name or folder of a model; "demo": the small one that comes along')
    quality.add_argument(
        "--cache", action="append", metavar="DTYPE[,NAME=VALUE...]",
        help="a KV cache to compare with 16 bits, as for --kv-cache-dtype, with arguments of vLLM's engine "
        "and, in capitals, variables of the environment; again for more (default: nvfp4, and on a GPU fp8)",
    )  # fmt: skip
    quality.add_argument(
        "--text", action="append", metavar="FILE", default=[],
        help="a text to read, UTF-8; again for more (default: the model writes one)",
    )  # fmt: skip
    quality.add_argument("--windows", type=int, default=40, help="windows of text (default: 40)")
    quality.add_argument("--length", type=int, default=2048, help="tokens of a window (default: 2048)")
    quality.add_argument("--first", type=int, help="first token that counts (default: half of --length)")
    quality.add_argument("--answer", type=int, default=200, help="tokens of a greedy answer (default: 200)")
    quality.add_argument("--chunk", type=int, default=256, help="tokens of a prefill chunk (default: 256)")
    quality.add_argument("--batch", type=int, default=40, help="windows read at once (default: 40)")
    quality.add_argument(
        "--at-once", type=int, default=1, metavar="N",
        help="engines beside each other, where their device has memory for them (default: 1)",
    )  # fmt: skip
    quality.add_argument(
        "--extra",
        type=json.loads,
        default={},
        metavar="JSON",
        help="arguments of vLLM's engine, for all caches",
    )
    quality.add_argument(
        "--calibrate", metavar="FILE", help="write global scales that suit K and V: for VLLM_XLAYER_KV_SCALES"
    )
    quality.add_argument("--json", metavar="FILE", help="also write all numbers there")
    quality.add_argument("--plot", metavar="FILE", help="also draw them (needs matplotlib)")


def problem(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, for people; None: nothing."""
    for name in ("windows", "answer", "chunk", "batch", "at_once"):
        if getattr(args, name) < 1:
            return f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}"
    if not 2 <= args.first < args.length:
        return f"--first: expected 2 to {args.length - 1} (--length less one), got {args.first}"
    if args.first + args.answer > args.length:
        most = args.length - args.first
        return f"--answer: expected at most {most} (--length less --first), got {args.answer}"
    if not isinstance(args.extra, dict):
        return f"--extra: expected a JSON object, got {args.extra!r}"
    if missing := [file for file in args.text if not Path(file).is_file()]:
        return f"--text: expected a file, found none: {missing[0]}"
    for name in ("json", "plot", "calibrate"):
        file = getattr(args, name)
        if file and not Path(file).absolute().parent.is_dir():
            return f"--{name}: expected a file in a folder that exists, got {file}"
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        return "--plot: expected matplotlib, found none: pip install matplotlib"
    return None if args.model == "demo" else _model_problem(args.model, args.extra.get("revision"))


def _model_problem(model: str, revision: str | None) -> str | None:
    """Why no engine could find a model; None: nothing is known that speaks against it."""
    from huggingface_hub import errors, hf_hub_download

    path, expected = Path(model), f"model: expected a folder or a name, got {model!r}"
    if path.is_dir():
        # Mistral's own format has params.json.
        known = any((path / name).is_file() for name in ("config.json", "params.json"))
        return None if known else f"{expected}: the folder has no config.json"
    if path.exists() or "://" in model or os.environ.get("VLLM_USE_MODELSCOPE"):
        return None  # GGUF, object stores, another hub: vLLM knows
    try:
        hf_hub_download(model, "config.json", revision=revision)
    except errors.HFValidationError:
        return f"{expected}: there is no such folder"
    except errors.RepositoryNotFoundError:
        return f"{expected}: neither a folder, nor a model that Hugging Face's hub lets you read"
    except errors.LocalEntryNotFoundError:
        return f"{expected}: neither a folder nor in the local cache, and Hugging Face's hub cannot be asked"
    except (OSError, errors.EntryNotFoundError):
        return None  # another format, or a trouble that the engine can say better
    return None


def run(args: argparse.Namespace) -> int:
    """Runs the engines, prints what they found. Returns a process exit code."""
    from rich.console import Console

    args.first = args.length // 2 if args.first is None else args.first
    try:
        caches = [Cache.parse(spec) for spec in args.cache or CHOICE[_device()]]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if wrong := problem(args):
        print(wrong, file=sys.stderr)
        return 2
    from . import report, results

    console = Console(width=report.WIDTH, highlight=False)
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-quality-") as folder:
        result = _measure(args, caches, Path(folder), console)
    if result is None:
        return 1
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    for part in (report.table(result), report.by_position(result), report.layers(result)):
        console.print(part)
    console.print(report.footer(result), markup=False)
    console.print(f"\n[bold]{report.verdict(result)}")
    if args.calibrate:
        from .. import kv_scales

        kv_scales.write(Path(args.calibrate), results.calibrated(result))
        console.print(f"Scales written. To use them: VLLM_XLAYER_KV_SCALES={args.calibrate}", markup=False)
    if args.plot:
        from . import plot

        plot.draw(result, Path(args.plot))
    return 0


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _measure(
    args: argparse.Namespace, caches: list[Cache], folder: Path, console: Any
) -> dict[str, Any] | None:
    from . import results
    from .job import Job

    model, is_demo = args.model, args.model == "demo"
    if is_demo:
        from ..demo import model_path

        model = str(model_path())
    wanted = [Cache(results.REFERENCE, "auto"), *caches]

    def look_at(number: int) -> Path | None:
        cache = wanted[number]
        console.print(f"[{number + 1}/{len(wanted)}] {cache.title}", markup=False)
        job = Job(
            title=cache.title, model=model, is_demo=is_demo, kv_cache_dtype=cache.kv_cache_dtype,
            out=str(folder / f"{number}.npz"), windows_file=str(folder / "windows.json"),
            windows=args.windows, length=args.length, first=args.first, answer=args.answer,
            chunk=args.chunk, batch=args.batch, is_reference=number == 0,
            text_files=[str(Path(file).resolve()) for file in args.text],
            options={**args.extra, **cache.options},
        )  # fmt: skip
        return Path(job.out) if _run_engine(job, cache.environment, folder / f"{number}.json") else None

    reference = look_at(0)  # it also makes the windows
    if reference is None:
        return None
    with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        outs = list(pool.map(look_at, range(1, len(wanted))))
    files = {cache.title: out for cache, out in zip(caches, outs, strict=True) if out is not None}
    if not files:
        return None
    what = {name: getattr(args, name) for name in ("text", "length", "chunk", "batch", "extra")}
    what = {"model": Path(args.model).name if Path(args.model).is_dir() else args.model} | what
    return what | results.compare(reference, files, args.first, args.length)


def _run_engine(job: Any, environment: dict[str, str], file: Path) -> bool:
    """Whether it ended well; if not, that was said. The job is written to ``file``."""
    job.write(file)
    quiet = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
        # Threads that wait by spinning make a busy machine ten times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        # The engine core in the same process: its memory is seen from there.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    command = [sys.executable, "-m", "vllm_xlayer.quality", str(file)]
    # Not in the current folder: `-m` would import a source tree there instead of the installed package.
    code = subprocess.run(
        command, env={**quiet, **os.environ, **environment}, cwd=file.parent, check=False
    ).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code or not Path(job.out).exists():
        print(f"left out: the engine with {job.title} ended with exit code {code}", file=sys.stderr)
        return False
    return True

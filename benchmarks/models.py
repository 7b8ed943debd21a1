"""Which families of models this package serves: docs/models.md's tables, from tiny models.

    python -m benchmarks.models [family ...] [--at-once 8] [--minutes 8]

Starts every family of models.json with random weights in three ways: with NVFP4, with XLayerConnector, and
with both. A prompt is answered from the device's cache, and once more after that cache was emptied and its
memory filled with another byte; with the connector, it is then restored. "Works" means that as many tokens
came from the cache, that tokens and logprobs are equal, and that a wrong block of any group would have
changed them. A refusal at start is quoted. Each family has a process of its own and a time limit; on a GPU
several may share it. Results go to results/cpu-models.json, or gpu-models.json, as they come, beside those of
families that were not named.
"""

import argparse
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_xlayer.bench.engines import GRAPHS_ONLY
from vllm_xlayer.provenance import rows_of, stamped, write

from . import RESULTS, ROOT, serving
from .cases import try_all
from .model_configs import configs

RESULT = {False: RESULTS / "cpu-models.json", True: RESULTS / "gpu-models.json"}
"""By whether there is a GPU."""
LARGE = RESULTS / "gpu-models-large.json"
"""Of `--cache-gib`, and with graphs: another question."""
DOCUMENT = ROOT / "docs" / "models.md"
NVFP4 = {"kv_cache_dtype": "nvfp4"}
WAYS: dict[str, dict[str, Any]] = {
    "NVFP4": NVFP4,
    "XLayerConnector": serving.CONNECTOR,
    "both": NVFP4 | serving.CONNECTOR,
}


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Args:
        config: of models.json.
        drafts: what the table says of its speculative decoding.
        speculation: vLLM's settings of that; a drafter of method "eagle" gets its weights here.
        cache_bytes: of the device's KV cache.
        graphs: decode runs in CUDA graphs.
    """

    config: dict[str, Any]
    drafts: str = ""
    speculation: dict[str, Any] = field(default_factory=dict)
    cache_bytes: int = 16 << 20
    graphs: bool = False

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.config["architectures"][0], self.drafts)))

    def settings(self, folder: Path) -> dict[str, Any]:
        """Saves the model in a folder; what LLM() is told of it."""
        from hybrid_fixture import save_hybrid_config, save_qwen3_next_with_mtp
        from model_fixture import save_eagle

        save = save_qwen3_next_with_mtp if self.speculation.get("method") == "mtp" else save_hybrid_config
        settings = {
            "dtype": self.config["dtype"], "kv_cache_memory_bytes": self.cache_bytes,
            **save(self.config, folder / "model"),
        }  # fmt: skip
        if self.graphs:
            settings |= {"enforce_eager": False, **GRAPHS_ONLY}
        if self.speculation:
            settings["speculative_config"] = dict(self.speculation)
        if self.speculation.get("method") == "eagle":
            draft = save_eagle(folder / "draft", 0, vocab_size=self.config["vocab_size"])
            settings["speculative_config"]["model"] = str(draft)
        return {"model": str(folder / "model"), **settings}


def families(gpu: bool = False) -> dict[str, Family]:
    found = {name: Family(config) for name, config in configs(gpu).items()}
    llama = found["llama"].config
    ngram = dict(method="ngram", prompt_lookup_max=3, prompt_lookup_min=1, num_speculative_tokens=3)
    found["llama_ngram"] = Family(llama, "n-gram drafts", ngram)
    found["llama_eagle"] = Family(llama, "EAGLE drafts", dict(method="eagle", num_speculative_tokens=2))
    mtp = dict(method="mtp", num_speculative_tokens=2)
    found["qwen3_next_mtp"] = Family(found["qwen3_next"].config, "MTP drafts", mtp)
    return found


def serve(settings: dict[str, Any]) -> str:
    """What happened to a model served that way, for a cell of the table."""
    try:
        with serving.started(settings) as llm:
            prompt = serving.prompt_of()
            cached = serving.cached_answer(llm, prompt)
            restores = "kv_transfer_config" in settings
            (serving.check_restored if restores else serving.check_unread)(llm, prompt, cached)
            serving.check_power(llm, prompt, cached)
            others = serving.other_nvfp4_backends(llm)
            return f"works ({', '.join([f'blocks of {serving.block_of(llm)}', *others])})"
    except Exception as error:
        traceback.print_exc()
        return serving.cell_of(error)


def try_family(family: Family, answers: Connection) -> None:
    """In a process of its own: sends (way, what happened) for each way."""
    serving.prepare()
    with tempfile.TemporaryDirectory() as folder:
        try:
            settings = family.settings(Path(folder))
        except Exception as error:
            traceback.print_exc()
            for way in WAYS:
                answers.send((way, f"not tried: {type(error).__name__}: {serving.sentence(error)}"))
            return
        for way, more in WAYS.items():
            answers.send((way, serve(settings | more)))


def main() -> int:
    """Returns 1 if an answer was wrong."""
    import torch

    gpu = torch.cuda.is_available()
    known = families(gpu)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="family", help=f"some of {', '.join(known)}")
    parser.add_argument("--seconds", type=float, default=240, help="limit for a family (default: 240)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="limit for all (default: none)")
    parser.add_argument("--at-once", type=int, default=1, help="families at a time (default: 1)")
    parser.add_argument(
        "--cache-gib",
        type=float,
        help=f"of a device's cache, whose last blocks are used, and decode in CUDA graphs; into {LARGE.name}",
    )
    parser.add_argument("--json", type=Path, help="file to write (default: as above)")
    parser.add_argument("--logs", type=Path, help="folder for what each family's process writes")
    args = parser.parse_args()
    if unknown := set(args.families) - set(known):
        parser.error(f"expected families of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if args.logs:
        os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
    from .readme import rendered

    large = args.cache_gib is not None
    file = args.json or (LARGE if large else RESULT[gpu])
    results = rows_of(file, "families")

    def finished(name: str, cells: dict[str, str]) -> None:
        size = {"GiB": f"{args.cache_gib:g}"} if large else {}
        results[name] = stamped({"family": known[name].label, **size, **cells})
        write(file, {"families": {name: results[name] for name in known if name in results}})

    more: dict[str, Any] = dict(cache_bytes=int(args.cache_gib * 2**30), graphs=True) if large else {}
    tried = {name: replace(known[name], **more) for name in args.families or known}
    try_all(
        tried, try_family, list(WAYS), finished,
        seconds=args.seconds, at_once=args.at_once, total_seconds=60 * args.minutes, logs=args.logs,
    )  # fmt: skip
    DOCUMENT.write_text(rendered(DOCUMENT.read_text()))
    return int(any("WRONG" in cell for cells in results.values() for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())

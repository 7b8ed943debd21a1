"""What K's transforms and exact newest tokens gain, in plain PyTorch: which of them an engine should have.

    python -m benchmarks.transforms MODEL --text FILE [--windows 40] [--json OUT.json]

A model reads windows of text as decode reads them: every key and value is quantised after RoPE and read
back, but for a query's newest tokens, which are exact. No engine and no kernel: what an idea is worth, before
either has it. MODEL is a folder, or "demo". The last windows only say the means of K.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_xlayer.nvfp4 import decode, encode
from vllm_xlayer.provenance import write
from vllm_xlayer.quality import text

V_SCALE = 1 / 16
"""V's global scale where a checkpoint has none, as the engine's."""
QUERIES = 256
"""Queries that attend at once: scores of all of them would take gigabytes."""
NEWEST = (0, 64)
AT_ONCE = 8
"""Windows that are read at once: a GPU waits for launches otherwise."""
CALIBRATION = 4
"""Windows that give the means."""
Quantiser = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(layer, K [B, H, n, D], V) -> what is read back of them."""


def nvfp4(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """After a round trip through the cache's format."""
    return decode(*encode(x, scale), scale)


def fp8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def rotated(x: torch.Tensor, block: int) -> torch.Tensor:
    """Each ``block`` elements times a Hadamard matrix, which is its own inverse."""
    h = torch.ones(1, 1, device=x.device)
    while len(h) < block:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return (x.unflatten(-1, (-1, block)) @ (h / math.sqrt(block))).flatten(-2)


@dataclass
class Means:
    """K's mean of each layer, head and channel."""

    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    def look(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.sums[layer] = self.sums.get(layer, 0) + k.sum((0, 2), keepdim=True)
        self.tokens[layer] = self.tokens.get(layer, 0) + k.shape[0] * k.shape[2]
        return k, v

    def of(self, layer: int) -> torch.Tensor:
        """[1, H, 1, D], as 16 bits hold it."""
        return (self.sums[layer] / self.tokens[layer]).bfloat16().float()


def quantisers(means: Means) -> dict[str, Quantiser]:
    """Title -> how K and V are kept."""

    def with_k(keep: Callable[[int, torch.Tensor], torch.Tensor]) -> Quantiser:
        return lambda layer, k, v: (keep(layer, k), nvfp4(v, V_SCALE))

    def rotation(block: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
        return lambda layer, k: rotated(nvfp4(rotated(k, block)), block)

    def without_mean(layer: int, k: torch.Tensor) -> torch.Tensor:
        return nvfp4(k - means.of(layer)) + means.of(layer)

    def without_mean_but_first(layer: int, k: torch.Tensor) -> torch.Tensor:
        """Models' first token is a sink: its K is no other's, and the mean would make it larger."""
        return torch.cat((nvfp4(k[:, :, :1]), without_mean(layer, k[:, :, 1:])), 2)

    return {
        "NVFP4": with_k(lambda layer, k: nvfp4(k)),
        "K rotated by 16": with_k(rotation(16)),
        "K rotated by 32": with_k(rotation(32)),
        "K rotated by 64": with_k(rotation(64)),
        "mean of K subtracted": with_k(without_mean),
        "mean subtracted, not of a first token": with_k(without_mean_but_first),
    }


class Reader:
    """A model whose attention reads K and V as a quantiser keeps them."""

    def __init__(self, folder: str, device: str) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register("as_kept", self._attend)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="as_kept"
        )
        self.model: Any = model.eval()
        self.model.to(device)
        self.device = device
        self.keep: Quantiser = lambda layer, k, v: (k, v)
        self.newest = 0

    def _attend(self, module, query, key, value, attention_mask, scaling=None, **_):
        """As transformers calls it: [B, heads, n, D]; returns [B, n, heads, D] and no weights."""
        k, v = key.bfloat16().float(), value.bfloat16().float()  # what the cache is given
        kept_k, kept_v = self.keep(module.layer_idx, k, v)
        group, n = query.shape[1] // k.shape[1], query.shape[2]
        k, v, kept_k, kept_v = (x.repeat_interleave(group, 1) for x in (k, v, kept_k, kept_v))
        at, out = torch.arange(n, device=k.device), torch.empty_like(query)
        for first in range(0, n, QUERIES):
            rows = slice(first, first + QUERIES)
            age = at[rows, None] - at
            exact = age < self.newest
            q = query[:, :, rows]
            scores = torch.where(exact, q @ k.mT, q @ kept_k.mT) * scaling
            p = scores.masked_fill(age < 0, -torch.inf).softmax(-1)
            out[:, :, rows] = (p * exact) @ v + (p * ~exact) @ kept_v
        return out.transpose(1, 2).contiguous(), None

    @torch.no_grad()
    def hidden(self, windows: list[list[int]], first: int) -> torch.Tensor:
        """[windows, n - first, hidden size]: what predicts the windows' tokens from ``first`` on."""
        ids = torch.tensor(windows, device=self.device)
        return self.model.model(ids, use_cache=False).last_hidden_state[:, first - 1 : -1]

    @torch.no_grad()
    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n - first, vocabulary], from one window's hidden states."""
        return self.model.lm_head(hidden).float().log_softmax(-1)


def measure(reader: Reader, windows: list[list[int]], first: int) -> list[dict[str, Any]]:
    """A row a variant: the change of perplexity against exact K and V, with 95 % over windows."""
    means = Means()
    reader.keep = means.look
    reader.hidden(windows[-CALIBRATION:], first)
    windows = windows[:-CALIBRATION]
    batches = [windows[i : i + AT_ONCE] for i in range(0, len(windows), AT_ONCE)]
    variants: list[tuple[str, int, Quantiser]] = [("exact", 0, lambda layer, k, v: (k, v))]
    variants += [("fp8", 0, lambda layer, k, v: (fp8(k), fp8(v)))]
    variants += [(title, n, keep) for title, keep in quantisers(means).items() for n in NEWEST]
    rows: list[dict[str, Any]] = []
    exact: list[torch.Tensor] = []
    for title, newest, keep in track(variants, "variants"):
        reader.keep, reader.newest = keep, newest
        found = [reader.hidden(batch, first) for batch in batches]
        exact = exact or found
        change, divergence = torch.tensor(_compare(reader, batches, first, exact, found)).unbind(1)
        half = 1.96 * float(change.std()) / math.sqrt(len(windows))
        mean = float(change.mean())
        interval = [math.expm1(x) for x in (mean, mean - half, mean + half)]
        rows.append(
            {"title": title, "newest": newest, "change": interval, "divergence": float(divergence.mean())}
        )
    return rows


def _compare(
    reader: Reader,
    batches: list[list[list[int]]],
    first: int,
    exact: list[torch.Tensor],
    found: list[torch.Tensor],
) -> list[tuple[float, float]]:
    """Of each window: how much larger the loss is, and KL from the exact distribution; nats a token."""
    results = []
    for batch, exact_hidden, hidden in zip(batches, exact, found, strict=True):
        for window, right, got in zip(batch, exact_hidden, hidden, strict=True):
            p, q = reader.log_probabilities(right), reader.log_probabilities(got)
            next_tokens = torch.tensor(window[first:], device=p.device)[:, None]
            loss = (p - q).gather(1, next_tokens).mean()
            results.append((float(loss), float((p.exp() * (p - q)).sum(-1).mean())))
    return results


def table(*results: dict[str, Any]) -> str:
    """Markdown: a row a way to keep K, a column a text and number of newest exact tokens."""
    counts = [(result, newest) for result in results for newest in NEWEST]
    heads = [f"{_name(result)}, {newest or 'none'} exact" for result, newest in counts]
    lines = [f"| K and V | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for title in dict.fromkeys(row["title"] for row in results[0]["variants"][1:]):
        cells = []
        for result, newest in counts:
            rows = [row for row in result["variants"] if (row["title"], row["newest"]) == (title, newest)]
            change = rows[0]["change"] if rows else None
            if change is None:
                cells.append("")
            else:
                mean, low, high = (f"{100 * x:.2f}" for x in change)
                cells.append(f"{mean} % ({low} .. {high}), {rows[0]['divergence']:.4f}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    said = "; ".join(
        f"{_name(result)}: {result['windows']} windows of {result['length']:,} tokens, {result['date']}, "
        f"commit {result['commit']}"
        for result in results
    )
    what = (
        "What else was tried, in plain PyTorch, which reads K and V as decode does "
        "(`python -m benchmarks.transforms`):"
    )
    how = f"Change of perplexity in the windows' second halves, in brackets 95 %, and KL. {said}."
    return "\n".join([what, "", *lines, "", how])


def _name(result: dict[str, Any]) -> str:
    return "the demo's model" if result["model"] == "demo" else ", ".join(result["text"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transforms", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", action="append", default=[], metavar="FILE")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--json", type=Path, default=Path("transforms.json"))
    args = parser.parse_args()
    from transformers import AutoTokenizer

    folder = args.model
    if is_demo := folder == "demo":
        from vllm_xlayer.demo import model_path

        folder = str(model_path())
    tokenizer, count = AutoTokenizer.from_pretrained(folder), args.windows + CALIBRATION
    windows = (
        text.demo_beginnings(tokenizer, count, args.length)
        if is_demo
        else text.windows_of([Path(file) for file in args.text], tokenizer, count, args.length)
    )
    reader = Reader(folder, "cuda" if torch.cuda.is_available() else "cpu")
    first = args.length // 2
    rows = measure(reader, windows, first)
    asked = {
        "model": Path(args.model).name,
        "text": [Path(file).name for file in args.text],
        "windows": args.windows,
        "length": args.length,
    }
    write(args.json, {**asked, "first": first, "variants": rows})
    grid = Table(title="Change of perplexity, as decode reads K and V")
    for column in ("K and V", "newest exact", "change", "95 % over windows", "KL"):
        grid.add_column(column, justify="left" if column == "K and V" else "right")
    for row in rows:
        mean, low, high = (f"{100 * x:+.2f} %" for x in row["change"])
        grid.add_row(row["title"], str(row["newest"]), mean, f"{low} .. {high}", f"{row['divergence']:.4f}")
    Console(width=100).print(grid)
    return 0


if __name__ == "__main__":
    sys.exit(main())

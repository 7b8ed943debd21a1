"""Trains a small model: ``python -m benchmarks.training.train --out DIR``. Minutes on one H200.

It is the demo's Llama, or with ``--architecture gpt_oss`` a gpt-oss with sinks and windows.

Writes the model as a Hugging Face folder and train.json, which says how it went. Steps, rows and
initial weights follow from --seed; sums on a GPU are not ordered, so two runs agree in what they
learn and not in the last bits. Should --minutes run out first (or the process be told to stop), the
schedule ends there: the best weights so far are written, and train.json says so.
"""

import argparse
import json
import math
import platform
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from vllm_xlayer.demo import model_path
from vllm_xlayer.demo.documents import SIZES, TASK_NAMES, TEST_SEED, prefixes

from .batches import batch
from .export import export
from .gpt_oss import GptOss, GptOssShape, sink_shares
from .llama import Llama, Shape
from .score import gaussian_noise, nvfp4_rounding, score
from .start import start_as_induction

LENGTHS = (128, 256, 512, 1280, 2560)
"""The curriculum: the next length opens when answers at the longest open one are right."""
OPEN_AT = 0.9
"""Share of answer bytes right at which the next length opens."""
CHECK_EVERY = 20
"""Steps between looks at the running accuracy (each waits for the device)."""
DEV_SEED = 4711
SINKS_TIMES = 10.0
"""How much faster sinks learn: they begin at zero, and the scores beside them are tens."""
NOISE = 0.08
"""About NVFP4's relative error on Gaussian data."""


@dataclass(frozen=True)
class Settings:
    steps: int = 8000
    minutes: float = 8.0
    seed: int = 0
    batch_bytes: int = 81920
    """Bytes a step: rows * length. A multiple of every length."""
    longest: int = LENGTHS[-1]
    learning_rate: float = 1e-3
    warmup: float = 0.03
    """Share of the schedule in which the learning rate rises."""
    weight_decay: float = 0.01
    evaluations: int = 10
    enough: float = 2.0
    """Exact match on the dev documents at which training ends; above 1: never."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


class Curriculum:
    """Draws a row length for each step; opens longer ones as the answers get right.

    Come what may, the second is open once 20 % of the schedule is over, the third at 30 % and so on.
    """

    def __init__(self, longest: int, rng: random.Random):
        self.lengths = [n for n in LENGTHS if n <= longest]
        self.open = 1
        self.rng = rng
        self.right = 0.0

    def draw(self) -> int:
        """The longest open length half of the time, each shorter one half as often as the next."""
        top = self.open - 1
        while top > 0 and self.rng.random() < 0.5:
            top -= 1
        return self.lengths[top]

    def update(self, accuracy: float, progress: float) -> bool:
        """Takes in the accuracy at the longest open length; says whether a length was opened."""
        self.right = 0.5 * self.right + 0.5 * accuracy
        if self.open < len(self.lengths) and (self.right > OPEN_AT or progress > 0.1 * (self.open + 1)):
            self.open += 1
            self.right = 0.0
            return True
        return False


def learning_rate(progress: float, warmup: float, peak: float) -> float:
    """Linear rise until progress is ``warmup``, under half a cosine to 2 % of the peak at progress 1."""
    return peak * min(1.0, progress / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


def loss_of(model: Llama, text: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the counted bytes, and the share of them that is the arg max."""
    logits = model(text[:, :-1]).float()
    targets, weight = text[:, 1:].flatten(), counted[:, 1:].flatten()
    every = F.cross_entropy(logits, targets, reduction="none")
    share = weight / weight.sum()
    return (every * share).sum(), ((logits.argmax(-1) == targets) * share).sum()


def model_of(shape: Shape) -> Llama:
    """A model of the architecture whose shape it is, with random weights."""
    return GptOss(shape) if isinstance(shape, GptOssShape) else Llama(shape)


def as_shipped(model: Llama) -> Llama:
    """A bf16 copy on the same device, not compiled: what will be loaded from the file."""
    other = model_of(model.shape).to(next(model.parameters()).device)
    other.load_state_dict(model.state_dict())
    return other.bfloat16().eval()


def dev_sizes(longest: int) -> tuple[int, ...]:
    """Prefix sizes that rows of ``longest`` bytes can train for."""
    return tuple(s for s in SIZES if s <= longest * 0.8) or (100,)


def parameter_groups(model: Llama, decay: float) -> list[dict[str, Any]]:
    sinks = [p for name, p in model.named_parameters() if name.endswith("sinks")]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for name, p in model.named_parameters() if p.ndim < 2 and not name.endswith("sinks")]
    groups = [
        {"params": matrices, "weight_decay": decay, "times": 1.0},
        {"params": vectors, "weight_decay": 0.0, "times": 1.0},
        {"params": sinks, "weight_decay": 0.0, "times": SINKS_TIMES},
    ]
    return [group for group in groups if group["params"]]


def progress_of(settings: Settings, started: float) -> Iterator[tuple[int, float]]:
    """(step, progress) until progress reaches 1.

    Progress is the share of steps done, so the schedule follows from the settings alone; unless the
    machine is too slow for --minutes: then the clock drives it. The clock starts a tenth late, which
    leaves room for compilation.
    """
    for step in range(settings.steps):
        clock = (time.monotonic() - started) / (60 * settings.minutes)
        progress = max(step / settings.steps, (clock - 0.1) / 0.9)
        if progress >= 1:
            return
        yield step, progress


def train(
    settings: Settings,
    shape: Shape,
    keep: Callable[[Llama], None] = lambda model: None,
    weights: Path | None = None,
) -> tuple[Llama, dict[str, Any]]:
    """Trains; returns the best weights (bf16) by documents of their own seed, and the run's record.

    ``keep`` gets each new best at once, so that a killed run leaves something behind.
    """
    device = torch.device(settings.device)
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    rng = random.Random(settings.seed)
    generator = torch.Generator(device).manual_seed(settings.seed + 1)
    model = model_of(shape)
    if weights is None:
        start_as_induction(model)
    else:
        model.load_state_dict(load_file(weights))
    model = model.to(device)
    cuda = device.type == "cuda"
    if cuda:
        # A compiler that fails leaves that part as plain PyTorch: slower, not wrong.
        torch._dynamo.config.suppress_errors = True
        model.compile_parts()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay), betas=(0.9, 0.98), lr=0.0, fused=cuda
    )
    curriculum = Curriculum(settings.longest, rng)
    if weights is not None:
        curriculum.open = len(curriculum.lengths)
    stop: list[int] = []
    old_handlers = {s: signal.signal(s, lambda n, _: stop.append(n)) for s in (signal.SIGTERM, signal.SIGINT)}
    best, best_score = as_shipped(model), -1.0
    history: list[dict[str, Any]] = []
    opened: list[dict[str, int]] = []
    step, evaluated, started = 0, 0, time.monotonic()
    bar = tqdm(total=settings.steps, desc="train", unit="step", mininterval=5.0, file=sys.stdout)
    try:
        for step, progress in progress_of(settings, started):
            if stop:
                break
            length = curriculum.draw()
            text, counted = batch(settings.batch_bytes // length, length, rng, generator)
            rate = learning_rate(progress, settings.warmup, settings.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["times"]
            with torch.autocast(device.type, torch.bfloat16):
                loss, accuracy = loss_of(model, text, counted)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if step % CHECK_EVERY == 0 and not bool(torch.isfinite(norm)):
                raise FloatingPointError(f"gradient norm at step {step}: expected finite, got {norm.item()}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            if step % CHECK_EVERY == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", right=f"{accuracy.item():.4f}", length=length)
                if length == curriculum.lengths[curriculum.open - 1] and curriculum.update(
                    accuracy.item(), progress
                ):
                    opened.append({"step": step, "length": curriculum.lengths[curriculum.open - 1]})
                    tqdm.write(f"step {step}: rows of {opened[-1]['length']} bytes", file=sys.stdout)
            if progress * settings.evaluations >= evaluated + 1:
                evaluated = int(progress * settings.evaluations)
                best, best_score = better(model, best, best_score, settings, history, step, loss.item())
                keep(best)
                if best_score >= settings.enough:
                    break
        if best_score < settings.enough:
            best, best_score = better(model, best, best_score, settings, history, step, loss.item())
            keep(best)
    finally:
        bar.close()
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
    seconds = time.monotonic() - started
    good = best_score >= settings.enough
    done = "all steps" if step + 1 == settings.steps else "out of time"
    ended = "stopped" if stop else "good enough" if good else done
    record = {
        "steps": step + 1, "ended": ended, "seconds": round(seconds, 1),
        "bytes": (step + 1) * settings.batch_bytes, "lengths_opened": opened, "history": history,
    }  # fmt: skip
    return best, record


def better(
    model: Llama,
    best: Llama,
    best_score: float,
    settings: Settings,
    history: list[Any],
    step: int,
    loss: float,
) -> tuple[Llama, float]:
    """Scores the model on the dev documents, notes it, and returns the better of it and the best so far."""
    candidate = as_shipped(model)
    scores = score(candidate, DEV_SEED, dev_sizes(settings.longest))
    history.append({"step": step + 1, "loss": loss, **scores})
    told = ", ".join(f"{k} {v:.3f}" for k, v in scores.items() if k != "documents")
    tqdm.write(f"step {step + 1}: loss {loss:.4f}, exact match on dev documents: {told}", file=sys.stdout)
    # Equal scores: the later weights, which have the wider margins.
    return (candidate, scores["overall"]) if scores["overall"] >= best_score else (best, best_score)


def report(model: Llama, settings: Settings, record: dict[str, Any]) -> dict[str, Any]:
    """Exact match on the shipped documents, with an exact and two damaged caches, and all that made it."""
    sizes = dev_sizes(settings.longest)
    caches = {
        "bf16_kv": None,
        "noisy_kv": gaussian_noise(NOISE, settings.seed),
        "nvfp4_kv_amax_6": nvfp4_rounding,
    }
    scores = {name: score(model, TEST_SEED, sizes, change) for name, change in caches.items()}
    scores |= {name: score(other, TEST_SEED, sizes) for name, other in model.variants().items()}
    for name, values in scores.items():
        print(f"{name:16}", "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
    cuda = settings.device.startswith("cuda")
    return {
        "exact_match": scores,
        "noisy_kv": f"Gaussian noise, {NOISE} of the r.m.s. of each K (after RoPE) and V vector",
        **({"sinks": of_sinks(model, max(sizes))} if isinstance(model, GptOss) else {}),
        "hardware": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "parameters": sum(p.numel() for p in model.parameters()),
        "architecture": model.config()["architectures"],
        "shape": asdict(model.shape),
        "settings": asdict(settings),
        **record,
    }


def of_sinks(model: GptOss, size: int) -> dict[str, Any]:
    """What each head's sink has become, and its share of attention in the shipped documents."""
    device = next(model.parameters()).device
    texts = [prefixes(task, TEST_SEED, (size,))[0]["prefix"].encode() for task in TASK_NAMES]
    shares = [sink_shares(model, torch.tensor([list(text)], device=device)) for text in texts]
    return {
        "scores": [layer.self_attn.sinks.tolist() for layer in model.sink_layers()],
        "shares": torch.tensor(shares).mean(0).tolist(),
    }


def main(arguments: list[str] | None = None) -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=model_path(), help="default: the shipped model's folder")
    parser.add_argument("--architecture", choices=("llama", "gpt_oss"), default="llama")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="end by then at the latest")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--batch-bytes", type=int, default=defaults.batch_bytes)
    parser.add_argument("--longest", type=int, choices=LENGTHS, default=defaults.longest, help="longest row")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument(
        "--enough", type=float, default=defaults.enough, metavar="SHARE",
        help="end when so many dev documents are answered (0 to 1; default: never)",
    )  # fmt: skip
    parser.add_argument("--device", default=defaults.device)
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on from the model there, all lengths open"
    )
    given = vars(parser.parse_args(arguments))
    out, resumed = given.pop("out"), given.pop("resume")
    shape = GptOssShape() if given.pop("architecture") == "gpt_oss" else Shape()
    settings = replace(defaults, **given)
    if settings.batch_bytes % settings.longest:
        parser.error(f"--batch-bytes: expected a multiple of {settings.longest}, got {settings.batch_bytes}")
    print(f"at most {settings.steps} steps and {settings.minutes} minutes on {settings.device}, to {out}")
    out.mkdir(parents=True, exist_ok=True)
    weights = None if resumed is None else resumed / "model.safetensors"
    model, record = train(settings, shape, lambda best: export(best, out), weights)
    results = report(model, settings, record)
    if resumed is not None:
        results["resumed"] = json.loads((resumed / "train.json").read_text())
    (out / "train.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()

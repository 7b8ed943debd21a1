"""Whether latent attention (DeepSeek) answers from rows as from vLLM's own layout: docs/models.md's table.

    python -m benchmarks.latents [case ...] [--at-once 6] [--minutes 5]

For each backend and dtype of a KV cache, a tiny model with latents of real width. "In rows": an engine
without a connector answers prompts, cold and cached, with VLLM_KV_CACHE_LAYOUT=BLHNC as another one did with
LBHNC, in equal tokens and logprobs, whatever unused memory holds. "Restored": with XLayerConnector a prompt
is answered from the host tier as from the device's cache. XLayerConnector refuses backends that are not in
`compat.rows.LATENTS_COMPARED`; here it takes each, so that whoever adds one there has seen it compared. Each
question has a process of its own: after a failed assertion on the device nothing runs in the same one.
Results go to results/cpu-latents.json, or gpu-latents.json.
"""

import argparse
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_xlayer.provenance import rows_of, stamped, write

from . import RESULTS, serving
from .cases import try_all
from .model_configs import configs

RESULT = {False: RESULTS / "cpu-latents.json", True: RESULTS / "gpu-latents.json"}
"""By whether there is a GPU."""
MODEL = "deepseek_v2"
BLOCK = 64
"""Tokens of a block, which each backend takes; FlashMLA takes no other."""
LENGTHS = (1, 63, 64, 65, 130, 300, 700)
LAYOUT_VARIABLE = "VLLM_KV_CACHE_LAYOUT"


@dataclass(frozen=True)
class Case:
    """A backend of vLLM's, None for the platform's choice, and the dtype of the KV cache."""

    backend: str | None
    dtype: str

    @property
    def label(self) -> str:
        return f"{self.backend or 'the platform'}, {self.dtype}"

    def settings(self, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        """Saves the model in a folder; what LLM() is told of it."""
        from hybrid_fixture import save_hybrid_config

        save_hybrid_config(config, folder / "model")
        named = {} if self.backend is None else {"attention_config": {"backend": self.backend}}
        return dict(
            model=str(folder / "model"), dtype=config["dtype"], kv_cache_dtype=self.dtype, block_size=BLOCK,
            **named,
        )  # fmt: skip


def cases(gpu: bool) -> dict[str, Case]:
    """Those that vLLM lists for compute capability 9.0, whether or not it takes them."""
    if not gpu:
        return {"cpu_mla": Case(None, "auto")}
    pairs = (
        ("FLASH_ATTN_MLA", "auto"), ("FLASHMLA", "auto"), ("FLASHMLA", "fp8"), ("FLASHINFER_MLA", "auto"),
        ("TRITON_MLA", "auto"), ("TRITON_MLA", "fp8"),
    )  # fmt: skip
    return {f"{backend}-{dtype}".lower(): Case(backend, dtype) for backend, dtype in pairs}


def rows_as_own_layout(settings: dict[str, Any]) -> str:
    """Whether an engine answers from rows as from vLLM's own layout, each without a connector."""
    expected: list[serving.Answer] = []
    for layout in ("LBHNC", "BLHNC"):
        os.environ[LAYOUT_VARIABLE] = layout
        try:
            with serving.started(settings) as llm:
                _check_layout(llm, layout)
                backend = _backend_of(llm)
                for byte in serving.POISONS:
                    serving.empty(llm, byte)
                    found = [answer for n in LENGTHS for answer in _cold_and_cached(llm, n)]
                    expected = expected or found
                    if found != expected:
                        told = f"{layout} with {byte:#x} in unused memory"
                        return f"WRONG: {backend} answers from {told} {found}, first {expected}"
        except Exception as error:
            traceback.print_exc()
            cell = serving.cell_of(error)
            return cell if cell.startswith("refused") else f"{cell}, in layout {layout}"
        finally:
            del os.environ[LAYOUT_VARIABLE]
    return f"equal ({backend}, {len(LENGTHS)} prompts, cold and cached)"


def _cold_and_cached(llm: Any, tokens: int) -> list[serving.Answer]:
    prompt = serving.prompt_of(tokens)
    cold = serving.answer_to(llm, prompt)
    if any(logprob != logprob for logprob in cold[1]):
        raise serving.Finding(f"WRONG: a cold prompt of {tokens} tokens has no number as logprob: {cold}")
    cached = [serving.cached_answer(llm, prompt)] if tokens > BLOCK else []
    return [cold, *cached]


def _check_layout(llm: Any, layout: str) -> None:
    from vllm_xlayer.compat.engine import core_of

    resolved = core_of(llm).scheduler.kv_cache_config.kv_cache_layout
    if resolved != layout:
        raise serving.Finding(f"not compared: vLLM resolved layout {resolved} where {layout} was set")


def _backend_of(llm: Any) -> str:
    from vllm_xlayer.compat import rows

    (backend,) = rows.backends_of(llm.llm_engine.vllm_config)
    return backend.get_name()


def restored_as_cached(settings: dict[str, Any]) -> str:
    """Whether XLayerConnector restores latents, of whichever backend."""
    from vllm_xlayer.compat import rows

    backend = settings.get("attention_config", {}).get("backend")
    rows.LATENTS_COMPARED = (*rows.LATENTS_COMPARED, *filter(None, [backend]))
    try:
        with serving.started(settings | serving.CONNECTOR) as llm:
            prompt = serving.prompt_of()
            cached = serving.cached_answer(llm, prompt)
            serving.check_restored(llm, prompt, cached)
            serving.check_power(llm, prompt, cached)
            return "equal"
    except Exception as error:
        traceback.print_exc()
        return serving.cell_of(error)


QUESTIONS = {"in rows": rows_as_own_layout, "restored": restored_as_cached}
FOUND = "found"


@dataclass(frozen=True)
class Trial:
    """A question of a case, for a process of its own."""

    case: Case
    question: str


def try_trial(trial: Trial, answers: Connection) -> None:
    """In a process of its own: sends (FOUND, what was found)."""
    import torch

    serving.prepare()
    with tempfile.TemporaryDirectory() as folder:
        settings = trial.case.settings(Path(folder), configs(torch.cuda.is_available())[MODEL])
        answers.send((FOUND, QUESTIONS[trial.question](settings)))


def main() -> int:
    """Returns 1 if an answer was wrong."""
    import torch

    gpu = torch.cuda.is_available()
    known = cases(gpu)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latents",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="case", help=f"some of {', '.join(known)}")
    parser.add_argument("--seconds", type=float, default=240, help="limit for a question (default: 240)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="limit for all (default: none)")
    parser.add_argument("--at-once", type=int, default=1, help="questions at a time (default: 1)")
    parser.add_argument("--json", type=Path, default=RESULT[gpu], help="file to write (default: %(default)s)")
    parser.add_argument("--logs", type=Path, help="folder for what each question's process writes")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(known):
        parser.error(f"expected cases of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if args.logs:
        os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # an error of a kernel is raised where it was launched
    results = rows_of(args.json, "cases")
    trials = {
        f"{name}.{question.replace(' ', '_')}": (name, question)
        for name in args.cases or known
        for question in QUESTIONS
    }

    new: dict[str, dict[str, str]] = {}

    def finished(trial: str, found: dict[str, str]) -> None:
        name, question = trials[trial]
        row = new.get(name, {"case": known[name].label} | dict.fromkeys(QUESTIONS, "not tried"))
        results[name] = new[name] = stamped(row | {question: found[FOUND]})
        write(args.json, {"cases": {name: results[name] for name in known if name in results}})

    with tempfile.TemporaryDirectory() as folder:
        try_all(
            {trial: Trial(known[name], question) for trial, (name, question) in trials.items()},
            try_trial, [FOUND], finished,
            seconds=args.seconds, at_once=args.at_once, total_seconds=60 * args.minutes,
            logs=args.logs or Path(folder),
        )  # fmt: skip
    return int(any("WRONG" in answer for found in results.values() for answer in found.values()))


if __name__ == "__main__":
    sys.exit(main())

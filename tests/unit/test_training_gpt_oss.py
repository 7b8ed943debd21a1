"""The small gpt-oss: its attention, its training, and the text that is read with it."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks import RESULTS, sinks
from benchmarks.training import train as training
from benchmarks.training.gpt_oss import GptOss, GptOssShape, attend, sink_shares
from benchmarks.training.train import Settings, main
from vllm_xlayer.demo.documents import HELD_OUT, KEYS, QUERIES, TASK_NAMES

SMALL = GptOssShape(layers=2, hidden=64, heads=8, kv_heads=1, head_size=64, mlp=64, window=32)


@pytest.fixture(autouse=True)
def one_thread():
    """The model is too small to share among threads, which on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_definition(q, k, v, sinks, window):
    """Softmax over the scores that a query sees and one more, the sink's, of which nothing comes."""
    length = q.shape[2]
    scores = q @ k.mT / q.shape[-1] ** 0.5
    back = torch.arange(length)[:, None] - torch.arange(length)
    seen = (back >= 0) & (back < (window or length))
    scores = scores.masked_fill(~seen, -torch.inf)
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("window", [None, 8, 16])
@pytest.mark.parametrize("length", [1, 8, 9, 43])
def test_attention_and_its_gradients_are_those_of_the_definition(window, length):
    g = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 4, length, 16, generator=g, requires_grad=True) for _ in range(3)]
    given.append(torch.randn(4, generator=g).mul(2).requires_grad_())
    weights = torch.randn(2, 4, length, 16, generator=g)
    results = []
    for function in (attend, by_definition):
        out = function(*given, window)
        results.append((out, *torch.autograd.grad((out * weights).sum(), given)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_shares_of_sinks() -> None:
    model = GptOss(SMALL)
    ids = torch.randint(256, (1, 50))
    for value, share in ((-1e4, 0.0), (1e4, 1.0)):
        for layer in model.model.decoder_layers():
            torch.nn.init.constant_(layer.self_attn.sinks, value)
        shares = torch.tensor(sink_shares(model, ids))
        assert shares.shape == (SMALL.layers, SMALL.heads)
        torch.testing.assert_close(shares, torch.full_like(shares, share))


def test_training_moves_every_parameter() -> None:
    torch.manual_seed(0)
    settings = Settings(
        steps=3, batch_bytes=512, longest=128, evaluations=1, device="cpu", learning_rate=0.03
    )
    begun = training.model_of(SMALL)
    torch.manual_seed(settings.seed)
    training.start_as_induction(begun)
    model, record = training.train(settings, SMALL)
    groups = training.parameter_groups(model, 0.01)
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(
        p.numel() for p in model.parameters()
    )
    before = begun.bfloat16().state_dict()
    # Weights of experts that were not chosen, or rows of bytes that did not come, stay; whole tensors do not.
    assert [name for name, p in model.state_dict().items() if torch.equal(p, before[name])] == []
    assert record["ended"] == "all steps"


def test_training_ends_when_it_is_good_enough() -> None:
    settings = Settings(steps=9, batch_bytes=512, longest=128, evaluations=3, device="cpu", enough=0.0)
    _, record = training.train(settings, SMALL)
    assert record["ended"] == "good enough" and record["steps"] < 9 and len(record["history"]) == 1


def test_training_writes_what_the_measurement_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(training, "GptOssShape", lambda: SMALL)
    monkeypatch.setattr(training, "model_of", GptOss)
    monkeypatch.setattr(training, "score", lambda model, *_: {"overall": float(model.shape is SMALL)})
    arguments = f"--architecture gpt_oss --out {tmp_path} --steps 2 --batch-bytes 512 --longest 128"
    main(f"{arguments} --device cpu --minutes 1".split())
    record = json.loads((tmp_path / "train.json").read_text())
    assert {"without_sinks", "without_windows", "bf16_kv"} < set(record["exact_match"])
    assert torch.tensor(record["sinks"]["shares"]).shape == (SMALL.layers, SMALL.heads)
    assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == ["GptOssForCausalLM"]


@pytest.mark.parametrize("task", TASK_NAMES)
def test_text_is_held_out_and_answered_from_its_table(task: str) -> None:
    text = sinks.document(task, 3, 2048)
    table, _, asked = text.partition(QUERIES)
    assert len(text) == 2048 and 700 < len(table) < 1200
    lines = table.splitlines()[1:]
    keys = [line[:3] for line in lines]
    numbers = [sum((ord(c) - 97) * 26**i for i, c in enumerate(reversed(key))) for key in keys]
    assert all(number % HELD_OUT == 0 and number < KEYS for number in numbers)
    if task == "trace":
        after = dict(line.split(">") for line in lines)
        for question in asked.splitlines()[:-1]:
            names = question.split(">")
            assert len(names) == 5 and all(after[a] == b for a, b in pairwise(names))
    else:
        assert set(asked.splitlines()[:-1]) <= set(lines)
    assert sinks.text(4, 2048)[3 * 2048 :].startswith(sinks.text(1, 64)[:2]), "tasks in turn"


@pytest.fixture
def results() -> dict:
    """As `benchmarks.sinks` writes them; what the quality command found is another model's."""
    scores = {"recall": 1.0, "copy": 1.0, "trace": 1.0, "documents": 288}
    overall = {"bf16_kv": 0.99, "noisy_kv": 0.9, "without_sinks": 0.25, "without_windows": 0.5}
    training = {
        "exact_match": {name: scores | {"overall": value} for name, value in overall.items()},
        "sinks": {"scores": [[0.0, 1.0]], "shares": [[0.1, 0.5]]},
        "parameters": 5_500_000, "seconds": 84.2, "hardware": "NVIDIA H200",
        "shape": {"layers": 4, "heads": 16, "kv_heads": 2, "head_size": 64, "experts": 4},
    }  # fmt: skip
    rows = [
        {
            "title": title,
            "scores": {f"xlayer_{task}": {"exact_match": x} for task in TASK_NAMES},
            "same": same,
        }
        for title, x, same in ((sinks.REFERENCE, 1.0, 288), (sinks.CACHES[2], 0.5, 140))
    ]
    quality = json.loads((RESULTS / "h200-quality.json").read_text())
    return quality | {"tasks": rows, "documents": 96, "training": training}


def test_section(results: dict) -> None:
    text = sinks.section(results)
    assert text.startswith("## ")
    text = " ".join(text.split())
    assert "| NVFP4, pages alone | 50.0 % (40.2 .. 59.8) |" in text and "| 140 of 288 |" in text
    assert "| 16 bits | 100.0 % (96.2 .. 100.0) |" in text
    assert "| fp8 | +" in text, "what the quality command found"
    assert "30 % goes to sinks (50 % in the head" in text
    assert "99.0 % of the held-out documents, with its sinks taken away 25.0 %, with its windows" in text

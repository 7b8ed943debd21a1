"""The small model's arithmetic, its export, how it is scored and how it is trained."""

import json
import random
from pathlib import Path

import pytest
import torch

from benchmarks.training import train as training
from benchmarks.training.batches import PAD_ID
from benchmarks.training.export import END_ID, export
from benchmarks.training.gpt_oss import GptOssShape
from benchmarks.training.llama import Llama, Shape
from benchmarks.training.score import _rows, exact_match, gaussian_noise, nvfp4_rounding, score
from benchmarks.training.train import Curriculum, Settings, learning_rate, main
from vllm_xlayer.demo.documents import Prefix, prefixes

SMALL = Shape(layers=2, hidden=64, heads=4, kv_heads=2, head_size=32, mlp=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = Llama(SMALL)
    for p in model.parameters():
        # Norm weights other than one, or a misplaced one would not show.
        p.data += 0.2 * torch.randn_like(p) if p.ndim == 1 else 0
    path = tmp_path_factory.mktemp("model")
    export(model, path)
    return path


def loaded(folder: Path, dtype: torch.dtype) -> tuple[Llama, torch.nn.Module]:
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    ours = Llama(SMALL)
    ours.load_state_dict(safetensors.load_file(folder / "model.safetensors"))
    return ours.to(dtype).eval(), theirs.eval()


def test_logits_equal_those_of_transformers(folder: Path) -> None:
    ours, theirs = loaded(folder, torch.float32)
    ids = torch.randint(256, (2, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        got = ours(ids).view(expected.shape)
    # float32 sums in another order: a few hundred terms of rounding 2^-24 relative to logits of about 1.
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-5 * expected.abs().max().item())


def test_config_survives_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (2, 32, 320)
    assert config.rope_parameters["rope_theta"] == SMALL.rope_theta
    assert config.dtype == torch.bfloat16


def test_tokenizer_is_one_token_a_byte(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "R\nkqz=4821\n?\n" + "".join(map(chr, range(1, 0x250))) + " \t  €𝄞"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END_ID, PAD_ID)
    assert tokenizer.decode([97, END_ID, PAD_ID], skip_special_tokens=True) == "a"
    messages = [{"role": "user", "content": "R\nabc="}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "R\nabc="


@pytest.fixture(scope="module")
def half_taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Prefix]:
    """A model that knows half of a prefix's answers by heart, and that prefix."""
    torch.manual_seed(0)
    group = prefixes("recall", seed=1, sizes=(100,))[0]
    model = Llama(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text, counted = _rows({**group, "questions": group["questions"][::2]}, torch.device("cpu"))
    for _ in range(60):
        loss, _ = training.loss_of(model, text, counted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("half")
    export(model, path)
    return path, group


def test_score_agrees_with_greedy_decoding(half_taught: tuple[Path, Prefix]) -> None:
    path, group = half_taught
    ours, theirs = loaded(path, torch.float32)
    decoded = []
    for question, answer in group["questions"]:
        ids = torch.tensor([list((group["prefix"] + question).encode())])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        decoded.append(bytes(i % 256 for i in out[0, ids.shape[1] :].tolist()) == (answer + "\n").encode())
    assert exact_match(ours, [group]) == decoded
    assert 0 < sum(decoded) < len(decoded), "the model should know some answers and not others"


def test_damage_reaches_keys_and_values(half_taught: tuple[Path, Prefix]) -> None:
    path, group = half_taught
    ours, _ = loaded(path, torch.float32)
    ids = _rows(group, torch.device("cpu"))[0][:, :-1]
    with torch.no_grad():
        plain = ours(ids)
        assert torch.equal(ours(ids, lambda k: k, lambda v: v), plain)
        for changes in ((gaussian_noise(0.5, 1), None), (None, gaussian_noise(0.5, 1))):
            assert not torch.allclose(ours(ids, *changes), plain, atol=1e-3)
    assert not any(exact_match(ours, [group], torch.zeros_like))


def test_gaussian_noise_has_the_size_asked_for() -> None:
    x = (
        torch.randn(4, 2, 100, 128, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-3, 30.0])[:, None, None]
    )
    error = (gaussian_noise(0.08, 7)(x) - x).square().mean((0, 2, 3)).sqrt()
    # 102,400 samples a head: the estimate's own relative error is 1 / sqrt(2 * 51200) = 0.3 %.
    torch.testing.assert_close(error, 0.08 * x.square().mean((0, 2, 3)).sqrt(), rtol=0.02, atol=0)


def test_nvfp4_rounding_keeps_what_it_can_write() -> None:
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    exact = torch.cat([codes, -codes]) * 0.25
    assert torch.equal(nvfp4_rounding(exact), exact)
    # 2.4 -> 2, 2.6 -> 3, 5.1 -> 6, ties to the even code: 0.25 -> 0, 2.5 -> 2, 5 -> 4.
    x = torch.tensor([2.4, 2.6, 5.1, 0.25, 2.5, 5.0, -2.4, 6.0] + [0.0] * 8)
    assert nvfp4_rounding(x).tolist()[:8] == [2.0, 3.0, 6.0, 0.0, 2.0, 4.0, -2.0, 6.0]
    assert torch.equal(nvfp4_rounding(torch.zeros(2, 32)), torch.zeros(2, 32))
    noise = torch.randn(1000, 128, generator=torch.Generator().manual_seed(0))
    error = (nvfp4_rounding(noise) - noise).norm() / noise.norm()
    assert 0.08 < error < 0.12


def test_curriculum_opens_lengths_on_accuracy_or_in_time() -> None:
    curriculum = Curriculum(512, random.Random(0))
    assert {curriculum.draw() for _ in range(50)} == {128}
    assert not curriculum.update(0.5, 0.1)
    for _ in range(10):
        opened = curriculum.update(1.0, 0.1)
        if opened:
            break
    assert opened and {curriculum.draw() for _ in range(50)} == {128, 256}
    assert not curriculum.update(0.0, 0.29)
    assert curriculum.update(0.0, 0.31), "30 % of the time is up"
    assert not curriculum.update(1.0, 0.6) and not curriculum.update(1.0, 0.6), "512 is the longest"
    drawn = [curriculum.draw() for _ in range(400)]
    assert 150 < drawn.count(512) < 250


def test_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step / 100, 0.1, 1e-3) for step in range(101)]
    assert rates[0] == 0 and rates[100] == pytest.approx(2e-5)
    assert max(rates) == rates[10] and rates[5] == pytest.approx(5e-4, rel=0.02)


def test_training_writes_a_model_that_transformers_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(training, "Shape", lambda: SMALL)
    main(f"--out {tmp_path} --steps 3 --batch-bytes 512 --longest 128 --device cpu --minutes 1".split())
    record = json.loads((tmp_path / "train.json").read_text())
    assert record["steps"] == 3 and record["ended"] == "all steps"
    assert set(record["exact_match"]) == {"bf16_kv", "noisy_kv", "nvfp4_kv_amax_6"}
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == record["parameters"]
    )


@pytest.fixture
def one_thread():
    """Sums in one order: how many threads share one can change from call to call on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training_learns_and_follows_from_its_seed(one_thread: None) -> None:
    settings = Settings(
        steps=30, batch_bytes=512, longest=128, evaluations=1, device="cpu", learning_rate=3e-3
    )
    one, first = training.train(settings, SMALL)
    two, second = training.train(settings, SMALL)
    assert first["history"] == second["history"]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    # Untrained, the loss is about ln(320) = 5.8; telling digits and letters apart brings it below 4.
    assert first["history"][-1]["loss"] < 4


def test_training_ends_in_time_and_says_so() -> None:
    settings = Settings(steps=10**6, minutes=0.05, batch_bytes=512, longest=128, evaluations=1, device="cpu")
    _, record = training.train(settings, SMALL)
    assert record["ended"] == "out of time" and record["steps"] < 10**5


def test_training_keeps_the_best_while_it_runs() -> None:
    settings = Settings(steps=4, batch_bytes=512, longest=128, evaluations=2, device="cpu")
    kept: list[Llama] = []
    best, record = training.train(settings, SMALL, kept.append)
    assert len(kept) == len(record["history"]) >= 2
    assert kept[-1] is best and kept[0] is not best, "equal scores: the later weights"


def test_batch_bytes_must_fit_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--batch-bytes", "1000", "--longest", "128"])
    assert "expected a multiple of 128, got 1000" in capsys.readouterr().err


def test_scores_count_every_document() -> None:
    scores = score(Llama(SMALL), seed=1, sizes=(100, 200))
    assert scores["documents"] == 3 * 2 * 8
    assert scores["overall"] == 0


@pytest.mark.parametrize(("shape", "looking"), [(Shape(), 8), (GptOssShape(), 5)], ids=["llama", "gpt-oss"])
def test_training_starts_with_heads_that_look_back(shape: Shape, looking: int) -> None:
    """Head h of layer 0 attends h + 1 bytes back, also through an NVFP4 cache."""
    from benchmarks.training.start import start_as_induction

    torch.manual_seed(0)
    model = training.model_of(shape)
    start_as_induction(model)
    ids = torch.randint(97, 123, (40,))
    layer = next(model.model.decoder_layers())
    with torch.no_grad():
        q, k, _ = layer.before(model.model.embed_tokens(ids), model.cos[:40, None], model.sin[:40, None])
    for change in (lambda x: x, nvfp4_rounding):
        for head in range(looking):
            keys = change(k[:, head * shape.kv_heads // shape.heads])
            weights = ((q[30:, head] @ keys.T) / shape.head_size**0.5).tril(30).softmax(-1)
            looks = weights[torch.arange(10), torch.arange(10) + 30 - (head + 1)]
            assert looks.min() > 0.8

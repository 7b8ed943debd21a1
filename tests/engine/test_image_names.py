"""Images whose names do not say what they are: the disk tier, which outlives the names, is not for them."""

import pytest
import torch
from disk_fixture import connector, entries
from faults import TALLY, core_of, greedy, live_connector, manager_of, settle
from model_fixture import IMAGE_TOKEN, llava_config, random_prompts, save_image_processor, save_random_model
from PIL import Image
from safetensors.torch import load_file, save_file
from test_sessions import talk

pytestmark = pytest.mark.fault("images named by a counter")

NUM_TOKENS = 8
BEFORE, AFTER = random_prompts([5, 40], seed=1)
BY_COUNTER = dict(enable_prefix_caching=False, mm_processor_cache_gb=0)
COUNTS = "not stored: items not named by content"


def register_llava(patch):
    """vLLM 0.26's LLaVA, also with a transformers that is newer than it expects."""
    from transformers import LlavaProcessor
    from transformers.models.pixtral import modeling_pixtral

    for name in ("PixtralRotaryEmbedding", "position_ids_in_meshgrid"):  # imported, not used
        if not hasattr(modeling_pixtral, name):
            patch.setattr(modeling_pixtral, name, None, raising=False)
    # vLLM has the text processed without its images.
    patch.setattr(LlavaProcessor, "validate_inputs", lambda *_, **__: None)
    from vllm import ModelRegistry
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    ModelRegistry.register_model("LlavaForConditionalGeneration", LlavaForConditionalGeneration)


def name_vision_weights(path):
    """As vLLM 0.26 expects them; later transformers save them under shorter names."""
    weights = load_file(path)
    old, new = "vision_tower.", "vision_tower.vision_model."
    save_file({k if new in k else k.replace(old, new): v for k, v in weights.items()}, path)


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory):
    folder = save_random_model(llava_config(), tmp_path_factory.mktemp("tiny_llava"))
    save_image_processor(folder)
    name_vision_weights(folder / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        register_llava(patch)
        yield folder


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randint(0, 256, (56, 56, 3), generator=generator, dtype=torch.uint8) for _ in range(3)]
    return [Image.fromarray(p.numpy()) for p in pixels]


def start(make_llm, model, folder=None, **settings):
    settings |= dict(skip_tokenizer_init=False, limit_mm_per_prompt={"image": 1})
    if folder is not None:
        settings |= dict(kv_transfer_config=connector(folder))
    llm = make_llm(model, **settings)
    if folder is not None:
        live_connector().pool.fill_(0xFF)
    return llm


def answers_to(llm, images, names=()):
    """(tokens, tokens found in a tier) for each image, one request after the other."""
    found = []
    for i, image in enumerate(images):
        prompt = {
            "prompt_token_ids": [*BEFORE, IMAGE_TOKEN, *AFTER],
            "multi_modal_data": {"image": image},
        }
        if names:
            prompt["multi_modal_uuids"] = {"image": names[i]}
        (output,) = llm.generate([prompt], greedy(NUM_TOKENS), use_tqdm=False)
        found.append((list(output.outputs[0].token_ids), output.num_cached_tokens))
    return [tokens for tokens, _ in found], [cached for _, cached in found]


@pytest.fixture(scope="module")
def answers(make_llm, tiny_llava, images):
    found, _ = answers_to(start(make_llm, tiny_llava), images)
    assert len({tuple(a) for a in found}) == len(images), "a model that sees no image tests no names"
    return found


def compare(llm, got, expected):
    settle(llm)
    TALLY["tries"] += len(got)
    TALLY["requests"] += len(got)
    TALLY["wrong"] += sum(a != b for a, b in zip(got, expected, strict=True))
    assert got == expected


def test_named_by_a_counter(make_llm, tiny_llava, images, answers, tmp_path, caplog_vllm):
    """The second engine counts other images with the same numbers."""
    for order in ([0, 1, 2], [2, 0, 1]):
        llm = start(make_llm, tiny_llava, tmp_path, **BY_COUNTER)
        got, cached = answers_to(llm, [images[i] for i in order])
        compare(llm, got, [answers[i] for i in order])
        assert manager_of(llm).disk.counts[COUNTS] > 0 and cached == [0] * 3
        core_of(llm).shutdown()
    assert not entries(tmp_path)
    assert caplog_vllm.text.count("do not use the disk tier") == 2  # once an engine


def test_named_by_content_or_by_the_user(make_llm, tiny_llava, images, answers, tmp_path):
    llm = start(make_llm, tiny_llava, tmp_path)
    got, _ = answers_to(llm, images)
    compare(llm, got, answers)
    stored = len(entries(tmp_path))
    assert stored > 0 and not manager_of(llm).disk.counts[COUNTS]
    names = ["one", "two", 64 * "0"]  # the last one looks like a hash
    got, _ = answers_to(llm, images, names)
    compare(llm, got, answers)
    core_of(llm).shutdown()
    assert len(entries(tmp_path)) == stored

    llm = start(make_llm, tiny_llava, tmp_path)
    got, cached = answers_to(llm, images[::-1])
    compare(llm, got, answers[::-1])
    assert all(cached), "images named by content come from the disk"
    got, _ = answers_to(llm, images[::-1], names)  # other images of the same names
    compare(llm, got, answers[::-1])
    assert manager_of(llm).disk.counts[COUNTS] > 0


def test_that_comes_in_a_later_turn_of_a_session(make_llm, tiny_llava, images, tmp_path):
    llm = start(make_llm, tiny_llava, tmp_path)
    (first,) = random_prompts([16], seed=2)
    image = {"prompt_token_ids": [*BEFORE, IMAGE_TOKEN, *AFTER], "multi_modal_data": {"image": images[0]}}
    turns = [{"prompt_token_ids": first}, image | {"multi_modal_uuids": {"image": "the user's name"}}]
    talk(llm, turns, 2)
    assert len(entries(tmp_path)) <= 1, "only the first turn is known by its content"
    assert manager_of(llm).disk.counts[COUNTS] > 0
    core_of(llm).shutdown()
    llm = start(make_llm, tiny_llava, tmp_path)
    talk(llm, [{"prompt_token_ids": first}, image], 2)
    assert len(entries(tmp_path)) > 1, "all are"

"""Names of multimodal items: which are said to be hashes of the item, in engines with a disk tier only."""

import uuid
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from PIL import Image
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_xlayer.connector.item_names import is_by_content
from vllm_xlayer.patches.item_names import Names, mark_names, tell_names_apart

HASH = 64 * "a"


def image(colour=0, name=None):
    made = Image.new("RGB", (4, 4), (colour, 0, 0))
    if name is not None:
        made.getexif()[Image.ExifTags.Base.ImageID] = name
    return made


def names(images, given=None, original=lambda *_: {"image": [HASH] * 2}):
    """The names of two images, where vLLM gives both of them the same."""
    items = MultiModalDataItems({"image": ImageProcessorItems(images)})
    inputs = ProcessorInputs([1], items, Names(given or {}))
    return tell_names_apart(original, inputs, "model")["image"]


@pytest.mark.parametrize("given", [None, {"image": [None, None]}])
def test_by_content(given):
    assert is_by_content(names([image(1), image(2)], given))


def test_what_the_user_or_a_counter_names():
    """Also if vLLM hashed the name, with arguments of the processor."""
    first, second = names([image(1), image(2)], {"image": [None, "renderer0-mm-1-image-0"]})
    assert is_by_content([first]) and not is_by_content([second])


@pytest.mark.parametrize(
    "name", ["content-", f"content-{HASH}", f"named-{HASH}", HASH, "", "content-" + 64 * "g"]
)
def test_a_name_cannot_pretend(name):
    """Whatever a user's text is, it is not taken for a hash; and no hash is where the patch is missing."""
    marked = names([image(), image()], {"image": [name, name]}, lambda *_: {"image": [name, name]})
    assert not is_by_content(marked[:1]) and not is_by_content([HASH])


def test_images_of_one_name_are_told_apart_by_their_pixels():
    own = uuid.uuid4()
    first, second = names([image(1, own), image(2, own)])
    assert first != second and is_by_content([first, second])
    assert names([image(1), image(1)])[0] == names([image(1), image(1)])[1]


def test_text_has_nothing_to_name():
    assert is_by_content([])


@pytest.mark.parametrize(
    ("extra", "marked"),
    [
        ({"disk_path": "/d"}, True),
        ({"connectors": [{"kv_connector_extra_config": {"disk_path": "/d"}}]}, True),
        ({}, False),
        (None, False),
    ],
)
def test_only_where_there_is_a_disk_tier(extra, marked):
    transfer = None if extra is None else SimpleNamespace(kv_connector_extra_config=extra)
    renderer = SimpleNamespace(config=SimpleNamespace(kv_transfer_config=transfer))
    found = mark_names(lambda *_: {"image": ["x"]}, renderer, {}, {}, {}, "id")
    assert isinstance(found, Names) is marked and found == {"image": ["x"]}
    inputs = SimpleNamespace(mm_uuid_items={"image": ["x"]})
    assert tell_names_apart(lambda *_: {"image": ["x"]}, inputs, "model") == {"image": ["x"]}

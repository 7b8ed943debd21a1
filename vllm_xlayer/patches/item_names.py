"""Names of images, audio and video: which of them say what the item is, for keys that outlive the engine.

A multimodal item is in the keys of its blocks by a name. It may be a hash of the item, a name that the user
gave it, a count of requests (with prefix caching and processor cache off), or a hash of one of those two. The
scheduler cannot tell them apart, so here the names are told apart where they are made: in the front end.
"""

import hashlib
from typing import Any

from ..compat.dependence import Patch
from ..connector.item_names import BY_CONTENT, OTHER
from .wrapping import wrap

FEATURE = "disk tier for multimodal items"


class Names(dict):
    """Names given to a prompt's items, modality -> names, where hashes are to be told from other names."""


def mark_names(original, renderer, *args, **kwargs):
    """What the original returns, as Names if the engine has a disk tier."""
    names = original(renderer, *args, **kwargs)
    return Names(names) if _asks_for_disk(renderer.config) else names


def tell_names_apart(original, inputs, *args, **kwargs):
    """The original's names, marked by content or not."""
    names = original(inputs, *args, **kwargs)
    given = inputs.mm_uuid_items
    if not isinstance(given, Names):
        return names
    marked = {}
    for modality, of_modality in names.items():
        items = inputs.mm_data_items[modality].get_all_items_for_hash()
        theirs = given.get(modality) or [None] * len(items)
        marked[modality] = [
            BY_CONTENT + name + _pixels(item) if own is None else OTHER + name
            for name, own, item in zip(of_modality, theirs, items, strict=True)
        ]
    return marked


def _pixels(item: object) -> str:
    """ "." and a digest of an image as the model gets it; empty for all else.

    vLLM takes an image's name from an id in its EXIF data where there is one.
    """
    from PIL.Image import Image

    image = getattr(item, "media", item)
    if not isinstance(image, Image):
        return ""
    what = repr((image.mode, image.size, image.getpalette())).encode()
    return "." + hashlib.sha256(what + image.tobytes()).hexdigest()


def _asks_for_disk(vllm_config: Any) -> bool:
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return False
    extra = transfer.kv_connector_extra_config
    children = [child.get("kv_connector_extra_config") or {} for child in extra.get("connectors", ())]
    return any("disk_path" in settings for settings in (extra, *children))


def _apply_renderer() -> None:
    from vllm.renderers.base import BaseRenderer

    wrap(BaseRenderer, "_process_mm_uuids", mark_names, "vllm")


def _apply_inputs() -> None:
    from vllm.multimodal.processing.inputs import ProcessorInputs

    wrap(ProcessorInputs, "get_mm_hashes", tell_names_apart, "vllm")


_WHY = "requests with images, audio or video do not use the disk tier"
_REMOVE_WHEN = "a request's multimodal features say whether their names are hashes of their content"

PATCHES = (
    Patch(
        feature=FEATURE,
        owner="vllm.renderers.base:BaseRenderer",
        why=_WHY,
        how="marks the names given to items by users and by vLLM as such, in engines with a disk tier",
        remove_when=_REMOVE_WHEN,
        methods={"_process_mm_uuids": "self mm_data mm_data_items mm_uuid_items mm_req_id"},
        apply=_apply_renderer,
    ),
    Patch(
        feature=FEATURE,
        owner="vllm.multimodal.processing.inputs:ProcessorInputs",
        why=_WHY,
        how="puts before the name of each item whether it is a hash of the item, in engines with a disk tier",
        remove_when=_REMOVE_WHEN,
        methods={"get_mm_hashes": "self model_id"},
        attributes=("mm_data_items", "mm_uuid_items"),
        apply=_apply_inputs,
    ),
)

"""How the name of an image, audio or video says whether it is a hash of the item.

The names are made by a patch (patches/item_names.py), which knows; the connector only reads them.
"""

import re
from collections.abc import Iterable

BY_CONTENT, OTHER = "content-", "named-"
"""What a name begins with that is a hash of the item, and one that somebody gave it."""

_CONTENT_NAME = re.compile(BY_CONTENT + r"[0-9a-f]{64,}(\.[0-9a-f]{64})?")


def is_by_content(names: Iterable[str]) -> bool:
    """Whether every name says what its item is, for certain: only names made under the patch do."""
    return all(_CONTENT_NAME.fullmatch(name) for name in names)

"""What shapes.h says of head sizes, query tokens and groups is what Python, the tests and the docs say."""

from pathlib import Path

import pytest
from reference.attention_cases import HEAD_SIZES

from vllm_xlayer import nvfp4, ops
from vllm_xlayer.attention.backend import NVFP4Backend
from vllm_xlayer.attention.decode import limits

# The source tree's: the installed package has no docs beside it.
ROOT = Path(__file__).parents[2]


def published() -> dict[str, object]:
    return ops.build_info()["decode"]


def listed(last: str) -> str:
    *others, largest = map(str, limits().head_sizes)
    return f"{', '.join(others)}{last}{largest}"


def test_head_sizes():
    assert [*limits().head_sizes] == HEAD_SIZES
    assert published()["max_head_size"] == nvfp4.MAX_HEAD_SIZE >= max(HEAD_SIZES)


def test_the_backend_serves_what_the_ops_do():
    most = published()["max_head_size"]
    served = [size for size in range(1, 4 * most) if NVFP4Backend.supports_head_size(size)]
    assert served == [*range(nvfp4.GROUP, most + 1, nvfp4.GROUP)]


TEXTS = {
    "docs/models.md": (
        "| head sizes | multiples of 16 up to {max_head_size}; a decode kernel for {listed} |",
        "| query heads a KV head | up to {max_group} in the decode kernel;",
        "| speculative decoding | up to {max_q_len} query tokens a request in the decode kernel |",
        "(head sizes above {max_head_size}, say)",
    ),
    "docs/limits.md": (
        "up to {max_q_len} query tokens a request take the decode kernel",
        "or\n  above {max_head_size}.",
    ),
    "README.md": ("head sizes above {max_head_size} or not multiples of 16",),
    ".github/CONTRIBUTING.md": ("multiples of 16 up to {max_head_size} work",),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_docs(name):
    path = ROOT / name
    if not path.is_file():
        pytest.skip(f"no source tree: {path} is not there")
    text = path.read_text()
    for sentence in TEXTS[name]:
        assert sentence.format(**published(), listed=listed(", ")) in text


def test_the_ops_own_words():
    text = " ".join((ops.nvfp4_paged_attention.__doc__ or "").split())
    for sentence in (
        "On CUDA D is {listed}; on the CPU any multiple of 16 up to {max_head_size}.",
        "Hq is 1 to {max_group} times H.",
        "q_len: query tokens a request, 1 to {max_q_len}:",
    ):
        assert sentence.format(**published(), listed=listed(" or ")) in text

"""The text that a model is asked about: the user's, or the model's own.

Without a file the model writes the text itself, with 16-bit KV: it goes on from one of the beginnings below,
each token drawn from its distribution. There is as much as wanted, in what the model does best; and as the
text is drawn from the reference, the change of perplexity on it is on average the divergence itself.
"""

from pathlib import Path

BEGINNINGS = (
    "The harbour was quiet that morning, and only the oldest of the fishermen had seen the ship come in.",
    "To replace the filter, first turn off the water. Then loosen the ring by hand, without a wrench.",
    "Question: why does ice float on water?\nAnswer: When water freezes,",
    'def merge(intervals):\n    """Joins intervals that overlap, in any order."""\n',
    "Dear Ms Okafor,\n\nthank you for your letter of 3 May. We have looked into the missing parts",
    "The council met on Tuesday to discuss the new bridge. Three of its members had asked to wait,",
    "A proof by induction has two parts. We show the statement for the smallest case, and then",
    "Soak the beans overnight. The next day, fry two onions in oil until they are golden, add",
    "In the spring of that year prices rose faster than wages, and for the first time in a decade",
    '"You never told me," she said, and put the cup down. He looked out of the window for a while before',
    "The heart has four chambers. Blood that comes back from the body enters the right atrium,",
    "# Installation\n\nThe server needs a machine with at least 16 GB of memory. Download it, then",
    "There are three ways to cross the mountains. The oldest follows the river to the second waterfall,",
    "SELECT customer, SUM(amount) FROM orders WHERE",
    "Let us compare the two theories. The first explains the data with few assumptions, but",
    "Once there was a miller who had a clever daughter and a lazy cat. One evening",
)


def beginnings(count: int, tokenizer) -> list[list[int]]:
    """Token ids of the beginnings of ``count`` windows; after sixteen they come again."""
    return [tokenizer.encode(BEGINNINGS[i % len(BEGINNINGS)]) for i in range(count)]


def windows_of(files: list[Path], tokenizer, count: int, length: int) -> list[list[int]]:
    """The first ``count`` windows of ``length`` tokens of the files, one after the other.

    Raises:
        ValueError: there is too little text.
    """
    tokens = tokenizer.encode("\n\n".join(path.read_text(encoding="utf-8") for path in files))
    if len(tokens) < count * length:
        names = ", ".join(map(str, files))
        raise ValueError(f"{names}: expected {count} windows of {length} tokens, got {len(tokens):,} tokens")
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


def demo_beginnings(tokenizer, count: int, length: int) -> list[list[int]]:
    """How windows in the language of the small model's tasks begin: with a table of up to ``length`` tokens
    and the first questions with their answers. What the model writes after them is right only with the table
    in view."""
    from ..demo.documents import TASK_NAMES, prefixes

    chosen = [TASK_NAMES[i % len(TASK_NAMES)] for i in range(count)]
    texts = [prefixes(task, seed, (length * 7 // 8,))[0]["prefix"] for seed, task in enumerate(chosen)]
    return [tokenizer.encode(text)[:length] for text in texts]

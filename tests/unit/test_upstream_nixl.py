"""What is said of a test of vLLM's that was run with our classes."""

from benchmarks.markdown_handover import upstream
from benchmarks.upstream_nixl import told


def test_only_a_reason_that_is_known_excuses_a_failure():
    assert told(("f::test_a", "", "")) == "passed"
    assert told(("f::test_a", "needs a GPU", "needs a GPU")).startswith("cannot run here")
    assert told(("f::test_a", "", "bidirectional_kv_xfer: expected nothing")).startswith("not for ours")
    assert told(("f::test_split_read_failure[x]", "", "KeyError")).startswith("not for ours")
    assert told(("f::test_a", "", "KeyError: 'r'")) == "failed: KeyError: 'r'"


def test_the_sentence_counts_every_test():
    results = {
        "counts": {
            "passed": 3, "not for ours: a": 2, "not for ours: b": 1, "not run: c": 1, "failed: d": 4,
            "cannot run here, with vLLM's classes neither: e": 5,
        },
        "tests": dict.fromkeys(map(str, range(16)), ""),
        "versions": {"vllm": "1"}, "date": "today", "commit": "abc",
    }  # fmt: skip
    said = "Of 16 tests 3 pass, 3 are not for this one, 5 cannot run there, 1 are left out, 4 fail; "
    assert upstream(results).startswith(said)

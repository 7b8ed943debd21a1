"""What is said of a test of vLLM's that was run with our classes."""

from benchmarks.upstream_nixl import told


def test_only_a_reason_that_is_known_excuses_a_failure():
    assert told(("f::test_a", "", "")) == "passed"
    assert told(("f::test_a", "needs a GPU", "needs a GPU")).startswith("cannot run here")
    assert told(("f::test_a", "", "bidirectional_kv_xfer: expected nothing")).startswith("not for ours")
    assert told(("f::test_split_read_failure[x]", "", "KeyError")).startswith("not for ours")
    assert told(("f::test_a", "", "KeyError: 'r'")) == "failed: KeyError: 'r'"

"""Which connectors are told of a sleep, or that weights may change, and when."""

from types import SimpleNamespace

from vllm_xlayer.patches.sleep import announce_sleep, doubt_weights

CALLS = []


class Told:
    def before_sleep(self, rpc):
        CALLS.append(rpc)

    def before_weights_may_change(self, rpc):
        CALLS.append(f"{rpc} of a user")


def engine(connector, asleep=()):
    CALLS.clear()
    return SimpleNamespace(
        scheduler=SimpleNamespace(get_kv_connector=lambda: connector),
        model_executor=SimpleNamespace(collective_rpc="rpc", sleeping_tags=set(asleep)),
    )


def sleep(connector, *args, asleep=(), **kwargs):
    core = engine(connector, asleep)

    def original(given, level=1, mode="abort"):
        assert given is core
        return [*CALLS], level, mode

    return announce_sleep(original, core, *args, **kwargs)


def test_ours_is_told_before_the_engine_sleeps():
    assert sleep(Told()) == (["rpc"], 1, "abort")
    assert sleep(Told(), 2, "wait") == (["rpc"], 2, "wait")
    assert sleep(Told(), level=2, mode="wait") == (["rpc"], 2, "wait")


def test_below_multi_connector():
    assert sleep(SimpleNamespace(_connectors=[object(), Told(), Told()])) == (["rpc", "rpc"], 1, "abort")


def test_a_pause_is_no_sleep():
    assert sleep(Told(), 0) == ([], 0, "abort")


def test_others_are_left_alone():
    assert sleep(None) == ([], 1, "abort")
    assert sleep(object()) == ([], 1, "abort")


def test_weights_that_sleep_are_not_looked_at():
    """Their memory is not there. A sleep of what sleeps does nothing in vLLM."""
    assert sleep(Told(), asleep=("weights", "kv_cache")) == ([], 1, "abort")
    assert sleep(Told(), asleep=("kv_cache",)) == (["rpc"], 1, "abort")


def call(connector, asleep=()):
    core = engine(connector, asleep)
    return doubt_weights(lambda given, *args: ([*CALLS], given is core, args), core, "method", 3)


def test_ours_is_told_before_a_user_runs_something_in_the_workers():
    assert call(Told()) == (["rpc of a user"], True, ("method", 3))
    assert call(SimpleNamespace(_connectors=[object(), Told()])) == (["rpc of a user"], True, ("method", 3))
    assert call(None) == call(object()) == call(Told(), asleep=("weights",)) == ([], True, ("method", 3))

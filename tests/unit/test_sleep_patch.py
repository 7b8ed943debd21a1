"""Which connectors are told of a sleep, and when."""

from types import SimpleNamespace

from vllm_xlayer.patches.sleep import announce_sleep

CALLS = []


class Told:
    def before_sleep(self, rpc):
        CALLS.append(rpc)


def sleep(connector, *args, **kwargs):
    CALLS.clear()
    core = SimpleNamespace(
        scheduler=SimpleNamespace(get_kv_connector=lambda: connector),
        model_executor=SimpleNamespace(collective_rpc="rpc"),
    )

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

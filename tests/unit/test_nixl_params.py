"""The check of kv_transfer_params: each field, and what is said of it."""

import json

import pytest

pytest.importorskip("pydantic")

from vllm_xlayer.connector.nixl.params import problem_in, without_reading

SAID = dict(
    do_remote_prefill=True, do_remote_decode=False, remote_block_ids=([3, 4, 9], [0, 4]),
    remote_engine_id="a1", remote_request_id="cmpl-1", remote_host="10.0.0.1", remote_port=5600, tp_size=2,
    dcp_size=1, pp_size=1, remote_num_tokens=33, remote_blocks_expiry_time=None,
    remote_registration_generation=1, transfer_mode="pull",
)  # fmt: skip
"""By a prefill engine of vLLM 0.33."""
BLOCKS = [3, 2]
ASKED = dict(
    do_remote_decode=True, do_remote_prefill=False, remote_engine_id=None, remote_block_ids=None,
    remote_host=None, remote_port=None,
)  # fmt: skip
"""By vLLM's proxy, of a prefill engine."""
NEEDED = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids")
OPTIONAL = ("tp_size", "dcp_size", "pp_size", "remote_registration_generation")


def without(*names):
    return {name: value for name, value in SAID.items() if name not in names}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"prompt_token_ids": [1]},
        {"do_remote_prefill": False, "remote_port": "odd"},
        {"do_remote_prefill": None},
        ASKED,
        ASKED | {"remote_block_ids": []},
        {"do_remote_decode": True},
        SAID,
        json.loads(json.dumps(SAID)),
        without(*OPTIONAL, "do_remote_decode", "remote_num_tokens"),
        SAID | {"remote_port": 65535, "remote_block_ids": [[(1 << 31) - 1] * 3, [0, 0]]},
        SAID | {"another connector's": object()},
    ],
)
def test_what_fits(params):
    assert problem_in(params, BLOCKS) is None


@pytest.mark.parametrize("name", NEEDED)
def test_what_must_be_there(name):
    kind, text = problem_in(without(name), BLOCKS)
    assert kind == name and text.startswith(f"{name}: expected ") and text.endswith(", got nothing")


@pytest.mark.parametrize(
    "name, values",
    {
        "remote_engine_id": (None, "", 7, ["a"], {}, b"a", "\ud800"),
        "remote_request_id": (None, "", 7, ["a"], "\ud800"),
        "remote_host": (None, "", 7, ["a"], "\ud800"),
        "remote_port": (None, 0, -1, 65536, "5600", 5600.0, True, [5600]),
        "remote_block_ids": (
            None, [], 3, "text", {}, [3, 4, 9], [None, []], ["349", "04"], [["3", 4, 9], [0, 4]],
            [[3, 4, 9.0], [0, 4]], [[3, 4, True], [0, 4]], [[3, 4, -1], [0, 4]], [[3, 4, 1 << 31], [0, 4]],
            [[3, 4, 1 << 63], [0, 4]], [{3: 3, 4: 4, 9: 9}, [0, 4]], [[[3], 4, 9], [0, 4]],
        ),
        "tp_size": (None, 0, -1, 1025, "2", 2.0, True),
        "dcp_size": (None, 0, 2, "1", True),
        "pp_size": (None, 0, 2, "1", True),
        "remote_registration_generation": (None, -1, "1", 1.0, True),
        "do_remote_prefill": (1, "true", "no", [1]),
        "do_remote_decode": (0, 1, "false", {}),
    }.items(),
)  # fmt: skip
def test_what_a_field_must_be(name, values):
    for value in values:
        kind, text = problem_in(SAID | {name: value}, BLOCKS)
        if name == "remote_block_ids" and value == []:
            assert kind == "number of blocks"
            continue
        assert kind == name and text.startswith(f"{name}: expected "), value
        assert text.endswith(f", got {value!r}"), "none of these is long enough to be cut"


@pytest.mark.parametrize("counts", [(2, 2), (4, 2), (3, 1), (3, 0), (3,), (3, 2, 1), (0, 0), (2, 3)])
def test_as_many_blocks_as_the_prompt_has(counts):
    kind, text = problem_in(SAID | {"remote_block_ids": [[1] * count for count in counts]}, BLOCKS)
    assert kind == "number of blocks" and "expected [3, 2] blocks" in text
    assert text.endswith(f"got {[*counts]}")
    # A request that was aborted before it began has another prompt, and reads none of them.
    assert problem_in(SAID | {"remote_block_ids": [[1] * count for count in counts]}, None) is None


def test_rows_go_one_way():
    kinds = {
        problem_in(params, BLOCKS).kind
        for params in (SAID | {"do_remote_decode": True}, ASKED | {"remote_block_ids": [[1]]})
    }
    assert kinds == {"do_remote_decode with do_remote_prefill", "do_remote_decode with remote_block_ids"}


@pytest.mark.parametrize("params", [0, 7, "", "text", [], [SAID], True], ids=repr)
def test_no_object(params):
    kind, text = problem_in(params, BLOCKS)
    assert kind == "kv_transfer_params" and "expected an object, got " in text
    assert without_reading(params) is None


def test_a_client_writes_no_long_lines():
    for value in ("x" * 100_000, [["x" * 100_000] * 100] * 100, ["x" * 100_000, {"x" * 100_000: "x"}]):
        for params in (value, SAID | {"remote_port": value}, SAID | {"remote_block_ids": value}):
            _, text = problem_in(params, BLOCKS)
            assert len(text) < 4000 and "\n" not in text


@pytest.mark.parametrize("decode", [True, False, None, "yes"])
def test_a_request_that_is_computed_says_nothing_of_rows(decode):
    before = SAID | {"do_remote_decode": decode, "mine": 1}
    params = without_reading(before)
    assert params == {
        "do_remote_prefill": False, "do_remote_decode": decode is True, "mine": 1, "remote_num_tokens": 33,
        "remote_blocks_expiry_time": None, "transfer_mode": "pull",
    }  # fmt: skip
    assert problem_in(params, BLOCKS) is None
    assert before["do_remote_prefill"] and before["remote_port"] == 5600, "the client's is left alone"

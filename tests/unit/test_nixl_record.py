"""What two engines must agree on: each field changed alone is refused, with both values."""

from dataclasses import replace

import pytest

from vllm_xlayer.connector.nixl.record import Record, RecordsDiffer, check_records, differences

OURS = Record(
    must_equal={
        "weights": "a" * 32,
        "global_scales": {"layer 0": [1.0, 0.5], "layer 1": [1.0, 0.25]},
        "groups": [{"layers": ["layer 0", "layer 1"], "dtype": "nvfp4", "kv_heads": 8}],
        "settings": {"dtype": "bfloat16", "config": {"rope_theta": 10000.0, "tie": False}},
    },
    layout={"row_bytes": 4608},
    tp_size=1,
    tp_rank=0,
    blocks=100,
    seals=4096,
    link={},
)


def changed(*path, to):
    """OURS with one value of must_equal changed."""

    def edit(node, keys):
        if not keys:
            return to
        if isinstance(node, list):
            return [edit(x, keys[1:]) if i == keys[0] else x for i, x in enumerate(node)]
        return {**node, keys[0]: edit(node.get(keys[0]), keys[1:])}

    return replace(OURS, must_equal=edit(OURS.must_equal, path))


def test_equal_engines_agree_over_the_wire():
    check_records(OURS, Record.decode(OURS.encode()))
    # Another amount of memory at another address is no difference.
    elsewhere = replace(OURS, blocks=7, seals=8192, layout={}, link={"host": "b"})
    check_records(OURS, Record.decode(elsewhere.encode()))


@pytest.mark.parametrize(
    ("theirs", "name", "here", "there"),
    [
        (changed("weights", to="b" * 32), "weights", "a" * 32, "b" * 32),
        (changed("global_scales", "layer 1", to=[1.0, 0.5]), "layer 1", "[1.0, 0.25]", "[1.0, 0.5]"),
        (changed("groups", to="others"), "groups", '[{"dtype": "nvfp4"', "others"),
        (changed("groups", 0, "layers", to=["layer 1", "layer 0"]), "groups", "[{", "[{"),
        (
            changed("settings", "config", "rope_theta", to=5e5),
            "settings.config.rope_theta",
            "10000",
            "500000",
        ),
        (changed("settings", "config", "tie", to=0), "settings.config.tie", "false", "0"),
        (changed("settings", "new", to="x"), "settings.new", "not given", "x"),
        (replace(OURS, seals=0), "row_seals", "True", "False"),
    ],
)
def test_each_difference_is_refused_with_both_values(theirs, name, here, there):
    for a, b, first, second in ((OURS, theirs, here, there), (theirs, OURS, there, here)):
        with pytest.raises(RecordsDiffer) as error:
            check_records(a, Record.decode(b.encode()))
        message = str(error.value)
        assert name in message and f"here {first}" in message and f"there {second}" in message


def test_many_differences_are_counted():
    theirs = replace(OURS, must_equal={"weights": OURS.must_equal["weights"]})
    assert len(list(differences(OURS, theirs))) == 6
    with pytest.raises(RecordsDiffer, match="and 2 more"):
        check_records(OURS, theirs)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"must_equal": {}}', "no json"])
def test_what_is_no_record_is_refused(text):
    with pytest.raises(RecordsDiffer, match="expected a record of xlayer-rows-2"):
        Record.decode(text)

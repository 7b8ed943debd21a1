"""What XLayerConnector does not do for a model is refused with the reason and a way on."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from test_row_plans import small_plan
from test_rows import config_with, one_group, planned

from vllm_xlayer.compat import rows
from vllm_xlayer.connector.limits import NotServedError, check_served


def engine(**changes):
    """As much of a VllmConfig as is read; a change is cache__x, parallel__x or extra__x."""
    parts = dict(
        cache=dict(enable_prefix_caching=True, prefix_match_unit=None, block_size=16),
        parallel=dict(decode_context_parallel_size=1, pipeline_parallel_size=1),
        extra={},
        model=dict(layers=4),
        speculation=dict(method=None),
    )
    for name, value in changes.items():
        part, key = name.split("__")
        parts[part][key] = value
    return SimpleNamespace(
        cache_config=SimpleNamespace(**parts["cache"]),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: parts["model"]["layers"]),
        parallel_config=SimpleNamespace(**parts["parallel"]),
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=parts["extra"]),
        speculative_config=SimpleNamespace(**parts["speculation"])
        if parts["speculation"]["method"]
        else None,
    )


def check(plan, ours=True, **changes):
    descriptor = rows.negotiate_rows(config_with(), plan).descriptor
    check_served(engine(**changes), plan, descriptor, ours)


def test_what_is_served():
    check(small_plan())
    check(small_plan(), cache__prefix_match_unit=16)
    check(small_plan(), extra__blocks_per_chunk=3)
    alike = planned(one_group("nvfp4"), "BLHNC")
    check(alike, ours=False)
    check(alike, parallel__pipeline_parallel_size=2, cache__enable_prefix_caching=False)
    check(small_plan(), cache__prefix_match_unit=16, extra__block_size=16)


def test_ranks_of_a_pipeline_have_as_many_layers():
    """A rank with more has larger rows: ids of host memory that the first rank's size allows are beyond its
    own."""
    alike = planned(one_group("nvfp4"), "BLHNC")
    with pytest.raises(NotServedError, match=r"ranks of 8, 8, 9, 8 layers.*VLLM_PP_LAYER_PARTITION"):
        check(alike, parallel__pipeline_parallel_size=4, model__layers=33)
    check(alike, parallel__pipeline_parallel_size=4, model__layers=32)


def test_a_drafter_is_on_the_last_rank_of_a_pipeline():
    alike = planned(one_group("nvfp4"), "BLHNC")
    check(alike, parallel__pipeline_parallel_size=2, speculation__method="ngram")
    check(alike, speculation__method="eagle")
    with pytest.raises(NotServedError, match=r"pipeline parallelism \(got 2\) with a drafter .* are larger"):
        check(alike, parallel__pipeline_parallel_size=2, speculation__method="eagle")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(cache__enable_prefix_caching=False), "only with prefix caching .* set --enable-prefix-caching"),
        (dict(parallel__decode_context_parallel_size=2), r"decode context parallelism \(got 2\)"),
        (dict(parallel__pipeline_parallel_size=2), r"pipeline parallelism \(got 2\)"),
        (dict(cache__prefix_match_unit=16, extra__blocks_per_chunk=2), "set only one of them"),
        (dict(cache__prefix_match_unit=16, extra__block_size=32), "block_size 32 .* set only one of them"),
        (dict(ours=False), "leave spec_name out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_served_with_hybrids(changes, reason):
    with pytest.raises(
        NotServedError, match=rf"{reason}.*Without --kv-connector the engine serves the model"
    ):
        check(small_plan(), **changes)


def test_states_that_are_kept_for_a_request_only():
    plan = small_plan()
    state = next(g for g in plan.kv_cache_groups if hasattr(g.kv_cache_spec, "mamba_cache_mode"))
    object.__setattr__(state.kv_cache_spec, "mamba_cache_mode", "none")
    with pytest.raises(NotServedError, match="mode none"):
        check(plan)


def test_memory_that_vllm_moves_by_itself():
    plan = small_plan()
    plan.hisparse_host_num_blocks = 4
    with pytest.raises(NotServedError, match="HiSparse"):
        check(plan)

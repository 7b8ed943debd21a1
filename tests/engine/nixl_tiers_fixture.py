"""A decode engine with tiers and hand-over, and a prefill engine: what they have and what they keep."""

from typing import Self

from faults import TALLY, compare, core_of, finish, live_connector
from model_fixture import vllm_greedy
from nixl_fixture import (
    CONNECTOR,
    ON_DEVICE,
    OtherEngine,
    add_all,
    blocks_in_use,
    flip_a_bit,
    free_port,
    side_channel,
    transfer,
)

from vllm_xlayer.compat.engine import empty_device_cache
from vllm_xlayer.connector.host.accounts import check_accounts

NUM_TOKENS = 8
LEASE_SECONDS = 600
"""Longer than anybody waits: blocks of the prefill engine come back only if it is told."""


class Pair:
    """A decode engine with tiers, here, and a prefill engine beside it, which is killed at the end.

    Args:
        prompts: what both are asked; a request's name is r and its number.
        both: the decode engine's kv_transfer_config, of a connector whose first part is the hand-over.
    """

    def __init__(self, make_llm, model, prompts, both, **settings):
        self.prompts = prompts
        settings = dict(skip_tokenizer_init=True, max_model_len=512, seed=0) | ON_DEVICE | settings
        with side_channel(free_port()):
            self.decode = make_llm(model, kv_transfer_config=both, **settings)
        self.scheduler = core_of(self.decode).scheduler
        nixl, tiers = live_connector().sub_connectors
        self.reads, self.pool = nixl.connector_worker, tiers.pool
        self.tiers = tiers.connector_worker.worker
        _, self.tiers_scheduler = self.scheduler.connector.sub_connectors
        settings |= dict(kv_cache_memory_bytes=256 * self.pool.shape[1], disable_log_stats=True)
        self.prefill = OtherEngine(
            model, kv_transfer_config=transfer(kv_lease_duration=LEASE_SECONDS), **settings
        )
        self.computed = vllm_greedy(self.decode, prompts, NUM_TOKENS)
        self.cached = vllm_greedy(self.decode, prompts, NUM_TOKENS)
        """Answers to prompts that are on the device: with NVFP4 those to restored ones, too."""
        self.rows_read, land = 0, self.reads.wire.land

        def spy(begun, buffer, rows):
            self.rows_read += len(rows)
            return land(begun, buffer, rows)

        self.reads.wire.land = spy

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error):
        self.prefill.kill()

    def begin(self, tiers_too=False):
        """Nothing is on the device, nor in the tiers if that is said; what is not loaded shows as NaN."""
        empty_device_cache(self.decode)
        if tiers_too:
            assert self.decode.reset_prefix_cache(reset_connector=True)
        self.pool.fill_(0xFF)
        self.reads.failures.clear()

    def hold(self, heads):
        """Nothing is on the device, and in the tiers so many tokens of each prompt, in whole blocks."""
        self.begin(tiers_too=True)
        vllm_greedy(self.decode, [p[:n] for p, n in zip(self.prompts, heads, strict=True) if n], 1)
        self.begin()

    def hand_over(self):
        return [self.prefill.prefill(prompt) for prompt in self.prompts]

    def hand_over_damaged(self):
        """As hand_over; then a bit of each prompt's last row is another."""
        handed_over = self.hand_over()
        for params in handed_over:
            self.prefill.call(flip_a_bit, params["remote_block_ids"][0][-1], 1001)
            TALLY["tries"] += 1
        return handed_over

    def add(self, handed_over=None):
        """handed_over: what the prefill engine said of each prompt; else nothing was said."""
        add_all(self.decode, self.prompts, handed_over or [None] * len(self.prompts), NUM_TOKENS)

    def finish(self, answers=None):
        outputs = {name.split("-")[0]: output for name, output in finish(self.decode).items()}
        compare(outputs, {f"r{i}": answer for i, answer in enumerate(answers or self.cached)})

    def ask(self, handed_over=None, answers=None):
        """(rows read from the other engine, rows loaded from the tiers), once the answers are right and
        nothing is kept."""
        read, loaded = self.rows_read, self.tiers.rows_loaded
        self.add(handed_over)
        self.finish(answers)
        self.check_nothing_is_kept()
        return self.rows_read - read, self.tiers.rows_loaded - loaded

    def check_nothing_is_kept(self, prefill=True):
        empty_device_cache(self.decode)  # refused while a block is in use
        check_accounts(self.tiers_scheduler.connector_scheduler, idle=True)
        kept = len(self.reads.reads.quarantined) + len(self.reads.reads.reads) + len(self.reads.tags)
        kept += len(getattr(self.scheduler.connector, "parts", ()))
        kept += len(live_connector().joining.missing) if hasattr(live_connector(), "joining") else 0
        kept += self.prefill.call(blocks_in_use) if prefill else 0
        TALLY["leaked"] += kept
        assert kept == 0


def tiered_connector(cpu_bytes_to_use):
    return dict(
        kv_connector="XLayerTieredNixlConnector", kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": cpu_bytes_to_use},
    )  # fmt: skip


def multi_connector(cpu_bytes_to_use, **transfer_extra):
    """Of vLLM's MultiConnector, with the hand-over first."""
    tiers = dict(
        kv_connector="XLayerConnector", kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": cpu_bytes_to_use},
    )  # fmt: skip
    link = dict(kv_connector=CONNECTOR, kv_role="kv_both", kv_connector_extra_config=transfer_extra)
    return dict(
        kv_connector="MultiConnector", kv_role="kv_both", kv_load_failure_policy="recompute",
        kv_connector_extra_config={"connectors": [link, tiers]},
    )  # fmt: skip

"""The scheduler's side of the hand-over: vLLM's own, and which rows to seal and what seals to expect."""

import threading
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from .listener import keep_listening
from .params import problem_in, without_reading
from .seals import prompt_tags
from .stats import RowNixlStats

logger = init_logger(__name__)


class RowNixlMetadata(NixlConnectorMetadata):
    """What workers are told in a step.

    Attributes:
        seals: (blocks, their tags) of requests whose prompt is computed once this step is done.
        tags: request to be read -> the tags of its prompt's blocks, by KV cache group.
        idle: whether this step computes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seals: list[tuple[list[int], np.ndarray]] = []
        self.tags: dict[str, list[np.ndarray]] = {}
        self.idle = False


class RowNixlScheduler(NixlPullConnectorScheduler):
    """vLLM's pull scheduler.

    Attributes:
        kv_cache_manager: set by the connector when vLLM has made it.
        stats: requests that cannot be read, since vLLM asked last.
    """

    kv_cache_manager: KVCacheManager

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self.to_seal: dict[str, Request] = {}
        self.stats = RowNixlStats()
        self.warned: set[str] = set()
        """Kinds of problems in kv_transfer_params that the log has named."""

    @staticmethod
    def _nixl_handshake_listener(
        encoded_data: dict[tuple[int, int], Any],
        ready_event: threading.Event,
        stop_event: threading.Event,
        host: str,
        port: int,
    ) -> None:
        """As vLLM's, in its thread, but a message that it does not understand does not end it."""

        def listen() -> None:
            NixlPullConnectorScheduler._nixl_handshake_listener(
                encoded_data, ready_event, stop_event, host, port
            )

        keep_listening(listen, stop_event, f"{host}:{port}")

    def on_new_request(self, request: Request) -> None:
        """As vLLM's, which sees a request's kv_transfer_params here first, once they are checked: a request
        whose fields do not fit goes on as if it had none to read by."""
        params = request.kv_transfer_params
        if params is not None:
            blocks = None if request.abort_immediately else self._blocks(request.num_prompt_tokens)
            if problem := problem_in(params, blocks):
                request.kv_transfer_params = without_reading(params)
                self.stats.record_failure("params")
                if problem.kind not in self.warned:
                    self.warned.add(problem.kind)
                    logger.warning(
                        "request %s is computed, as are others like it, which are counted only: "
                        "kv_transfer_params: %s",
                        request.request_id,
                        problem.text,
                    )
        super().on_new_request(request)

    def _blocks(self, tokens: int) -> list[int]:
        """How many blocks of a prompt are handed over, by KV cache group."""
        groups = self.kv_cache_config.kv_cache_groups
        ids = tuple([*range(cdiv(tokens, group.kv_cache_spec.block_size))] for group in groups)
        return [len(group) for group in self.get_exchange_clipped_blocks(ids)]

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        if not _has_tags(request):  # the prompt is computed here
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if (request.kv_transfer_params or {}).get("do_remote_decode") and _has_tags(request):
            self.to_seal[request.request_id] = request

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        to_read = [entry[0] for entry in self._reqs_need_recv.values() if any(entry[1])]
        meta = RowNixlMetadata()
        vars(meta).update(vars(super().build_connector_meta(scheduler_output)))
        meta.idle = scheduler_output.total_num_scheduled_tokens == 0
        meta.tags = {request.request_id: self._tags(request) for request in to_read}
        for name, scheduled in scheduler_output.num_scheduled_tokens.items():
            request = self.to_seal.get(name)
            if request is None or request.num_computed_tokens + scheduled < request.num_prompt_tokens:
                continue
            del self.to_seal[name]
            blocks = self.get_exchange_clipped_blocks(self.kv_cache_manager.get_block_ids(name))
            for ids, tags in zip(blocks, self._tags(request), strict=True):
                ids = ids[-len(tags) :]  # a sliding window keeps its last blocks only
                meta.seals.append((list(ids), tags[-len(ids) :]))
        return meta

    def request_finished(
        self, request: Request, block_ids: tuple[list[int], ...] | list[list[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.to_seal.pop(request.request_id, None)
        return super().request_finished(request, block_ids)

    def _tags(self, request: Request) -> list[np.ndarray]:
        """Of the prompt's blocks, by group that is handed over."""
        assert request.prompt_token_ids is not None
        items = [(item.mm_position.offset, str(item.identifier)) for item in request.mm_features]
        return [
            prompt_tags(
                request.prompt_token_ids, group.kv_cache_spec.block_size, i, request.cache_salt or "", items
            )
            for i, group in enumerate(self.kv_cache_config.transfer_groups)
        ]


def _has_tags(request: Request) -> bool:
    """Whether its tokens say what its prompt is: of embeddings, also of some between tokens, nothing does."""
    return bool(request.prompt_token_ids) and request.prompt_embeds is None

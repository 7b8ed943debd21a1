"""The worker's side of the hand-over: one rank's rows, registered with NIXL and read from another engine."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
    NIXL_CONNECTOR_VERSION,
    NixlAgentMetadata,
    NixlConnectorMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.tp_mapping import ReadSpec, TPMapping
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig

from ...compat.rows import allocations
from ...layout import LayoutDescriptor, check_allocation
from .agent import vllm_makes_such
from .engine import record_of
from .link import Link, allow_cuda_ipc_reads, why_tcp
from .reads import Rows
from .record import PROTOCOL, Record, RecordsDiffer, check_records
from .reshard import CannotReshard, Move, heads_of, moves_between
from .scheduler import RowNixlMetadata
from .seals import BYTES, SealTable
from .settings import NixlSettings
from .staging import BESIDE_STEPS, IDLE, StagedReads
from .stats import RowNixlStats
from .wire import BUFFERS, NixlWire, RemotePool

logger = init_logger(__name__)


class RowNixlWorker(NixlPullConnectorWorker):
    """vLLM's pull worker, whose one region is the pool of rows.

    vLLM makes a region of what a layer's view covers: a page, where pages are contiguous. Given one view of
    whole rows for every layer it makes one region whose descriptors are rows; `_check_region` sees that.
    """

    xfer_stats: RowNixlStats

    def __init__(
        self,
        vllm_config: VllmConfig,
        engine_id: str,
        kv_cache_config: KVCacheConfig,
        layout: LayoutDescriptor,
        settings: NixlSettings,
    ):
        if torch.cuda.is_available():
            allow_cuda_ipc_reads()
        with vllm_makes_such():
            super().__init__(vllm_config, engine_id, kv_cache_config)
        self.layout, self.settings = layout, settings
        self.record: Record | None = None
        self.seals: SealTable | None = None
        self.tags: dict[str, list[np.ndarray]] = {}
        """Request that is being received -> the tags of its prompt's blocks, by group."""
        self.xfer_stats = RowNixlStats()
        self.failures: Counter[str] = Counter()
        """Requests whose rows did not come, by reason."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """kv_caches: layer name -> (B, H, N, C) view of the pool."""
        own = [name for group in self.layout.groups for name in group.layers]
        check_allocation(self.layout, allocations({name: kv_caches[name] for name in own}))
        storage = kv_caches[own[0]].untyped_storage()
        pool = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self.pool = pool.view(-1, self.layout.row_bytes)
        if self.settings.row_seals:
            self.seals = SealTable(self.pool)
            self._register(self.seals.table)
        bytes_each = self.settings.staging_bytes // BUFFERS // 16 * 16
        ring = torch.empty(BUFFERS, bytes_each, dtype=torch.uint8, device=self.pool.device)
        self._register(ring)
        self.wire = NixlWire(self.nixl_wrapper, self.nixl_memory_type, self.pool, ring, self._record_transfer)
        if self.seals is not None:
            self.wire.landings.prepare(self.layout.row_bytes)  # takes its memory now, or the start fails
        self.reads = StagedReads(self.wire, BUFFERS, self.settings.read_timeout_seconds)
        super().register_kv_caches(dict.fromkeys(own, self.pool))
        self._check_region()
        self._publish_record()

    def _register(self, memory: torch.Tensor) -> None:
        """Lets NIXL move bytes to and from a tensor."""
        range_ = (memory.data_ptr(), memory.nbytes, max(memory.get_device(), 0), "")
        descriptors = self.nixl_wrapper.get_reg_descs([range_], self.nixl_memory_type)
        self.nixl_wrapper.register_memory(descriptors, backends=self.nixl_backends)
        self._registered_descs.append(descriptors)

    def _check_region(self) -> None:
        """Raises RuntimeError unless vLLM made one region of the pool, with rows as its blocks."""
        bases = self.kv_caches_base_addr[self.engine_id][self.tp_rank]
        row = self.layout.row_bytes
        got = (list(bases), list(self.block_len_per_layer), list(self.block_stride_per_layer))
        if got != (expected := ([self.pool.data_ptr()], [row], [row])):
            raise RuntimeError(
                "XLayerNixlConnector: expected vLLM to register one region of rows (bases, block lengths, "
                f"strides) {expected}, got {got}"
            )

    def _publish_record(self) -> None:
        """Puts the record into the handshake, in a list of names that pull without pipeline leaves empty."""
        assert self.compat_hash is not None and self.xfer_handshake_metadata is not None
        seals = 0 if self.seals is None else self.seals.table.data_ptr()
        self.record = record_of(
            self.vllm_config, self.layout, self.compat_hash, self.tp_rank, self.num_blocks, seals
        )
        # vLLM compares this one, and an engine without our connector must not pass. What it stands for is
        # compared here, with both values.
        self.compat_hash = hashlib.sha256(f"{PROTOCOL} {NIXL_CONNECTOR_VERSION}".encode()).hexdigest()
        payload = self.xfer_handshake_metadata
        meta = msgspec.msgpack.decode(payload.agent_metadata_bytes, type=NixlAgentMetadata)
        meta.region_members = [[PROTOCOL, self.record.encode()]]
        payload.agent_metadata_bytes = msgspec.msgpack.encode(meta)
        payload.compatibility_hash = self.compat_hash

    def add_remote_agent(
        self,
        nixl_agent_meta: NixlAgentMetadata,
        remote_tp_rank: int = 0,
        remote_tp_size: int = 1,
        remote_dcp_size: int = 1,
    ) -> str:
        """As vLLM's, once the peer's record agrees with ours.

        What keeps rows from being read is seen before vLLM gives NIXL descriptors of the peer, which it does
        not take back where a handshake fails; the next request begins another one.

        Raises:
            RecordsDiffer, CannotReshard, StagingTooSmall: the requests that wait for this peer are computed
                here instead.
        """
        theirs = self._agree(nixl_agent_meta)
        moves = self._moves_from(theirs)
        self.wire.rows_beside(theirs.blocks * BYTES if theirs.seals else 0, nixl_agent_meta.block_lens[0])
        agent = super().add_remote_agent(nixl_agent_meta, remote_tp_rank, remote_tp_size, remote_dcp_size)
        remote = RemotePool(
            agent,
            nixl_agent_meta.kv_caches_base_addr[0],
            nixl_agent_meta.device_id,
            self.nixl_memory_type,
            nixl_agent_meta.block_lens[0],
            theirs.blocks,
            theirs.seals,
            moves,
        )
        self.wire.add_peer((nixl_agent_meta.engine_id, remote_tp_rank), remote)
        self._say_if_slow(nixl_agent_meta.engine_id, theirs)
        return agent

    def _say_if_slow(self, engine: str, theirs: Record) -> None:
        """Once for an engine, and by one rank."""
        assert self.record is not None
        why = why_tcp(Link(**self.record.link), Link(**theirs.link))
        if why and self.tp_rank == 0 and "UCX" in self.nixl_backends:
            logger.warning_once(
                "rows of engine %s come over TCP, which is many times slower than RDMA, NVLink or shared "
                "memory: %s", engine, why,
            )  # fmt: skip

    def _agree(self, meta: NixlAgentMetadata) -> Record:
        """The peer's record. Raises RecordsDiffer."""
        assert self.record is not None
        if len(meta.region_members) != 1 or meta.region_members[0][:1] != [PROTOCOL]:
            raise RecordsDiffer(
                f"engine {meta.engine_id}: expected an engine with XLayerNixlConnector ({PROTOCOL}), got one "
                f"that names {meta.region_members or 'nothing'}"
            )
        theirs = Record.decode(meta.region_members[0][1])
        try:
            check_records(self.record, theirs)
        except RecordsDiffer as error:
            raise RecordsDiffer(f"engine {meta.engine_id}: {error}") from None
        return theirs

    def _moves_from(self, theirs: Record) -> tuple[tuple[Move, ...], ...]:
        """Raises CannotReshard."""
        assert self.record is not None
        heads = self.model_config.get_total_num_kv_heads()
        if max(theirs.tp_size, self.record.tp_size) > heads and theirs.tp_size != self.record.tp_size:
            raise CannotReshard(
                f"tensor_parallel_size: expected the same on both sides, or at most {heads} (the KV heads), "
                f"got {self.record.tp_size} here and {theirs.tp_size} there"
            )
        their_heads, our_heads = (heads_of(r.tp_rank, r.tp_size, heads) for r in (theirs, self.record))
        return moves_between(LayoutDescriptor.from_dict(theirs.layout), self.layout, their_heads, our_heads)

    def _validate_remote_agent_handshake(
        self, nixl_agent_meta: NixlAgentMetadata, remote_tp_size: int, remote_dcp_size: int = 1
    ) -> None:
        """In place of vLLM's, which would refuse NVFP4 rows of another tensor-parallel size, and let others
        be cut by bytes, that is by layers. What rows mean, the records have been compared for."""
        theirs = Record.decode(nixl_agent_meta.region_members[0][1])
        row = theirs.layout["row_bytes"]
        expected = (remote_tp_size, theirs.blocks, [row], [row], 1)
        got = (
            theirs.tp_size,
            nixl_agent_meta.num_blocks,
            nixl_agent_meta.block_lens,
            nixl_agent_meta.block_strides,
            len(nixl_agent_meta.kv_caches_base_addr),
        )
        if got != expected:
            raise RecordsDiffer(
                f"engine {nixl_agent_meta.engine_id}: expected (ranks, blocks, block lengths, strides, "
                f"regions) {expected}, got {got}"
            )

    def _build_fa_remote(
        self, plan: TPMapping, nixl_agent_meta: NixlAgentMetadata, block_size_ratio: int
    ) -> np.ndarray:
        """Whole rows of the peer, whatever its size: vLLM's would be cut by bytes. Reads do not use them."""
        cut = super()._build_fa_remote(plan, nixl_agent_meta, block_size_ratio)
        row, device = nixl_agent_meta.block_lens[0], nixl_agent_meta.device_id
        if row == self.layout.row_bytes:
            return cut
        base, blocks = nixl_agent_meta.kv_caches_base_addr[0], nixl_agent_meta.num_blocks
        if cut.shape[1] == 5:  # address, bytes, device, stride, count
            return np.array([(base, row, device, row, blocks)], np.uint64)
        return np.array([(base + i * row, row, device) for i in range(blocks)], np.uint64)

    def _build_local_splits_from_plan(
        self, plan: TPMapping, src_blocks_data: np.ndarray, num_fa_descs: int, block_size_ratio: int = 1
    ) -> Iterator[np.ndarray]:
        """Whole rows of ours, once a source: as above. NIXL refuses a read between rows of two sizes."""
        return (src_blocks_data for _ in plan.all_source_ranks)

    def _engines_with_inflight_transfers(self) -> set[str]:
        """With those whose reads were given up, and may write into the ring yet."""
        inflight: set[str] = super()._engines_with_inflight_transfers()
        return inflight | {engine for engine, _ in self.reads.peers()}

    def _cleanup_remote_engine(self, engine_id: str, log_eviction: bool = True) -> None:
        super()._cleanup_remote_engine(engine_id, log_eviction=log_eviction)
        for peer in [peer for peer in list(self.wire.peers) if peer[0] == engine_id]:
            self.wire.retire_peer(peer)
        self.wire.release_retired(self.reads.peers())

    def seal(self, seals: Sequence[tuple[list[int], np.ndarray]]) -> None:
        """Seals rows that this step has completed: (blocks, tags) each.

        Launched before the step's tokens are fetched: nobody knows of the rows before they are sealed.
        """
        if self.seals is not None:
            for blocks, tags in seals:
                self.seals.seal(blocks, tags)

    def start_load_kv(self, metadata: NixlConnectorMetadata) -> None:
        assert isinstance(metadata, RowNixlMetadata)
        self.tags.update(metadata.tags)
        self.reads.stay = IDLE if metadata.idle else BESIDE_STEPS
        super().start_load_kv(metadata)

    def _read_blocks(
        self,
        read_spec: ReadSpec,
        dst_engine_id: str,
        request_id: str,
        remote_request_id: str,
        local_xfer_side_handle: int,
        local_dram_handle: int | None,
        remote_xfer_side_handle: int,
        expected_consumers: int,
        awaiting_kvs: bool,
    ) -> bool:
        """Reads rows into the ring, in place of the KV cache; the peer is told when all are here."""
        if not any(read_spec.local_block_ids):
            return super()._read_blocks(
                read_spec, dst_engine_id, request_id, remote_request_id, local_xfer_side_handle,
                local_dram_handle, remote_xfer_side_handle, expected_consumers, awaiting_kvs,
            )  # fmt: skip
        local, remote = self._apply_prefix_caching(
            read_spec.local_block_ids, read_spec.remote_block_ids, 1, 1
        )
        rows = _rows(local, remote, self.tags[request_id])
        agent = self._remote_agents[dst_engine_id][0, read_spec.remote_rank]
        note = (agent, f"{remote_request_id}:{expected_consumers}".encode())
        self._pending_recv_notifs.setdefault(request_id, []).append(note)
        self.xfer_stats.record_rows(len(rows.remote))
        self.reads.add(request_id, (dst_engine_id, read_spec.remote_rank), len(rows.remote), rows)
        return True

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        """The requests whose reads are over, and those of them that failed.

        A peer is told that a failed read is over as well: it need not keep the rows.
        """
        over = self.reads.poll()
        self.wire.release_retired(self.reads.peers())
        failed = {request: failure for request, failure in over.items() if failure is not None}
        for request, (reason, text) in failed.items():
            logger.warning("request %s is computed, its rows did not come: %s", request, text)
            self.xfer_stats.record_failure(reason)
            self.failures[reason] += 1
            self._handle_failed_transfer(request, None)
            self._send_pending_recv_notifs(request)
        done = {request for request in transfers if request not in self.reads.reads}
        for request in done:
            del transfers[request]
        return done, set(failed)

    def get_transfer_results(self) -> KVConnectorTransferResults:
        results = super().get_transfer_results()
        for request in (*(results.finished_recving or ()), *(results.failed_recving or ())):
            self.tags.pop(request, None)
        return results

    def _record_transfer(self, handle: int) -> None:
        self.xfer_stats.record_transfer(self.nixl_wrapper.get_xfer_telemetry(handle))


def _rows(
    local: Sequence[Sequence[int]], remote: Sequence[Sequence[int]], tags: Sequence[np.ndarray]
) -> Rows:
    """By KV cache group: blocks here, theirs, and the tags of the prompt's blocks, of which a group has the
    last; what comes before is in the prefix cache, or outside its window.

    Raises:
        ValueError: not as many blocks here as there.
    """
    ours, theirs = (
        np.concatenate([np.asarray(ids, np.int64) for ids in blocks]) for blocks in (local, remote)
    )
    counts = [len(ids) for ids in local]
    if counts != [len(ids) for ids in remote]:
        raise ValueError(f"expected as many blocks here as there, got {counts} and {[*map(len, remote)]}")
    last = np.concatenate([mine[len(mine) - count :] for mine, count in zip(tags, counts, strict=True)])
    return Rows(theirs, ours, np.repeat(np.arange(len(counts)), counts), last)

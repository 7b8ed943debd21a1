"""Oracles for unquantised newest tokens: what is read from a row is what was last written to the page."""

from collections import Counter
from dataclasses import replace

import torch

BLOCK = 16


class PageOracle:
    """Wraps the attention's writes and reads: what is read from a row is what was last written to the page.

    It follows pages, not requests: of every layer and slot it keeps the key and value last written there. A
    row holds a better copy of what is in a page, never another content, so each token that attention takes
    from a row must equal what was last written where the block table has that token.

    Attributes:
        wrong: descriptions of tokens that were another content than their page's.
        counts: "read", tokens taken from rows; "attended", requests and layers of all steps.
    """

    def __init__(self, monkeypatch) -> None:
        from vllm_xlayer.attention.cpu_impl import CpuReferenceImpl

        self.written: dict[str, torch.Tensor] = {}  # layer -> [slots, 2, H, D]
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        write, gather = CpuReferenceImpl.do_kv_cache_update, CpuReferenceImpl._gather

        def writes(impl, layer, key, value, kv_cache, slot_mapping):
            shape = (kv_cache.shape[0] * BLOCK, 2, *key.shape[1:])
            pages = self.written.setdefault(layer.layer_name, torch.full(shape, torch.nan))
            tokens = torch.nonzero(slot_mapping >= 0).squeeze(1)
            pages[slot_mapping[tokens]] = torch.stack((key[tokens], value[tokens]), 1).float()
            return write(impl, layer, key, value, kv_cache, slot_mapping)

        def gathers(impl, layer, kv_cache, step, request, start, key, value):
            found = gather(impl, layer, kv_cache, step, request, start, key, value)
            if step.newest is not None:
                alone = replace(step, newest=None)
                pages = gather(impl, layer, kv_cache, alone, request, start, key, value)
                self._check(layer.layer_name, step.block_table[request].long(), start, pages, found)
            return found

        monkeypatch.setattr(CpuReferenceImpl, "do_kv_cache_update", writes)
        monkeypatch.setattr(CpuReferenceImpl, "_gather", gathers)

    def _check(self, layer, blocks, start, pages, found) -> None:
        """pages, found: K and V [H, n, D] each, without newest tokens and with them."""
        keys, values = found
        changed = (keys != pages[0]).any(-1).any(0).nonzero().squeeze(1)
        positions = start + changed
        slots = blocks[positions // BLOCK] * BLOCK + positions % BLOCK
        got = torch.stack((keys[:, changed], values[:, changed])).permute(2, 0, 1, 3)
        # K is kept rotated, here in float32: to its rounding.
        same = torch.isclose(got, self.written[layer][slots], rtol=1e-4, atol=1e-5)
        differs = (~same).flatten(1).any(1)
        self.counts["read"] += len(changed)
        self.counts["attended"] += 1
        for position in positions[differs].tolist():
            self.wrong.append(f"{layer}: token {position} of {start + keys.shape[1]}")


class RowOracle:
    """The same on a GPU, in eager mode: what a step may read from rows is what was last written to the page.

    Attributes:
        wrong, counts: as `PageOracle` has them; "read" counts what may be read.
    """

    def __init__(self, monkeypatch) -> None:
        from vllm_xlayer.attention.impl import NVFP4Impl
        from vllm_xlayer.attention.metadata import NVFP4MetadataBuilder

        self.steps: dict[str, tuple] = {}  # layer -> its step's metadata, vLLM's and ours
        self.written: dict[str, torch.Tensor] = {}  # layer -> [slots, 2, H, D]
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        write, build = NVFP4Impl.do_kv_cache_update, NVFP4MetadataBuilder.build

        def builds(builder, *args, **kwargs):
            made = build(builder, *args, **kwargs)
            step = kwargs["common_attn_metadata"] if "common_attn_metadata" in kwargs else args[1]
            self.steps.update(dict.fromkeys(builder.layer_names, (step, made.newest)))
            return made

        def writes(impl, layer, key, value, kv_cache, slot_mapping):
            write(impl, layer, key, value, kv_cache, slot_mapping)
            shape = (kv_cache.shape[0] * BLOCK, 2, *key.shape[1:])
            missing = torch.full(shape, torch.nan, device=key.device)
            pages = self.written.setdefault(layer.layer_name, missing)
            tokens = torch.nonzero(slot_mapping >= 0).squeeze(1)
            pages[slot_mapping[tokens]] = torch.stack((key[tokens], value[tokens]), 1).float()
            self._check(layer.layer_name, impl.newest, pages)

        monkeypatch.setattr(NVFP4MetadataBuilder, "build", builds)
        monkeypatch.setattr(NVFP4Impl, "do_kv_cache_update", writes)

    def _check(self, layer: str, memory: torch.Tensor, pages: torch.Tensor) -> None:
        from vllm_xlayer.nvfp4 import rotate_back

        step, batch = self.steps.get(layer, (None, None))
        if batch is None:
            return
        n = step.num_reqs
        lens, begin, rows = step.seq_lens[:n], batch.begin[:n], batch.rows[:n].long()
        positions = lens[:, None] - 1 - torch.arange(batch.places, device=lens.device)
        request, place = torch.nonzero(
            (rows >= 0)[:, None] & (positions >= begin[:, None]) & (positions >= 0), as_tuple=True
        )
        position = positions[request, place].long()
        block = step.block_table_tensor[request, position // BLOCK].long()
        want = pages[block * BLOCK + position % BLOCK]
        got = memory[rows[request], :, :, position % batch.places].float()
        got[:, 0] = rotate_back(got[:, 0])
        # Rounded to 16 bits once it was rotated; another token's is another vector altogether.
        same = (got - want).norm(dim=-1) <= 0.02 * want.norm(dim=-1)
        self.counts["read"] += len(position)
        self.counts["attended"] += n
        for i in (~same).flatten(1).any(1).nonzero().squeeze(1).tolist():
            self.wrong.append(f"{layer}: token {int(position[i])} of {int(lens[request[i]])}")

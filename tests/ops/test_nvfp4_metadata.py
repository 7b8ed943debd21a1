"""What the NVFP4 backend's builder makes of vLLM's batches: decode requests first. On CPU tensors."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import make_kv_sharing_fast_prefill_common_attn_metadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_xlayer.attention import metadata
from vllm_xlayer.attention.backend import NVFP4Backend
from vllm_xlayer.attention.metadata import NVFP4MetadataBuilder
from vllm_xlayer.attention.prefix import Limits, PrefixKernel

pytestmark = pytest.mark.usefixtures("pages_alone")

LAYERS = ["a", "b"]


def config(
    num_heads: int = 8,
    speculative: int | None = None,
    windows=(None, 64),
    head_size: int = 128,
    fast_prefill: bool = False,
) -> SimpleNamespace:
    """What the builder reads of a VllmConfig."""
    spec = None
    if speculative is not None:
        spec = SimpleNamespace(num_speculative_tokens=speculative, parallel_drafting=False)
    layers = {
        name: SimpleNamespace(
            impl=SimpleNamespace(window=window, num_heads=num_heads, num_kv_heads=2, head_size=head_size)
        )
        for name, window in zip(LAYERS, windows, strict=True)
    }
    return SimpleNamespace(
        speculative_config=spec,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=fast_prefill),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=8, static_forward_context=layers),
    )


def builder(head_size: int = 128, non_causal: bool = False, **settings) -> NVFP4MetadataBuilder:
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=head_size, dtype=torch.uint8, non_causal=non_causal
    )
    return NVFP4MetadataBuilder(spec, LAYERS, config(head_size=head_size, **settings), torch.device("cpu"))


def batch(
    query_lens: list[int], seq_lens: list[int], padded_tokens: int | None = None
) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    tokens = int(starts[-1]) if padded_tokens is None else padded_tokens
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lens, seq_lens_cpu_upper_bound=lens,
        num_reqs=len(query_lens), num_actual_tokens=tokens, max_query_len=max(query_lens),
        max_seq_len=max(seq_lens), block_table_tensor=torch.zeros(len(query_lens), 8, dtype=torch.int32),
        slot_mapping=torch.zeros(tokens, dtype=torch.int64),
    )  # fmt: skip


def test_decode_only():
    made = builder().build(0, batch([1, 1, 1], [5, 100, 17]))
    assert made.decode is not None and (made.decode.num_requests, made.decode.q_len) == (3, 1)
    assert made.decode.seq_lens.tolist() == [5, 100, 17] and len(made.seq_lens) == 0
    assert set(made.decode.workspaces) == {0, 64}
    schedules = [w.schedule.data_ptr() for w in made.decode.workspaces.values()]
    assert len(set(schedules)) == 2


def test_captured_graphs_find_everything_where_it_was():
    b = builder()
    first, second = (b.build(0, batch([1] * n, [9] * n)) for n in (4, 2))
    for window, workspace in first.decode.workspaces.items():
        other = second.decode.workspaces[window]
        assert workspace.schedule.data_ptr() == other.schedule.data_ptr()
        assert workspace.partial.data_ptr() == other.partial.data_ptr()


def test_decode_and_prefill():
    made = builder().build(0, batch([1, 1, 40, 7], [5, 100, 60, 7]))
    assert made.decode.num_requests == 2 and made.decode.num_tokens == 2
    assert made.query_starts.tolist() == [2, 42, 49] and made.seq_lens.tolist() == [60, 7]
    assert len(made.block_table) == 2
    (piece,) = made.plan(None, 1000)
    assert piece.tokens == slice(2, 49) and piece.num_keys == 67


def test_prefill_only():
    made = builder().build(0, batch([40, 7], [60, 7]))
    assert made.decode is None and made.query_starts.tolist() == [0, 40, 47]


def test_a_batch_padded_for_a_graph():
    made = builder().build(0, batch([1, 1, 0, 0], [5, 100, 0, 0], padded_tokens=4))
    assert made.decode.num_requests == 4 and made.decode.num_tokens == 4
    assert made.decode.seq_lens.tolist() == [5, 100, 0, 0] and len(made.seq_lens) == 0


def test_speculative_decoding():
    b = builder(speculative=3)
    assert b.reorder_batch_threshold == 4
    uniform = b.build(0, batch([4, 4, 0], [50, 100, 0], padded_tokens=12))
    assert (uniform.decode.num_requests, uniform.decode.q_len, uniform.decode.num_tokens) == (3, 4, 12)
    assert uniform.decode.query_starts is None and uniform.decode.kernel_q_len == 4


def test_drafts_of_other_lengths():
    """As n-gram drafts are: all that are short enough decode in one launch, and none is dequantised first."""
    b = builder(speculative=3)
    mixed = b.build(0, batch([1, 4, 2, 1, 9], [50, 100, 30, 7, 12]))
    decode = mixed.decode
    assert (decode.num_requests, decode.q_len, decode.num_tokens, decode.kernel_q_len) == (4, 4, 8, 3)
    assert decode.query_starts.tolist() == [0, 1, 5, 7, 8] and decode.seq_lens.tolist() == [50, 100, 30, 7]
    assert mixed.query_starts.tolist() == [8, 17] and mixed.seq_lens.tolist() == [12]
    alone = b.build(0, batch([2, 4, 1], [50, 100, 30]))
    assert alone.decode.num_tokens == 7 and len(alone.seq_lens) == 0
    padded = b.build(0, batch([2, 4, 0], [50, 100, 0], padded_tokens=8))
    assert padded.decode.num_tokens == 6 and padded.decode.query_starts.tolist() == [0, 2, 6, 6]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(), AttentionCGSupport.UNIFORM_BATCH),
        (dict(speculative=7), AttentionCGSupport.UNIFORM_BATCH),
        (dict(speculative=8), AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        (dict(head_size=48), AttentionCGSupport.NEVER),
        (dict(num_heads=64), AttentionCGSupport.NEVER),
    ],
    ids=str,
)
def test_what_can_be_captured(settings, expected):
    head_size = settings.pop("head_size", 128)
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=head_size, dtype=torch.uint8)
    of = config(head_size=head_size, **settings)
    assert NVFP4MetadataBuilder.get_cudagraph_support(of, spec) is expected


def test_query_heads_are_the_layers_own(monkeypatch):
    """A drafter's may be others than its model's."""
    made = []
    monkeypatch.setattr(metadata, "DecodePlanner", lambda device, **shape: made.append(shape))
    of = config(num_heads=8)
    drafter = SimpleNamespace(impl=SimpleNamespace(window=None, num_heads=4, num_kv_heads=2, head_size=128))
    of.compilation_config.static_forward_context["drafter"] = drafter
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=128, dtype=torch.uint8)
    for names in (["drafter"], LAYERS):
        NVFP4MetadataBuilder(spec, names, of, torch.device("cpu"))
    assert [shape["num_heads"] for shape in made] == [4, 8]
    with pytest.raises(ValueError, match=r"as many query heads, got \[4, 8\] \(a, drafter\)"):
        NVFP4MetadataBuilder(spec, ["a", "drafter"], of, torch.device("cpu"))


def test_graphs_are_for_all_layers_of_a_cache():
    of = config(num_heads=8)
    others = dict(
        drafter=SimpleNamespace(impl=SimpleNamespace(num_heads=64, num_kv_heads=2, head_size=128)),
        state=SimpleNamespace(),
    )
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=128, dtype=torch.uint8)
    for name, expected in (
        ("state", AttentionCGSupport.UNIFORM_BATCH),
        ("drafter", AttentionCGSupport.NEVER),
    ):
        of.compilation_config.static_forward_context[name] = others[name]
        assert NVFP4MetadataBuilder.get_cudagraph_support(of, spec) is expected


def test_requests_whose_drafts_are_in_two_chunks():
    """vLLM makes two requests of each (Llama 4), more than may run."""
    from vllm.model_executor.layers.attention.chunked_local_attention import (
        create_chunked_local_attention_backend,
    )

    of = config(speculative=3, windows=(None, None))
    of.compilation_config.max_cudagraph_capture_size = 0
    for layer in of.compilation_config.static_forward_context.values():
        layer.attention_chunk_size = 64
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=128, dtype=torch.uint8)
    in_chunks = create_chunked_local_attention_backend(NVFP4Backend, 64).get_builder_cls()
    made = in_chunks(spec, LAYERS, of, torch.device("cpu")).build(0, batch([4] * 4, [66, 65, 67, 130]))
    assert made.decode.num_requests == 8 and made.decode.seq_lens.tolist() == [64, 2, 64, 1, 64, 3, 64, 2]
    assert made.decode.query_starts.tolist() == [0, 2, 4, 7, 8, 9, 12, 14, 16]


def test_heads_without_a_decode_kernel(monkeypatch):
    said = []
    monkeypatch.setattr(metadata.logger, "warning_once", lambda text, *args: said.append(text % args))
    b = builder(head_size=48)
    assert len(said) == 1 and "no decode kernel for heads of 48 and 4 query heads" in said[0]
    made = b.build(0, batch([1, 1], [5, 100]))
    assert b.reorder_batch_threshold is None and made.decode is None and made.seq_lens.tolist() == [5, 100]


@pytest.mark.parametrize(
    ("prefilling", "waits"),
    [([False, True, True], False), ([False, True, False], True), (None, True)],
    ids=str,
)
def test_lengths_under_speculation(monkeypatch, prefilling, waits):
    """The host's are exact for prompts alone; others' are asked of the device, which is then waited for."""
    waited, cpu = [], torch.Tensor.cpu
    step = batch([4, 40, 30], [50, 60, 70])
    bound = step.seq_lens.clone()
    if waits:
        bound += 3  # drafts that may have been rejected
    else:
        bound[0] += 3
    step.seq_lens_cpu_upper_bound = bound
    step.is_prefilling = None if prefilling is None else torch.tensor(prefilling)
    made = builder(speculative=3)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (waited.append(tensor), cpu(tensor))[1])
    metadata = made.build(0, step)
    assert metadata.seq_lens.tolist() == [60, 70] and bool(waited) is waits
    assert metadata.decode.seq_lens.tolist() == [50]


@pytest.mark.parametrize("before", [[0, 0, 0, 0, 0], [0, 3, 4, 5, 6], [7, 1, 1, 1, 9]])
def test_fast_prefill_of_layers_that_share_a_cache(before):
    """vLLM computes query_start_loc on the device, and its copy on the host may not be there yet."""
    m = batch([1, 1, 40, 7], [5, 100, 60, 7])
    m.logits_indices_padded = torch.tensor([0, 1, 41, 48], dtype=torch.int32)
    m.num_logits_indices, m.max_logits_per_req = 4, 1
    m = make_kv_sharing_fast_prefill_common_attn_metadata(m)
    m.query_start_loc_cpu = torch.tensor(before, dtype=torch.int32)
    decode = builder(fast_prefill=True).build(0, m).decode
    assert decode is not None and (decode.q_len, decode.num_tokens, decode.num_requests) == (1, 4, 4)


def test_layers_that_are_not_causal_are_refused_at_start():
    with pytest.raises(ValueError, match=r"expected causal attention, got layers .* \(a\).*FLASHINFER"):
        builder(non_causal=True)


def test_layers_with_other_prefixes_have_plans_of_their_own():
    made = builder().build(0, batch([40], [140]))
    limits = Limits(least_tokens=16, least_busy=0.0)
    for newest_tokens, end in ((64, 32), (0, 96), (64, 32)):
        prefix = made.prefix(PrefixKernel(128, 4, 2, 1, newest_tokens, limits))
        (piece,) = made.plan(None, 8192, prefix=prefix)
        assert prefix.starts.tolist() == piece.piece.seq_starts.tolist() == [end]
    (piece,) = made.plan(None, 8192)
    assert piece.piece.seq_starts.tolist() == [0]

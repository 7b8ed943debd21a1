"""Both decode kernels side by side: python measure.py [--sweep]. Not committed."""
import os, sys, time
from functools import partial
import torch
from vllm_xlayer import ops
from vllm_xlayer.bench.decode import L2_TIMES, MAX_COPIES, RAGGED
from vllm_xlayer.bench.inputs import Inputs, Shape
from vllm_xlayer.bench.peers import check, ours
from vllm_xlayer.bench.timing import copy_rate, graph_seconds
from vllm_xlayer.nvfp4 import ROTATED_KEYS

SHAPES = (
    Shape("64 x 8192", (8192,) * 64),
    Shape("ragged 96, up to 60k", RAGGED),
    Shape("ragged 96, 28 heads, 4 KV heads", RAGGED, num_q_heads=28, num_kv_heads=4),
    Shape("64 x 1024", (1024,) * 64),
    Shape("64 x 2048", (2048,) * 64),
    Shape("256 x 1024", (1024,) * 256),
    Shape("16 x 8192", (8192,) * 16),
    Shape("1 x 65536", (65536,)),
)
L2 = torch.cuda.get_device_properties(0).L2_cache_size


def calls_of(inputs, cache, newest, kernel, costs=None):
    """As bench.peers.ours.make, with a kernel forced while the schedule is made and while calls are captured."""
    os.environ["XLAYER_KERNEL"] = kernel
    os.environ.pop("XLAYER_COSTS", None)
    if costs: os.environ["XLAYER_COSTS"] = costs
    s = inputs.shape
    one = torch.ones(1, device="cuda")
    ws = ops.AttentionWorkspace.create(inputs.q.device, num_q_heads=s.num_q_heads, num_kv_heads=s.num_kv_heads,
        head_size=s.head_size, block_size=s.block_size, max_requests=len(s.lens), max_q_len=s.q_len)
    ops.nvfp4_attention_schedule(inputs.seq_lens, ws, s.q_len, 0, None, None, newest.get("newest_from"))
    def call(table):
        ops.nvfp4_paged_attention(inputs.q, cache, table, inputs.seq_lens, ws, one, one, inputs.out,
            scale=s.head_size**-0.5, q_len=s.q_len, rotated_keys=ROTATED_KEYS, **newest)
    return [partial(call, t) for t in inputs.tables], ws


def main():
    sweep = "--sweep" in sys.argv
    only = [a for a in sys.argv[1:] if not a.startswith("-")]
    began = time.time()
    print(torch.cuda.get_device_name(), ops.load() if hasattr(ops, "load") else "")
    for heads in ((32, 8), (28, 4)):
        kind = Shape("", (), num_q_heads=heads[0], num_kv_heads=heads[1])
        for name, make in (("plain", ours.make), ("newest", ours.make_newest)):
            for kernel in ("tiles", "pages"):
                os.environ["XLAYER_KERNEL"] = kernel
                print(f"error against float64, {heads}, {name}, {kernel}: {check.error(make, ours.kept, kind):.5f}")
    rate = copy_rate()
    print(f"copy rate {rate / 1e12:.2f} TB/s")
    print(f"{'':34}{'plain: tiles':>14}{'pages':>8}{'share':>7}{'diff':>10} {'newest: tiles':>15}{'pages':>8}{'diff':>10}")
    for s in SHAPES:
        if only and not any(o in s.name for o in only): continue
        size = s.num_kv_heads * 2 * s.head_size * 4.5 / 8 * s.tokens
        inputs = Inputs(s, min(MAX_COPIES, max(2, int(L2_TIMES * L2 / size) + 1)))
        cache = ours.nvfp4_cache(inputs, None)
        cache_views = None
        text = f"{s.name:34}"
        for places in (0, ours.NEWEST):
            newest = ours.newest_arguments(inputs, cache, None, places) if places else {}
            outs, times = {}, {}
            for kernel in ("tiles", "pages"):
                calls, ws = calls_of(inputs, cache, newest, kernel)
                inputs.out.fill_(torch.nan)
                calls[0]()
                outs[kernel] = inputs.out.float().clone()
                inputs.out.fill_(torch.nan)
                calls[0]()  # again: counters are 0, bits are the same
                same = torch.equal(outs[kernel], inputs.out.float())
                times[kernel] = graph_seconds(calls) * 1e6
                if kernel == "pages": head = ws.schedule[:3].tolist()
                if not same: text += f" !{kernel} differs between runs!"
            diff = (outs["pages"] - outs["tiles"]).abs().max().item()
            scale = outs["tiles"].abs().max().item()
            share = f"{size / times['pages'] * 1e6 / rate:7.2f}" if not places else " "
            text += f"{times['tiles']:14.1f}{times['pages']:8.1f}{share}{diff / scale:10.5f}"
            if sweep:
                for costs in ("2,4,16", "2,4,48", "2,4,64", "0,4,32", "4,4,32", "2,3,32", "2,6,32"):
                    calls, ws = calls_of(inputs, cache, newest, "pages", costs)
                    calls[0]()
                    text += f"\n      {'newest' if places else 'plain'} run,newest,least = {costs}: {graph_seconds(calls) * 1e6:.1f}"
                text += "\n"
            text += f" (chunk, parts, total {head})"
        print(text, flush=True)
        del inputs, cache, calls, newest
        torch.cuda.empty_cache()
    print(f"{time.time() - began:.0f} s")

main()

"""An engine in a process of its own, told by hand what to do; the other one is this process's.

Forked from a server that has imported vLLM once, so that tests can kill engines and start others quickly; on
a GPU, which a process that was forked cannot use where its parent has, each imports it anew.
"""

import multiprocessing
import os
import signal
import socket
import time
import traceback
from contextlib import contextmanager
from multiprocessing import forkserver

import pytest
import torch
from faults import finish
from model_fixture import ON_GPU
from vllm import SamplingParams

CONNECTOR = "XLayerNixlConnector"
PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"
ROW = 2 * 2 * 16 * 2 * 32 * 4
"""Bytes of a row of the tiny Llama: layers, heads, tokens, K and V, elements, bytes."""
PREFILL = dict(
    do_remote_decode=True, do_remote_prefill=False, remote_engine_id=None, remote_block_ids=None,
    remote_host=None, remote_port=None,
)  # fmt: skip
"""What vLLM's proxy sends to a prefill engine."""
ANSWER_SECONDS = 60 if ON_GPU else 600
START_SECONDS = 120 if ON_GPU else 600
"""Of another engine. A GPU is lent for minutes: what hangs there must not take the others' time."""

ON_DEVICE = (
    dict(dtype="bfloat16", gpu_memory_utilization=0.2, enforce_eager=True)
    if ON_GPU
    else dict(dtype="bfloat16")
)
"""Settings of an engine that shares its device with others."""

_context = multiprocessing.get_context("spawn" if ON_GPU else "forkserver")
if not ON_GPU:
    _context.set_forkserver_preload(["nixl_preload"])


def begin_import():
    """Starts the server, so that it imports while this process makes its own engine."""
    if ON_GPU:
        return
    here = os.path.dirname(__file__)
    path = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    if here not in path:
        # Some versions of Python give it no other folders, and it goes on without what it cannot import.
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *path])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONSAFEPATH", "1")  # the installed package, not the source tree that this may run in
        forkserver.ensure_running()


def transfer(**extra):
    return dict(kv_connector=CONNECTOR, kv_role="kv_both", kv_connector_extra_config=extra)


_held: list[socket.socket] = []


def free_port() -> int:
    """A port that this process holds: the engine binds it long after, and a port that is only known to have
    been free may then be another socket's. Bound and not listening, it is still the engine's to bind, as
    both sockets set SO_REUSEADDR."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    _held.append(holder)
    return holder.getsockname()[1]


@contextmanager
def side_channel(port, **environment):
    """For the engine that is made in it, in this process."""
    begin_import()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {PORT: str(port), **environment}.items():
            patch.setenv(name, value)
        yield


def sampling(num_tokens, params=None):
    extra = {"kv_transfer_params": params} if params else None
    return SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, extra_args=extra
    )


def add_all(llm, prompts, params, num_tokens):
    """Adds requests r0, r1, ... to a decode engine, each with what a prefill engine said of it, or None."""
    for i, (prompt, said) in enumerate(zip(prompts, params, strict=True)):
        settings = sampling(num_tokens, said and dict(said))
        llm.llm_engine.add_request(f"r{i}", {"prompt_token_ids": prompt}, settings)


class OtherEngine:
    """The parent's side. Everything raises if the child does not answer in time.

    Where there are two GPUs it has the second one, unless it has several ranks.
    """

    def __init__(self, model, port=None, environment=None, **settings):
        self.port = port or free_port()
        self.pipe, theirs = _context.Pipe()
        self.process = _context.Process(
            # Ranks are children of its own, which daemons may not have. It ends with our end of the pipe.
            target=_serve,
            args=(theirs, str(model), {PORT: str(self.port)} | (environment or {}), settings),
            daemon=False,
        )
        with pytest.MonkeyPatch.context() as patch:
            if ON_GPU and torch.cuda.device_count() > 1 and settings.get("tensor_parallel_size", 1) == 1:
                visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
                patch.setenv("CUDA_VISIBLE_DEVICES", visible.split(",")[1])  # before it imports torch
            self.process.start()
        theirs.close()
        self._answer(START_SECONDS)

    def prefill(self, prompt) -> dict:
        """Computes a prompt; what vLLM's proxy hands to the decode engine."""
        return self.call(_prefill, prompt)

    def call(self, function, *args):
        """function(llm, *args), in the child."""
        self.pipe.send((function, args))
        return self._answer()

    def stop(self, number=signal.SIGSTOP):
        os.kill(self.process.pid, number)

    def go_on(self):
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self):
        """Also where it is stopped, or gone."""
        self.process.kill()
        self.process.join()

    def _answer(self, seconds=ANSWER_SECONDS):
        if not self.pipe.poll(seconds):
            raise TimeoutError(f"the other engine did not answer in {seconds} s")
        answer = self.pipe.recv()
        if isinstance(answer, str) and answer.startswith("Traceback"):
            raise RuntimeError(answer)
        return answer


# These run in the child.


def _serve(pipe, model, environment, settings):
    os.environ.update(environment)
    from vllm import LLM

    torch.set_num_threads(1)
    try:
        llm = LLM(model, **settings)
        pipe.send("ready")
        while True:
            if pipe.poll(0.002):
                function, args = pipe.recv()
                pipe.send(function(llm, *args))
            elif _core(llm).scheduler.has_requests():
                llm.llm_engine.step()  # notifications and leases are looked at in steps
    except EOFError:
        pass  # the tests are over
    except BaseException:
        pipe.send(traceback.format_exc())


def _core(llm):
    return llm.llm_engine.engine_core.engine_core


def _prefill(llm, prompt):
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling(1, dict(PREFILL)), use_tqdm=False)
    return output.kv_transfer_params


def hand_over(llm, prompts):
    """What vLLM's proxy hands to the decode engine, of each prompt once it is computed."""
    return [_prefill(llm, prompt) for prompt in prompts]


def greedy_answers(llm, prompts, handed_over, num_tokens):
    """Tokens by prompt of a decode engine; None: no answer."""
    add_all(llm, prompts, handed_over, num_tokens)
    # A request's name gets a suffix.
    outputs = {name.split("-")[0]: list(out.outputs[0].token_ids) for name, out in finish(llm).items()}
    return [outputs.get(f"r{i}") for i in range(len(prompts))]


def blocks_in_use(llm):
    """Once nothing is under way, or after some time."""
    scheduler = _core(llm).scheduler
    deadline = time.monotonic() + 120
    while scheduler.has_requests() and time.monotonic() < deadline:
        llm.llm_engine.step()
    pool = scheduler.kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


def abort_prompt(llm, prompt, steps):
    """The client of the prefill engine goes away after so many steps."""
    llm.llm_engine.add_request("gone", {"prompt_token_ids": prompt}, sampling(8, dict(PREFILL)))
    for _ in range(steps):
        llm.llm_engine.step()
    llm.llm_engine.abort_request(["gone"])
    return blocks_in_use(llm)


def begin_read(llm, prompt, params):
    """A decode engine's read of a prompt, which does not end; how many rows are on their way."""
    worker = _worker()
    worker.wire.state = lambda handle: "PROC"
    llm.llm_engine.add_request("read", {"prompt_token_ids": prompt}, sampling(1, dict(params)))
    deadline = time.monotonic() + 60
    while not worker.reads.chunks and time.monotonic() < deadline:
        llm.llm_engine.step()
    return sum(len(chunk.rows) for chunk in worker.reads.chunks)


def blocks_kept(llm):
    """Without waiting for anything."""
    pool = _core(llm).scheduler.kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


def flip_a_bit(llm, block, byte):
    _worker().pool[block, byte] ^= 1


def end_leases(llm):
    """As if their time was over."""
    for _ in range(2):
        llm.llm_engine.step()  # workers hear of them
    llm.collective_rpc(_end_leases)


def _end_leases(_):
    leases = _worker()._reqs_to_send
    leases.update(dict.fromkeys(leases, 0.0))


def forget_prompts(llm):
    """Ends leases, then gives every block to other prompts."""
    end_leases(llm)
    assert blocks_in_use(llm) == 0
    assert llm.reset_prefix_cache()
    blocks = _core(llm).scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
    for i in range(-(-blocks // 31)):
        _prefill(llm, [i % 250 + 1] * 496)
        end_leases(llm)  # the last ones need the first ones' blocks


def _worker():
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().connector_worker

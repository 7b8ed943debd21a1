"""The small gpt-oss that training writes is to transformers and vLLM what it is in training."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm import SamplingParams, TokensPrompt

from benchmarks.training.export import export
from benchmarks.training.gpt_oss import GptOss, GptOssShape

SMALL = GptOssShape(layers=2, hidden=64, heads=8, kv_heads=1, head_size=64, mlp=64, window=32)
LENGTH = 100
IDS = torch.randint(256, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Untrained weights in which sinks, biases and norms do something."""
    torch.manual_seed(0)
    model = GptOss(SMALL)
    for name, p in model.named_parameters():
        if name.endswith("sinks"):
            p.data.normal_(1.0, 2.0)
        elif name.endswith("bias"):
            p.data.normal_(0.0, 0.3)
        elif p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
        elif "q_proj" in name or "k_proj" in name:
            p.data.mul_(2.0)
    path = tmp_path_factory.mktemp("gpt-oss")
    export(model, path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    model = GptOss(SMALL)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def logprobs(model):
    with torch.no_grad():
        return model(IDS).view(len(IDS), LENGTH, -1).log_softmax(-1)


def test_transformers(folder, ours):
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(IDS).logits
        got = ours(IDS).view(expected.shape)
    # float32 sums in another order.
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-5 * expected.abs().max().item())


def test_vllm(folder, ours, make_llm):
    llm = make_llm(folder, max_logprobs=SMALL.vocabulary)
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=SMALL.vocabulary, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in IDS.tolist()], wanted)
    # Of the first token there is none: entry i is of the distribution after token i - 1.
    found = torch.tensor(
        [
            [[at[token].logprob for token in range(SMALL.vocabulary)] for at in output.prompt_logprobs[1:]]
            for output in outputs
        ]
    )
    apart = (found - logprobs(ours)[:, :-1]).abs().max().item()
    assert apart < 1e-4
    for name, other in ours.variants().items():
        assert (found - logprobs(other)[:, :-1]).abs().max() > 1000 * apart, name

"""offline.py MODEL: answers a prompt, forgets it on the device, and answers it again from host memory."""

import sys

from vllm import LLM, SamplingParams


def main(model: str) -> None:
    llm = LLM(
        model,
        kv_cache_dtype="nvfp4",
        kv_transfer_config={"kv_connector": "XLayerConnector", "kv_role": "kv_both"},
    )
    prompt = "A long document, of which many questions will be asked. " * 20
    for _ in range(2):
        answer = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=16))[0]
        print(f"{answer.outputs[0].text!r}, {answer.num_cached_tokens} tokens cached")
        llm.reset_prefix_cache()  # the device's: the next answer comes from host memory


if __name__ == "__main__":  # vLLM's engine process may import this file again
    if len(sys.argv) != 2:
        sys.exit(f"expected MODEL, got {sys.argv[1:]}")
    main(sys.argv[1])

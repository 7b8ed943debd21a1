"""client.py URL MODEL PROMPT: asks a server twice, and says how much of the prompt came from a cache."""

import json
import sys
import urllib.request


def ask(url: str, model: str, prompt: str) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were found in a cache."""
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        answer = json.load(response)
    details = answer["usage"].get("prompt_tokens_details") or {}
    return answer["choices"][0]["text"], details.get("cached_tokens") or 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"expected URL MODEL PROMPT, got {sys.argv[1:]}")
    for _ in range(2):
        text, cached = ask(*sys.argv[1:4])
        print(f"{text!r}, {cached} tokens cached")

"""docs/prefill-decode.md's tables of hand-overs: what is in a file of `benchmarks.handover`, whole or not."""

from benchmarks.markdown_handover import proxied, section

ABOUT = {
    "date": "d", "commit": "c", "hardware": "NVIDIA H200", "versions": {"vllm": "0.33.0", "torch": "2"},
}  # fmt: skip


def times(**more):
    rows = {"seconds": [0.9, 0.012, 0.014], "cached_seconds": [0.01, 0.9, 0.01], "descriptors": 1050.0}
    length = {
        "tokens": 16384, "kv_bytes": 6e8, "link": {"one": 3e11, "rows": 2e11},
        "ways": {"rows": rows, "computed": {"seconds": [0.5]}},
    }  # fmt: skip
    return {"cache": "nvfp4", "lengths": [length]} | more


def test_answers_and_times():
    answers = {"cache": "bf16", "same": 95, "answers": 96, "computed": 1}
    steps = {"answers, bf16": answers, "times, nvfp4": times()}
    text = section(ABOUT | {"devices": ["0,1", "0"], "steps": steps})
    assert "Prefill engine on GPU 0,1, decode engine on GPU 0" in text
    assert "bf16 95 of 96 (1 prompts computed again)" in text
    lines = [line for line in text.splitlines() if line.startswith("| nvfp4")]
    # The median of each; the hand-over is their difference, the floors 6e8 / 3e11 and 6e8 / 2e11 s.
    assert lines == [
        "| nvfp4, 16,384 (600) | read as rows | 2.0 ms (300 GB/s) | 3.0 ms (200 GB/s) | 14.0 | 10.0 | 4.0 | "
        "2.00 | 1.33 | 1,050 |",
        "| nvfp4, 16,384 (600) | computed here | 2.0 ms (300 GB/s) | - | 500.0 |  |  |  |  |  |",
    ]
    assert "Not measured" not in text and "NVIDIA H200" in text


def test_a_worker_without_engines():
    """6e8 bytes at 1e11 a second, beside 2 and 3 ms."""
    worker = times()
    worker["lengths"][0]["worker"] = {
        "neighbours": {str(64 << 20): 2e11}, "scattered": {str(64 << 20): 1e11},
    }  # fmt: skip
    text = section(ABOUT | {"devices": None, "steps": {"times, nvfp4": worker}})
    for line in (
        "| nvfp4, 16,384 (600) | rows, neighbours, without engines, ring of 64 MiB | 2.0 ms (300 GB/s) | "
        "- |  |  | 3.0 | 1.50 | - |  |",
        "| nvfp4, 16,384 (600) | rows, scattered, without engines, ring of 64 MiB | 2.0 ms (300 GB/s) | "
        "3.0 ms (200 GB/s) |  |  | 6.0 | 3.00 | 2.00 |  |",
    ):
        assert line in text.splitlines()


def test_what_is_missing_is_said():
    late = {"seconds": 57.5, "problem": "not done in 57 s"}
    stock = times(problems={"pages": "the engine ended with exit code 1"})
    del stock["lengths"][0]["link"]["one"]
    text = section(ABOUT | {"devices": None, "steps": {"times, fp8": late, "times, nvfp4": stock}})
    assert "Both engines on one GPU" in text and "| 4.0 | - | 1.33 | 1,050 |" in text
    assert "times, fp8: not done in 57 s; times, nvfp4: the engine ended with exit code 1." in text


def test_what_another_commit_has_measured_is_said():
    older = times() | {"date": "2026-11-28 10:00 UTC", "commit": "0123456"}
    steps = {"times, fp8": older, "times, nvfp4": times() | {"commit": ABOUT["commit"]}}
    text = section(ABOUT | {"devices": None, "steps": steps})
    assert "Of another commit: times, fp8: 2026-11-28 10:00 UTC, commit 0123456." in text


def test_through_a_proxy():
    scores = {way: {"recall": {"exact_match": 0.75, "stderr": 0.0}} for way in ("alone", "through the proxy")}
    text = proxied(ABOUT | {"cache": "nvfp4", "same": 95, "answers": 96, "rows": 2150, "scores": scores})
    assert "95 of 96 answers" in text and "2,150 rows were read" in text
    assert "(alone recall 75%; through the proxy recall 75%)" in text and "NVIDIA H200" in text

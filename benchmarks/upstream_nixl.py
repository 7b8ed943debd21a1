"""vLLM's own unit tests of its NIXL connector, with XLayerNixlConnector in its place: what became of each.

They are in vLLM's source, not in its wheel: ``pip download --no-binary :all: --no-deps vllm==VERSION``, and
unpack it. Every test is run with vLLM's classes as well: one that fails with those cannot run here. No GPU
and no model hub is needed. tests/upstream/nixl_plugin.py says what is put in whose place.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from vllm_xlayer.provenance import write

from . import RESULTS, ROOT

UNIT = Path("tests/v1/kv_connector/unit")
FILES = (
    "test_nixl_connector.py",
    "test_nixl_connector_hma.py",
    "test_nixl_heartbeat.py",
    "test_remote_prefill_lifecycle.py",
    "test_remote_decode_lifecycle.py",
    "test_bidirectional_kv_transfer.py",
    "test_multi_connector.py",
)
NOT_RUN = {
    "test_abort_timeout_on_prefiller": "serves a model of the hub on a GPU",
    "test_register_kv_caches": "counts the regions and descriptors of layers, of which rows have one",
}
"""Test -> why it is not even tried."""
HERE = {
    "LocalEntryNotFoundError": "needs a model of the hub",
    "got fp8": "the CPU reference platform has no fp8 cache",
    "expected a multiple of 16, got 8": "the CPU reference platform has no blocks of 8 tokens",
}
"""Part of the error with vLLM's classes -> what is missing here."""
REASONS = {
    "Mamba": "a model with Mamba layers: refused by ours",
    "context parallelism puts": "context parallelism: refused by ours",
    "with speculative decoding": "speculative decoding: refused by ours",
    "bidirectional_kv_xfer: expected nothing": "bidirectional transfer: refused by ours",
    "expected tensor parallelism only": "sets tensor_parallel_size without ranks: refused by ours",
    "head_size_v: expected": "a model with MLA: refused by ours",
    "the KV cache is not allocated": "registers layers of their own memory, where there are no rows",
}
"""Part of the error with our classes -> what the test is about that ours does not serve."""
HANDLES = "puts handles of NIXL where vLLM's worker keeps them; ours keeps them in StagedReads"
TOLD = "a failed read: the prefill engine is told by ours that it need not keep the rows, by vLLM's not"
COUNTED = "counts handles of descriptors, of which ours has two more a peer"
ABOUT = {
    "test_hybrid_mamba_attention": REASONS["Mamba"],
    "test_p_side_chunked_prefill_mamba": REASONS["Mamba"],
    "test_handshake_mla_target": REASONS["head_size_v: expected"],
    "test_region_pull": REASONS["head_size_v: expected"],
    "test_dcp_region_pull": REASONS["context parallelism puts"],
    "test_handshake_rejects_nvfp4_kv_head_split": "NVFP4 on several ranks: served by ours",
    "test_transfer_failure_logging": "looks for vLLM's words in the log; ours has its own",
    "test_waits_for_reads_before_cleanup": HANDLES,
    "test_recovery_drains_reads": HANDLES,
    "test_invalid_peer_empty_recv": HANDLES,
    "test_split_read_failure": HANDLES,
    "test_recv_failure_waits": HANDLES,
    "test_mixed_memory_read_failure": TOLD,
    "test_rehandshakes_queued_request": TOLD,
    "test_cleans_old_peer_after_confirmed_handshake": COUNTED,
    "test_recovery_requires_confirmed_missing_metadata[True]": COUNTED,
    "test_recovery_rehandshakes_same_id": COUNTED,
    "test_recovery_waits_until_failed_handle": "a request waits for its handle to be released; with ours the "
    "ring's buffer does, and the request is computed",
}
"""Part of a test's name -> the same, where the error does not say it."""
MODEL = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 768, "ffn_dim": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 2048,
    "vocab_size": 50272, "word_embed_proj_dim": 768, "do_layer_norm_before": True, "torch_dtype": "float16",
    "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
"""The shape that the tests' engines have."""
MODEL_NAMES = ("opt-125m", "opt-350m")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="an unpacked source tree of the installed vLLM")
    parser.add_argument("--json", type=Path, default=RESULTS / "cpu-upstream-nixl.json", help="file to write")


def run(args: argparse.Namespace) -> int:
    """Runs the tests twice; 0 if each that fails with our classes only has a reason that is known."""
    missing = [name for name in FILES if not (args.source / UNIT / name).is_file()]
    if missing:
        print(f"expected {UNIT / missing[0]} in {args.source}: a source tree of vLLM", file=sys.stderr)
        return 2
    found = {name: told(outcome) for name, outcome in outcomes(args.source).items()}
    found |= {f"{name} (all)": f"not run: {reason}" for name, reason in NOT_RUN.items()}
    counts = Counter(found.values())
    for what, count in counts.most_common():
        print(f"{count:4} {what}")
    write(args.json, {"counts": dict(counts.most_common()), "tests": found})
    failed = [name for name, what in found.items() if what.startswith("failed")]
    for name in failed:
        print(f"{name}: {found[name]}", file=sys.stderr)
    return int(bool(failed))


def outcomes(source: Path) -> dict[str, tuple[str, str, str]]:
    """Test -> (its name, error with vLLM's classes, error with ours); an error is empty where it passed."""
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-upstream-") as name:
        folder = Path(name)
        # Not the whole source tree: its vllm/, which is not built, would be imported.
        (folder / "tests").symlink_to((source / "tests").resolve())
        for model in MODEL_NAMES:
            (folder / "facebook" / model).mkdir(parents=True)
            (folder / "facebook" / model / "config.json").write_text(json.dumps(MODEL))
        theirs, ours = (_errors(folder, with_ours) for with_ours in (False, True))
    return {test: (test, theirs[test], ours.get(test, "it was not run")) for test in theirs}


def told(outcome: tuple[str, str, str]) -> str:
    """What became of a test."""
    name, theirs, ours = outcome
    if not ours:
        return "passed"
    if theirs:
        why = next((reason for part, reason in HERE.items() if part in theirs), theirs[:160])
        return f"cannot run here, with vLLM's classes neither: {why}"
    for reasons, where in ((ABOUT, name), (REASONS, ours)):
        for part, reason in reasons.items():
            if part in where:
                return f"not for ours: {reason}"
    return f"failed: {ours[:300]}"


def _errors(folder: Path, with_ours: bool) -> dict[str, str]:
    """Test -> its error, or why it was skipped; empty where it passed."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-p",
        "nixl_plugin",
        f"--junitxml={report}",
    ]
    command += ["-p", "no:cacheprovider", "--tb=short", "-rN", "-o", "addopts="]
    command += ["-k", " and ".join(f"not {name}" for name in NOT_RUN), *(str(UNIT / name) for name in FILES)]
    path = [str(folder), str(ROOT), str(ROOT / "tests" / "upstream"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "UPSTREAM_NIXL_OURS": "1" if with_ours else "",
    }
    subprocess.run(command, cwd=folder, env=environment, check=False)
    errors = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
        message = " ".join(bad[0].get("message", bad[0].tag).split()) if bad else ""
        errors[f"{str(case.get('classname')).split('.unit.')[-1]}::{case.get('name')}"] = message
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upstream_nixl", description=__doc__)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))

"""What `vllm-xlayer doctor` says of this vLLM and of a model, without an engine."""

from vllm_xlayer import doctor
from vllm_xlayer.compat import private
from vllm_xlayer.layout import Layout
from vllm_xlayer.patches import PATCHES


def test_everything_private_is_listed_with_its_state(reference_platform, monkeypatch):
    gone = private.Private("a feature", "vllm.no_such_module", "why", "how", "never", attributes=("_x",))
    table = private.table()
    monkeypatch.setattr(private, "table", lambda: (*table, gone))
    said = {record["target"]: record for record in doctor._vllm()["private"]}
    assert set(said) == {record.target for record in (*PATCHES, *table, gone)}
    off = said.pop(gone.target)
    assert off["state"] == "off" and "no_such_module" in off["reason"]
    assert {record["state"] for record in said.values()} <= {"applied", "not needed", "fits"}, said


def test_a_page_is_what_the_backend_makes_of_it(reference_platform, tiny_llama):
    """vLLM's spec alone counts a byte an element; the backend says that it is 4.5 bits."""
    from vllm_xlayer.compat.model import negotiate_for_model

    decision, layer = negotiate_for_model(str(tiny_llama), "nvfp4", None, 1)
    (group,) = decision.descriptor.groups
    assert (group.page_bytes, layer) == (2 * 16 * 2 * (16 + 2), "layer 1")
    assert decision.descriptor.layout is Layout.BLHNC
    assert "attention backend CpuReferenceBackend" in decision.accepted_by

import logging

import pytest


@pytest.fixture
def caplog_vllm(caplog, monkeypatch):
    """caplog that hears this package's logger, which hands its records to vLLM's handlers only."""
    ours = logging.getLogger("vllm_xlayer")
    monkeypatch.setattr(ours, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(ours, "propagate", True)
    return caplog

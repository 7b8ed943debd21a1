"""Rows between hosts: a prefill and a decode engine over NIXL, on vLLM's own NixlConnector."""

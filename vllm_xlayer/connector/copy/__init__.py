"""Rows between device and host: streams, pacing, early loads, and the choice of how to copy."""

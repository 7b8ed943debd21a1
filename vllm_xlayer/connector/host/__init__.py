"""The host tier: its memory, pinning, NUMA placement, manager and accounts."""

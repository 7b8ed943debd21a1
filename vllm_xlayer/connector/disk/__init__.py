"""The disk tier: files and their format, store, tier, identity, and its commands."""

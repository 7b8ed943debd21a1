"""Changes to vLLM where it has no extension point: a registry, and one file a target."""

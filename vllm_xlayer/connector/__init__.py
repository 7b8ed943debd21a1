"""XLayerConnector: rows (one block, all layers) to a host tier and back, on vLLM's offloading machinery."""

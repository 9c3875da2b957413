"""Types of the KV cache as people write them, plans of them by layer, and cases to measure."""

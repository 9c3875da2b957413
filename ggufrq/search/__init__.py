"""The best types within a budget, by measurement: of a cache by layers, of weights by tensors."""

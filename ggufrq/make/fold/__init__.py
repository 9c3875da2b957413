"""Folding: a model rewritten so that it computes the same and quantizes better.

A factor that one tensor takes off its output, and the tensors that read it put on their input, cancels. Which
tensors are such pairs is data (``architectures.toml``); ``awq`` finds factors by which the weights quantize
better, ``kv`` such that K and V do.
"""

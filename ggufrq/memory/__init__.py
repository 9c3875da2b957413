"""What a model takes of memory, from metadata alone: weights, K and V, recurrent state, compute buffers."""

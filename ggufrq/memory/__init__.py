"""What a model takes of memory, from metadata alone: weights, K and V, recurrent state, compute buffers."""

from ggufrq.memory.shape import KvShape, kv_shape

__all__ = ["KvShape", "kv_shape"]

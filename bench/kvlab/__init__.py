"""Numerical experiments on codes and rotations for a KV cache: what bench/kv_modes.py and kv_codes.py run.

Everything here is float32 numpy (and torch for the models), made for comparing, not for use.
"""
